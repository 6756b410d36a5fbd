"""Where the command begins: what needs no library is answered before any is imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import lightning_sae
from lightning_sae.cli.overview import overview

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

__all__ = ["main"]


def main(args: ArgsType = None) -> None:
    """Run `lightning_sae fit|validate|test|predict|report|export|import|cache`, or tell of them.

    Args:
        args: Command line, without the program's name. Default: that of the process.

    Raises:
        SystemExit: If it fails, with a line that says why, or if no command is given.
    """
    given = sys.argv[1:] if args is None else args
    words = given if isinstance(given, list) else None
    if words and words[0] == "help" and words[1:]:  # as `git help log` is `git log --help`
        args = words = [*words[1:], "--help"]
    if words and words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
    elif words == ["--version"]:
        print(f"lightning_sae {lightning_sae.__version__}")
    elif words == []:
        print(overview(), end="", file=sys.stderr)
        sys.exit(2)
    else:
        from lightning_sae.cli.command import run  # with torch, Lightning and transformers

        run(args)
