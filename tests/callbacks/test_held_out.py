"""What only shows on two devices or in padding; the rest is tested with the callbacks."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from lightning_sae.callbacks import AdaptiveComputationCallback, LossRecoveredCallback
from lightning_sae.data import HeldOutBatches
from lightning_sae.sae import Encoded
from tests.callbacks.fakes import D_MODEL, LENGTH, FakeData, FakeLanguageModel, FakeSAE
from tests.helpers.ddp import run_on_two

CALLBACKS = {"loss": LossRecoveredCallback, "adaptive": AdaptiveComputationCallback}


def run_callback(callback, batches, trainer, step=lambda module, batch: None):
    """What a callback logs of held-out batches, of which a step may have made something."""
    torch.manual_seed(0)
    module, logged = FakeSAE().eval(), {}
    module.factor.data.fill_(0.5)
    module.log = lambda name, value, sync_dist: logged.update({name: value.item()})
    callback.on_validation_epoch_start(trainer, module)
    with torch.no_grad():
        for index, batch in enumerate(batches):
            outputs = step(module, batch)
            callback.on_validation_batch_end(trainer, module, outputs, batch, index)
    callback.on_validation_epoch_end(trainer, module)
    return logged


def measure_on_rank(rank, name, cases):
    """Values of a rank on its share of so many contexts, cut into batches of such a size."""
    read = FakeLanguageModel().embeddings.__getitem__
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=False, datamodule=FakeData())
    results = []
    for contexts, batch_size, tokens in cases:
        ids = torch.randint(9, (contexts, LENGTH), generator=torch.Generator().manual_seed(3))
        batches = HeldOutBatches(ids, lambda ids: ids != 4, read, batch_size, "")
        results.append(
            run_callback(CALLBACKS[name](tokens=tokens), without_states(batches), trainer)
        )
    return results


def without_states(batches):
    return [{name: batch[name] for name in batch if name != "states"} for batch in batches]


@pytest.mark.parametrize("name", CALLBACKS)
def test_what_is_measured_does_not_depend_on_the_number_of_devices(name):
    # Among them: uneven batches, a part of one, and a second rank that measures nothing.
    sizes = [(7, 3), (7, 2), (10, 4), (11, 50), (2, 1)]
    cases = [(*size, tokens) for size in sizes for tokens in (1, LENGTH + 1, 4 * LENGTH, 1000)]
    alone = measure_on_rank(0, name, cases)
    for values in run_on_two(measure_on_rank, name, cases):
        for case, found, expected in zip(cases, values, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, nan_ok=True), case
    assert sum(len(values) > 0 for values in alone) > len(cases) / 2


def test_the_sae_is_looked_for_once_in_a_run():
    callback, trainer, module = LossRecoveredCallback(9), SimpleNamespace(), torch.nn.Linear(1, 1)
    for _ in range(2):
        callback.setup(trainer, module, "fit")
        with pytest.warns(UserWarning, match="does nothing: neither Linear nor a part"):
            callback.on_validation_epoch_start(trainer, module)
        callback.on_validation_epoch_start(trainer, module)  # a warning is an error here


class Remembering(FakeLanguageModel):
    """Reads the sum of the tokens so far, but for padding."""

    def replace(self, input_ids, edit, attention_mask=None):
        self.runs += 1
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read = edit(self.embeddings[input_ids]) * mask.unsqueeze(-1)
        return read.cumsum(1) @ self.embeddings.T


def padded(batch, before, after):
    """The same contexts with padding around them, which is kept as if it were text."""
    ids = functional.pad(batch["input_ids"], (before, after), value=7)
    mask = functional.pad(torch.ones_like(batch["input_ids"]), (before, after))
    kept = functional.pad(batch["kept"], (before, after), value=True)
    x = torch.full((*ids.shape, D_MODEL), 50.0)
    x[:, before : before + LENGTH][batch["kept"]] = batch["activations"]
    return {"activations": x[kept], "input_ids": ids, "kept": kept, "attention_mask": mask}


@pytest.mark.parametrize("name", CALLBACKS)
def test_padded_contexts_give_what_they_give_alone(name):
    data = FakeData()
    data.residual_stream = Remembering()
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=False, datamodule=data)
    shapes = [(0, 2), (2, 0), (1, 1)]
    batches = [padded(batch, *shape) for batch, shape in zip(data.batches, shapes, strict=True)]
    callback = CALLBACKS[name](tokens=1000)
    expected = run_callback(callback, data.batches, trainer)
    assert expected
    found = run_callback(callback, batches, trainer)
    assert found == pytest.approx(expected, rel=1e-5)
    # The same tokens with other padding are others.
    other = [{**batch, "attention_mask": batch["attention_mask"].flip(1)} for batch in batches]
    assert run_callback(callback, other, trainer) != pytest.approx(found, rel=1e-3)


def measure_alone_on_rank(rank, tokens):
    """Values of a rank in whose strategy no other has tokens of its own."""
    alone = [dist.new_group([each]) for each in range(2)][rank]
    mesh = {"data_parallel": SimpleNamespace(get_group=lambda: alone)}
    data = FakeData(count=6)
    trainer = SimpleNamespace(
        sanity_checking=False, datamodule=data, strategy=SimpleNamespace(device_mesh=mesh)
    )
    callback = LossRecoveredCallback(tokens=tokens)
    return run_callback(callback, data.batches[rank::2], trainer), int(callback._metric.tokens)


def test_only_processes_with_other_tokens_measure_together():
    (first, on_first), (second, on_second) = run_on_two(measure_alone_on_rank, 50)
    batches = FakeData(count=6).batches
    scored = [
        torch.cat([batch["kept"] for batch in batches[rank::2]])[:9, :-1].sum() for rank in range(2)
    ]
    assert [on_first, on_second] == scored  # in 9 contexts, which hold 50 tokens, each
    assert first["val/ce_clean"] > 0
    assert first != second


def read(data):
    """Batches whose activations are what the language model has there."""
    embeddings = data.residual_stream.embeddings
    return [
        {**batch, "activations": embeddings[batch["input_ids"][batch["kept"]]]}
        for batch in data.batches
    ]


def encoded(module, batch):
    x = batch["activations"]
    return {"encoded": Encoded(module.match(x), module(x))}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("tokens", [1, LENGTH + 1, 1000])
def test_what_the_step_has_encoded_is_not_encoded_again(monkeypatch, name, tokens):
    calls = []
    for method in ("match", "forward"):
        original = getattr(FakeSAE, method)
        monkeypatch.setattr(
            FakeSAE, method, lambda self, x, own=original: calls.append(x) or own(self, x)
        )
    data = FakeData(count=3)
    batches = read(data)
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=False, datamodule=data)
    by_itself = run_callback(CALLBACKS[name](tokens=tokens), batches, trainer)
    assert calls
    calls.clear()
    given = run_callback(CALLBACKS[name](tokens=tokens), batches, trainer, encoded)
    assert given == pytest.approx(by_itself, rel=1e-6, nan_ok=True)
    assert len(calls) == 2 * len(batches)  # by the step


@pytest.mark.parametrize("padded", [False, True])
def test_what_the_step_has_encoded_is_spliced_in_only_if_it_is_what_was_read(padded):
    class WithPadding(FakeLanguageModel):
        def replace(self, input_ids, edit, attention_mask=None):
            return super().replace(input_ids, edit)

    data = FakeData(count=3)  # whose activations are no embeddings
    data.residual_stream = WithPadding()
    mask = torch.ones_like(data.batches[0]["input_ids"])
    mask[:, -2:] = 0
    batches = (
        [{**batch, "attention_mask": mask} for batch in read(data)] if padded else data.batches
    )
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=False, datamodule=data)
    by_itself = run_callback(LossRecoveredCallback(), batches, trainer)
    assert run_callback(LossRecoveredCallback(), batches, trainer, encoded) == by_itself
