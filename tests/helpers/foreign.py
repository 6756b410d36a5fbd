"""Trained SAEs of every kind, to be carried into other libraries and back."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sae import SparseAutoencoder, UsageError
from lightning_sae.interop import FORMATS, export, load_foreign, unfold
from tests.helpers.architectures import ARCHITECTURES, D_MODEL, train
from tests.helpers.superposition import superposition

RECORD = {
    "trained_on": {
        "model_name": "someone/model",
        "layer": 3,
        "hook_name": "model.layers.3",
        "transformer_lens_hook_name": "blocks.3.hook_resid_post",
        "text": "some/text",
        "context_length": 128,
        "positions": "all but the first",
    },
    "measured": {"l0": 4.0, "fvu": 0.2, "loss_recovered_mean": 0.9},
}
KINDS = ["standard", "jumprelu", "gated", "topk", "mutual_choice", "feature_choice_zipf"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def tokens(number: int = 512) -> Tensor:
    """Activations with a large mean, of many lengths, none of them the mean itself."""
    generator = torch.Generator().manual_seed(number)
    noise = 0.1 * torch.randn(number, D_MODEL, generator=generator)
    x = superposition(number, D_MODEL, n_features=32, seed=number) + noise
    return (x * 7 + 20) * torch.rand(number, 1, generator=generator).add(0.5)


def trained(kind: str, **options) -> SparseAutoencoder:
    """An SAE as others have them: without a discount, and TopK with one scale for all tokens."""
    torch.manual_seed(0)
    discount = {"rank_discount": 0} if "choice" in kind else {}
    scale = {"normalize_inputs": "average"} if kind == "topk" else {}
    sae = ARCHITECTURES[kind](**discount | scale | options)
    sae.loss(tokens(1024))
    train(sae, 20)
    for _ in range(20):
        sae.loss(tokens(1024))
    sae.record = RECORD
    return sae.eval()


def there_and_back(sae: SparseAutoencoder, to: str, folder: Path) -> SparseAutoencoder:
    """Export, compare as `export` does, and make the SAE again from the files alone."""
    for comparison in export(sae, to, folder, tokens()):
        assert comparison.error < 1e-5
        assert comparison.near_a_tie <= 2
    return unfold(load_foreign(f"{to}:{folder}"), k=4)


def assert_same(one: SparseAutoencoder, other: SparseAutoencoder) -> None:
    """All but a few tokens, whose affinities are within rounding of a threshold, come out alike."""
    x = tokens(1024)
    assert type(one) is type(other)
    same = ((one.encode(x) > 0) == (other.encode(x) > 0)).all(1)
    assert same.sum() >= len(x) - 2
    torch.testing.assert_close(other(x)[same], one(x)[same], rtol=1e-5, atol=1e-3)


def as_its_card_says(folder: Path, x: Tensor) -> dict[str, Any]:
    """Run the lines of Python on the card of an exported SAE; return what they have named."""
    card = (folder / "README.md").read_text()
    (lines,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    names = {"activations": x}
    exec(lines.replace("this folder", str(folder)), names)  # noqa: S102
    return names


def refusal(sae: SparseAutoencoder, to: str, folder: Path) -> str:
    with pytest.raises(UsageError) as refused:
        export(sae, to, folder)
    assert not list(folder.iterdir())
    return str(refused.value)


__all__ = [
    "FORMATS",
    "KINDS",
    "RECORD",
    "as_its_card_says",
    "assert_same",
    "every_kind",
    "refusal",
    "there_and_back",
    "tokens",
    "trained",
]
