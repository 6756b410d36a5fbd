"""`lightning_sae export` and `lightning_sae import`: SAEs of, and for, other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sae import interop
from lightning_sae.architectures import load
from lightning_sae.checks import UsageError, require_positive
from lightning_sae.cli.recorded import recorded_settings
from lightning_sae.data import ActivationDataModule

__all__ = ["export_sae", "import_sae"]

Library = Literal["saelens", "sparsify", "dictionary_learning", "openmoss"]


def export_sae(ckpt_path: str, to: Library, output: str, tokens: int = 4096) -> None:
    """Write a trained SAE for another library, load it there, and compare.

    Args:
        ckpt_path: A checkpoint, a folder that holds a saved SAE, or one's id on the hub.
        to: The library. Where it is installed it loads what was written itself.
        output: Folder to write to.
        tokens: Held-out tokens of what the SAE was trained on to compare on, beside random ones.
    """
    require_positive(tokens=tokens)
    sae = load(ckpt_path)
    for comparison in interop.export(sae, to, output, _activations(sae.record, tokens)):
        print(comparison)
    print(f"{output} is for {to}.")


def import_sae(path: str, output: str, k: int | None = None, tokens: int = 16_384) -> None:
    """Read an SAE of another library, and save it as `lightning_sae.load` finds it.

    Args:
        path: LIBRARY:FOLDER, with saelens, sparsify, dictionary_learning or openmoss for a library.
        output: Folder to write to.
        k: Matches per token that are expected; needed of SAEs with thresholds that do not say.
        tokens: Tokens of what it was trained on, where that is known and at hand, to measure mean
            and scale of activations on.
    """
    require_positive(tokens=tokens)
    folder = Path(output).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"output={output} holds files already: remove them or name another")
    folded = interop.load_foreign(path)
    sae = interop.unfold(folded, k, _activations(folded.record, tokens))
    sae.save_pretrained(folder)
    print(f"{output} holds a {type(sae).__name__}: lightning_sae.load({output!r})")


def _activations(record: dict[str, Any], tokens: int) -> Tensor | None:
    """Return held-out activations (tokens, d_model) of what a record names, if they can be read."""
    settings = recorded_settings(record)
    if not {"model_name", "layer", "text"} <= settings.keys():
        rank_zero_warn("What the SAE was trained on is not known: no real activations are read")
        return None
    try:
        # Twice as many, since special tokens are none of them; what is not needed is not read.
        most = 2 * tokens + settings.get("context_length", 128)
        data = ActivationDataModule(**settings, validation_tokens=most)
        found: list[Tensor] = []
        for batch in data.val_dataloader():
            found.append(batch["activations"])
            if sum(map(len, found)) >= tokens:
                break
        return torch.cat(found)[:tokens]
    except (UsageError, OSError) as error:
        rank_zero_warn(
            f"What the SAE was trained on cannot be read, so no real activations: {error}"
        )
        return None
