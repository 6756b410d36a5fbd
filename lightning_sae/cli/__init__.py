"""The command `lightning_sae`."""

from lightning_sae.cli.command import SparseAutoencoderCLI, main
from lightning_sae.cli.parser import find_config

__all__ = ["SparseAutoencoderCLI", "find_config", "main"]
