"""What SAELens has no class for, as a class of its own: needs `pip install sae-lens`.

import lightning_sae.interop.saelens_adapter as adapter
adapter.register()
SAE.load_from_disk(folder)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class

from lightning_sae.interop.folded import RELATIVE

__all__ = ["TokenNormJumpReLUSAE", "TokenNormJumpReLUSAEConfig", "download", "load", "register"]


@dataclass
class TokenNormJumpReLUSAEConfig(JumpReLUSAEConfig):  # type: ignore[misc]  # SAELens has no types
    """Settings of a `TokenNormJumpReLUSAE`."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name it is registered by."""
        return RELATIVE


class TokenNormJumpReLUSAE(JumpReLUSAE):  # type: ignore[misc]  # SAELens has no types
    """A JumpReLU SAE whose thresholds are multiples of the token's distance from `b_dec`."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return codes (..., d_sae) of activations (..., d_in)."""
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        origin = 0 if self.cfg.apply_b_dec_to_input else self.b_dec
        lengths = (sae_in - origin).norm(dim=-1, keepdim=True)
        codes = self.activation_fn(hidden_pre) * (hidden_pre > self.threshold * lengths)
        result: torch.Tensor = self.hook_sae_acts_post(codes)
        return result


def register() -> None:
    """Have SAELens load such SAEs by `SAE.load_from_disk` and `SAE.from_pretrained`."""
    if RELATIVE not in SAE_CLASS_REGISTRY:
        register_sae_class(RELATIVE, TokenNormJumpReLUSAE, TokenNormJumpReLUSAEConfig)


def load(folder: Path) -> Any:
    """Return the SAE in a folder, as SAELens has it."""
    return SAE.load_from_disk(folder)


def download(release: str, sae_id: str, folder: Path) -> None:
    """Write what SAELens' readers make of a released SAE to a folder, in SAELens' own format.

    Args:
        release: As `SAE.from_pretrained` takes it.
        sae_id: Likewise.
        folder: Where to write.
    """
    sae = SAE.from_pretrained(release, sae_id)
    known = get_pretrained_saes_directory().get(release)
    l0 = known.expected_l0.get(sae_id) if known is not None else None
    if sae.cfg.metadata.l0 is None:  # which it is of what is not there
        sae.cfg.metadata.l0 = l0
    sae.save_model(folder)
