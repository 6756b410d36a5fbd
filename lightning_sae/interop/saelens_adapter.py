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

from lightning_sae.allocation import RankDiscount
from lightning_sae.core.gate import Gate
from lightning_sae.interop.folded import OWN

__all__ = ["GeneralJumpReLUSAE", "GeneralJumpReLUSAEConfig", "download", "load", "register"]


@dataclass
class GeneralJumpReLUSAEConfig(JumpReLUSAEConfig):  # type: ignore[misc]  # SAELens has no types
    """Settings of a `GeneralJumpReLUSAE`.

    Attributes:
        token_norm: Whether thresholds are multiples of the token's distance from `b_dec`.
        k: Features of a token that count in full; the r-th has to reach `(r / k) ** rank_discount`
            times its threshold.
        rank_discount: See `k`. At 0 all count in full.
    """

    token_norm: bool = False
    k: int = 1
    rank_discount: float = 0.0

    @classmethod
    def architecture(cls) -> str:
        """Return the name it is registered by."""
        return OWN


class GeneralJumpReLUSAE(JumpReLUSAE):  # type: ignore[misc]  # SAELens has no types
    """A JumpReLU SAE by whose thresholds tokens, and a token's features, can differ."""

    cfg: GeneralJumpReLUSAEConfig

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return codes (..., d_sae) of activations (..., d_in)."""
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        origin = 0 if self.cfg.apply_b_dec_to_input else self.b_dec
        lengths = (sae_in - origin).norm(dim=-1, keepdim=True)
        exponent = self.cfg.rank_discount
        discount = RankDiscount(self.cfg.k, exponent) if exponent else None
        gate = Gate(threshold=self.threshold, relative=self.cfg.token_norm, discount=discount)
        cut = gate.cut(hidden_pre, lengths)
        codes = self.activation_fn(hidden_pre) * (hidden_pre > cut)
        result: torch.Tensor = self.hook_sae_acts_post(codes)
        return result


def register() -> None:
    """Have SAELens load such SAEs by `SAE.load_from_disk` and `SAE.from_pretrained`."""
    if OWN not in SAE_CLASS_REGISTRY:
        register_sae_class(OWN, GeneralJumpReLUSAE, GeneralJumpReLUSAEConfig)


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
