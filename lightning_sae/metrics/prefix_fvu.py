"""How much of the variance the first features of a dictionary miss by themselves."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_sae.metrics.fraction_of_variance_unexplained import FractionOfVarianceUnexplained

__all__ = ["PrefixFVU", "of_prefixes"]


class PrefixFVU(FractionOfVarianceUnexplained):
    """`FractionOfVarianceUnexplained` of one of the dictionaries within a Matryoshka SAE.

    ``update`` takes what each of them leaves of the activations, and the activations, all of shape
    (..., d_model). ``compute`` returns a float32 scalar.

    Args:
        d_model: Length of an activation.
        place: Which of them it is of, from 0.
        **kwargs: As of every `torchmetrics.Metric`; see `TotalsMetric`.

    Example:
        >>> import torch
        >>> fvu = PrefixFVU(2, place=0)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
        >>> fvu.update([torch.tensor([1.0, 0.0]).expand(2, 2)], x)
        >>> fvu.compute()
        tensor(0.2000)
    """

    def __init__(self, d_model: int, place: int, **kwargs: Any) -> None:
        super().__init__(d_model, **kwargs)
        self.place = place

    def update(self, prefix_errors: Sequence[Tensor], activations: Tensor) -> None:  # type: ignore[override]  # metrics take what they name
        """Add a batch of errors, one tensor a dictionary, and of the activations they are of."""
        super().update(activations - prefix_errors[self.place], activations)


def of_prefixes(d_model: int, prefixes: Sequence[int] | None, **options: Any) -> dict[str, Any]:
    """Return one metric for each of the smaller dictionaries, as ``fvu_first_<its size>``.

    Args:
        d_model: Width of the activations.
        prefixes: Their sizes; none if None.
        options: What every `torchmetrics.Metric` takes.
    """
    sizes = enumerate(prefixes or ())
    return {f"fvu_first_{size}": PrefixFVU(d_model, place, **options) for place, size in sizes}
