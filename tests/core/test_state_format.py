"""States of every format load by torch's own `load_state_dict`, alone or in a parent."""

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sae import MutualChoiceSAE, TopKSAE
from lightning_sae.checks import UsageError
from lightning_sae.core.state_format import FORMAT, is_sae

FORMAT_1 = Path(__file__).parent.parent / "checkpoints_format_1"


class Parent(nn.Module):
    """A module of someone else's, of which an SAE is a part."""

    def __init__(self) -> None:
        super().__init__()
        self.sae = fixture()[0]
        self.head = nn.Linear(2, 2)


def fixture():
    """Return an SAE of the shape of the one in a checkpoint of format 1, and that one's state."""
    checkpoint = torch.load(FORMAT_1 / "topk.ckpt", weights_only=True)
    n_features, d_model = checkpoint["state_dict"]["W_dec"].shape
    sae = TopKSAE(d_model, n_features, k=checkpoint["hyper_parameters"]["k"])
    return sae, checkpoint["state_dict"]


def test_a_state_of_format_1_loads_without_lightning():
    sae, state = fixture()
    names = list(state)
    sae.load_state_dict(state)
    assert torch.equal(sae.W_dec, state["W_dec"])
    assert torch.equal(sae.history.tokens_since_fired, state["tokens_since_fired"])
    assert list(state) == names


def test_a_state_of_format_1_loads_into_a_parent():
    _, state = fixture()
    parent = Parent()
    whole = {f"sae.{name}": tensor for name, tensor in state.items()}
    whole |= {f"head.{name}": tensor for name, tensor in parent.head.state_dict().items()}
    assert not is_sae(whole)
    parent.load_state_dict(whole)
    assert torch.equal(parent.sae.W_dec, state["W_dec"])


@pytest.mark.parametrize("make", [lambda: fixture()[0], Parent], ids=["alone", "in a parent"])
def test_a_state_notes_its_format_also_in_a_file(make):
    file = io.BytesIO()
    torch.save(make().state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    place = "sae" if isinstance(make(), Parent) else ""
    assert state._metadata[place] == {"version": FORMAT}
    make().load_state_dict(state)
    state._metadata[place]["version"] = FORMAT + 1
    with pytest.raises(UsageError, match=rf"lightning_sae_format={FORMAT + 1}, .* up to {FORMAT}"):
        make().load_state_dict(state)


def test_a_state_of_one_scale_is_not_loaded_where_each_token_has_its_own():
    average = MutualChoiceSAE(4, 16, 2, normalize_inputs="average", rank_discount=0)
    state = average.state_dict()
    state._metadata[""]["version"] = 2  # as it was when there was no choice
    average.load_state_dict(state)
    with pytest.raises(UsageError, match="normalize_inputs='token': the state to load was trained"):
        MutualChoiceSAE(4, 16, 2).load_state_dict(state)


def test_a_state_without_a_discount_is_not_loaded_where_there_is_one():
    plain = MutualChoiceSAE(4, 16, 2, rank_discount=0)
    state = plain.state_dict()
    state._metadata[""]["version"] = 3
    plain.load_state_dict(state)
    with pytest.raises(UsageError, match="trained without a discount for ranks: give rank_disc"):
        MutualChoiceSAE(4, 16, 2).load_state_dict(state)
