"""What all data modules do in a Trainer, seen on text: whole, interrupted, between validations."""

import itertools
import shutil
from functools import partial
from types import SimpleNamespace

import datasets
import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

from lightning_sae.checks import UsageError
from lightning_sae.data import ActivationDataModule
from tests.data.tiny import D_MODEL, STEPS, Recorder, arguments, same, trainer
from tests.helpers.ddp import run_on_two


def take(datamodule, count):
    batches = itertools.islice(datamodule.train_dataloader(), count)
    return [batch["activations"] for batch in batches]


class SaveEachStep(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


@pytest.fixture(scope="module")
def uninterrupted(model_folder, text_file, tmp_path_factory):
    """Runs to the end, with a checkpoint after each step: one of the whole text, one streamed."""

    def run(streaming):
        folder = tmp_path_factory.mktemp("run")
        module = Recorder()
        datamodule = ActivationDataModule(**arguments(model_folder, text_file), streaming=streaming)
        torch.manual_seed(0)
        trainer(folder, callbacks=[SaveEachStep()]).fit(module, datamodule)
        return folder, module

    return {streaming: run(streaming) for streaming in (False, True)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cut", range(1, STEPS))
def test_a_resumed_run_goes_on_where_it_was(make, uninterrupted, tmp_path, cut, streaming):
    folder, expected = uninterrupted[streaming]
    module = Recorder()
    datamodule = make(streaming=streaming)
    checkpoint = folder / f"{cut}.ckpt"
    trainer(tmp_path).fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    assert same(module.trained, expected.trained[cut:])
    assert torch.equal(module.layer.weight, expected.layer.weight)
    assert datamodule.state_dict()["cursor"] == (2, STEPS - 8)


def test_training_batches_are_plain_tensors(uninterrupted):
    batches = uninterrupted[False][1].trained
    assert {(b.shape, b.dtype) for b in batches} == {((64, D_MODEL), torch.float32)}


def test_epochs_of_a_limited_length_go_on_too(make, uninterrupted, tmp_path):
    module = Recorder()
    limits = {"limit_train_batches": 3, "max_epochs": 3, "max_steps": -1}
    trainer(tmp_path, **limits).fit(module, make())
    assert same(module.trained, uninterrupted[False][1].trained[:9])


@pytest.mark.parametrize(
    ("settings", "cut", "blocks"),
    [
        ({"max_steps": 6}, None, 2),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, None, 2),
        ({"max_steps": 7}, 5, 1),
    ],
)
def test_nothing_is_read_that_no_step_will_take(
    make, uninterrupted, tmp_path, settings, cut, blocks
):
    datamodule = make()
    read, contexts = datamodule.read, []
    datamodule.read = lambda inputs: contexts.extend(inputs) or read(inputs)
    checkpoint = None if cut is None else uninterrupted[False][0] / f"{cut}.ckpt"
    trainer(tmp_path, **settings).fit(
        Recorder(), datamodule, ckpt_path=checkpoint, weights_only=True
    )
    block = next(datamodule.train_dataloader().blocks(0))
    assert len(contexts) == blocks * len(block)


def test_validation_does_not_move_the_stream(make, uninterrupted, tmp_path):
    module = Recorder()
    settings = {"limit_val_batches": None, "val_check_interval": 3}
    trainer(tmp_path, check_val_every_n_epoch=None, **settings).fit(module, make())
    assert same(module.trained, uninterrupted[False][1].trained)
    assert len(module.validated) == 2 + 3 * 4  # the sanity check, then three times


def test_overfitting_repeats_the_same_batches(make, uninterrupted, tmp_path):
    module = Recorder()
    limits = {"overfit_batches": 2, "max_epochs": 3, "max_steps": -1, "limit_val_batches": None}
    trainer(tmp_path, **limits).fit(module, make())
    assert same(module.trained, 3 * uninterrupted[False][1].trained[:2])


def test_a_model_used_for_testing_first_can_be_trained_on(make, uninterrupted, tmp_path):
    module, datamodule = Recorder(), make()
    trainer(tmp_path).test(module, datamodule, verbose=False)
    ids = trainer(tmp_path).predict(module, datamodule)
    assert torch.equal(torch.cat(ids), torch.cat([b["input_ids"] for b in module.tested]))
    trainer(tmp_path).fit(module, datamodule)
    assert same(module.trained, uninterrupted[False][1].trained)


def test_another_stream_than_the_checkpoints_is_told(make, uninterrupted, tmp_path):
    checkpoint = uninterrupted[False][0] / "5.ckpt"
    message = r"^batch_size=32 was 64 in the checkpoint: training continues at batch 1 of block 1"
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, max_steps=6).fit(Recorder(), make(batch_size=32), ckpt_path=checkpoint)


