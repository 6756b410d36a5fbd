"""`lightning_sae export` and `lightning_sae import`: SAEs of, and for, other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from lightning_sae import interop
from lightning_sae.architectures.threshold import ThresholdSAE
from lightning_sae.checks import UsageError, require_positive
from lightning_sae.cli.recorded import note_figures, recorded_activations
from lightning_sae.cli.trained import imported, trained
from lightning_sae.metrics import FractionOfVarianceUnexplained
from lightning_sae.sae import SparseAutoencoder

__all__ = ["export_sae", "import_sae"]

Library = Literal["saelens", "sparsify", "dictionary_learning", "openmoss"]


def export_sae(
    ckpt_path: str, to: Library, output: str, tokens: int = 16_384, without_discount: bool = False
) -> None:
    """Write a trained SAE for another library, load it there, and compare.

    Args:
        ckpt_path: A checkpoint, a folder that holds a saved SAE, one's id on the hub, or
            LIBRARY:FOLDER.
        to: The library. Where it is installed it loads what was written itself.
        output: Folder to write to.
        tokens: Held-out tokens of what the SAE was trained on to compare on, beside random ones.
        without_discount: Whether an SAE with a `rank_discount`, which no other library knows by
            itself, is written with one of 0, its thresholds set anew on these tokens.
    """
    require_positive(tokens=tokens)
    sae = trained(ckpt_path)
    real = recorded_activations(sae.record, tokens)
    if without_discount:
        sae = _without_discount(sae, real, tokens)
    for comparison in interop.export(sae, to, output, real):
        print(comparison)
    if isinstance(sae, ThresholdSAE) and sae.rank_discount:
        print(f"{to} loads it with this package beside it, as its README.md says; what")
        print("--without_discount=true would write, it loads alone.")
    print(f"{output} is for {to}.")


def _without_discount(
    sae: SparseAutoencoder, activations: Tensor | None, tokens: int
) -> SparseAutoencoder:
    if not (isinstance(sae, ThresholdSAE) and sae.rank_discount):
        raise UsageError(f"without_discount=true: {type(sae).__name__} has no rank_discount")
    if activations is None:
        raise UsageError("without_discount=true: what the SAE was trained on is not at hand")
    plain = sae.without_discount(activations)
    width = getattr(sae, "d_target", sae.d_model)  # a transcoder's target is beside what it reads
    whole = FractionOfVarianceUnexplained(width)
    before = float(whole(sae(activations)[:, -width:], activations[:, -width:]))
    after = plain.record["measured"]["fvu"]
    note_figures(plain, tokens)
    print(f"FVU of the SAE {before:.4f}, without the discount {after:.4f}")
    return plain


def import_sae(path: str, output: str, k: int | None = None, tokens: int = 16_384) -> None:
    """Read an SAE of another library, and save it as `lightning_sae.load` finds it.

    Args:
        path: LIBRARY:FOLDER, with saelens, sparsify, dictionary_learning or openmoss for a library;
            or saelens:RELEASE:ID, if SAELens is installed, for what it can download.
        output: Folder to write to.
        k: Matches per token that are expected; needed of SAEs with thresholds that do not say.
        tokens: Tokens of what it was trained on, where that is known and at hand, to measure mean
            and scale of activations on.
    """
    require_positive(tokens=tokens)
    folder = Path(output).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"output={output} holds files already: remove them or name another")
    sae = imported(interop.load_foreign(path), k, tokens=tokens)
    sae.save_pretrained(folder)
    print(f"{output} holds a {type(sae).__name__}: lightning_sae.load({output!r})")
