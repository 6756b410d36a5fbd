"""Stored activations come in the stream that all others do."""

import itertools
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_sae import FeatureChoiceSAE, TopKSAE
from lightning_sae.callbacks import LossRecoveredCallback, SavePretrained
from lightning_sae.checks import UsageError
from lightning_sae.data import StoredActivationsDataModule
from lightning_sae.data.shards import Shards
from tests.data.stored import LAYOUTS, save_npy, vectors
from tests.data.tiny import D_MODEL, LENGTH, Recorder, same, trainer
from tests.helpers.ddp import run_on_two

SMALL = {
    "batch_size": 64,
    "batches_per_block": 3,
    "held_out_share": 0.2,
    "validation_tokens": 6 * LENGTH,
    "test_tokens": 6 * LENGTH,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_npy(tmp_path_factory.mktemp("stored") / "there", vectors())


@pytest.fixture
def make(folder):
    def make_datamodule(activations=folder, **changed):
        return StoredActivationsDataModule(str(activations), **{**SMALL, **changed})

    return make_datamodule


def take(datamodule, count):
    batches = itertools.islice(datamodule.train_dataloader(), count)
    return [batch["activations"] for batch in batches]


def rows(activations):
    return Counter(map(tuple, activations.tolist()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_give_the_same_stream(make, tmp_path, layout):
    data, expected = make(LAYOUTS[layout](tmp_path / "there", vectors())), make()
    assert data.d_model == D_MODEL
    assert same(take(data, 9), take(expected, 9))
    for loader in ("val_dataloader", "test_dataloader"):
        held_out, others = list(getattr(data, loader)()), list(getattr(expected, loader)())
        assert same([b["activations"] for b in held_out], [b["activations"] for b in others])
    assert data.description["vectors"] == 960


@pytest.mark.parametrize("skip_positions", [0, 3])
def test_an_epoch_has_each_vector_once_and_none_that_is_held_out(make, skip_positions):
    data = make(skip_positions=skip_positions, batch_size=48 * (LENGTH - skip_positions))
    data.batches_per_block = 1 - 0.25
    (epoch,) = take(data, 1)
    held_out = [
        torch.cat([batch["activations"] for batch in loader])
        for loader in (data.val_dataloader(), data.test_dataloader())
    ]
    everything = torch.from_numpy(vectors()[:, skip_positions:]).float().reshape(-1, D_MODEL)
    assert rows(torch.cat([epoch, *held_out])) == rows(everything)


def test_held_out_batches_say_which_runs_they_are(make):
    data = make()
    (batch,) = data.val_dataloader()
    assert batch["states"].dtype == torch.float16
    expected = torch.from_numpy(vectors())[batch["run_numbers"]]
    assert torch.equal(batch["states"], expected)
    assert torch.equal(batch["activations"], expected.flatten(0, 1).float())


def test_other_files_may_be_held_out(make, tmp_path):
    others = save_npy(tmp_path / "others", vectors(20, seed=1))
    data = make(held_out=str(others), batch_size=960, batches_per_block=1, run_length=7)
    data.batches_per_block = 1 - 0.25
    assert rows(take(data, 1)[0]) == rows(torch.from_numpy(vectors()).float().view(-1, D_MODEL))
    measured = torch.cat([batch["activations"] for batch in data.test_dataloader()])
    assert rows(measured) <= rows(torch.from_numpy(vectors(20, seed=1)).float().view(-1, D_MODEL))


def keep(folder, *of_processes):
    """Each keeps inputs of its own, whose keys are their values."""
    processes = [Shards(folder, limit=1e9) for _ in of_processes]
    for shards, keys in zip(processes, of_processes, strict=True):
        x = torch.tensor([float(key) for key in keys])[:, None, None].expand(-1, LENGTH, D_MODEL)
        shards.add(list(keys), x, {}, {"model_name": "small"})
        shards.write()
    return folder


def test_what_two_processes_have_kept_is_one_input(tmp_path):
    folder = keep(tmp_path / "kept", range(40), range(40, 0, -1))
    data = StoredActivationsDataModule(folder, held_out_share=0.5)
    numbers = data.train_inputs(), data.held_out_inputs()
    parts = [data.read(each)[:, 0, 0].tolist() for each in numbers]
    assert sorted(itertools.chain(*parts)) == list(range(41))


def test_what_is_there_twice_is_noted_once(tmp_path):
    once, twice = keep(tmp_path / "once", range(40)), keep(tmp_path / "twice", range(40))
    file = next(twice.iterdir())
    (twice / "activations-z.safetensors").write_bytes(file.read_bytes())
    noted, expected = (StoredActivationsDataModule(each).description for each in (twice, once))
    assert noted == expected
    assert noted["vectors"] == 40 * LENGTH


def of_rank(rank, folder):
    data = StoredActivationsDataModule(folder, **SMALL)
    held_out = torch.cat([batch["activations"] for batch in data.val_dataloader()])
    return take(data, 7), held_out


def test_two_ranks_together_get_what_one_gets(make, folder):
    ranks = run_on_two(of_rank, str(folder))
    together = [torch.cat(parts) for parts in zip(ranks[0][0], ranks[1][0], strict=True)]
    assert same(together, take(make(), 7))
    both = rows(torch.cat([held_out for _, held_out in ranks]))
    assert both == rows(torch.cat([batch["activations"] for batch in make().val_dataloader()]))


@pytest.mark.parametrize("cut", [1, 3, 7])  # in a block, at its end, and in a second epoch
def test_a_resumed_run_goes_on_with_the_next_batch(make, folder, tmp_path, cut):
    whole, first, rest = Recorder(), Recorder(), Recorder()
    trainer(tmp_path).fit(whole, make())
    begun = trainer(tmp_path, max_steps=cut)
    begun.fit(first, make())
    begun.save_checkpoint(tmp_path / "cut.ckpt")
    moved = shutil.copytree(folder, tmp_path / "moved")
    ahead = trainer(tmp_path)
    with pytest.warns(UserWarning, match="activations=.* was .* in the checkpoint"):
        ahead.fit(rest, make(moved), ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert same(first.trained + rest.trained, whole.trained)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, r"^seed=1: |is no longer what the checkpoint was trained on"),
        ({"held_out_share": 0.3}, r"^held_out_share=0.3: the checkpoint was trained on 0.2$"),
        ({"activations": None}, r"^activations=.*: the checkpoint was trained on '"),
    ],
)
def test_other_vectors_are_not_resumed(make, tmp_path, changed, message):
    begun = trainer(tmp_path, max_steps=1)
    begun.fit(Recorder(), make())
    begun.save_checkpoint(tmp_path / "cut.ckpt")
    if "activations" in changed:
        changed = {"activations": save_npy(tmp_path / "others", vectors(seed=1))}
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path).fit(Recorder(), make(**changed), ckpt_path=tmp_path / "cut.ckpt")


