"""A report of made-up codes, for the tests of what is written from one."""

import torch

from lightning_sae import Matches
from lightning_sae.report import FeatureReport, FiringCollector, LogitLens

FEATURES, CONTEXTS, LENGTH, VOCABULARY = 6, 12, 40, 30
ODD = "</script><b>\n"
"""A token that would end the element that holds it."""


def texts(ids: list[int]) -> list[str]:
    return [ODD if each == 0 else f" t{each}" for each in ids]


def made(*, with_lens: bool = True) -> tuple[FeatureReport, torch.Tensor]:
    """Return a report, in which the last feature is dead, and its codes."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (CONTEXTS, LENGTH), generator=draw)
    codes = torch.rand(CONTEXTS, LENGTH, FEATURES, generator=draw) - 0.9
    codes = 10 * codes.clamp_min(0)
    codes[..., -1] = 0
    codes[..., -2] = 0
    codes[3, 5:9, -2] = 1.0  # fires four times
    codes[:, 0] = 0
    kept = torch.ones(CONTEXTS, LENGTH, dtype=torch.bool)
    kept[:, 0] = False
    token, feature = codes[kept].nonzero(as_tuple=True)
    matches = Matches(token, feature, codes[kept][token, feature], (int(kept.sum()), FEATURES))
    collector = FiringCollector(FEATURES, top=4, sample=10)
    collector.update(kept, matches, 0)
    few = torch.randint(VOCABULARY, (2, FEATURES, 3), generator=draw)
    lens = LogitLens(few[0], torch.rand(FEATURES, 3), few[1], -torch.rand(FEATURES, 3))
    nearest = torch.arange(FEATURES).flip(0)[:, None].repeat(1, 2), torch.rand(FEATURES, 2)
    return (
        FeatureReport(
            title="An <SAE> & more",
            about={"Settings": {"k": 3}, "Trained on": {}},
            firings=collector.result(),
            contexts=ids,
            text_of=texts,
            lens=lens if with_lens else None,
            nearest=nearest,
        ),
        codes,
    )
