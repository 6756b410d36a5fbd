"""Our training steps: in a real `Trainer.fit`, and in a plain loop, part by part."""

import tempfile
from functools import partial
from typing import Any, Literal

from benchmarks.rounds import Feed, Size

ARCHITECTURES = {
    "TopK": "TopKSAE",
    "Mutual Choice": "MutualChoiceSAE",
    "Feature Choice": "FeatureChoiceSAE",
}
CLIP = 1.0  # gradient_clip_val of the shipped configurations


def build(architecture: str, size: Size, *, chunked: bool = False, **options: Any) -> Any:
    """Return an SAE of ours with a fused Adam, or with one that steps in chunks."""
    import torch

    import lightning_sae

    adam = lightning_sae.ChunkedAdam if chunked else partial(torch.optim.Adam, fused=True)
    options = {"aux_coefficient": 0.0} | options
    if architecture == "FeatureChoiceSAE":
        # Features choose from the start, by a law that is given: the second phase of a run.
        options |= {"mutual_choice_share": 0, "zipf_exponent": 1.0}
        options |= {"zipf_offset": size.n_features / 1000}
    return getattr(lightning_sae, architecture)(
        size.d_model,
        size.n_features,
        size.k,
        optimizer=partial(adam, lr=2e-3, eps=6.25e-10),
        **options,
    )


def fit(
    feed: Feed,
    architecture: str,
    chunked: bool = False,
    dead: float = 0.0,
    aux_every: int = 1,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    progress_bar: bool = True,
    options: dict[str, Any] | None = None,
) -> None:
    """Train in a Trainer set up as in the shipped configurations, validation left out.

    Args:
        feed: Where batches come from.
        architecture: Name of the class.
        chunked: Whether `ChunkedAdam` steps, which needs no gradient as large as the weights.
        dead: Share of the features that the auxiliary loss takes for dead; 0 leaves it out.
        aux_every: It is computed on one token in so many.
        precision: The Trainer's.
        progress_bar: Whether there is one; a process can have one at a time.
        options: More arguments of the class.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    import lightning_sae  # noqa: F401  # imported before memory is measured

    feed.imported()
    aux = {"aux_coefficient": 1 / 32, "aux_every": aux_every} if dead else {}
    sae = build(architecture, feed.size, chunked=chunked, **aux, **(options or {}))
    if dead:
        feed.before_step = partial(_declare_dead, sae, dead)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator=feed.device,
            devices=1,
            precision=precision,
            max_steps=1_000_000,
            max_epochs=-1,
            gradient_clip_val=CLIP,
            log_every_n_steps=10,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=progress_bar,
        ).fit(sae, feed)


def loop(feed: Feed, architecture: str) -> None:
    """Train without a Trainer, taking the time of each part.

    The choice is part of `loss`, so it is timed once more by itself: what `loss` takes beyond it is
    decoding and the loss.
    """
    import torch

    import lightning_sae  # noqa: F401  # imported before memory is measured

    feed.imported()
    sae = build(architecture, feed.size).to(feed.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3, eps=6.25e-10, fused=True)
    for x in feed:
        loss, _ = sae.loss(x)
        feed.lap("loss")
        optimizer.zero_grad()
        loss.backward()
        feed.lap("backward")
        torch.nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
        optimizer.step()
        sae.normalize_decoder()
        feed.lap("optimizer")
        sae.match(x)
        feed.lap("match")


def _declare_dead(sae: Any, share: float) -> None:
    """Let the same features count as dead in every step, whether they fired or not."""
    sae.tokens_since_fired[: round(share * sae.n_features)] = sae.dead_after_tokens
