"""Prints how exact exports are, as docs/exchange.md tells: `python -m tests.interop.errors`.

The libraries themselves must be installed: `pip install '.[interop]'`.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_sae import UsageError
from lightning_sae.interop import FORMATS, Comparison, export, fold
from tests.helpers.foreign import KINDS, tokens, trained

LIBRARIES = ["saelens", "dictionary_learning", "sparsify"]
ACTIVATIONS = 4096


def compared(to: str, kind: str, normalize_inputs: str) -> list[Comparison]:
    """Return what `export` finds of an SAE of a kind; nothing if the format cannot say it."""
    sae = trained(kind, normalize_inputs=normalize_inputs)
    with TemporaryDirectory() as folder:
        try:
            FORMATS[to].write(fold(sae), Path(folder))
        except UsageError:
            return []
    with TemporaryDirectory() as folder:
        found = export(sae, to, Path(folder), tokens(ACTIVATIONS))
    if any(each.by != to for each in found):
        raise SystemExit(f"{to} is not installed")
    return found


def main() -> None:
    """Print a table of kinds and libraries, and the largest of each of these."""
    every: dict[str, list[Comparison]] = {to: [] for to in LIBRARIES}
    print(f"Largest errors on {ACTIVATIONS:,} activations, of their spread:\n")
    print(f"| | {' | '.join(LIBRARIES)} |\n|{'---|' * (1 + len(LIBRARIES))}")
    for kind in KINDS:
        for normalize in ("average", "token"):
            row = {to: compared(to, kind, normalize) for to in LIBRARIES}
            cells = [f"{max(c.error for c in row[to]):.1e}" if row[to] else "" for to in row]
            print(f"| {kind}, {normalize} | {' | '.join(cells)} |", flush=True)
            for to, found in row.items():
                every[to] += found
    print("| all | " + " | ".join(f"{max(c.error for c in every[to]):.1e}" for to in every) + " |")
    ties = sum(comparison.near_a_tie for found in every.values() for comparison in found)
    print(f"\nTokens that had other features: {ties}")


if __name__ == "__main__":
    main()
