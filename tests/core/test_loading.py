"""A state that no training leads to is refused in one line, before any of it is loaded."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, SparseAutoencoder, TopKSAE
from lightning_sae.checks import UsageError
from tests.helpers.architectures import D_MODEL, N_FEATURES, K, activations, every_architecture


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(make: Callable[[], SparseAutoencoder]) -> dict[str, Tensor]:
    sae = make()
    sae.loss(activations())
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def mutual() -> MutualChoiceSAE:
    return MutualChoiceSAE(D_MODEL, N_FEATURES, K)


def feature() -> FeatureChoiceSAE:
    return FeatureChoiceSAE(D_MODEL, N_FEATURES, K, mutual_choice_share=0, zipf_exponent=1.0)


UNFIT: list[tuple[Callable[[], SparseAutoencoder], str, Any, str]] = [
    (mutual, "input_scale", 0.0, "input_scale=0 in the state to load must be more than 0"),
    (mutual, "input_scale", -1.0, "input_scale=-1 in the state to load must be more than 0"),
    (mutual, "input_scale", math.nan, "input_scale has NaN or Inf"),
    (mutual, "input_mean", math.inf, "input_mean has NaN or Inf"),
    (mutual, "encoder.weight", math.nan, "encoder.weight has NaN or Inf"),
    (mutual, "decoder.bias", -math.inf, "decoder.bias has NaN or Inf"),
    (feature, "threshold", math.nan, "threshold has NaN or Inf"),
    (mutual, "threshold", math.inf, "threshold has NaN or Inf"),
    (mutual, "threshold", -0.5, "threshold=-0.5 in the state to load must be at least 0"),
    (mutual, "history.tokens_seen", -1, "tokens_seen=-1 in the state to load must be at least 0"),
    (mutual, "history.tokens_since_fired", -2, "tokens_since_fired=-2 in the state"),
    (mutual, "history.density", -0.5, "density=-0.5 in the state to load must be at least 0"),
    (feature, "threshold", math.inf, "threshold has NaN or Inf"),
    (feature, "target_density", -0.1, "target_density=-0.1 in the state to load must be at least"),
    (feature, "target_density", math.nan, "target_density has NaN or Inf"),
]


@pytest.mark.parametrize(
    ("make", "name", "value", "told"), UNFIT, ids=lambda it: getattr(it, "__name__", str(it))
)
@pytest.mark.parametrize("prefix", ["", "sae."], ids=["alone", "child"])
def test_a_value_out_of_range_is_told(make, name: str, value: Any, told: str, prefix: str):
    state = trained(make)
    state[name].view(-1)[-1] = value
    sae = make()
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    module = nn.ModuleDict({"sae": sae}) if prefix else sae
    with pytest.raises(UsageError, match=told) as caught:
        module.load_state_dict({prefix + key: tensor for key, tensor in state.items()})
    assert "\n" not in str(caught.value)
    for key, tensor in sae.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


def test_features_cannot_choose_without_budgets():
    state = trained(feature)
    state["target_density"].zero_()
    with pytest.raises(UsageError, match="target_density=0 in the state to load must be more than"):
        feature().load_state_dict(state)


def test_counters_are_whole_numbers():
    state = trained(mutual)
    state["history.tokens_seen"] = torch.tensor(64.0)
    with pytest.raises(UsageError, match=r"tokens_seen is to be loaded as torch.float32, and is"):
        mutual().load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda state: state.pop("encoder.bias"),
            r'Missing key\(s\) .*"encoder.bias"',
        ),
        (lambda state: state.update(other=torch.ones(1)), r'Unexpected key.* "other"'),
        (
            lambda state: state.update(threshold=torch.ones(3)),
            r"threshold.*\(\[3\]\).*\(\[\]\)",
        ),
        (lambda state: state.update(threshold=3.0), "threshold.*expected torch.Tensor"),
    ],
    ids=["missing", "extra", "of another shape", "no tensor"],
)
def test_what_torch_refuses_is_told_in_one_line(change, told: str):
    state = trained(mutual)
    change(state)
    with pytest.raises(UsageError, match=f"(?i){told}") as caught:
        mutual().load_state_dict(state)
    assert "\n" not in str(caught.value)


@every_architecture
@pytest.mark.parametrize("steps", [0, 2])
def test_what_training_leads_to_is_loaded(make, steps: int):
    sae = make()
    for seed in range(steps):
        sae.loss(activations(64 + seed))
    again = make()
    again.load_state_dict(sae.state_dict())
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, equal_nan=True)


def test_a_part_can_be_loaded():
    sae, part = TopKSAE(D_MODEL, N_FEATURES, K), trained(mutual)
    wanted = {"encoder.weight": part["encoder.weight"]}
    assert not sae.load_state_dict(wanted, strict=False).unexpected_keys
    assert torch.equal(sae.encoder.weight, part["encoder.weight"])


def test_thresholds_that_no_batch_has_set_are_taken():
    """Also with the history of another architecture, which an SAE may have taken over."""
    sae = mutual()
    sae.take_over(trained(feature))
    assert sae.tokens_seen > 0
    assert sae.threshold.isnan()
    mutual().load_state_dict(sae.state_dict())
