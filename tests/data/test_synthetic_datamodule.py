import itertools

import pytest
import torch

from lightning_sae import TopKSAE
from lightning_sae.checks import UsageError
from lightning_sae.data import SyntheticDataModule
from tests.data.tiny import D_MODEL, Recorder, same, trainer

SMALL = {"d_model": D_MODEL, "true_features": 20, "true_l0": 2.0, "children": 3}
SMALL |= {"batch_size": 64, "batches_per_block": 3, "validation_tokens": 1024, "test_tokens": 600}


def make(**changed):
    return SyntheticDataModule(**SMALL | changed)


def take(data, count):
    return [b["activations"] for b in itertools.islice(data.train_dataloader(), count)]


def test_the_stream_is_a_function_of_the_arguments_and_no_token_comes_twice():
    batches = take(make(), 20)
    assert same(batches, take(make(), 20))
    assert not same(batches, take(make(seed=1), 20))
    held_out = [b["activations"] for loader in held_out_loaders(make()) for b in loader]
    rows = torch.cat([*batches, *held_out])
    rows = rows[(rows != 0).any(1)]  # of those on which nothing fires there are several
    assert len(rows.unique(dim=0)) == len(rows) > 1500


def held_out_loaders(data):
    return data.val_dataloader(), data.test_dataloader()


def test_it_knows_what_held_out_batches_are_made_of():
    data = make()
    batches = [batch for loader in held_out_loaders(data) for batch in loader]
    assert [len(batch["activations"]) for batch in batches] == [1024, 512]  # whole runs of 256
    for batch in batches:
        codes = data.true_codes(batch)
        assert codes.shape == (len(batch["activations"]), 20)
        expected = codes.to_dense() @ data.truth.directions
        torch.testing.assert_close(batch["activations"], expected)


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_a_resumed_run_goes_on_where_it_was(tmp_path, cut):
    def run(steps, checkpoint=None, **changed):
        module = Recorder()
        fit = trainer(tmp_path, steps)
        fit.fit(module, make(**changed), ckpt_path=checkpoint, weights_only=True)
        fit.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.trained

    whole = run(9)
    run(cut)
    checkpoint = tmp_path / f"{cut}.ckpt"
    assert same(run(9, checkpoint), whole[cut:])
    with pytest.raises(UsageError, match=r"^true_l0=3.0: the checkpoint was trained on 2.0$"):
        run(9, checkpoint, true_l0=3.0)


def test_to_resume_no_number_is_passed_over():
    data = make()
    inputs = data.train_inputs()
    first = [int(each) for each in itertools.islice(inputs, 5)]
    state = inputs.state_dict()
    assert first == [0, 1, 2, 3, 4]
    other = data.train_inputs()
    other.load_state_dict(state)
    assert int(next(iter(other))) == 5
    assert int(next(iter(other))) == 0  # it starts afresh each time


def test_an_sae_of_other_features_is_not_tested(tmp_path):
    run = trainer(tmp_path, 2)
    sae = TopKSAE(D_MODEL, n_features=20, k=2)
    run.fit(sae, make())
    run.save_checkpoint(tmp_path / "there.ckpt")
    again = {"ckpt_path": tmp_path / "there.ckpt", "weights_only": True, "verbose": False}
    (figures,) = trainer(tmp_path).test(sae, make(batch_size=128), **again)
    assert figures["test/tokens"] == 512
    with pytest.raises(UsageError, match=r"^seed=1: the checkpoint was trained on 0$"):
        trainer(tmp_path).test(sae, make(seed=1), **again)


def test_its_arguments_are_on_record():
    data = make()
    assert data.hparams["true_l0"] == 2.0
    described = data.describe()
    assert described["children"] == 3
    assert described["d_model"] == D_MODEL
