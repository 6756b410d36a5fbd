"""SAEs in the formats of other libraries: written, read, and compared."""

from lightning_sae.interop.export import Comparison, export
from lightning_sae.interop.folded import FoldedSAE, fold, unfold
from lightning_sae.interop.formats import FORMATS, load_foreign

__all__ = ["FORMATS", "Comparison", "FoldedSAE", "export", "fold", "load_foreign", "unfold"]
