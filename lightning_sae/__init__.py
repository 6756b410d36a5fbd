"""Sparse autoencoders on transformer activations, as PyTorch Lightning modules.

What is public is what `lightning_sae.__all__` names, and what the `__all__` of
`lightning_sae.allocation`, `callbacks`, `data`, `interop`, `interventions`, `metrics`, `report` and
`zipf` does. Everything else may change without notice.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_sae.public import *  # noqa: F403 - one list of names is enough, and it is there
    from lightning_sae.public import __all__ as __all__
else:  # a type checker would take it that any name is there

    def __getattr__(name: str) -> Any:
        """Import what is public, and torch with it, when the first of it is asked for."""
        if find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        public = import_module(f"{__name__}.public")
        globals().update({each: getattr(public, each) for each in ("__all__", *public.__all__)})
        if name in globals():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module(f"{__name__}.public").__all__})
