"""The training steps of other libraries: their own loops, with their own defaults.

Auxiliary losses are off unless `dead` says which share of the features to take for dead, and
nothing is logged, saved or evaluated.
"""

import os
from typing import Any, Literal, get_args

from benchmarks.rounds import ENDLESS, Feed

Rule = Literal["topk", "batchtopk"]
RULES: tuple[Rule, ...] = get_args(Rule)


def saelens(feed: Feed, rule: Rule, dead: float = 0.0, autocast: bool = False) -> None:
    """Train with SAELens: `SAETrainer.fit`, with products in bfloat16 if `autocast`."""
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    feed.imported()
    size = feed.size
    classes: dict[Rule, tuple[Any, Any]] = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }
    sae_class, config_class = classes[rule]
    config = config_class(d_in=size.d_model, d_sae=size.n_features, k=size.k)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=ENDLESS * size.tokens,
            train_batch_size_samples=size.tokens,
            device=feed.device,
            autocast=autocast,
            lr_end=3e-5,  # a tenth, as their runner sets it; the schedule is constant
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae_class(config).to(feed.device),
        feed,
    )

    def declare_dead() -> None:
        fired = trainer.n_forward_passes_since_fired
        fired[: round(dead * size.n_features)] = trainer.cfg.dead_feature_window + 1

    feed.before_step = declare_dead if dead else None
    trainer.fit()


def dictionary_learning(feed: Feed, rule: Rule, dead: float = 0.0) -> None:
    """Train with dictionary_learning: `trainSAE`, which calls `Trainer.update`."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    feed.imported()
    size = feed.size
    trainer_class: Any = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[rule]

    def trainer(**options: Any) -> Any:
        made = trainer_class(**options)

        def declare_dead() -> None:
            silent = round(dead * size.n_features)
            made.num_tokens_since_fired[:silent] = made.dead_feature_threshold

        feed.before_step = declare_dead if dead else None
        return made

    options = {
        "steps": ENDLESS,
        "activation_dim": size.d_model,
        "dict_size": size.n_features,
        "k": size.k,
        "layer": 0,
        "lm_name": "none",
        "device": feed.device,
        "auxk_alpha": 1 / 32 if dead else 0.0,
        "threshold_start_step": 0,  # as in all but the first 1,000 steps
    }
    trainSAE(feed, [{"trainer": trainer, **options}], ENDLESS, device=feed.device)


def sparsify(feed: Feed, optimizer: Literal["signum", "adam"], dead: float = 0.0) -> None:
    """Train with EleutherAI's sparsify: `Trainer.fit`, on a language model that costs nothing."""
    import torch

    if feed.device == "cpu":  # it takes its Triton kernels wherever Triton is installed
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SaeConfig, TrainConfig, Trainer
    from torch import Tensor, nn

    feed.imported()
    size = feed.size

    class Replay(nn.Module):
        """A "language model" whose one layer puts out the next batch."""

        device = torch.device(feed.device)
        dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}  # noqa: RUF012  # sparsify reads it

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()
            self.batch = torch.zeros(1, size.d_model, device=feed.device)

        @property
        def base_model(self) -> nn.Module:
            return self

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layer(self.batch[None])

    class Contexts(torch.utils.data.Dataset[dict[str, Tensor]]):
        """One context a step, which is when the next batch is drawn."""

        def __len__(self) -> int:
            return ENDLESS

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            model.batch = next(batches)
            return {"input_ids": torch.zeros(size.tokens, dtype=torch.int64)}

    model, batches = Replay(), iter(feed)
    config = TrainConfig(
        SaeConfig(num_latents=size.n_features, k=size.k),
        batch_size=1,
        optimizer=optimizer,
        auxk_alpha=1 / 32 if dead else 0.0,
        hookpoints=["layer"],
        save_every=ENDLESS,
        log_to_wandb=False,
    )
    trainer = Trainer(config, Contexts(), model)

    def declare_dead() -> None:
        silent = round(dead * size.n_features)
        trainer.num_tokens_since_fired["layer"][:silent] = config.dead_feature_threshold + 1

    feed.before_step = declare_dead if dead else None
    trainer.fit()