def test_an_sae_notes_what_it_was_trained_on(make, tmp_path, caplog):
    sae = FeatureChoiceSAE(d_model=D_MODEL, n_features=16, k=2)
    fit = trainer(
        tmp_path,
        max_steps=4,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[LossRecoveredCallback(), SavePretrained(tmp_path / "out")],
    )
    with caplog.at_level("INFO"):
        fit.fit(sae, make())
    line = "LossRecoveredCallback measures nothing: the data have no language model"
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    noted = sae.record["trained_on"]
    assert {"d_model": 8, "vectors": 960, "stored_dtype": "float16"}.items() <= noted.items()
    assert len(noted["fingerprint"]) == 16
    assert noted["activations"].endswith("there")
    assert fit.callback_metrics["val/fvu"] < 2


def test_nan_is_told(make, tmp_path):
    broken = vectors()
    broken[:, 3, 2] = np.nan
    data = make(save_npy(tmp_path / "there", broken))
    with pytest.raises(UsageError, match=r"^activations=.*, block 0: the activations have NaN or"):
        take(data, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"held_out_share": 1.0}, "^held_out_share=1.0 must be a share"),
        ({"run_length": 0}, "^run_length=0 must be at least 1$"),
        ({"skip_positions": -1}, "^skip_positions=-1 must be at least 0$"),
        (
            {"batch_size": 10**6},
            "only 48 runs of vectors to train on; one batch needs 62500$",
        ),
        ({"held_out_share": 0.999}, "leaves nothing to train on: .* has 60 runs of vectors, of 16"),
        ({"held_out": "none"}, "^held_out='none' does not exist$"),
        ({"held_out_share": 0.0}, "has 0 held-out runs of vectors for it, and needs one$"),
    ],
)
def test_mistakes_are_told_in_one_line(make, changed, message):
    def use():
        take(make(**changed), 1)
        make(**changed).val_dataloader()

    with pytest.raises(UsageError, match=message) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_what_is_trained_on_is_not_held_out(make, folder):
    with pytest.raises(UsageError, match=r"'.*1.npy' is among the activations to train on$"):
        _ = make(held_out=str(folder / "1.npy")).d_model


def test_a_plain_loop(make):
    data = make()
    sae = TopKSAE(data.d_model, n_features=16, k=2)
    for batch in itertools.islice(data.train_dataloader(), 3):
        loss, _ = sae.loss(batch["activations"])
        loss.backward()
    assert loss.isfinite()
