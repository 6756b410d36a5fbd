"""The outcome of an allocation: which features each token is matched with, and how strongly."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_sae.host_copy import true_places

Pairs = tuple[Tensor, Tensor, Tensor]  # token, feature and value of each


@dataclass(eq=False)  # not frozen: Lightning moves what predict_step returns between devices
class Matches:
    """Token-feature pairs that are switched on, sorted by token, then by feature.

    A feature fires on a token where its code is above 0, here as in dense codes. The rules choose
    no other pairs; of those that come from elsewhere, one of value 0, below, or NaN is no firing.

    Attributes:
        token: Row of each match, int64, shape (matches,).
        feature: Column of each match, int64, shape (matches,).
        value: Activation of each match, shape (matches,). Carries the gradient.
        shape: (tokens, features) of the affinities the matches were chosen from.

    Example:
        >>> token, feature = torch.tensor([0, 0]), torch.tensor([0, 2])
        >>> matches = Matches(token, feature, torch.tensor([0.5, 2.0]), shape=(1, 3))
        >>> matches.per_feature()
        tensor([1, 0, 1])
        >>> matches.to_dense()
        tensor([[0.5000, 0.0000, 2.0000]])
    """

    token: Tensor
    feature: Tensor
    value: Tensor
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.token.numel()

    def to_dense(self, values: Tensor | None = None) -> Tensor:
        """Return the codes as one tensor of shape (tokens, features), zero where no match is.

        Args:
            values: What to put in place of `value`, shape (matches,).
        """
        values = self.value if values is None else values
        return values.new_zeros(self.shape).index_put((self.token, self.feature), values)

    def select(self, chosen: Tensor, count: int | None = None) -> "Matches":
        """Return the matches that a mask (matches,) marks, or those of given numbers, int64.

        Args:
            chosen: Either of them.
            count: How many a mask marks, if that is known: else a device has to be asked.
        """
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero().squeeze(1) if count is None else true_places(chosen, count)
        return Matches(self.token[chosen], self.feature[chosen], self.value[chosen], self.shape)

    def of_first(self, tokens: int) -> "Matches":
        """Return the matches of the first tokens only, so many."""
        count = int((self.token < tokens).sum())
        columns = self.token[:count], self.feature[:count], self.value[:count]
        return Matches(*columns, (tokens, self.shape[1]))

    def with_values(self, value: Tensor) -> "Matches":
        """Return the same pairs with other values, shape (matches,)."""
        matches = Matches(self.token, self.feature, value, self.shape)
        if value.requires_grad:  # gradients of both will need it: sort once
            matches.by_feature = self.by_feature
        return matches

    def sort(self) -> "Matches":
        """Return matches that are sorted by feature, then by token, the other way round."""
        order = self.token.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        matches = self.select(order)
        matches.by_feature = (self.token, self.feature, back)
        return matches

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and features of the matches sorted by feature, and the order that does it."""
        order = self.feature.argsort(stable=True)
        return self.token[order], self.feature[order], order

    def per_token(self) -> Tensor:
        """Return the number of features that fire on each token, int64, shape (tokens,)."""
        return self._firings(self.token, self.shape[0])

    def per_feature(self) -> Tensor:
        """Return the number of tokens on which each feature fires, int64, shape (features,)."""
        return self._firings(self.feature, self.shape[1])

    def _firings(self, place: Tensor, places: int) -> Tensor:
        counts = torch.zeros(places, dtype=torch.int64, device=place.device)
        return counts.index_add_(0, place, (self.value > 0).long())
