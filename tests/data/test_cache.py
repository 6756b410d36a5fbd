import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_sae.checks import UsageError
from lightning_sae.data.cache import ActivationCache
from lightning_sae.data.shards import Shards
from lightning_sae.data.vector_files import METADATA

CPU = torch.device("cpu")


class Reader:
    """Random activations, counted, each of its own input."""

    def __init__(self, dtype=torch.float32, scale=1.0):
        self.calls = 0
        self.dtype, self.scale = dtype, scale

    def __call__(self, inputs):
        self.calls += 1
        self.last = inputs
        rows = []
        for each in inputs:
            generator = torch.Generator().manual_seed(int(each.sum()))
            rows.append(torch.randn(*each.shape, 5, generator=generator) * self.scale)
        return torch.stack(rows).to(self.dtype)


def cached(reader, folder, **options):
    shards = Shards(folder, limit=float("inf"))
    return ActivationCache(
        reader, shards, CPU, lambda ids: (*ids.shape, 5), reader.dtype, **options
    )


IDS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_read_once_is_not_read_again(tmp_path, dtype, written):
    reader = Reader(dtype)
    cache = cached(reader, tmp_path / "new" / "folder")
    first = cache(IDS)
    assert torch.equal(first, Reader(dtype)(IDS))
    if written:
        cache.shards.write()
        cache = cached(reader, tmp_path / "new" / "folder")
    assert cache.holds(IDS)
    assert torch.equal(cache(IDS), first)
    assert torch.equal(cache(IDS.flip(0)), first.flip(0))
    assert cache(IDS).dtype == dtype
    assert reader.calls == 1


def test_inputs_are_found_one_by_one(tmp_path):
    """And what is new is read together with what was found, as it would be without a cache."""
    reader = Reader()
    cache = cached(reader, tmp_path)
    cache(IDS)
    both = torch.stack([IDS[1], IDS[1] + 7])
    assert not cache.holds(both)
    assert torch.equal(cache(both), Reader()(both))
    assert torch.equal(reader.last, both)
    assert len(cache.shards) == 3


def test_other_tokens_shapes_and_types_are_other_inputs(tmp_path):
    reader = Reader()
    cache = cached(reader, tmp_path)
    ids = torch.arange(6)
    a, b = ids.view(2, 3), ids.view(3, 2)
    for other in (ids.view(1, 6), a, b, ids.flip(0).view(2, 3), b.T, a.int()):
        assert cache(other).shape == (*other.shape, 5)
    assert reader.calls == 6


def test_a_file_says_what_it_holds(tmp_path):
    cache = cached(Reader(), tmp_path, made_of=lambda: {"layer": 2})
    kept = torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
    whole = cache(IDS, kept)
    cache(IDS + 7, held_out=True)
    cache(IDS + 7)  # as the first time says
    cache.shards.write()
    (file,) = tmp_path.iterdir()
    found = load_file(file)
    assert set(found) == {"activations", "kept", "held_out", "key", "input_ids"}
    assert found.pop("held_out").tolist() == [0, 0, 1, 1]
    found = {name: each[:2] for name, each in found.items()}
    assert torch.equal(found["activations"], whole)
    assert torch.equal(found["kept"].bool(), kept)
    assert torch.equal(found["input_ids"], IDS.int())
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()[METADATA]) == {"layer": 2}


def test_images_are_no_tokens(tmp_path):
    images = torch.randn(2, 3, 4)
    shards = Shards(tmp_path, limit=float("inf"))
    cache = ActivationCache(lambda x: x[:, :2], shards, CPU, lambda _: (2, 2, 4), torch.float32)
    cache(images)
    shards.write()
    assert set(load_file(next(tmp_path.iterdir()))) == {"activations", "kept", "held_out", "key"}


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16])
def test_a_rounded_run_is_the_same_cold_and_warm(tmp_path, kept):
    reader = Reader()
    cold = cached(reader, tmp_path, kept_dtype=kept)(IDS)
    warm = cached(reader, tmp_path, kept_dtype=kept)(IDS)  # the first is gone, and was written
    assert reader.calls == 1
    assert cold.dtype == warm.dtype == torch.float32  # as the model goes on with
    assert torch.equal(cold, warm)
    assert torch.equal(cold, Reader()(IDS).to(kept).float())


def test_what_float16_cannot_hold_is_told_before_anything_is_kept(tmp_path):
    cache = cached(Reader(scale=1e6), tmp_path, kept_dtype=torch.float16)
    message = r"^cache_dtype='float16' holds no more than 65504, and activations reach \d.*float32$"
    with pytest.raises(UsageError, match=message):
        cache(IDS)
    assert not list(tmp_path.iterdir())
    assert cached(Reader(scale=1e6), tmp_path, kept_dtype=torch.bfloat16)(IDS).isfinite().all()


def test_a_residual_stream_wider_than_the_model_s_type_is_taken(tmp_path):
    reader = Reader()
    shards = Shards(tmp_path, limit=float("inf"))
    for dtype in (torch.float32, torch.bfloat16):
        cache = ActivationCache(reader, shards, CPU, lambda ids: (*ids.shape, 5), dtype)
        assert cache(IDS).dtype == torch.float32
    assert reader.calls == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x[:, :2], r"torch.float32 of shape \(2, 5\)"),
        (lambda x: x[..., :4], r"torch.float32 of shape \(3, 4\)"),
        (lambda x: x[..., 0], r"torch.float32 of shape \(3,\)"),
        (lambda x: x.half(), r"torch.float16 of shape \(3, 5\)"),
        (lambda x: x.long(), r"torch.int64 of shape \(3, 5\)"),
    ],
)
def test_a_file_of_another_shape_or_type_is_not_taken(tmp_path, change, told):
    cached(Reader(), tmp_path)(IDS)
    (file,) = tmp_path.iterdir()
    tensors = load_file(file)
    save_file(tensors | {"activations": change(tensors["activations"]).contiguous()}, file)
    message = rf"^cache_dir: .* holds {told} instead of .*float32 of shape \(3, 5\); delete it,"
    with pytest.raises(UsageError, match=message):
        cached(Reader(), tmp_path)(IDS)
