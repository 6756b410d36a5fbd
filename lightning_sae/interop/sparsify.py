"""Sparsify (https://github.com/EleutherAI/sparsify): `SparseCoder.load_from_disk(folder)`.

As of eai-sparsify 1.3. It has TopK alone, and activations as they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.core.gate import Gate
from lightning_sae.interop.folded import FoldedSAE, require_inputs_as_they_are
from lightning_sae.tensor_files import save_tensors

__all__ = ["LIBRARY", "loading", "read", "run", "write"]

LIBRARY: Final = "sparsify"
CONFIG: Final = "cfg.json"
WEIGHTS: Final = "sae.safetensors"


def loading(folded: FoldedSAE) -> str:
    """Return the lines of Python that load it with the library."""
    return """from sparsify import SparseCoder

sae = SparseCoder.load_from_disk("this folder")
codes = sae.encode(activations)  # of each token the k largest, and which features these are"""


def write(folded: FoldedSAE, folder: Path) -> None:
    """Write `cfg.json` and `sae.safetensors`.

    Raises:
        UsageError: If the SAE is no TopK, or normalises each token.
    """
    if folded.gate.k is None:
        raise UsageError("to=sparsify: it has no thresholds, only the k largest codes of a token")
    require_inputs_as_they_are(folded, LIBRARY)
    n_features, d_model = folded.encoder_weight.shape
    config = {
        "d_in": d_model,
        "num_latents": n_features,
        "k": folded.gate.k,
        "activation": "topk",
        "normalize_decoder": True,
        "expansion_factor": n_features // d_model,  # of no meaning beside num_latents
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "lightning_sae": folded.record,  # which its reader leaves out
    }
    tensors = {
        "encoder.weight": folded.encoder_weight,
        "encoder.bias": folded.encoder_bias,
        "W_dec": folded.decoder_weight,
        "b_dec": folded.decoder_bias,
    }
    save_tensors(tensors, folder / WEIGHTS, format="pt")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> FoldedSAE:
    """Return what is in such a folder.

    Raises:
        UsageError: If it is a transcoder, or not of TopK.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for name in ("skip_connection", "transcode"):
        if config.get(name):
            raise UsageError(f"{name}={config[name]!r} of {CONFIG} is not read")
    if config.get("activation", "topk") != "topk":
        raise UsageError(f"activation={config['activation']!r} of {CONFIG} is not read")
    tensors = {name: each.float() for name, each in load_file(folder / WEIGHTS).items()}
    return FoldedSAE(
        tensors["encoder.weight"],
        tensors["encoder.bias"],
        tensors["W_dec"],
        tensors["b_dec"],
        Gate(k=int(config["k"])),
        record=config.get("lightning_sae", {}),
    )


def run(folder: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Return what gives codes and reconstructions by sparsify, or None if it is not installed."""
    if find_spec("sparsify") is None:
        return None
    if not torch.cuda.is_available():  # where it would decode by Triton, and fail
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)

    @torch.no_grad()
    def encode_and_decode(x: Tensor) -> tuple[Tensor, Tensor]:
        found = sae.encode(x)
        codes = x.new_zeros(len(x), sae.num_latents)
        codes.scatter_(1, found.top_indices, found.top_acts)
        return codes, sae.decode(found.top_acts, found.top_indices)

    return encode_and_decode
