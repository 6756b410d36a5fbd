"""The command `lightning_sae`."""

from lightning_sae.cli.command import SparseAutoencoderCLI, find_config, main

__all__ = ["SparseAutoencoderCLI", "find_config", "main"]
