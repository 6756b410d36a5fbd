"""What a run was trained on is told apart from anything else, and in words."""

import re
from typing import Any

import pytest
import torch

from lightning_sae.checks import UsageError
from lightning_sae.data.provenance import compare, fingerprint

INPUTS = list(torch.arange(100).view(20, 5))


def noted(inputs: str | None = "0123", **changed: Any) -> dict[str, Any]:
    """Return what a data module notes, but for some of it."""
    place = {"model_name": "small", "text": "a.txt", "batch_size": 64} | changed
    activations = {"model_name": "small", "weights": "ab", "layer": 2, "model_dtype": "float32"}
    activations |= {name: changed[name] for name in activations if name in changed}
    place = {name: value for name, value in place.items() if name not in ("weights", "layer")}
    return {"place": place, "activations": activations, "inputs": inputs}


def test_a_fingerprint_is_of_numbers_types_and_shapes():
    assert fingerprint(INPUTS) == fingerprint([each.clone() for each in INPUTS])
    others = [
        INPUTS[:-1],
        [each + 1 for each in INPUTS],
        [each.int() for each in INPUTS],
        [each.view(1, 5) for each in INPUTS],
        INPUTS[::-1],
    ]
    assert len({fingerprint(each) for each in [INPUTS, *others]}) == 6
    assert re.fullmatch("[0-9a-f]{16}", str(fingerprint(INPUTS)))


def test_other_rounding_is_told_where_training_goes_on():
    rounded = noted()
    rounded["activations"]["rounded_to"] = "float16"
    compare(noted(), rounded, resumed=False, source="text='a.txt'")
    with pytest.warns(UserWarning, match="^cache_dtype=None was 'float16' in the checkpoint: act"):
        compare(noted(), rounded, resumed=True, source="text='a.txt'")


def test_what_has_to_be_read_in_order_has_none():
    assert fingerprint(iter(INPUTS)) is None


def test_a_checkpoint_that_notes_no_site_is_of_the_residual_stream():
    now, before = noted(), noted()
    now["activations"]["site"] = "resid_post"
    compare(now, before, resumed=True, source="text='a.txt'")
    now["activations"]["site"] = "z"
    with pytest.raises(UsageError, match=r"^site='z': the checkpoint was trained on 'resid_post'$"):
        compare(now, before, resumed=False, source="text='a.txt'")


@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": 1}, "layer=1: the checkpoint was trained on 2"),
        ({"weights": "cd", "model_name": "other"}, "model_name='other' has the weights cd: the"),
    ],
)
def test_other_activations_are_refused(changed: dict[str, Any], message: str, resumed: bool):
    with pytest.raises(UsageError, match=f"^{message}"):
        compare(noted(**changed), noted(), resumed, "text='a.txt'")


@pytest.mark.parametrize(
    ("now", "before", "message"),
    [
        (noted("4567"), noted(), "text='a.txt' is no longer what the checkpoint was trained on"),
        (noted("4567", text="b.txt"), noted(), "text='b.txt': the checkpoint was trained on 'a"),
        (noted(None, text="b.txt"), noted(), "text='b.txt': the checkpoint was trained on 'a"),
    ],
)
def test_other_inputs_are_refused_where_training_goes_on(
    now: dict[str, Any], before: dict[str, Any], message: str
):
    compare(now, before, False, "text='a.txt'")
    with pytest.raises(UsageError, match=f"^{message}"):
        compare(now, before, True, "text='a.txt'")


@pytest.mark.parametrize(
    "now",
    [
        noted(),
        noted(text="moved.txt"),  # which reads the same
        noted(model_name="moved"),
        noted(batch_size=32),
        noted(None),
    ],
)
def test_what_reads_the_same_is_taken(now: dict[str, Any]):
    compare(now, noted(), True, "text='a.txt'")
    before = noted()
    del before["activations"], before["inputs"]  # of a version that noted neither
    compare(noted(), before, True, "text='a.txt'")
