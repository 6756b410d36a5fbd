"""The configurations that ship with the package, by name."""

from pathlib import Path
from typing import Final

import lightning_sae

__all__ = ["PACKAGE", "find_config", "packaged_configs"]

PACKAGE: Final = Path(lightning_sae.__file__).parent


def packaged_configs() -> list[str]:
    """Return the names of the configurations that ship with the package."""
    folders = (folder / "configs" for folder in (PACKAGE, PACKAGE.parent))
    return [path.relative_to(each).as_posix() for each in folders for path in each.rglob("*.yaml")]


def find_config(name: str) -> str:
    """Return the path of a configuration: as given if it exists, else where it is packaged.

    In a wheel the configurations lie inside the package, in a checkout beside it.
    """
    packaged = (folder / "configs" / name for folder in (PACKAGE, PACKAGE.parent))
    return next((str(path) for path in (Path(name), *packaged) if path.is_file()), name)
