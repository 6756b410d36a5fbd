"""What is one SAE's of all that several are given."""

import torch

from lightning_sae import TopKSAE
from lightning_sae.part import ALONE, part_of, parts_of_widths
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.several_sites import SeveralSites
from tests.helpers.language_models import CONFIGS, tiny

ONE, TWO = parts_of_widths({"one": 2, "two": 3})


def test_each_has_its_columns_in_memory_of_their_own():
    x = torch.arange(10).view(2, 5)
    assert ONE.of(x).tolist() == [[0, 1], [5, 6]]
    assert TWO.of(x).tolist() == [[2, 3, 4], [7, 8, 9]]
    assert TWO.of(x).is_contiguous()
    batch = {"activations": x, "states": x.view(1, 2, 5), "kept": x > 3}
    own = TWO.of_batch(batch)
    assert own["states"].shape == (1, 2, 3)
    assert own["kept"] is batch["kept"]
    assert TWO.of_outputs({"one": 1, "two": 2}) == 2
    assert TWO.of_outputs(None) is None


def test_names():
    assert (TWO.stage("val"), TWO.curve("train/l0")) == ("val/two", "train/two/l0")
    assert (ALONE.stage("val"), ALONE.curve("train/l0")) == ("val", "train/l0")


def test_each_is_read_at_its_site():
    model = tiny(CONFIGS["gpt2"])
    streams = SeveralSites([ResidualStream(model, 0), ResidualStream(model, 1)])
    assert TWO.of_streams(streams) is streams.streams[1]
    assert ALONE.of_streams(streams) is streams
    assert TWO.of_streams(model) is model


def test_what_is_said_of_several_is_said_of_one():
    several = {
        "model_name": "m",
        "layer": [1, 2],
        "site": "z",
        "hook_name": ["a", None],
        "transformer_lens_hook_name": ["b", "c"],
    }
    assert TWO.of_description(several) == several | {
        "layer": 2,
        "site": "z",
        "hook_name": None,
        "transformer_lens_hook_name": "c",
    }
    assert TWO.of_description({"made": 1}) == {"made": 1}
    assert ALONE.of_description(several) == several


def test_what_is_alone_is_the_whole():
    assert part_of(TopKSAE(4, 8, 2)) is ALONE
    assert part_of(torch.nn.Linear(1, 1)) is ALONE
    x = torch.randn(3, 4)
    assert ALONE.of(x).data_ptr() == x.data_ptr()
