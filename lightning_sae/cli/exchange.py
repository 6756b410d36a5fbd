"""`lightning_sae export` and `lightning_sae import`: SAEs of, and for, other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning_sae import interop
from lightning_sae.checks import UsageError, require_positive
from lightning_sae.cli.recorded import recorded_activations
from lightning_sae.cli.trained import imported, trained

__all__ = ["export_sae", "import_sae"]

Library = Literal["saelens", "sparsify", "dictionary_learning", "openmoss"]


def export_sae(ckpt_path: str, to: Library, output: str, tokens: int = 4096) -> None:
    """Write a trained SAE for another library, load it there, and compare.

    Args:
        ckpt_path: A checkpoint, a folder that holds a saved SAE, one's id on the hub, or
            LIBRARY:FOLDER.
        to: The library. Where it is installed it loads what was written itself.
        output: Folder to write to.
        tokens: Held-out tokens of what the SAE was trained on to compare on, beside random ones.
    """
    require_positive(tokens=tokens)
    sae = trained(ckpt_path)
    real = recorded_activations(sae.record, tokens)
    for comparison in interop.export(sae, to, output, real):
        print(comparison)
    print(f"{output} is for {to}.")


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
