"""Several sites of a model, read in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.residual_stream import LayerReached, ResidualStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SeveralSites"]


class SeveralSites:
    """Several sites of one model, whose activations are beside each other.

    Args:
        streams: One a site, of the same model.

    Attributes:
        streams: As given.
        widths: The width of each.
    """

    def __init__(self, streams: Sequence[ResidualStream]) -> None:
        self.streams = tuple(streams)
        self.widths = [stream.d_model for stream in streams]

    @property
    def model(self) -> PreTrainedModel:
        """The model that they are of."""
        return self.streams[0].model

    @property
    def is_causal_language_model(self) -> bool:
        """Whether the model predicts each token from those before it alone."""
        return self.streams[0].is_causal_language_model

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the model once, up to the last of the sites and no further.

        Args:
            input_ids: As `ResidualStream.read` takes them.
            attention_mask: Likewise.

        Returns:
            What is read at each, beside each other, (contexts or images, length, sum of widths).
        """
        found: dict[int, Tensor] = {}

        def note(place: int, x: Tensor) -> Tensor:
            found[place] = x.clone()  # the model may change it in place
            if len(found) == len(self.streams):
                raise LayerReached
            return x

        with suppress(LayerReached), self._noting(note, input_ids):
            self.streams[0].run(input_ids, attention_mask)
        return torch.cat([found[place] for place in range(len(self.streams))], dim=-1)

    def replace(
        self,
        input_ids: Tensor,
        edit: Callable[[Tensor], Tensor],
        attention_mask: Tensor | None = None,
        *,
        states: Tensor | None = None,
    ) -> Tensor:
        """Run the model with what the last of the sites is, in an edit of all of them, put there.

        Args:
            input_ids: As `ResidualStream.replace` takes them.
            edit: Maps what is beside each other, (contexts or images, length, sum of widths),
                float32 or wider, to the same shape; of the others nothing is replaced.
            attention_mask: As `ResidualStream.replace` takes it.
            states: What `read` returned for these inputs: it makes for no shorter run.

        Returns:
            Logits, as of `ResidualStream.replace`.

        Raises:
            UsageError: If the last of the sites is not the last that the model comes to.
        """
        *others, last = self.streams
        found: dict[int, Tensor] = {}

        def note(place: int, x: Tensor) -> Tensor:
            found[place] = x
            return x

        def put(x: Tensor) -> Tensor:
            if len(found) < len(others):
                raise UsageError(f"{last} comes before other sites, and nothing can be put there")
            before = [found[place].to(x) for place in range(len(others))]
            edited = edit(torch.cat([*before, x], dim=-1))
            return edited[..., -self.widths[-1] :]

        with self._noting(note, input_ids, len(others)):
            return last.replace(input_ids, put, attention_mask)

    def _noting(
        self, note: Callable[[int, Tensor], Tensor], input_ids: Tensor, count: int | None = None
    ) -> ExitStack:
        """Have the first so many sites noted; not entered, it would leave hooks behind."""
        with ExitStack() as hooks:
            for place, stream in enumerate(self.streams[:count]):
                hooks.enter_context(stream.seeing(_of(note, place), input_ids))
            return hooks.pop_all()


def _of(note: Callable[[int, Tensor], Tensor], place: int) -> Callable[[Tensor], Tensor]:
    return lambda x: note(place, x)
