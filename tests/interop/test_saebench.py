"""An SAE of this package in SAEBench's core evaluation, by way of SAELens."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

pytest.importorskip("sae_bench")

from datasets import Dataset
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.sae_bench_utils import general_utils
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import PreTrainedModel

from lightning_sae import ActivationDataModule, MutualChoiceSAE
from lightning_sae.callbacks import LossRecoveredCallback
from lightning_sae.interop import export


def hooked(model: PreTrainedModel, tokenizer: Any) -> HookedTransformer:
    """Return a GPT-2 of any size as TransformerLens has it, nothing folded into its weights."""
    config = model.config
    found = HookedTransformer(
        HookedTransformerConfig(
            n_layers=config.n_layer,
            d_model=config.n_embd,
            n_ctx=config.n_positions,
            n_heads=config.n_head,
            d_head=config.n_embd // config.n_head,
            d_vocab=config.vocab_size,
            act_fn="gelu_new",
            normalization_type="LN",
            eps=config.layer_norm_epsilon,
        ),
        tokenizer=tokenizer,
    )
    found.load_state_dict(convert_gpt2_weights(model, found.cfg), strict=False)
    return found


def test_saebench_measures_what_we_measure(tmp_path: Path):
    data = ActivationDataModule("quickstart", 2, batch_size=2048, validation_tokens=16_384)
    sae = MutualChoiceSAE(data.d_model, 1024, 16, rank_discount=0)
    trainer = pl.Trainer(
        max_steps=150,
        val_check_interval=150,
        check_val_every_n_epoch=None,
        callbacks=[LossRecoveredCallback()],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(sae, data)
    ours = {name: float(value) for name, value in trainer.callback_metrics.items()}

    export(sae.eval(), "saelens", tmp_path / "sae")
    theirs = SAE.load_from_disk(tmp_path / "sae")
    # As SAEBench does with what it loads itself: the name of the hook is elsewhere by now.
    general_utils._standardize_sae_cfg(theirs.cfg)
    assert theirs.cfg.hook_name == "blocks.2.hook_resid_post"
    stream = data.model.residual_stream(torch.device("cpu"))
    tokenizer = data.model.tokenizer(128)
    model = hooked(stream.model, tokenizer)
    contexts = [each.tolist() for each in islice(iter(data.held_out_inputs()), 128)]
    with torch.no_grad():
        ids = torch.tensor(contexts[:2])
        torch.testing.assert_close(model(ids), stream.model(ids).logits, rtol=1e-3, atol=1e-3)
    store = ActivationsStore.from_sae(
        model=model,
        sae=theirs,
        dataset=Dataset.from_dict({"tokens": contexts}),
        streaming=False,
        store_batch_size_prompts=16,
        n_batches_in_buffer=4,
        device="cpu",
        context_size=128,
    )
    settings = CoreEvalConfig(
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        n_eval_reconstruction_batches=4,
        n_eval_sparsity_variance_batches=4,
    )
    found, _ = run_evals(theirs, store, model, settings, ignore_tokens={tokenizer.bos_token_id})
    # They read other stretches of the same text, so figures are near each other, not the same;
    # their ablation is another one, which the rise of the loss does not depend on.
    assert found["sparsity"]["l0"] == pytest.approx(ours["val/l0"], rel=0.1)
    losses = found["model_performance_preservation"]
    rise = losses["ce_loss_with_sae"] - losses["ce_loss_without_sae"]
    assert rise == pytest.approx(ours["val/delta_ce"], rel=0.2)
    divergence = found["model_behavior_preservation"]["kl_div_with_sae"]
    assert divergence == pytest.approx(ours["val/kl"], rel=0.2)
