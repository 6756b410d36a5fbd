"""The formats by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol, cast

from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.interop import dictionary_learning, openmoss, saelens, sparsify
from lightning_sae.interop.folded import FoldedSAE

__all__ = ["FORMATS", "Format", "is_foreign", "load_foreign"]


class Format(Protocol):
    """What the module of a format has.

    Attributes:
        LIBRARY: What hubs, or else pip, call the library.
    """

    LIBRARY: str

    def loading(self, folded: FoldedSAE) -> str:
        """Return the lines of Python that load it with the library."""

    def write(self, folded: FoldedSAE, folder: Path) -> None:
        """Write the files."""

    def read(self, folder: Path) -> FoldedSAE:
        """Read them."""

    def run(self, folder: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """Load them with the library itself, if it is installed."""


FORMATS: Final = MappingProxyType(
    {
        "saelens": cast(Format, saelens),
        "sparsify": cast(Format, sparsify),
        "dictionary_learning": cast(Format, dictionary_learning),
        "openmoss": cast(Format, openmoss),
    }
)
"""By the names that `export` and `load_foreign` know."""


def is_foreign(path: str | Path) -> bool:
    """Return whether a path begins as `load_foreign` takes it."""
    name, colon, _ = str(path).partition(":")
    return bool(colon) and name in FORMATS


def load_foreign(path: str) -> FoldedSAE:
    """Return an SAE that another library has written.

    Args:
        path: `FORMAT:FOLDER`, for example `saelens:downloads/layer_8`. Or `saelens:RELEASE:ID`, for
            what SAELens' `SAE.from_pretrained(RELEASE, ID)` downloads, such as Gemma Scope.

    Raises:
        UsageError: If there is none, it is damaged, or is of a kind that is not read.
    """
    name, _, folder = path.partition(":")
    if name not in FORMATS:
        raise UsageError(f"{path} begins with none of {', '.join(f'{each}:' for each in FORMATS)}")
    where = Path(folder).expanduser()
    release, of_release, sae_id = folder.partition(":")
    downloaded = name == "saelens" and bool(of_release) and not where.is_dir()
    if not (downloaded or where.is_dir()):
        raise UsageError(f"{path}: there is no such folder")
    try:
        return saelens.download(release, sae_id) if downloaded else FORMATS[name].read(where)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:  # there is no end to what broken files raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path} is no SAE of {name}, or is damaged: {reason}") from error
