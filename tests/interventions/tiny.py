"""Tiny models and SAEs of their layers, for the tests of what changes and weighs features."""

import torch

from lightning_sae import ResidualStream
from tests.helpers.architectures import ARCHITECTURES, D_MODEL
from tests.helpers.language_models import CONFIGS, tiny

FAMILIES = ("gpt2", "llama")
LAYER = 1


def model_of(family):
    """A model whose token 0 is the special one, and of which nothing is trained."""
    model = tiny(CONFIGS[family]).requires_grad_(requires_grad=False)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = 0
    return model


def ids_of(contexts=2, length=7, seed=1):
    return torch.randint(1, 50, (contexts, length), generator=torch.Generator().manual_seed(seed))


def sae_of(stream: ResidualStream, architecture="mutual_choice", **options):
    """An SAE that has learned a little of a layer."""
    torch.manual_seed(0)
    sae = ARCHITECTURES[architecture](**options)
    x = stream.read(ids_of(32, 9, seed=2))[:, 1:].reshape(-1, D_MODEL).float()
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(3):
        loss, _ = sae.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
    optimizer.zero_grad()
    return sae.eval()


def kept_of(ids, mask=None):
    """Which tokens are changed if nothing else is said, one by one."""
    mask = torch.ones_like(ids) if mask is None else mask
    kept = torch.zeros_like(ids, dtype=torch.bool)
    for context, row in enumerate(mask.tolist()):
        first = row.index(1)
        for place in range(first + 1, len(row)):
            kept[context, place] = bool(row[place]) and ids[context, place] != 0
    return kept


def busiest(sae, x, n=2):
    """Features that fire on most activations (tokens, d_model), the numbers of so many."""
    return sae.match(x).per_feature().topk(n).indices.tolist()
