"""What an SAE is and learns: pure torch, without a Trainer."""

from lightning_sae.core.autoencoder import Autoencoder
from lightning_sae.core.dictionary import Dictionary
from lightning_sae.core.firing_history import FiringHistory

__all__ = ["Autoencoder", "Dictionary", "FiringHistory"]
