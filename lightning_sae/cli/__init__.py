"""The command `lightning_sae`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_sae.cli.configurations import find_config
from lightning_sae.cli.entry import main

__all__ = ["SparseAutoencoderCLI", "find_config", "main"]

if TYPE_CHECKING:
    from lightning_sae.cli.command import SparseAutoencoderCLI
else:  # a type checker would take it that any name is there

    def __getattr__(name: str) -> Any:
        """Import the class, and Lightning with it, when it is asked for."""
        if name == "SparseAutoencoderCLI":
            return import_module(f"{__name__}.command").SparseAutoencoderCLI
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
