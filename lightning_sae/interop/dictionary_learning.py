"""`dictionary_learning` (https://github.com/saprmarks/dictionary_learning): `load_dictionary`.

As of its release 0.1. Weights are a file of torch there, which is read with `weights_only`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.core.gate import Gate
from lightning_sae.interop.folded import (
    FoldedSAE,
    require_inputs_as_they_are,
    require_plain_thresholds,
    without_gates,
)

__all__ = ["LIBRARY", "loading", "read", "run", "write"]

LIBRARY: Final = "dictionary_learning"
CONFIG: Final = "config.json"
WEIGHTS: Final = "ae.pt"


def loading(folded: FoldedSAE) -> str:
    """Return the lines of Python that load it with the library."""
    return """from dictionary_learning.utils import load_dictionary

sae, config = load_dictionary("this folder", device="cpu")
codes = sae.encode(activations)  # (tokens, activation_dim) -> (tokens, dict_size)"""


def write(folded: FoldedSAE, folder: Path) -> None:
    """Write `config.json` and `ae.pt`.

    Raises:
        UsageError: If the SAE normalises each token, or has thresholds that are more than numbers.
    """
    require_inputs_as_they_are(folded, LIBRARY)
    require_plain_thresholds(folded.gate, LIBRARY)
    kind, state = _kind(folded), {}
    if kind == "JumpReluAutoEncoder":
        state = {
            "W_enc": folded.encoder_weight.T.contiguous(),
            "b_enc": folded.encoder_bias_of_x,
            "W_dec": folded.decoder_weight,
            "b_dec": folded.decoder_bias,
            "threshold": folded.gate.threshold,
        }
    else:
        origin = "bias" if kind == "AutoEncoder" else "b_dec"
        state = {
            origin: folded.decoder_bias,
            "encoder.weight": folded.encoder_weight,
            "encoder.bias": folded.encoder_bias,
            "decoder.weight": folded.decoder_weight.T.contiguous(),
        }
    k = folded.gate.k or max(1, round(folded.record.get("measured", {}).get("l0") or 1))
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        cut = torch.tensor(-1.0) if folded.gate.threshold is None else folded.gate.threshold[0]
        state |= {"k": torch.tensor(k, dtype=torch.int32), "threshold": cut.clone()}
    torch.save(state, folder / WEIGHTS)
    activations = folded.record.get("trained_on", {})
    n_features, d_model = folded.encoder_weight.shape
    trainer = {
        "dict_class": kind,
        "trainer_class": folded.architecture,
        "activation_dim": d_model,
        "dict_size": n_features,
        "k": k,
        "layer": activations.get("layer"),
        "lm_name": activations.get("model_name"),
        "submodule_name": activations.get("hook_name"),
    }
    config = {
        "trainer": trainer,
        "buffer": {"ctx_len": activations.get("context_length")},
        "lightning_sae": folded.record,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> FoldedSAE:
    """Return what is in such a folder.

    Raises:
        UsageError: If it is of a class that is not read.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    trainer: dict[str, Any] = config["trainer"]
    kind = trainer["dict_class"]
    state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    record = config.get("lightning_sae") or _record(trainer, config.get("buffer", {}))
    described: dict[str, Any] = {"record": record, "architecture": trainer.get("trainer_class")}
    if kind == "JumpReluAutoEncoder":
        gate = Gate(threshold=state["threshold"].float())
        rows = state["W_enc"].float().T.contiguous(), state["W_dec"].float()
        folded = FoldedSAE(rows[0], state["b_enc"].float(), rows[1], state["b_dec"].float(), gate)
        folded = folded.subtracting_origin(state["b_enc"].float())
        return FoldedSAE(**vars(folded) | described)
    weight = state["encoder.weight"].float()
    if kind == "GatedAutoEncoder":
        biases = (state[name] for name in ("gate_bias", "r_mag", "mag_bias"))
        rows = state["decoder.weight"].float().T.contiguous(), state["decoder_bias"].float()
        weight, bias, gate = without_gates(weight, *biases)
        return FoldedSAE(weight, bias, *rows, gate, **described)
    if kind == "AutoEncoderTopK":
        gate = Gate(k=int(state["k"] if "k" in state else trainer["k"]))
    elif kind == "BatchTopKSAE":
        gate = Gate(threshold=state["threshold"].float().expand(len(weight)).clone())
    elif kind == "AutoEncoder":
        gate = Gate()
    else:
        raise UsageError(f"dict_class={kind!r} of {CONFIG} is not read")
    return FoldedSAE(
        weight,
        state["encoder.bias"].float(),
        state["decoder.weight"].float().T.contiguous(),
        state["bias" if kind == "AutoEncoder" else "b_dec"].float(),
        gate,
        **described,
    )


def run(folder: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Return what gives codes and reconstructions by it, or None if it is not installed."""
    if find_spec("dictionary_learning") is None:
        return None
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(folder), "cpu")

    @torch.no_grad()
    def encode_and_decode(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return codes, sae.decode(codes)

    return encode_and_decode


def _kind(folded: FoldedSAE) -> str:
    threshold = folded.gate.threshold
    if folded.gate.k is not None:
        return "AutoEncoderTopK"
    if threshold is None:
        return "AutoEncoder"
    return "BatchTopKSAE" if bool((threshold == threshold[0]).all()) else "JumpReluAutoEncoder"


def _record(trainer: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any]:
    found = {
        "model_name": trainer.get("lm_name"),
        "layer": trainer.get("layer"),
        "hook_name": trainer.get("submodule_name"),
        "context_length": buffer.get("ctx_len"),
    }
    measured = {"l0": float(trainer["k"])} if trainer.get("k") else {}
    return {
        "trained_on": {name: value for name, value in found.items() if value is not None},
        "measured": measured,
    }
