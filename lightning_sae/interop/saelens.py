"""SAELens (https://github.com/decoderesearch/SAELens): `SAE.load_from_disk(folder)`.

As of sae-lens 6.54. Thresholds that no class of SAELens has, relative to a token's length or
higher for a token's matches beyond its k-th, are written for one that
`lightning_sae.interop.saelens_adapter` registers there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_sae.allocation import RankDiscount
from lightning_sae.checks import UsageError
from lightning_sae.core.gate import Gate
from lightning_sae.interop.folded import OWN, FoldedSAE, without_gates
from lightning_sae.sites import site_of
from lightning_sae.tensor_files import save_tensors

__all__ = ["LIBRARY", "download", "loading", "metadata_of", "read", "run", "write"]

LIBRARY: Final = "saelens"
CONFIG: Final = "cfg.json"
WEIGHTS: Final = "sae_weights.safetensors"
SPARSITY: Final = "sparsity.safetensors"
VERSION: Final = "6.54.12"
"""The release that was tried; files of one before 6.0 are read otherwise."""
GATED: Final = "gated"
UNIT_LENGTH: Final = "constant_norm_rescale"
HOOKS: Final = {"hook_name": "transformer_lens_", "hf_hook_name": ""}
"""Its names of a hook, and what ours begin with."""


def loading(folded: FoldedSAE) -> str:
    """Return the lines of Python that load it with the library."""
    own = ""
    if _is_own(folded.gate):
        own = """from lightning_sae.interop import saelens_adapter

saelens_adapter.register()  # a kind of thresholds that SAELens lacks
"""
    return f"""from sae_lens import SAE

{own}sae = SAE.load_from_disk("this folder")
codes = sae.encode(activations)  # (..., d_in) -> (..., d_sae)"""


