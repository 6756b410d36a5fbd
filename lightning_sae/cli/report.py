"""The command `lightning_sae report`."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, cast

import torch

from lightning_sae.checks import UsageError
from lightning_sae.cli.recorded import recorded_settings
from lightning_sae.cli.trained import trained
from lightning_sae.data import ActivationDataModule
from lightning_sae.data.provenance import compare
from lightning_sae.report.neuronpedia import write_neuronpedia
from lightning_sae.report.write import Split, report_of, write_report
from lightning_sae.sae import SparseAutoencoder

__all__ = ["report"]

SOURCES: Final = MappingProxyType({"resid_post": "res", "mlp_out": "mlp", "z": "att"})
"""What sites are in the names that sets of features have on Neuronpedia."""


def report(
    ckpt_path: str,
    output: str | None = None,
    *,
    format: Literal["page", "neuronpedia"] = "page",  # noqa: A002 - as the command line has it
    tokens: int = 250_000,
    split: Split = "held_out",
    model_name: str | None = None,
    layer: int | str | None = None,
    text: str | None = None,
    device: str = "auto",
) -> None:
    """Show what the features of a trained SAE fire on, as a page for a browser.

    Args:
        ckpt_path: A checkpoint, a folder that `save_pretrained` wrote, or the id of a repository on
            the Hugging Face hub.
        output: The page, report.html if nothing is said. Tables of the same content come beside it,
            as parquet. Files that are there are replaced. Of another format, a folder to make.
        format: A page, or files of which Neuronpedia's tools make dashboards.
        tokens: Tokens to read. The more, the rarer the features of which something is seen.
        split: Whether to read text that was held out, or that was trained on, which is more.
        model_name: The language model, if it is no longer where it was in training, or the SAE
            does not note it.
        layer: The layer whose output the SAE is for, if it does not note it.
        text: The text to read, if it is no longer where it was, another is wanted, or the SAE does
            not note it.
        device: What to compute on: cpu, cuda, or auto, which is a GPU if there is one.
    """
    page = format == "page"
    where = _checked(output or ("report.html" if page else "neuronpedia"), page=page)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    named = {"model_name": model_name, "layer": layer, "text": text}
    said = {name: value for name, value in named.items() if value is not None}
    sae = trained(ckpt_path, device, said)
    data = _data_of(sae, ckpt_path, said)
    block, kind = data.model.layer, SOURCES.get(str(data.model.site))
    known = isinstance(block, int) and kind is not None
    if not (page or known):
        raise UsageError(
            f"format={format}: Neuronpedia knows layers by numbers of blocks, and of sites "
            f"{', '.join(SOURCES)}; the SAE is of layer={block!r}, site={data.model.site!r}"
        )
    found = report_of(sae, data, tokens=tokens, split=split)
    if page:
        paths = write_report(found, where)
    else:
        names = {"model_id": Path(data.model_name).name, "source_set": f"lightning_sae-{kind}"}
        paths = write_neuronpedia(found, where, layer=cast(int, block), **names)
    for path in paths:
        print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


def _checked(output: str, *, page: bool) -> Path:
    """Return where to write. What is wrong with it is found out now, not after the pass."""
    path = Path(output).expanduser()
    if page and (path.suffix != ".html" or path.is_dir()):
        raise UsageError(f"output={output} must be a file whose name ends in .html")
    if not path.parent.is_dir():
        raise UsageError(f"output={output}: there is no folder {path.parent}")
    if not page and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise UsageError(f"output={output} holds files already: remove them or name another")
    return path


def _data_of(sae: SparseAutoencoder, path: str, said: dict[str, int | str]) -> ActivationDataModule:
    """Return the data module that the SAE was trained with, as its record and the user say.

    Args:
        sae: A trained one.
        path: What messages call it.
        said: What the user says, which counts.
    """
    trained_on: dict[str, Any] = sae.record.get("trained_on", {})
    if "images" in trained_on:
        raise UsageError(
            f"ckpt_path={path}: this SAE was trained on images, and a report reads text"
        )
    settings = recorded_settings(sae.record) | said
    missing = [f"--{name}" for name in ("model_name", "layer", "text") if name not in settings]
    if missing:
        raise UsageError(
            f"ckpt_path={path} does not note all of what the SAE was trained on: "
            f"say {', '.join(missing)}"
        )
    data = ActivationDataModule(**settings)
    compare(data.state_dict(), {"activations": trained_on}, resumed=False, source=data.source)
    target = getattr(sae, "d_target", None)
    if data.widths != [sae.d_model] + ([] if target is None else [target]):
        raise UsageError(
            f"{data.model} gives activations {data.d_model} wide, and ckpt_path={path} is for "
            f"those {sae.d_model + (target or 0)} wide"
        )
    return data
