"""SAEs in the formats of other libraries: written, read, and compared."""

from lightning_sae.interop.export import Comparison, export
from lightning_sae.interop.folded import FoldedSAE, fold, unfold
from lightning_sae.interop.formats import FORMATS, is_foreign, load_foreign

__all__ = [
    "FORMATS",
    "Comparison",
    "FoldedSAE",
    "export",
    "fold",
    "is_foreign",
    "load_foreign",
    "unfold",
]