def write(folded: FoldedSAE, folder: Path) -> None:
    """Write `cfg.json`, `sae_weights.safetensors`, and the densities in `sparsity.safetensors`."""
    n_features, d_model = folded.encoder_weight.shape
    gate = folded.gate
    tensors = {
        "W_enc": folded.encoder_weight.T,
        # OpenMOSS, which reads these files too, takes none that subtract b_dec.
        "b_enc": folded.encoder_bias_of_x,
        "W_dec": folded.decoder_weight,
        "b_dec": folded.decoder_bias,
    }
    special: dict[str, Any] = {"architecture": "standard"}
    if gate.k is not None:
        special = {"architecture": "topk", "k": gate.k, "rescale_acts_by_decoder_norm": False}
    elif gate.threshold is not None:
        special = {"architecture": "jumprelu"}
        if _is_own(gate):
            special = {"architecture": OWN, "token_norm": gate.relative}
        if gate.discount is not None:
            special |= {"k": gate.discount.k, "rank_discount": gate.discount.exponent}
        tensors["threshold"] = gate.threshold
    config = special | {
        "d_in": d_model,
        "d_sae": n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": UNIT_LENGTH if folded.unit_length else "none",
        # Heads beside each other, as they are here; there they come one by one.
        "reshape_activations": "hook_z" if _hook_name(folded).endswith("hook_z") else "none",
        "metadata": metadata_of(folded.record, folded.architecture),
    }
    save_tensors(tensors, folder / WEIGHTS)
    if folded.density is not None:
        save_tensors({"sparsity": (folded.density + 1e-10).log10()}, folder / SPARSITY)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> FoldedSAE:
    """Return what is in such a folder.

    Raises:
        UsageError: If it is of an architecture, or has settings, that are not read.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    gate, unit_length = _gate(config), config.get("normalize_activations") == UNIT_LENGTH
    tensors = load_file(folder / WEIGHTS)
    w_dec, b_dec = tensors["W_dec"].float(), tensors["b_dec"].float()
    w_enc, gated = tensors["W_enc"].float().T.contiguous(), config["architecture"] == GATED
    if gated:
        w_enc, b_enc, gate = without_gates(
            w_enc, *(tensors[name] for name in ("b_gate", "r_mag", "b_mag"))
        )
    else:
        b_enc = tensors["b_enc"].float()
    if config.get("rescale_acts_by_decoder_norm") and gate.k is not None:
        # Codes are multiplied by these lengths before the largest are taken: directions of unit
        # norm have the same.
        lengths = w_dec.norm(dim=1, keepdim=True)
        w_enc, b_enc, w_dec = w_enc * lengths, b_enc * lengths.squeeze(1), w_dec / lengths
    if gate.threshold is not None and not gated:
        gate = replace(gate, threshold=tensors["threshold"].float())
    metadata = config.get("metadata", {})
    path = folder / SPARSITY
    folded = FoldedSAE(
        w_enc,
        b_enc,
        w_dec,
        b_dec,
        gate,
        unit_length,
        _record(metadata),
        metadata.get("training_architecture", GATED if gated else None),
        10 ** load_file(path)["sparsity"].float() if path.exists() else None,
    )
    return folded if config.get("apply_b_dec_to_input", True) else folded.subtracting_origin(b_enc)


def download(release: str, sae_id: str) -> FoldedSAE:
    """Return an SAE of those that SAELens has readers for, Gemma Scope and others.

    Args:
        release: A key of SAELens' list of pretrained SAEs, or a repository on the hub.
        sae_id: Its name there.

    Raises:
        UsageError: If SAELens is not installed, or the SAE of a kind that is not read.
    """
    if find_spec("sae_lens") is None:
        raise UsageError("SAELens' readers are not here: pip install sae-lens")
    from lightning_sae.interop import saelens_adapter

    with TemporaryDirectory() as folder:
        saelens_adapter.download(release, sae_id, Path(folder))
        return read(Path(folder))


def run(folder: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Return what gives codes and reconstructions by SAELens, or None if it is not installed."""
    if find_spec("sae_lens") is None:
        return None
    from lightning_sae.interop import saelens_adapter

    saelens_adapter.register()
    sae = saelens_adapter.load(folder)
    sae.turn_off_forward_pass_hook_z_reshaping()  # what it is given here is not a head at a time

    @torch.no_grad()
    def encode_and_decode(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return codes, sae.decode(codes)

    return encode_and_decode


def _gate(config: dict[str, Any]) -> Gate:
    architecture = config.get("architecture")
    normalization = config.get("normalize_activations")
    if normalization not in (None, "none", UNIT_LENGTH):
        raise UsageError(f"normalize_activations={normalization!r} of {CONFIG} is not read")
    if config.get("reshape_activations") not in (None, "none", "hook_z"):
        raise UsageError(f"reshape_activations={config['reshape_activations']!r} is not read")
    if architecture == "topk":
        return Gate(k=int(config["k"]))
    if architecture in ("jumprelu", GATED):
        return Gate(threshold=torch.empty(0))
    if architecture == OWN:
        exponent = config.get("rank_discount", 0.0)
        discount = RankDiscount(int(config["k"]), exponent) if exponent else None
        relative = bool(config.get("token_norm"))
        return Gate(threshold=torch.empty(0), relative=relative, discount=discount)
    if architecture == "standard":
        return Gate()
    raise UsageError(f"architecture={architecture!r} of {CONFIG} is not read")


def _is_own(gate: Gate) -> bool:
    """Return whether no class of SAELens has such thresholds."""
    return gate.threshold is not None and (gate.relative or gate.discount is not None)


def _hook_name(folded: FoldedSAE) -> str:
    return str(folded.record.get("trained_on", {}).get("transformer_lens_hook_name"))


def metadata_of(record: dict[str, Any], architecture: str | None) -> dict[str, Any]:
    """Return what SAELens calls metadata.

    Args:
        record: What is known of the training, as `SparseAutoencoder.record`.
        architecture: What the class was called that was trained.
    """
    activations = record.get("trained_on", {})
    names = {name: activations.get(f"{ours}hook_name") for name, ours in HOOKS.items()}
    ends = {name: each if isinstance(each, list) else [each] for name, each in names.items()}
    known = {
        "model_name": activations.get("model_name"),
        "hook_name": ends["hook_name"][0] or ends["hf_hook_name"][0],
        "hf_hook_name": ends["hf_hook_name"][0],
        "context_size": activations.get("context_length"),
        "dataset_path": activations.get("text"),
        "l0": record.get("measured", {}).get("l0"),
        "training_architecture": architecture,
    }
    for name, (_, *target) in ends.items():  # of a transcoder
        known[name.replace("hook_name", "hook_name_out")] = next(iter(target), None)
    if "context_length" in activations:  # how `ActivationDataModule` packs text
        known |= {"prepend_bos": True, "exclude_special_tokens": True}
    told = {name: value for name, value in known.items() if value is not None}
    return {"sae_lens_version": VERSION, **told, "lightning_sae": record}


def _record(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what is known, from our own note if there is one."""
    if isinstance(metadata.get("lightning_sae"), dict):
        return dict(metadata["lightning_sae"])
    names = {
        "model_name": "model_name",
        "hook_name": "transformer_lens_hook_name",
        "hf_hook_name": "hook_name",
        "context_size": "context_length",
        "dataset_path": "text",
    }
    trained_on = {ours: metadata[name] for name, ours in names.items() if metadata.get(name)}
    if (found := site_of(str(metadata.get("hook_name")))) is not None:
        trained_on["layer"], trained_on["site"] = found
    measured = {"l0": float(metadata["l0"])} if metadata.get("l0") else {}
    known = {"trained_on": trained_on, "measured": measured}
    return {name: value for name, value in known.items() if value}
