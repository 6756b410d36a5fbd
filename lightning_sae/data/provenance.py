"""What a run was trained on: checkpoints note it, and runs that read one compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_sae.checks import UsageError
from lightning_sae.data.blocks import Inputs, NumberedInputs

__all__ = ["ORDER", "compare", "fingerprint", "require_same_activations"]

ORDER: Final = frozenset({"model_name", "batch_size", "batches_per_block"})
"""Arguments that decide which inputs a place in the stream means, though not which there are."""


def fingerprint(inputs: Inputs) -> str | None:
    """Return what tells inputs from others, as 16 hexadecimal digits: their number and a few.

    Returns:
        None if they have no length and would have to be read in order, or are others each time.
    """
    if not hasattr(inputs, "__len__"):
        return None
    numbered = cast(NumberedInputs, inputs)
    total = len(numbered)
    digest = hashlib.sha256(str(total).encode())
    for number in range(0, total, max(1, total // 16)):
        each = numbered[number].cpu().contiguous()
        if not torch.equal(each, numbered[number].cpu()):  # drawn anew each time it is read
            return None
        digest.update(f"{each.dtype} {tuple(each.shape)}".encode())
        digest.update(each.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def compare(now: Mapping[str, Any], before: Mapping[str, Any], resumed: bool, source: str) -> None:
    """Refuse a checkpoint of other activations; if a run is resumed, also one of other inputs.

    Args:
        now: The state of a data module, of `StreamDataModule.state_dict`.
        before: That in the checkpoint. What it does not have is not compared.
        resumed: Whether training is to go on.
        source: What messages call the data.

    Raises:
        UsageError: If it is one. A model and its text may have moved.
    """
    require_same_activations(now["activations"], before.get("activations", {}))
    if not resumed:
        return
    here, was = (each.get("activations", {}).get("rounded_to") for each in (now, before))
    if here != was:
        rank_zero_warn(f"cache_dtype={here!r} was {was!r} in the checkpoint: activations differ")
    pairs = {name: (now["place"].get(name), was) for name, was in before["place"].items()}
    changed = {name: (here, was) for name, (here, was) in pairs.items() if here != was}
    _require_same_inputs(changed, now["inputs"], before.get("inputs"), source)


def require_same_activations(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another layer, site, dtype or other weights, where it notes them.

    Args:
        now: What activations are, as `StreamDataModule.description` says.
        before: What they were.

    Raises:
        UsageError: If they are others.
    """
    if "layer" in before:
        before = {"site": "resid_post", **before}  # of one that does not say, there was no other
    for name in ("layer", "site", "model_dtype"):
        if name in before and name in now and now[name] != before[name]:
            raise UsageError(
                f"{name}={now[name]!r}: the checkpoint was trained on {before[name]!r}"
            )
    if "weights" in before and "weights" in now and now["weights"] != before["weights"]:
        here, was = now.get("model_name"), before.get("model_name")
        raise UsageError(
            f"model_name={here!r} has the weights {now['weights']}: the checkpoint "
            f"was trained on model_name={was!r}, which had {before['weights']}"
        )


def _require_same_inputs(
    changed: Mapping[str, tuple[Any, Any]], now: str | None, before: str | None, source: str
) -> None:
    """Refuse inputs of another fingerprint; where one is not known, other arguments."""
    named = sorted(changed.keys() - ORDER)
    known = now is not None and before is not None
    if not (now != before if known else named):
        return
    if named:
        here, was = changed[named[0]]
        raise UsageError(f"{named[0]}={here!r}: the checkpoint was trained on {was!r}")
    raise UsageError(
        f"{source} is no longer what the checkpoint was trained on: it reads as {now}, not {before}"
    )
