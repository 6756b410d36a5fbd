"""Data sources of one's own: what it takes to write one, and what it then can do."""

from pathlib import Path

import datasets
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_sae import TopKSAE
from lightning_sae.callbacks import LossRecoveredCallback
from lightning_sae.checks import UsageError
from lightning_sae.data import FrozenModelDataModule, LanguageModel, VisionModel
from tests.data import own_source
from tests.data.own_source import TokenListDataModule
from tests.data.tiny import D_MODEL, LENGTH, PATCHES, Recorder, same, trainer

SMALL = {"batch_size": 64, "batches_per_block": 2, "model_batch_size": 8}
SMALL |= {"validation_tokens": 10 * LENGTH, "test_tokens": 5 * LENGTH}


def contexts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(320, (count, LENGTH), generator=generator))


def test_it_takes_25_lines():
    assert len(Path(own_source.__file__).read_text().splitlines()) <= 25


def test_an_autoencoder_is_trained_and_measured_on_it(tmp_path):
    data = TokenListDataModule(contexts(40), contexts(15, seed=1), **SMALL)
    sae = TopKSAE(data.d_model, n_features=512, k=4)
    before = sae.W_dec.detach().clone()
    run = trainer(tmp_path, 2, limit_val_batches=None, callbacks=[LossRecoveredCallback()])
    run.fit(sae, data)
    assert not torch.equal(sae.W_dec, before)
    (results,) = run.validate(sae, data, verbose=False)
    assert results["val/tokens"] == 10 * (LENGTH - 1)
    assert 0 < results["val/fvu"] < 2
    assert "val/loss_recovered_mean" in results  # for the callback finds token ids


def test_held_out_batches_are_those_of_the_model():
    data = TokenListDataModule(contexts(40), contexts(15, seed=1), **SMALL)
    batches = list(data.val_dataloader())
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(ids, torch.stack(data.held_out[:10]))
    activations = torch.cat([batch["activations"] for batch in batches])
    expected = data.residual_stream.read(ids)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(activations, expected)
    tested = torch.cat([batch["input_ids"] for batch in data.test_dataloader()])
    assert torch.equal(tested, torch.stack(data.held_out[10:]))


class TableDataModule(FrozenModelDataModule):
    """Rows of a table with a column of token ids; the last ones are held out."""

    source = "table='rows'"
    noun = "rows"
    place = (*FrozenModelDataModule.place, "held_out_rows")
    positions_per_input = LENGTH

    def __init__(self, model: str, *, held_out_rows: int = 20, **options) -> None:
        super().__init__(LanguageModel(model, 1), **options)
        self.held_out_rows = held_out_rows
        rows = {"input_ids": [row.tolist() for row in contexts(60)]}
        self.table = datasets.Dataset.from_dict(rows).with_format("torch")

    def train_inputs(self):
        return self.table.take(60 - self.held_out_rows)["input_ids"]

    def held_out_inputs(self):
        return self.table.skip(60 - self.held_out_rows)["input_ids"]


class StreamedTableDataModule(TableDataModule):
    """The same rows in their order, as if nobody knew how many there are."""

    def train_inputs(self):
        return InTheirOrder(self)


class InTheirOrder:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield from TableDataModule.train_inputs(self.data)


@pytest.mark.parametrize("kind", [TableDataModule, StreamedTableDataModule])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_goes_on_where_it_was(model_folder, tmp_path, kind, cut):
    def run(steps, checkpoint=None, **changed):
        module = Recorder()
        made = kind(str(model_folder), **{**SMALL, **changed})
        fit = trainer(tmp_path, steps)
        fit.fit(module, made, ckpt_path=checkpoint, weights_only=True)
        fit.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.trained

    whole = run(5)
    run(cut)
    checkpoint = tmp_path / f"{cut}.ckpt"
    assert same(run(5, checkpoint), whole[cut:])
    with pytest.raises(UsageError, match=r"^held_out_rows=30: the checkpoint was trained on 20$"):
        run(5, checkpoint, held_out_rows=30)


@pytest.mark.parametrize("kind", [TableDataModule, StreamedTableDataModule])
def test_mistakes_name_the_source_and_what_it_has(model_folder, kind):
    few = kind(str(model_folder), **{**SMALL, "batch_size": 1024})
    message = r"^table='rows' gives only 40 rows to train on; one batch needs 64$"
    with pytest.raises(ValueError, match=message):
        list(few.train_dataloader())
    many = kind(str(model_folder), **{**SMALL, "validation_tokens": 20 * LENGTH})
    message = r"^test_tokens=80: table='rows' has 0 held-out rows for it, and needs one$"
    with pytest.raises(ValueError, match=message):
        many.test_dataloader()
    short = kind(str(model_folder), **{**SMALL, "test_tokens": LENGTH - 1})
    with pytest.raises(ValueError, match=r"^test_tokens=15 must be at least 16$"):
        short.val_dataloader()


def test_its_options_are_on_the_command_line():
    parser = ArgumentParser()
    parser.add_class_arguments(TableDataModule, "data")
    parsed = parser.parse_args(["--data.model=m", "--data.batch_size=8", "--data.held_out_rows=3"])
    assert (parsed.data.batch_size, parsed.data.held_out_rows, parsed.data.seed) == (8, 3, 0)


class PixelDataModule(FrozenModelDataModule):
    """Noise for a vision transformer, by the seed that makes it."""

    input_key = "seeds"

    @property
    def positions_per_input(self):
        return self.model.patches

    def train_inputs(self):
        return torch.arange(30)

    def held_out_inputs(self):
        return torch.arange(30, 40)

    def read(self, inputs):
        seeds = map(torch.Generator().manual_seed, inputs.tolist())
        return super().read(torch.stack([torch.randn(3, 12, 12, generator=s) for s in seeds]))


def test_inputs_may_stand_for_what_is_read(vision_folder):
    data = PixelDataModule(VisionModel(str(vision_folder), 1), **SMALL)
    first = next(iter(data.train_dataloader()))
    assert first["activations"].shape == (64, D_MODEL)
    batches = list(data.val_dataloader())
    assert torch.cat([batch["seeds"] for batch in batches]).tolist() == list(range(30, 40))
    for batch in batches:
        assert batch["kept"].shape == (len(batch["seeds"]), PATCHES)
        assert batch["kept"].all()
        assert torch.equal(batch["activations"], data.read(batch["seeds"]).flatten(0, 1))


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (
            [16, 16, 16],
            "positions_per_input=12: the model reads 16 positions of the inputs",
        ),
        ([12, 12, 16], r"inputs should have one shape, and some have \(12,\), others \(16,\)"),
    ],
)
def test_inputs_of_another_length_are_told(model_folder, lengths: list[int], said: str):
    class Declared(FrozenModelDataModule):
        positions_per_input = 12

        def train_inputs(self) -> list[torch.Tensor]:
            return [torch.arange(length) for length in lengths]

        held_out_inputs = train_inputs

    model = LanguageModel(str(model_folder), 0)
    data = Declared(model, batch_size=12, batches_per_block=1, validation_tokens=36, test_tokens=36)
    for batches in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(UsageError, match=said):
            next(iter(batches()))


def test_inputs_are_looked_at_once_for_all_checkpoints():
    class Counted(list):
        read = 0

        def __getitem__(self, number):
            self.read += 1
            return super().__getitem__(number)

    train = Counted(contexts(40))
    data = TokenListDataModule(train, contexts(15, seed=1), **SMALL)
    data.prepare_data()
    first, read = data.state_dict(), train.read
    assert first["inputs"] is not None
    assert data.state_dict() == first
    assert train.read == read
