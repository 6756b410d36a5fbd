"""What features fire on, as text beside the curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_sae.callbacks.drawing import add_texts
from lightning_sae.callbacks.held_out import HeldOutCallback
from lightning_sae.checks import require_positive
from lightning_sae.matches import Matches
from lightning_sae.parallel import Ranks
from lightning_sae.report.collect import BEFORE, FiringCollector, Firings
from lightning_sae.report.contents import Windows, windows_of
from lightning_sae.report.token_texts import token_texts
from lightning_sae.residual_stream import ResidualStream

WIDTH: Final = 48
"""Characters to show on either side of the token."""
SHOWN: Final = str.maketrans({"\n": "↵", "\r": "↵", "\t": "→", "\f": " ", "\v": " "})


class TopContexts(HeldOutCallback):
    """Shows in which contexts some features fire most, at the end of every validation and test.

    Under `val/` or `test/` goes the text `top_contexts`: for each feature the share of tokens on
    which it fires, and the contexts in which its values are highest, each with the value and the
    token marked. It is in TensorBoard's tab *Text*, in Weights & Biases and MLflow, and beside the
    CSV of a `CSVLogger` a file in the folder `texts`. `lightning_sae report` shows all features.

    The features are drawn at random, once for all validations, so that one can follow them, and so
    that they stand for the others, dead ones too. The contexts are those of the first device.

    It needs data as `HeldOutCallback` says, and their tokenizer as `model.tokenizer`, as
    `ActivationDataModule` has; and a module, or a part of it, with `n_features` and
    `match(activations)`, which returns `Matches`, as `SparseAutoencoder` has.

    Args:
        features: How many features to show.
        contexts: Contexts of each.
        tokens: Tokens to look at, over all devices, in whole contexts.
        seed: Seed of the draw.

    Raises:
        ValueError: If a number is not positive.
    """

    needs: ClassVar[tuple[str, ...]] = ("match", "n_features")

    def __init__(
        self, features: int = 24, contexts: int = 4, tokens: int = 65_536, seed: int = 0
    ) -> None:
        super().__init__(tokens)
        require_positive(features=features, contexts=contexts)
        self.features = features
        self.contexts = contexts
        self.seed = seed
        self._collector: FiringCollector | None = None
        self._chosen = torch.empty(0, dtype=torch.int64)  # features, in order
        self._ids: list[Tensor] = []  # contexts that were seen

    def start(self, ranks: Ranks) -> None:
        """Forget what was seen."""
        self._collector, self._ids = None, []

    def measure(self, sae: Any, residual_stream: ResidualStream, batch: Mapping[str, Any]) -> None:
        """Collect what the features do in a batch."""
        encoded = batch.get("encoded")
        codes = sae.match(batch["activations"]) if encoded is None else encoded.codes
        if self._collector is None:
            draw = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(sae.n_features, generator=draw)
            self._chosen = order[: self.features].sort().values
            self._collector = FiringCollector(
                len(self._chosen), top=self.contexts, sample=1, device=codes.feature.device
            )
        first = sum(map(len, self._ids))
        self._collector.update(batch["kept"], _of_features(codes, self._chosen), first)
        self._ids.append(batch["input_ids"].cpu())

    def log_results(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write them down."""
        if self._collector is None or not trainer.is_global_zero:
            return
        data: Any = getattr(trainer, "datamodule", None)
        tokenizer_of = getattr(getattr(data, "model", None), "tokenizer", None)
        if tokenizer_of is None:
            rank_zero_info("TopContexts shows nothing: the data have no tokenizer")
            return
        ids = torch.cat(self._ids)
        firings = self._collector.result()

        def text() -> str:
            tokenizer = tokenizer_of(ids.shape[1])
            return top_contexts(firings, ids, lambda i: token_texts(tokenizer, i), self._chosen)

        add_texts(trainer, {f"{stage}/top_contexts": text})


def top_contexts(
    firings: Firings,
    contexts: Tensor,
    text_of: Callable[[list[int]], list[str]],
    names: Tensor | None = None,
) -> str:
    """Return, as text, what features fire on most.

    Args:
        firings: What was found out of each feature.
        contexts: The tokens that were read, (contexts, length) int64.
        text_of: Returns the texts of token ids.
        names: What each feature is called, int64, (features,). Default: its place.

    Returns:
        A paragraph for each feature, one line a context, in which the token that counts is between
        brackets, one below another. Markdown shows it as it is.
    """
    windows = windows_of(firings.top, contexts)
    ids = windows.token_ids.unique().tolist()
    ids = [each for each in ids if each >= 0]
    texts = dict(zip(ids, text_of(ids), strict=True)) | {-1: ""}
    lines: dict[int, list[str]] = {each: [] for each in range(len(firings.count))}
    for row, feature in enumerate(windows.feature.tolist()):
        lines[feature].append(_line(windows, row, texts))
    paragraphs = []
    for feature, shown in lines.items():
        name = feature if names is None else int(names[feature])
        head = f"feature {name}: {firings.density[feature]:.2%} of {firings.tokens:,} tokens"
        paragraphs.append("\n".join([head, *shown]))
    # Indented by four it is code, in which no sign of a text means anything to Markdown.
    return "\n\n".join(paragraphs).replace("\n", "\n    ").join(["    ", "\n"])


def _line(windows: Windows, row: int, texts: Mapping[int, str]) -> str:
    shown = [texts[each].translate(SHOWN) for each in windows.token_ids[row].tolist()]
    before, after = "".join(shown[:BEFORE])[-WIDTH:], "".join(shown[BEFORE + 1 :])[:WIDTH]
    value = float(windows.values[row, BEFORE])
    return f"{value:8.2f}  {before:>{WIDTH}}⟦{shown[BEFORE]}⟧{after}"


def _of_features(codes: Matches, chosen: Tensor) -> Matches:
    """Return the matches of some features, by their places among these."""
    place = torch.full((codes.shape[1],), -1, dtype=torch.int64, device=codes.feature.device)
    place[chosen.to(place.device)] = torch.arange(len(chosen), device=place.device)
    found = codes.select(place[codes.feature] >= 0)
    return Matches(found.token, place[found.feature], found.value, (codes.shape[0], len(chosen)))
