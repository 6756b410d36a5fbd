"""Whole runs of training on a language model: by this package's command, and by other libraries.

Each function trains one SAE with the library's own runner and leaves it in a folder. Everyone gets
the same contexts, tokenized beforehand, and trains on the same of their tokens: all but the special
ones, which is all but the first of a context and those between documents. What a library does to
watch the training (evaluation, its logging service, checkpoints on the way) is off, as far as it
is not part of `fit`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.rounds import Size

LR = 2e-3  # of the shipped configurations
LAYER, CONTEXT, SPECIAL = 2, 128, 0
"""Block of the packaged model, tokens of a context, and the id of its one special token."""
CONTEXTS_AT_ONCE = 32
"""Of a forward pass of the language model: the default of SAELens, and of ours."""


@dataclass(frozen=True)
class Job:
    """How much is trained, and where.

    Args:
        size: Tokens of a step, width of the model, features, and matches a token.
        steps: Steps.
        work: Folder with the text, and its contexts.
        folder: Folder for what the run leaves.
    """

    size: Size
    steps: int
    work: Path
    folder: Path


def ours(job: Job, config: Literal["topk", "mutual_choice"]) -> str:
    """Train by the command `lightning_sae fit`, and return what names the result.

    The configuration is the one that ships, its learning rate included. Logging to TensorBoard and
    the callbacks that draw the speed and the learning rate stay on; validation, and the callbacks
    that only work in it, are off, as are checkpoints but for that of the last step.
    """
    from lightning_sae.cli import main

    quiet = {"limit_val_batches": 0, "enable_model_summary": False, "accelerator": "cpu"}
    checkpoint = {"dirpath": str(job.folder), "every_n_train_steps": job.steps, "save_last": True}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        {"class_path": "lightning_sae.callbacks.TokensPerSecond"},
    ]
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(job.folder), "default_hp_metric": False},
    }
    settings = {
        "model": {"init_args": {"n_features": job.size.n_features, "k": job.size.k}},
        "data": {
            "init_args": {
                "text": str(job.work / "text"),
                "layer": LAYER,
                "context_length": CONTEXT,
                "batch_size": job.size.tokens,
                "model_batch_size": CONTEXTS_AT_ONCE,
            }
        },
        "trainer": quiet | {"max_steps": job.steps, "callbacks": callbacks, "logger": logger},
    }
    file = job.folder / "settings.yaml"
    file.write_text(json.dumps(settings))  # which is YAML too
    main(["fit", "--config", f"{config}.yaml", "--config", str(file)])
    return str(job.folder / "last.ckpt")


def saelens(job: Job, rule: Literal["topk", "batchtopk"]) -> str:
    """Train by SAELens' runner, and return what names the result.

    The learning rate and its way to zero are ours: that of SAELens, constant and a seventh as high,
    is for longer runs. Activations are divided by their mean length, which five batches are read
    for.
    """
    from datasets import load_from_disk
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    from lightning_sae.quickstart import FOLDER

    config_class: Any = {"topk": TopKTrainingSAEConfig, "batchtopk": BatchTopKTrainingSAEConfig}
    config = LanguageModelSAERunnerConfig(
        sae=config_class[rule](
            d_in=job.size.d_model,
            d_sae=job.size.n_features,
            k=job.size.k,
            normalize_activations="expected_average_only_in",
        ),
        model_class_name="AutoModelForCausalLM",
        model_name=str(FOLDER),
        model_from_pretrained_kwargs={"dtype": "float32"},
        hook_name=f"transformer.h.{LAYER}",
        dataset_path=str(job.work / "contexts"),
        context_size=CONTEXT,
        exclude_special_tokens=[SPECIAL],
        store_batch_size_prompts=CONTEXTS_AT_ONCE,
        train_batch_size_tokens=job.size.tokens,
        training_tokens=job.size.tokens * job.steps,
        n_batches_for_norm_estimate=5,  # of 1,000, which would be longer than the run
        lr=LR,
        lr_decay_steps=job.steps,
        prefetch_llm_batches=True,  # in a thread, as ours does; by default not
        logger=LoggingConfig(log_to_wandb=False),  # without it, it does not evaluate either
        checkpoint_path=None,
        output_path=str(job.folder / "sae"),
        device="cpu",
    )
    contexts = load_from_disk(job.work / "contexts")
    LanguageModelSAETrainingRunner(config, override_dataset=contexts).run()
    return f"saelens:{job.folder / 'sae'}"


def sparsify(job: Job) -> str:
    """Train by sparsify's Trainer, and return what names the result.

    Its default optimizer, signum without a schedule, has the learning rate that it works out. A
    step has whole contexts: 16 of them for 2,048 tokens, 2,032 with those that count.
    """
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes its kernels wherever Triton is installed
    import torch
    from datasets import load_from_disk
    from sparsify import SaeConfig, TrainConfig, Trainer
    from transformers import AutoModel

    from lightning_sae.quickstart import FOLDER

    at_once = round(job.size.tokens / (CONTEXT - 1))
    contexts = load_from_disk(job.work / "contexts").with_format("torch")
    config = TrainConfig(
        SaeConfig(num_latents=job.size.n_features, k=job.size.k),
        batch_size=at_once,
        exclude_tokens=[SPECIAL],
        hookpoints=[f"h.{LAYER}"],
        save_every=job.steps + 1,
        save_dir=str(job.folder),
        log_to_wandb=False,
    )
    model = AutoModel.from_pretrained(FOLDER, dtype=torch.float32)
    Trainer(config, contexts.select(range(at_once * job.steps)), model).fit()
    return f"sparsify:{job.folder / 'unnamed' / f'h.{LAYER}'}"