def refused(act, told):
    with pytest.raises(UsageError, match=told) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", [{"layer": 0}, {"model_dtype": "bfloat16"}])
def test_activations_of_another_kind_are_told(make, uninterrupted, tmp_path, changed):
    checkpoint = uninterrupted[False][0] / "5.ckpt"
    ((name, value),) = changed.items()
    told = f"^{name}={value!r}: the checkpoint was trained on "
    data = make(**changed)
    for method in ("fit", "validate", "test", "predict"):
        act = getattr(trainer(tmp_path), method)
        refused(partial(act, Recorder(), datamodule=data, ckpt_path=checkpoint), told)


def test_other_weights_under_the_same_name_are_told(make, uninterrupted, tmp_path, model_folder):
    checkpoint = uninterrupted[False][0] / "5.ckpt"
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    act = partial(trainer(tmp_path).test, verbose=False, ckpt_path=checkpoint)
    act(Recorder(), make(model_name=str(moved)))
    weights = load_file(moved / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    told = "has the weights .* the checkpoint was trained on model_name=.*, which had "
    refused(partial(act, Recorder(), make(model_name=str(moved))), told)


@pytest.mark.parametrize("changed", [{"context_length": 8}, {"seed": 1}])
def test_other_inputs_are_told(make, uninterrupted, tmp_path, changed):
    checkpoint = uninterrupted[False][0] / "5.ckpt"
    ((name, value),) = changed.items()
    told = f"^{name}={value!r}: the checkpoint was trained on "
    refused(partial(trainer(tmp_path).fit, Recorder(), make(**changed), ckpt_path=checkpoint), told)
    trainer(tmp_path).test(Recorder(), make(**changed), ckpt_path=checkpoint, verbose=False)


def test_text_that_has_changed_or_moved(make, uninterrupted, text_file, tmp_path):
    checkpoint = uninterrupted[False][0] / "5.ckpt"
    moved = tmp_path / "moved.jsonl"
    lines = text_file.read_text().splitlines()
    moved.write_text("\n".join(lines))
    fit = partial(trainer(tmp_path, max_steps=6).fit, Recorder(), ckpt_path=checkpoint)
    with pytest.warns(UserWarning, match="^text=.* in the checkpoint: training continues"):
        fit(make(text=str(moved)))
    moved.write_text("\n".join(lines[1:]))
    refused(partial(fit, make(text=str(moved))), "^text=.*: the checkpoint was trained on")


@pytest.mark.parametrize(
    ("precision", "changed", "ahead"),
    [
        ("32-true", {}, True),
        ("bf16-mixed", {}, True),
        ("bf16-true", {}, False),
        ("64-true", {}, False),
        ("32-true", {"model_dtype": "bfloat16"}, True),  # the first block waits for the model
        ("32-true", {"cache_dir": "cache"}, True),
        ("32-true", {"model_dtype": "bfloat16", "cache_dir": "cache"}, False),
    ],
)
def test_nothing_is_read_while_the_default_dtype_may_change(
    make, tmp_path, monkeypatch, precision, changed, ahead
):
    monkeypatch.chdir(tmp_path)
    datamodule = make(**changed)
    datamodule.trainer = trainer(tmp_path, precision=precision)
    assert datamodule.train_dataloader().ahead is ahead
    assert len(take(datamodule, 1)) == 1


def test_a_checkpoint_says_which_inputs_its_place_is_in(make):
    state = make(streaming=True).state_dict()
    assert state["cursor"] == (0, 0)
    assert state["place"]["streaming"] is True
    assert state["place"]["batch_size"] == 64
    assert set(state["place"]) == {
        *("model_name", "batch_size", "batches_per_block", "seed", "text", "text_config"),
        *("text_column", "train_split", "validation_split", "held_out_documents", "streaming"),
        "context_length",
    }


def of_process_with_the_same_tokens(rank, settings, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    strategy = SimpleNamespace(device_mesh=mesh, root_device=torch.device("cpu"))
    datamodule = ActivationDataModule(**settings)
    datamodule.trainer = SimpleNamespace(strategy=strategy, precision="32-true", max_steps=-1)
    return take(datamodule, 9), [batch["input_ids"] for batch in datamodule.val_dataloader()]


def test_processes_that_share_out_features_get_the_same_tokens(
    make, model_folder, text_file, tmp_path
):
    settings = arguments(model_folder, text_file)
    alone = make()
    for train, held_out in run_on_two(of_process_with_the_same_tokens, settings, tmp_path):
        assert same(train, take(alone, 9))
        assert same(held_out, [batch["input_ids"] for batch in alone.val_dataloader()])
