"""OpenMOSS' llamascopium: `SparseAutoEncoder.from_pretrained(folder)`.

After its source as of 2.0.0b34 (https://github.com/OpenMOSS/Language-Model-SAEs). It was read, and
not run: what is written here was compared with our own reading of it alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.core.gate import Gate
from lightning_sae.interop.folded import FoldedSAE, require_plain_thresholds
from lightning_sae.tensor_files import save_tensors

__all__ = ["LIBRARY", "loading", "read", "run", "write"]

LIBRARY: Final = "llamascopium"
CONFIG: Final = "config.json"
WEIGHTS: Final = "sae_weights.safetensors"
THRESHOLD: Final = "activation_function.log_jumprelu_threshold"


def loading(folded: FoldedSAE) -> str:
    """Return the lines of Python that load it with the library."""
    return """from llamascopium import SparseAutoEncoder

sae = SparseAutoEncoder.from_pretrained("this folder")
codes = sae.encode(activations)  # (tokens, d_model) -> (tokens, d_sae)"""


def write(folded: FoldedSAE, folder: Path) -> None:
    """Write `config.json` and `sae_weights.safetensors`.

    Raises:
        UsageError: If thresholds are more than numbers, or one is zero.
    """
    gate = folded.gate
    require_plain_thresholds(gate, "openmoss")
    if gate.threshold is not None and not bool((gate.threshold > 0).all()):
        raise UsageError("to=openmoss: it keeps the logarithm of thresholds, and one here is 0")
    tensors = {
        "W_E": folded.encoder_weight.T,
        "b_E": folded.encoder_bias_of_x,
        "W_D": folded.decoder_weight,
        "b_D": folded.decoder_bias,
    }
    kind: dict[str, Any] = {"act_fn": "relu"}
    if gate.k is not None:
        kind = {"act_fn": "topk", "top_k": gate.k}
    elif gate.threshold is not None:
        kind = {"act_fn": "jumprelu", "jumprelu_threshold_window": 2.0}
        tensors[THRESHOLD] = gate.threshold.log()
    activations = folded.record.get("trained_on", {})
    hook = activations.get("transformer_lens_hook_name") or activations.get("hook_name")
    n_features, d_model = folded.encoder_weight.shape
    config = kind | {
        "sae_type": "sae",
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": d_model,
        "expansion_factor": n_features / d_model,
        "norm_activation": "token-wise" if folded.unit_length else "inference",
        "sparsity_include_decoder_norm": False,
        "use_decoder_bias": True,
        "use_glu_encoder": False,
    }
    save_tensors(tensors, folder / WEIGHTS, format="pt")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> FoldedSAE:
    """Return what is in such a folder.

    Raises:
        UsageError: If it has settings that are not read.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    normalization = config.get("norm_activation")
    if config.get("sae_type") != "sae" or config.get("use_glu_encoder"):
        raise UsageError(f"{CONFIG} is not that of a plain SAE")
    if normalization not in ("inference", "token-wise"):
        raise UsageError(f"norm_activation={normalization!r} of {CONFIG} is not read")
    tensors = {name: each.float() for name, each in load_file(folder / WEIGHTS).items()}
    w_enc, w_dec = tensors["W_E"].T.contiguous(), tensors["W_D"]
    b_enc, gate = tensors["b_E"], _gate(config, tensors)
    if config.get("sparsity_include_decoder_norm") and gate.k is not None:
        raise UsageError(f"sparsity_include_decoder_norm=True of {CONFIG} is not read")
    name = config.get("hook_point_in")
    record = {"trained_on": {"transformer_lens_hook_name": name}} if name else {}
    unit_length = normalization == "token-wise"
    folded = FoldedSAE(w_enc, b_enc, w_dec, tensors["b_D"], gate, unit_length, record)
    return folded.subtracting_origin(b_enc)


def run(folder: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Return None: it was not tried here."""
    return None


def _gate(config: dict[str, Any], tensors: dict[str, Tensor]) -> Gate:
    match config.get("act_fn"):
        case "relu":
            return Gate()
        case "topk":
            return Gate(k=int(config["top_k"]))
        case "jumprelu":
            return Gate(threshold=tensors[THRESHOLD].exp())
    raise UsageError(f"act_fn={config.get('act_fn')!r} of {CONFIG} is not read")
