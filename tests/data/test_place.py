"""Where a fit begins that shares its data module with others: at the beginning, or a checkpoint."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.tuner import Tuner

from lightning_sae.data import ActivationDataModule, LanguageModel
from tests.data.own_source import TokenListDataModule
from tests.data.tiny import LENGTH, Recorder, same, trainer

STEPS = 6  # of training: two blocks, the second one cut short


class WithHooksOfItsOwn(TokenListDataModule):
    """A source that overrides what Lightning calls as a fit begins, and calls no base."""

    def prepare_data(self):
        """Prepare nothing."""

    def setup(self, stage):
        """Set nothing up."""


@pytest.fixture
def own_source(model_folder):
    ids = torch.randint(320, (60, LENGTH), generator=torch.Generator().manual_seed(0))
    sizes = {"batch_size": 64, "batches_per_block": 4, "model_batch_size": 5}
    sizes |= {"validation_tokens": 10 * LENGTH, "test_tokens": 10 * LENGTH}
    source = WithHooksOfItsOwn(list(ids[:40]), list(ids[40:]), **sizes)
    source.model = LanguageModel(str(model_folder), 1)
    return source


@pytest.fixture(params=["text", "streamed text", "images", "own source"])
def data(request, make, make_images, own_source):
    """A data module of each kind."""
    if request.param == "own source":
        return own_source
    if request.param == "images":
        return make_images()
    return make(streaming=request.param == "streamed text")


def fit(folder, data, *, steps=STEPS, checkpoint=None, **changed):
    """Train a new module in a new Trainer; return what it was trained on, and the Trainer."""
    module, of_its_own = Recorder(), trainer(folder, steps, **changed)
    of_its_own.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module.trained, of_its_own


def test_every_fit_starts_at_the_beginning(data, tmp_path):
    first, _ = fit(tmp_path, data)
    for steps in (1, STEPS):
        assert same(fit(tmp_path, data, steps=steps)[0], first[:steps])
    sanity = {"limit_val_batches": None, "num_sanity_val_steps": 1}
    assert same(fit(tmp_path, data, **sanity)[0], first)


def test_a_resumed_fit_goes_on_from_its_checkpoint(data, tmp_path):
    whole, _ = fit(tmp_path, data)
    for cut in (1, 4):
        _, cut_short = fit(tmp_path, data, steps=cut)
        cut_short.save_checkpoint(tmp_path / f"{cut}.ckpt")
    for cut in (4, 1, 1):  # in any order, and each as often as one likes
        assert same(fit(tmp_path, data, checkpoint=tmp_path / f"{cut}.ckpt")[0], whole[cut:])
    assert same(fit(tmp_path, data)[0], whole)


@pytest.mark.parametrize("measure", ["validate", "test", "predict"])
@pytest.mark.parametrize("of", [None, "1.ckpt"])
def test_what_is_measured_in_between_moves_nothing(make, tmp_path, measure, of):
    data = make()
    whole, _ = fit(tmp_path, data)
    fit(tmp_path, data, steps=1)[1].save_checkpoint(tmp_path / "1.ckpt")
    _, cut_short = fit(tmp_path, data, steps=2)
    options = {} if measure == "predict" else {"verbose": False}
    options |= {"ckpt_path": of and tmp_path / of, "weights_only": True}
    getattr(trainer(tmp_path), measure)(Recorder(), data, **options)
    cut_short.save_checkpoint(tmp_path / "2.ckpt")  # after another Trainer used the data
    assert same(fit(tmp_path, data)[0], whole)
    assert same(fit(tmp_path, data, checkpoint=tmp_path / "2.ckpt")[0], whole[2:])
    unused = make()
    getattr(trainer(tmp_path), measure)(Recorder(), unused, **options)
    assert same(fit(tmp_path, unused)[0], whole)


def test_a_trainer_that_trains_on_goes_on(make, tmp_path):
    data = make()
    whole, _ = fit(tmp_path, data)
    trained, again = fit(tmp_path, data, steps=2)
    module = again.lightning_module
    again.fit_loop.epoch_loop.max_steps = STEPS
    again.fit(module, data)
    assert same(module.trained, whole)
    assert trained is module.trained


def test_a_state_that_was_loaded_by_hand_is_where_one_fit_begins(make, tmp_path):
    data = make()
    whole, _ = fit(tmp_path, data)
    fit(tmp_path, data, steps=3)
    state = data.state_dict()
    data.load_state_dict(state)
    assert same(fit(tmp_path, data, steps=2)[0], whole[3:5])
    assert same(fit(tmp_path, data, steps=2)[0], whole[:2])


def test_looking_for_a_learning_rate_moves_nothing(make, tmp_path):
    class Finding(Recorder):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    data = make()
    whole, _ = fit(tmp_path, data)
    module, finding = Finding(), trainer(tmp_path, STEPS)
    Tuner(finding).lr_find(module, data, num_training=3)
    module.trained.clear()
    finding.fit(module, data)
    assert same(module.trained, whole)


def test_no_model_of_an_earlier_fit_stays_in_memory(make, tmp_path):
    data = make()
    earlier = weakref.ref(fit(tmp_path, data, steps=1)[1].lightning_module)
    trainer(tmp_path).test(Recorder(), data, verbose=False)
    gc.collect()
    assert earlier() is None


def test_numbers_of_numpy_and_paths_are_plain_in_a_checkpoint(model_folder, text_file, tmp_path):
    numbers = {
        "layer": 1,
        "batch_size": 64,
        "batches_per_block": 4,
        "seed": 3,
        "context_length": 16,
    }
    numbers |= {"held_out_documents": 20, "validation_tokens": 64, "test_tokens": 64}
    of_numpy = {name: np.int64(number) for name, number in numbers.items()}
    paths = {"model_name": Path(model_folder), "text": Path(text_file), "cache_dir": tmp_path / "c"}
    texts = {name: str(path) for name, path in paths.items()}
    first, fitted = fit(tmp_path, ActivationDataModule(**of_numpy, **paths), steps=2)
    fitted.save_checkpoint(tmp_path / "2.ckpt")
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)
    plain = ActivationDataModule(**numbers, **texts)
    assert saved["datamodule_hyper_parameters"].items() >= (numbers | texts).items()
    assert saved["ActivationDataModule"]["place"] == plain.state_dict()["place"]
    resumed, _ = fit(tmp_path, plain, steps=4, checkpoint=tmp_path / "2.ckpt")
    assert same([*first, *resumed], fit(tmp_path, plain, steps=4)[0])


@pytest.mark.parametrize("name", ["batch_size", "seed", "validation_tokens", "held_out_documents"])
def test_numbers_beyond_64_bits(make, name):
    with pytest.raises(ValueError, match=rf"^{name}=\d+ must be less than 2\*\*63$"):
        make(**{name: 2**63})
