import doctest
from types import SimpleNamespace

import torch

from lightning_sae.callbacks import LossRecoveredCallback, ResultsTable, results_table
from tests.callbacks.fakes import FakeData, FakeSAE, trainer


def test_doctests():
    assert doctest.testmod(results_table).failed == 0


def test_test_prints_one_table(tmp_path, capsys):
    class More(FakeSAE):
        def on_test_epoch_end(self):
            super().on_test_epoch_end()
            self.log("test/tokens", 131072.0)
            self.log("test/own", 1e-7)
            self.log("other", 3.0)

    run = trainer(tmp_path, LossRecoveredCallback(), ResultsTable())
    run.test(More(), datamodule=FakeData(), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names[:4] == ["fvu", "tokens", "loss_recovered_mean", "loss_recovered_zero"]
    assert names[-1] == "own"
    assert "other" not in names
    assert len(names) == len(set(names)) == 11
    table = "\n".join(lines)
    assert "fvu                     0.25  share of the activations' variance not" in table
    assert "tokens               131,072  tokens tested on" in table
    assert max(map(len, lines)) < 100


def test_numbers_have_sensible_digits():
    values = {"a": 0.123456, "b": 12.0, "c": 123456.7, "d": 1e-9, "e": float("nan"), "f": -0.5}
    printed = [line.split()[1] for line in results_table.results_table(values).splitlines()]
    assert printed == ["0.1235", "12", "123,457", "1e-09", "nan", "-0.5"]


def test_each_of_several_has_a_column():
    values = {"a/l0": 2.0, "a/fvu": 0.5, "b/fvu": 12345.6, "other": 1.0, "x/y": 3.0}
    assert results_table.results_table(values, ["a", "b"]).splitlines() == [
        "            a       b",
        "fvu       0.5  12,346  share of the activations' variance not reconstructed",
        "l0          2          features that fire on a token, mean",
        "other  1",
        "x/y    3",
    ]


def test_nothing_to_print():
    assert results_table.results_table({}) == ""


def test_only_one_rank_prints(capsys):
    for first in (False, True):
        metrics = {"test/fvu": torch.tensor(1.0)}
        ResultsTable().on_test_end(
            SimpleNamespace(is_global_zero=first, callback_metrics=metrics), FakeSAE()
        )
        assert bool(capsys.readouterr().out) == first
