"""The data module for activations whose features are known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.known_features import KnownFeatures
from lightning_sae.data.stream_datamodule import StreamDataModule
from lightning_sae.matches import Matches

__all__ = ["SyntheticDataModule"]

_TRAIN, _HELD_OUT = 4, 5  # what is drawn, beside what other parts draw by the seed
_TRUTH: Final = ("true_features", "true_l0", "zipf_exponent", "zipf_offset")
_DEPENDENCE: Final = ("correlation", "children")


class SyntheticDataModule(StreamDataModule):
    """Activations made of known features, in the same stream as those of a model.

    There is no end to them, and none comes twice. A checkpoint of other features is refused, to
    test it too. `lightning_sae.callbacks.TruthCallback` measures an SAE against these features.

    Args:
        d_model: Width of the activations.
        true_features: Features that activations are made of.
        true_l0: How many of them fire on a token, on average.
        zipf_exponent: s of their densities (rank + q)^-s.
        zipf_offset: q of them.
        correlation: What features have in common, a share of variance, 0 to less than 1.
        children: Features that fire only where a certain other does, for each that has some.
        batch_size: Tokens of a training batch, over all devices.
        batches_per_block: Batches that are drawn together, and kept in memory twice.
        validation_tokens: Held-out tokens to validate on, in whole runs of 256.
        test_tokens: Held-out tokens to test on: those that come after.
        seed: Seed of the features, and of which fire when.

    Attributes:
        truth: The features.

    Raises:
        UsageError: If an argument is out of its range.

    Example:
        >>> data = SyntheticDataModule(d_model=8, true_features=20, true_l0=2.0, batch_size=256)
        >>> next(iter(data.train_dataloader()))["activations"].shape
        torch.Size([256, 8])
        >>> held_out = next(iter(data.val_dataloader()))
        >>> data.true_codes(held_out).shape
        (4096, 20)
    """

    noun: ClassVar[str] = "runs of tokens"
    input_key: ClassVar[str] = "run_numbers"
    place: ClassVar[tuple[str, ...]] = (*StreamDataModule.place, "d_model", *_TRUTH, *_DEPENDENCE)
    source = "synthetic data"

    def __init__(
        self,
        d_model: int = 256,
        true_features: int = 2048,
        true_l0: float = 16.0,
        *,
        zipf_exponent: float = 1.0,
        zipf_offset: float = 10.0,
        correlation: float = 0.0,
        children: int = 0,
        batch_size: int = 2048,
        batches_per_block: int = 8,
        validation_tokens: int = 32_768,
        test_tokens: int = 131_072,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            batches_per_block=batches_per_block,
            validation_tokens=validation_tokens,
            test_tokens=test_tokens,
            seed=seed,
        )
        self.save_hyperparameters()
        self.true_features = true_features
        self.true_l0 = true_l0
        self.zipf_exponent = zipf_exponent
        self.zipf_offset = zipf_offset
        self.correlation = correlation
        self.children = children
        self.truth = KnownFeatures(
            d_model,
            true_features,
            true_l0,
            zipf_exponent=zipf_exponent,
            zipf_offset=zipf_offset,
            correlation=correlation,
            children=children,
            seed=seed,
        )

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.truth.directions.shape[1]

    @property
    def description(self) -> dict[str, Any]:
        """What the features are: the arguments that decide."""
        return {name: getattr(self, name) for name in ("d_model", *_TRUTH, *_DEPENDENCE, "seed")}

    @property
    def positions_per_input(self) -> int:
        """Tokens of a run, which are drawn together."""
        return 256

    @property
    def inputs_at_once(self) -> int:
        """Runs that are drawn at once."""
        return 16

    def train_inputs(self) -> _Numbers:
        """Return the numbers of all runs."""
        return _Numbers()

    held_out_inputs = train_inputs

    def read(self, inputs: Tensor) -> Tensor:
        """Return the activations of runs to train on, (runs, 256, d_model)."""
        return self._read(_TRAIN, inputs)

    def read_held_out(self, inputs: Tensor) -> Tensor:
        """Return the activations of runs that are held out, (runs, 256, d_model)."""
        return self._read(_HELD_OUT, inputs)

    def true_codes(self, batch: dict[str, Any]) -> Matches:
        """Return which features a held-out batch was made of, (tokens, true_features), on the CPU.

        Args:
            batch: As `val_dataloader`, `test_dataloader` and `predict_dataloader` yield it.
        """
        runs = [self._codes(_HELD_OUT, number) for number in batch[self.input_key].tolist()]
        length = self.positions_per_input
        token = torch.cat([run.token + place * length for place, run in enumerate(runs)])
        feature, value = (torch.cat([getattr(r, n) for r in runs]) for n in ("feature", "value"))
        return Matches(token, feature, value, (len(runs) * length, self.true_features))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue right after the batch that was consumed last when the state was saved.

        Raises:
            UsageError: If it is of other features.
        """
        before = state_dict.get("activations", {})
        for name, here in self.description.items():
            if name in before and before[name] != here:
                was = before[name]
                raise UsageError(f"{name}={here!r}: the checkpoint was trained on {was!r}")
        super().load_state_dict(state_dict)

    def _codes(self, part: int, number: int) -> Matches:
        return self.truth.draw(self.positions_per_input, key=(part, number))

    def _read(self, part: int, inputs: Tensor) -> Tensor:
        runs = [self.truth.activations(self._codes(part, number)) for number in inputs.tolist()]
        return torch.stack(runs).to(self._device)


class _Numbers:
    """0, 1, 2 and so on, each a tensor, without end; they go on where they were, if told to."""

    def __init__(self) -> None:
        self._first = self._next = 0

    def __iter__(self) -> Iterator[Tensor]:
        first, self._first = self._first, 0
        for number in itertools.count(first):
            self._next = number + 1
            yield torch.tensor(number)

    def state_dict(self) -> dict[str, int]:
        """Return the place after the number read last."""
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next iteration there."""
        self._first = self._next = state_dict["next"]
