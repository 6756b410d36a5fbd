"""Which Zipf-Mandelbrot law the budgets of Feature Choice follow.

Ayonrinde 2024 (arXiv 2411.02124) sets budgets by a Zipf distribution; its constants were not
available.
"""

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_sae.core.firing_history import FiringHistory
from lightning_sae.zipf import ZipfFitError, fit_zipf

__all__ = ["budget_law"]


def budget_law(
    history: FiringHistory, exponent: float | None, offset: float | None
) -> tuple[float, float]:
    """Return s and q of budgets (rank + q)^-s: as given, else as fitted, else a guess.

    Args:
        history: Whose densities the law is fitted to.
        exponent: s, if it is given. Guess: 1.
        offset: q, if it is given. Guess: a thousandth of the features.
    """
    guess = 1.0, len(history.density) / 1000
    if None in (exponent, offset) and history.density.any():
        try:
            fit = fit_zipf(history.density, history.window)
            guess = fit.exponent, fit.offset
            rank_zero_info(
                f"Features choose from now on: budgets follow (rank + {fit.offset:.4g})^"
                f"-{fit.exponent:.4g}, as densities do with R^2 = {fit.r2:.3f}, "
                f"{fit.r2_middle:.3f} in the middle ranks"
            )
        except ZipfFitError as error:
            rank_zero_warn(f"Budgets follow s={guess[0]}, q={guess[1]}: {error}")
    return guess[0] if exponent is None else exponent, guess[1] if offset is None else offset
