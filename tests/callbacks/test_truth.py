"""What is measured against the truth, by the Trainer and by the command."""

import pytest
import torch

from lightning_sae import SyntheticDataModule, TopKSAE
from lightning_sae.callbacks import TruthCallback
from lightning_sae.cli import main
from lightning_sae.matches import Matches
from lightning_sae.metrics import FeatureAbsorption, FeatureClassification, direction_statistics
from tests.callbacks.fakes import FakeData, FakeSAE, trainer

SIZES = {"d_model": 8, "true_features": 20, "true_l0": 2.0, "batch_size": 256}
SIZES |= {"validation_tokens": 512, "test_tokens": 5120}
OF_DIRECTIONS = {"mmcs_true", "mmcs_learned", "uniqueness", "unmatched_fraction"}
OF_FIRINGS = {"feature_precision", "feature_recall", "feature_f1", "feature_accuracy"}
OF_FAMILIES = {"absorption", "absorption_fraction"}
ALL = OF_DIRECTIONS | OF_FIRINGS | OF_FAMILIES


def truth_of(figures: dict) -> dict[str, float]:
    found = {name.split("/")[1]: float(value) for name, value in figures.items()}
    return {name: value for name, value in found.items() if name in ALL}


def test_figures_are_those_of_all_held_out_tokens_together(tmp_path):
    data = SyntheticDataModule(**SIZES, children=3)
    sae = TopKSAE(8, n_features=24, k=3)
    sae.initialize(next(iter(data.train_dataloader()))["activations"])
    (figures,) = trainer(tmp_path, TruthCallback()).test(sae, data, verbose=False)

    batches = list(data.test_dataloader())
    assert len(batches) > 1
    x = torch.cat([batch["activations"] for batch in batches])
    true = torch.cat([data.true_codes(batch).to_dense() for batch in batches])
    codes = sae.eval().match(x)
    expected = direction_statistics(sae.W_dec, data.truth.directions)
    classification = FeatureClassification(sae.W_dec, data.truth.directions)
    classification.update(codes, matches(true))
    absorption = FeatureAbsorption(sae.W_dec, data.truth.directions[:5])
    scaled = codes.to_dense() / sae.scales(x)
    torch.testing.assert_close(  # which are codes in the units of the activations
        scaled @ sae.W_dec + sae.b_dec / sae.scales(x), sae(x)
    )
    absorption.update(matches(scaled), x, matches(true[:, :5]))
    expected |= classification.compute() | absorption.compute()
    assert truth_of(figures) == pytest.approx({n: v.item() for n, v in expected.items()})
    assert figures["test/absorption_fraction"] > 0


def matches(dense) -> Matches:
    token, feature = (dense > 0).nonzero(as_tuple=True)
    return Matches(token, feature, dense[token, feature].detach(), tuple(dense.shape))


def test_without_families_there_is_nothing_to_absorb(tmp_path):
    data, sae = SyntheticDataModule(**SIZES), TopKSAE(8, n_features=24, k=3)
    run = trainer(tmp_path, TruthCallback(), max_steps=4, max_epochs=-1, val_check_interval=2)
    run.fit(sae, data)
    assert truth_of(run.callback_metrics).keys() == OF_DIRECTIONS | OF_FIRINGS


def test_with_other_data_nothing_happens(tmp_path):
    run = trainer(tmp_path, TruthCallback())
    run.fit(FakeSAE(), FakeData())
    assert not truth_of(run.callback_metrics)
    with pytest.warns(UserWarning, match="TruthCallback does nothing"):
        trainer(tmp_path, TruthCallback()).validate(Blind(), SyntheticDataModule(**SIZES))


class Blind(FakeSAE):
    """It has no directions."""

    def validation_step(self, batch):
        pass


def test_the_command_trains_on_known_features_and_says_what_was_found(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    config = ["--config", "topk.yaml", "--config", "data/synthetic.yaml"]
    config += [f"--data.{name}={value}" for name, value in SIZES.items()] + ["--data.children=3"]
    sizes = ["--model.n_features=24", "--model.k=3", "--trainer.max_steps=6"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.val_check_interval=3"]
    main(["fit", *config, *sizes, *quiet])
    capsys.readouterr()
    last = "runs/synthetic/topk/version_0/checkpoints/last.ckpt"
    main(["test", *config, *sizes[:2], "--ckpt_path", last])
    table = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert table.keys() > ALL
    assert float(table["mmcs_true"]) > 0.3
