"""The few rows of each feature whose keys are the largest, out of any number that are offered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Largest"]


class Largest:
    """Keeps of each feature the `n` rows of largest key: highest values, or, by lot, a sample.

    Of rows with equal keys, those from the first places are kept.

    Args:
        n_features: Size of the dictionary.
        n: Rows to keep of each feature.
        width: Numbers of a row.
        device: Where they are.

    Attributes:
        key: Of each row, float64, (n_features, n); -inf where there is none.
        place: Where the row is from, int64, (n_features, n); -1 where there is none.
        row: Float32, (n_features, n, width).
    """

    def __init__(
        self, n_features: int, n: int, width: int, device: torch.device | str = "cpu"
    ) -> None:
        self.key = torch.full((n_features, n), -torch.inf, dtype=torch.float64, device=device)
        self.place = torch.full((n_features, n), -1, dtype=torch.int64, device=device)
        self.row = torch.zeros(n_features, n, width, device=device)

    def offer(
        self, feature: Tensor, key: Tensor, place: Tensor, rows: Callable[[Tensor], Tensor]
    ) -> None:
        """Take what is larger than what there is, in place of that.

        Args:
            feature: The feature of each row that is offered, int64, (offered,).
            key: Its key, (offered,).
            place: Where it is from, int64, (offered,); of a feature in ascending order.
            rows: Returns the rows of given numbers among those offered, (numbers, width): only
                those that are taken are asked for.
        """
        n = self.key.shape[1]
        key = key.double()
        number = (key > self.key.amin(1)[feature]).nonzero().squeeze(1)
        number = number[key[number].argsort(descending=True, stable=True)]
        number = number[feature[number].argsort(stable=True)]
        found, group, counts = feature[number].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(number), device=number.device) - (counts.cumsum(0) - counts)[group]
        number, at = number[rank < n], (group[rank < n], rank[rank < n])
        new_key = self.key.new_full((len(found), n), -torch.inf).index_put_(at, key[number])
        new_place = self.place.new_full((len(found), n), -1).index_put_(at, place[number])
        numbers = number.new_zeros(len(found), n).index_put_(at, number)

        keys = torch.cat([self.key[found], new_key], dim=1)
        places = torch.cat([self.place[found], new_place], dim=1)
        stays = torch.zeros_like(keys, dtype=torch.bool)
        stays.scatter_(1, _descending(keys, places)[:, :n], True)
        # Of each feature as many go as come.
        group, slot = (~stays[:, :n]).nonzero(as_tuple=True)
        taken = numbers[stays[:, n:]]
        slots = found[group], slot
        self.key[slots], self.place[slots] = key[taken], place[taken]
        self.row[slots] = rows(taken)

    def by_key(self) -> tuple[Tensor, Tensor]:
        """Return the places and the rows of each feature, that of the largest key first."""
        return self._arranged(_descending(self.key, self.place))

    def by_column(self, column: int) -> tuple[Tensor, Tensor]:
        """Return them with the row first that has the largest number in a column, and none last."""
        there = self.row[..., column].double().where(self.place >= 0, -torch.inf)
        return self._arranged(_descending(there, self.place))

    def _arranged(self, order: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.row.gather(1, order.unsqueeze(-1).expand_as(self.row))
        return self.place.gather(1, order), rows


def _descending(keys: Tensor, places: Tensor) -> Tensor:
    """Return the order of each row by key, the largest first, and then by place, the least first.

    Args:
        keys: (rows, columns).
        places: (rows, columns).
    """
    by_place = places.argsort(dim=1, stable=True)
    order = keys.gather(1, by_place).argsort(dim=1, descending=True, stable=True)
    return by_place.gather(1, order)
