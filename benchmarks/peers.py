"""The training steps of other libraries: their own loops, with their own defaults.

Auxiliary losses are off unless `dead` says which share of the features to take for dead, and
nothing is logged, saved or evaluated.
"""

import importlib
import os
from typing import Any, Literal

from benchmarks.rounds import ENDLESS, Feed, Size

RULES = ("topk", "batchtopk")
FAMILY = ("jumprelu", "gated", "standard", "matryoshka")
PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
"""Of a Matryoshka SAE, as shares of its features: each is of twice as many as the one before."""


def prefixes(size: Size) -> list[int]:
    """Return the numbers of features of a Matryoshka SAE's prefixes, all but the last."""
    return [round(share * size.n_features) for share in PREFIXES]


def saelens(feed: Feed, rule: str, dead: float = 0.0, autocast: bool = False) -> None:
    """Train with SAELens: `SAETrainer.fit`, with products in bfloat16 if `autocast`."""
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    feed.imported()
    size = feed.size
    named: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopK", {"k": size.k}),
        "batchtopk": ("BatchTopK", {"k": size.k}),
        "jumprelu": ("JumpReLU", {}),
        "gated": ("Gated", {}),
        "standard": ("Standard", {}),
        "matryoshka": (
            "MatryoshkaBatchTopK",
            {"k": size.k, "matryoshka_widths": [*prefixes(size), size.n_features]},
        ),
    }
    name, of_it = named[rule]
    config_class = getattr(sae_lens, f"{name}TrainingSAEConfig")
    config = config_class(d_in=size.d_model, d_sae=size.n_features, **of_it)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=ENDLESS * size.tokens,
            train_batch_size_samples=size.tokens,
            device=feed.device,
            autocast=autocast,
            lr_end=3e-5,  # a tenth, as their runner sets it; the schedule is constant
            logger=LoggingConfig(log_to_wandb=False),
        ),
        getattr(sae_lens, f"{name}TrainingSAE")(config).to(feed.device),
        feed,
    )

    def declare_dead() -> None:
        fired = trainer.n_forward_passes_since_fired
        fired[: round(dead * size.n_features)] = trainer.cfg.dead_feature_window + 1

    feed.before_step = declare_dead if dead else None
    trainer.fit()


def dictionary_learning(feed: Feed, rule: str, dead: float = 0.0) -> None:
    """Train with dictionary_learning: `trainSAE`, which calls `Trainer.update`."""
    from dictionary_learning.training import trainSAE

    feed.imported()
    size = feed.size
    chosen = {
        "k": size.k,
        "auxk_alpha": 1 / 32 if dead else 0.0,
        "threshold_start_step": 0,  # as in all but the first 1,000 steps
    }
    ends = [*prefixes(size), size.n_features]
    shares = [(end - start) / size.n_features for start, end in zip([0, *ends], ends, strict=False)]
    named: dict[str, tuple[str, str, dict[str, Any]]] = {
        "topk": ("top_k", "TopKTrainer", chosen),
        "batchtopk": ("batch_top_k", "BatchTopKTrainer", chosen),
        "jumprelu": ("jumprelu", "JumpReluTrainer", {"target_l0": float(size.k)}),
        "gated": ("gdm", "GatedSAETrainer", {}),
        "standard": ("standard", "StandardTrainer", {}),
        "matryoshka": (
            "matryoshka_batch_top_k",
            "MatryoshkaBatchTopKTrainer",
            chosen | {"group_fractions": shares},
        ),
    }
    module, name, of_it = named[rule]
    trainer_class: Any = getattr(
        importlib.import_module(f"dictionary_learning.trainers.{module}"), name
    )

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
        "layer": 0,
        "lm_name": "none",
        "device": feed.device,
        **of_it,
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
