"""The results of a test as a person wants to read them."""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_sae.callbacks.find_sae import trained_together
from lightning_sae.part import part_of

_MEANINGS = {
    "fvu": "share of the activations' variance not reconstructed",
    "l0": "features that fire on a token, mean",
    "l0_std": "features that fire on a token, spread over tokens",
    "l0_correlation_surprise": "correlation of matches with how surprising the token was",
    "l0_correlation_next_loss": "the same with how hard the next token is to predict",
    "l0_correlation_distance": "the same with the activation's distance from the mean",
    "dead_fraction": "share of features that never fired",
    "dying_fraction": "share of features alive but far below their Zipf density",
    "zipf_exponent": "slope s of the Zipf-Mandelbrot law of densities",
    "zipf_offset": "rank q below which that law flattens",
    "zipf_r2": "R^2 of that law, in log density, over all live ranks",
    "zipf_r2_middle": "the same over the middle ranks",
    "zipf_tail_deviation": "largest distance of a rare feature from it, in log density",
    "mmcs_true": "largest cosine of a true direction with a learned one, mean",
    "mmcs_learned": "largest cosine of a learned direction with a true one, mean",
    "uniqueness": "true features that are nearest to a learned one, as a share of these",
    "unmatched_fraction": "share of true features that are nearest to no learned one",
    "feature_precision": "share of a feature's firings at which its true one fires, mean",
    "feature_recall": "share of the true one's firings at which it fires, mean",
    "feature_f1": "harmonic mean of both, mean over features",
    "feature_accuracy": "share of tokens on which both fire or neither does, mean",
    "absorption": "share of firings of a parent that another feature stands in for",
    "absorption_fraction": "share of a parent that others explain where it fires, mean",
    "tokens": "tokens tested on",
    "threshold": "score above which a feature fires, mean",
    "loss_recovered_mean": "language model's loss recovered, against mean ablation",
    "loss_recovered_zero": "language model's loss recovered, against zero ablation",
    "delta_ce": "rise of that loss by the reconstruction, nats per token",
    "kl": "divergence of the model's predictions, nats per token",
    "ce_clean": "language model's loss as it is, nats per token",
    "ce_spliced": "the same with reconstructed activations",
    "ce_mean": "the same with the mean activation",
    "ce_zero": "the same with zeros for activations",
}


class ResultsTable(Callback):
    """Prints all `test/` metrics as one table when `Trainer.test` ends.

    Of several SAEs that are trained together each has a column.

    Pass `verbose=False` to `Trainer.test`, which prints a table of its own otherwise.
    """

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table, on one rank only."""
        if trainer.is_global_zero:
            found = trainer.callback_metrics.items()
            results = {k[5:]: v.item() for k, v in found if k.startswith("test/")}
            names = [part_of(each).name for each in trained_together(pl_module)]
            print(results_table(results, [name for name in names if name]))


def results_table(results: Mapping[str, float], columns: Sequence[str] = ()) -> str:
    """Lay out results in aligned lines, with what each one means where that is known.

    Args:
        results: Values by name. Known names come first, in a fixed order.
        columns: What some names begin with, before a `/`: those of a column.

    Example:
        >>> print(results_table({"my_metric": 2.0, "tokens": 131072.0, "fvu": 0.123456}))
        fvu         0.1235  share of the activations' variance not reconstructed
        tokens     131,072  tokens tested on
        my_metric        2
    """
    cells: dict[str, dict[str, str]] = {}  # by row and column
    for name, value in results.items():
        column, _, row = name.partition("/")
        column, row = (column, row) if column in columns else ("", name)
        cells.setdefault(row, {})[column] = _number(value)
    known = [name for name in _MEANINGS if name in cells]
    rows = known + [name for name in cells if name not in _MEANINGS]
    shown = [each for each in ("", *columns) if any(each in cells[row] for row in rows)]
    lines = [[row, *(cells[row].get(each, "") for each in shown)] for row in rows]
    if columns:
        lines.insert(0, ["", *shown])
    left, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)] or [0]
    return "\n".join(
        "  ".join(
            [name.ljust(left), *map(str.rjust, values, widths), _MEANINGS.get(name, "")]
        ).rstrip()
        for name, *values in lines
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
