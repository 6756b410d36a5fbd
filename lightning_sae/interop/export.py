"""Write an SAE for another library, and see that it is the same there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lightning_sae.architectures import Transcoder
from lightning_sae.checks import UsageError, require_choice
from lightning_sae.interop import saelens_transcoder
from lightning_sae.interop.folded import fold
from lightning_sae.interop.formats import FORMATS
from lightning_sae.model_card import model_card
from lightning_sae.sae import SparseAutoencoder

__all__ = ["TOLERANCE", "Comparison", "compare", "export"]

TOLERANCE: Final = 1e-5
"""Largest error, relative to the spread of the activations, of what counts as exact."""


@dataclass(frozen=True)
class Comparison:
    """What an SAE makes of activations here, and in another library.

    Attributes:
        name: What the activations are.
        tokens: How many.
        error: Largest absolute difference of the reconstructions, over the activations' spread.
            Tokens `near_a_tie` are left out.
        near_a_tie: Tokens of which the two have other features, all of them within rounding of the
            threshold, or of the k-th largest affinity, or of each other where places count.
        l0: Features that fire on a token, here and there.
        fvu: Share of the variance that is not reconstructed, here and there.
        by: Who computed the other one.
    """

    name: str
    tokens: int
    error: float
    near_a_tie: int
    l0: tuple[float, float]
    fvu: tuple[float, float]
    by: str

    def __str__(self) -> str:
        (l0, other_l0), (fvu, other_fvu) = self.l0, self.fvu
        ties = f", {self.near_a_tie} tokens within rounding of a tie" if self.near_a_tie else ""
        return (
            f"{self.name}, {self.tokens:,} tokens: largest error {self.error:.1e} of their spread"
            f"{ties}; L0 {l0:.3f} here, {other_l0:.3f} by {self.by}; "
            f"FVU {fvu:.4f} here, {other_fvu:.4f}"
        )


def export(
    sae: SparseAutoencoder,
    to: str,
    output: str | Path,
    activations: Tensor | None = None,
) -> list[Comparison]:
    """Write a trained SAE in the format of another library, load it there, and compare.

    Input scale and directions' lengths are folded in, so that what is written takes activations as
    they come from the language model. Beside it comes a model card, `README.md`, which says how the
    library loads it, what it was trained on and what it is worth. Where the library is installed it
    loads what was written; else our own reading of its format does.

    Args:
        sae: A trained SAE.
        to: One of `lightning_sae.interop.FORMATS`.
        output: Folder to write to. It must not hold files yet.
        activations: Real ones to compare on, (tokens, d_model), beside random ones. Of a transcoder
            with targets beside them.

    Returns:
        A comparison of random activations, and of the real ones.

    Raises:
        UsageError: If the format cannot say what the SAE does, or what was written does something
            else: an error above `TOLERANCE`. Nothing is left in the folder then.
    """
    require_choice(to=to, of=tuple(FORMATS))
    folder = Path(output).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"output={output} holds files already: remove them or name another")
    folder.mkdir(parents=True, exist_ok=True)
    samples = {"random activations": _random(sae)}
    if activations is not None:
        samples["real activations"] = activations
    try:
        if isinstance(sae, Transcoder) and to == "saelens":
            saelens_transcoder.write(sae, folder)
            loading = saelens_transcoder.LOADING
            theirs, read = saelens_transcoder.run(folder), saelens_transcoder.read
        else:
            folded = fold(sae)
            FORMATS[to].write(folded, folder)
            loading = FORMATS[to].loading(folded)
            theirs, read = FORMATS[to].run(folder), FORMATS[to].read
        card = model_card(sae.config(), FORMATS[to].LIBRARY, loading)
        (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")
        by = to if theirs is not None else "our reading of its files"
        other = theirs if theirs is not None else read(folder)
        found = [compare(sae, other, x, name, by) for name, x in samples.items()]
        for each in found:
            if not each.error <= TOLERANCE:
                raise UsageError(f"to={to}: it is not the same there. {each}")
    except BaseException:  # also of the user's, who stops it: nobody is to take it for exported
        for file in folder.iterdir():
            file.unlink()
        raise
    return found


@torch.no_grad()
def compare(
    sae: SparseAutoencoder,
    other: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    name: str = "activations",
    by: str = "the other",
) -> Comparison:
    """Return how another reading of an SAE differs from it.

    Args:
        sae: The SAE.
        other: Gives dense codes (tokens, n_features) and reconstructions of activations.
        x: Activations, shape (tokens, d_model); for a transcoder, with targets beside them.
        name: What they are called.
        by: Whose reading it is.
    """
    x = x.float().cpu()
    x, target = (
        (x[:, : sae.d_model], x[:, sae.d_model :]) if isinstance(sae, Transcoder) else (x, x)
    )
    here = x.to(sae.input_mean.device)
    fires, reconstruction = (sae.encode(here) > 0).cpu(), sae(here).cpu()
    codes, other_reconstruction = other(x)
    differ = fires != (codes > 0)
    if isinstance(sae, Transcoder):
        affinities = sae.scores(sae.scaled(here)).dense().cpu()
        cut = torch.as_tensor(sae.gate().threshold).cpu()
    else:
        affinities, cut = fold(sae).affinities(x)
    rounding = TOLERANCE * affinities.abs().amax(1, keepdim=True)
    ties = differ.any(1) & (~differ | ((affinities - cut).abs() <= rounding)).all(1)
    gate = sae.gate()
    if gate.discount is not None and gate.threshold is not None:
        # And which of two that are alike is ranked first, so that the other needs more.
        multiples = affinities / gate.threshold.cpu().clamp_min(torch.finfo().tiny)
        least = multiples.masked_fill(~differ, math.inf).amin(1)
        most = multiples.masked_fill(~differ, -math.inf).amax(1)
        ties |= (differ.sum(1) > 1) & (most - least <= TOLERANCE * most)
    variance = (target - target.mean(0)).square().mean()
    error = (reconstruction - other_reconstruction).abs().amax(1)[~ties]
    return Comparison(
        name=name,
        tokens=len(x),
        error=float(error.max() / variance.sqrt()) if len(error) else math.nan,
        near_a_tie=int(ties.sum()),
        l0=(float(fires.sum() / len(x)), float((codes > 0).sum() / len(x))),
        fvu=(
            float((target - reconstruction).square().mean() / variance),
            float((target - other_reconstruction).square().mean() / variance),
        ),
        by=by,
    )


def _random(sae: SparseAutoencoder, tokens: int = 1024) -> Tensor:
    """Return activations of the mean and scale that the SAE was made for, (tokens, d_model)."""
    generator = torch.Generator().manual_seed(0)
    spaces = [sae, sae.target] if isinstance(sae, Transcoder) else [sae]
    noise = (torch.randn(tokens, each.d_model, generator=generator) for each in spaces)
    scaled = (n / each.input_scale.cpu() for n, each in zip(noise, spaces, strict=True))
    means = (each.input_mean.cpu() for each in spaces)
    return torch.cat([mean + n for mean, n in zip(means, scaled, strict=True)], dim=1)
