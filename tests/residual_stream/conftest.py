"""Tiny language models of a few families, and what they read."""

import pytest
import torch

from tests.helpers.language_models import CONFIGS, tiny


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny(CONFIGS[request.param])


@pytest.fixture
def input_ids():
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))
