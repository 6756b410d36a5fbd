"""Dictionaries within a dictionary: Matryoshka, Bussmann et al. 2025, arXiv 2503.17547."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.core.dictionary import Dictionary
from lightning_sae.core.input_scaling import NormalizeInputs
from lightning_sae.matches import Matches
from lightning_sae.parallel import wide_rows

__all__ = ["NestedDictionary", "split"]


class NestedDictionary(Dictionary):
    """A dictionary of which some first features are to be dictionaries by themselves.

    Whatever rule chose the matches, a smaller dictionary reconstructs by those of them that are its
    own. So the first features become general ones: none may be left to a later, more special one.

    Args:
        d_model: Width of the activations.
        n_features: Size of the dictionary.
        normalize_inputs: `lightning_sae.core.input_scaling.NormalizeInputs`.
        prefixes: Sizes of the smaller ones, ascending. Default: there are none.

    Attributes:
        prefixes: As given.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        normalize_inputs: NormalizeInputs = "average",
        prefixes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(d_model, n_features, normalize_inputs)
        self.prefixes = None if prefixes is None else list(prefixes)
        sizes = [0, *(self.prefixes or ()), n_features]
        if sorted(set(sizes)) != sizes:
            raise UsageError(
                f"prefixes={self.prefixes} must ascend, from at least 1 to less than "
                f"n_features={n_features}"
            )

    def prefix_order(self) -> Tensor | None:
        """Return the place of each feature, by which it belongs to prefixes, int64, (n_features,).

        None, the default: as they are numbered.
        """
        return None

    def targets(self, x: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is to be reconstructed of activations, and what of it matches are to.

        Args:
            x: Activations, shape (tokens, d_model).
            scaled: The same, scaled: which by default are both of them.
        """
        return scaled, scaled

    def prefix_errors(self, x: Tensor, matches: Matches) -> list[Tensor]:
        """Return what each smaller dictionary leaves of activations, in their own units.

        Args:
            x: Activations, shape (tokens, d_model).
            matches: Those of their tokens.
        """
        if not self.prefixes:
            return []
        _, target = self.targets(x, self.scaled(x))
        return [error / self.scales(x) for error in self.errors(target, matches)[:-1]]

    def errors(self, target: Tensor, matches: Matches) -> list[Tensor]:
        """Return what each dictionary leaves of activations, (tokens, d_model); the last is whole.

        Costs what `reconstruct` does, but for sums of vectors: each match is decoded once.

        Args:
            target: What matches are to reconstruct, scaled, shape (tokens, d_model).
            matches: Those of their tokens.
        """
        if not self.prefixes:
            return [target - self.reconstruct(matches)]
        parts = self.sum_directions(split(matches, self.prefixes, self.prefix_order()))
        (origin,) = wide_rows(self.decoder.bias)
        parts = parts.view(len(target), len(self.prefixes) + 1, len(origin))
        errors = [target - origin]
        for part in parts.unbind(1):
            errors.append(errors[-1] - part)
        return errors[1:]


def split(matches: Matches, prefixes: Sequence[int], order: Tensor | None = None) -> Matches:
    """Return matches as of several tokens for each: one for the features between two prefixes.

    Args:
        matches: Sorted by token, then by feature.
        prefixes: Sizes, ascending, the largest less than all.
        order: As `NestedDictionary.prefix_order` returns it.

    Returns:
        Of ``len(prefixes) + 1`` times as many tokens, which are those of a token one after another.

    Example:
        >>> matches = Matches(torch.tensor([0, 0]), torch.tensor([0, 2]), torch.ones(2), (1, 3))
        >>> split(matches, [1]).to_dense()
        tensor([[1., 0., 0.],
                [0., 0., 1.]])
    """
    sizes = torch.tensor(prefixes, device=matches.feature.device)
    place = matches.feature if order is None else order[matches.feature]
    count, (tokens, features) = len(prefixes) + 1, matches.shape
    token = matches.token * count + torch.bucketize(place, sizes, right=True)
    parts = Matches(token, matches.feature, matches.value, (tokens * count, features))
    if order is not None:
        return parts.select(token.argsort(stable=True))
    _, feature, by_feature = matches.by_feature  # which is the order of the parts too
    parts.by_feature = (token[by_feature], feature, by_feature)
    return parts
