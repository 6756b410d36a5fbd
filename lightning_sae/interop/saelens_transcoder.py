"""Transcoders for SAELens, in its classes `jumprelu_transcoder` and `jumprelu_skip_transcoder`.

As of sae-lens 6.54. Thresholds are all that its classes know: those of Mutual and Feature Choice,
without a discount, and of JumpReLU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from lightning_sae.architectures import Transcoder
from lightning_sae.checks import UsageError
from lightning_sae.interop.folded import require_plain_thresholds
from lightning_sae.interop.saelens import CONFIG, UNIT_LENGTH, WEIGHTS, metadata_of
from lightning_sae.tensor_files import save_tensors

__all__ = ["LOADING", "read", "run", "write"]

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
LOADING: Final = """from sae_lens import SAE

transcoder = SAE.load_from_disk("this folder")
target, codes = transcoder.forward_with_activations(activations)  # (..., d_in) -> (..., d_out)"""
NORMALIZED: Final = {"average": "none", "token": UNIT_LENGTH}


@torch.no_grad()
def write(transcoder: Transcoder, folder: Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, in the units of activations.

    Raises:
        UsageError: If no class of SAELens is the same.
    """
    gate = transcoder.gate()
    if gate.threshold is None:
        raise UsageError(
            f"{type(transcoder).__name__}: SAELens has transcoders with thresholds, none "
            "that takes the k largest"
        )
    require_plain_thresholds(gate, "saelens, of a transcoder")
    if gate.threshold.isnan().any():
        raise UsageError(f"threshold of {type(transcoder).__name__} is not calibrated: train it")
    like = torch.ones(1, transcoder.d_model, device=transcoder.input_scale.device)
    scale = transcoder.input_scales(like).double().cpu().squeeze()  # of what is encoded
    average, mean = (
        each.double().cpu() for each in (transcoder.input_scale, transcoder.input_mean)
    )
    theirs = transcoder.target.input_scale.double().cpu()
    weight, bias = (p.double().cpu() for p in transcoder.encoder.parameters())
    directions = functional.normalize(transcoder.decoder.weight.double().cpu(), dim=1)
    origin = transcoder.decoder.bias.double().cpu() / theirs
    tensors = {
        "W_enc": weight.T,
        "b_enc": (bias - weight @ transcoder.origin.double().cpu()) / scale,
        "W_dec": directions * (scale / theirs),
        "threshold": gate.threshold.double().cpu().expand(transcoder.n_features) / scale,
    }
    if transcoder.skip is not None:
        tensors["W_skip"] = transcoder.skip.double().cpu() * (average / theirs)
        origin = origin - tensors["W_skip"] @ mean
    tensors["b_dec"] = origin
    save_tensors({name: each.float() for name, each in tensors.items()}, folder / WEIGHTS)
    config = {
        "architecture": f"jumprelu_{'' if transcoder.skip is None else 'skip_'}transcoder",
        "d_in": transcoder.d_model,
        "d_out": transcoder.d_target,
        "d_sae": transcoder.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": NORMALIZED[transcoder.normalize_inputs],
        "reshape_activations": "none",
        "metadata": metadata_of(transcoder.record, type(transcoder).__name__),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def run(folder: Path) -> Run | None:
    """Return what gives codes and reconstructions by SAELens, or None if it is not installed."""
    if find_spec("sae_lens") is None:
        return None
    from lightning_sae.interop import saelens_adapter

    transcoder = saelens_adapter.load(folder)

    @torch.no_grad()
    def encode_and_decode(x: Tensor) -> tuple[Tensor, Tensor]:
        found, codes = transcoder.forward_with_activations(x)
        return codes, found

    return encode_and_decode


def read(folder: Path) -> Run:
    """Return what gives codes (tokens, n_features) and reconstructions, by the files alone."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)

    def encode_and_decode(x: Tensor) -> tuple[Tensor, Tensor]:
        unit = config["normalize_activations"] == UNIT_LENGTH
        lengths = x.norm(dim=1, keepdim=True) / math.sqrt(x.shape[1]) if unit else 1.0
        affinities = (x / lengths) @ tensors["W_enc"] + tensors["b_enc"]
        codes = affinities.where(affinities > tensors["threshold"].clamp_min(0), 0.0)
        found = codes @ tensors["W_dec"] + tensors["b_dec"]
        return codes, found + x @ tensors["W_skip"].T if "W_skip" in tensors else found

    return encode_and_decode
