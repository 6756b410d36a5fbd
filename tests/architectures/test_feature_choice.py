"""Feature Choice: every feature spends its own budget, so none is dead."""

import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, SparseAutoencoder, StandardSAE, TopKSAE
from lightning_sae.allocation import Choice, Scores
from lightning_sae.zipf import fit_zipf
from tests.helpers.architectures import chosen
from tests.helpers.superposition import superposition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def train(sae: SparseAutoencoder, steps: int, tokens: int = 512) -> None:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for step in range(steps):
        loss, _ = sae.loss(superposition(tokens, 8, n_features=16, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()


def from_scratch(n_features: int = 24, k: int = 3, **arguments: object) -> FeatureChoiceSAE:
    return FeatureChoiceSAE(8, n_features, k, mutual_choice_share=0, **arguments)


def test_uniform_budgets_give_every_feature_the_same():
    sae = from_scratch(budgets="uniform", per_batch=True)
    x = superposition(128, 8, n_features=16, seed=0)
    _, stats = sae.loss(x)
    assert torch.equal(chosen(sae, x).per_feature(), torch.full((24,), 16))  # 3 * 128 / 24
    assert stats["l0"] == 3


def test_zipf_budgets_fall_with_rank_and_sum_to_k_a_token():
    sae = from_scratch(max_density=0.4)
    sae.begin_feature_choice(128)
    budgets = sae.budgets_for(128)
    assert budgets.sum().item() == pytest.approx(3 * 128)
    assert (budgets.diff() <= 0).all()
    assert budgets.min() >= 1 - 1e-5
    assert budgets.max() <= 0.4 * 128 * (1 + 1e-6)
    assert budgets[0] > 2 * budgets[-1]
    torch.testing.assert_close(sae.budgets_for(256), 2 * budgets)


def test_fractions_of_a_match_are_rounded_anew_in_every_batch():
    sae = from_scratch(per_batch=True)
    x = superposition(100, 8, n_features=16, seed=0)
    counts = []
    for _ in range(6):
        sae.loss(x)
        counts.append(chosen(sae, x).per_feature())
    assert len({tuple(count.tolist()) for count in counts}) > 1
    # The two largest budgets find too few positive affinities to spend themselves on.
    assert ((torch.stack(counts) - sae.budgets_for(100))[:, 2:].abs() < 1).all()


def test_a_budget_below_one_is_served_in_turns():
    sae = from_scratch(n_features=200, k=1, zipf_exponent=1.5, min_matches=0.1, per_batch=True)
    counts = torch.zeros(200)
    for seed in range(100):
        x = superposition(64, 8, n_features=16, seed=seed)
        sae.loss(x)
        counts += chosen(sae, x).per_feature()
    budgets = sae.budgets_for(64)
    assert 0.0999 < budgets.min() < 0.5
    tail = budgets < 0.5
    assert (counts[tail] > 0).all()
    assert counts[tail].sum() == pytest.approx(100 * float(budgets[tail].sum()), rel=0.1)


def test_every_feature_fires_in_every_batch():
    sae = from_scratch(k=2, min_matches=1, per_batch=True)
    for seed in range(5):
        x = superposition(64, 8, n_features=16, seed=seed)
        sae.loss(x)
        assert (sae.history.tokens_since_fired == 0).all()


def test_the_batch_chooses_first_and_then_features_by_their_density():
    options = {"budgets": "zipf", "min_matches": 1, "per_batch": True}
    sae = FeatureChoiceSAE(8, 24, 3, mutual_choice_tokens=60 * 512, **options)
    mutual = MutualChoiceSAE(8, 24, 3, rank_discount=0)
    mutual.load_state_dict(dict(sae.named_parameters()), strict=False)
    train(sae, 60)
    train(mutual, 60)
    assert not sae.choosing
    torch.testing.assert_close(sae.W_dec, mutual.W_dec)  # the very same training
    torch.testing.assert_close(sae.threshold, mutual.threshold.expand(24))
    density = sae.history.density.clone()
    sae.loss(superposition(512, 8, n_features=16, seed=60))
    assert sae.choosing
    order = density.argsort(descending=True, stable=True)
    assert (sae.target_density[order].diff() <= 0).all()
    law = fit_zipf(density, 60 * 512).density(torch.arange(1, 25))
    targets = sae.target_density[order].double()
    free = (targets > 1.01 / 512) & (targets < 0.499)  # of the bounds
    assert free.sum() > 5
    proportion = (targets / law)[free]
    torch.testing.assert_close(proportion, proportion[:1].expand_as(proportion), rtol=1e-4, atol=0)
    before = sae.target_density.clone()
    train(sae, 5)
    assert torch.equal(sae.target_density, before)  # frozen


def test_measured_budgets_are_the_densities_reached_but_for_the_rarest():
    sae = FeatureChoiceSAE(8, 24, 3, mutual_choice_tokens=10 * 512)
    train(sae, 10)
    sae.history.density[[3, 7]] = torch.tensor([1e-4, 0.0])  # a tenth of the mean is 0.0125
    density, threshold = sae.history.density.double(), sae.threshold.clone()
    sae.loss(superposition(512, 8, n_features=16, seed=10))
    least = 3 / 24 / 10
    weights = sae.target_density.double() / density**sae.steepness
    assert sae.target_density[[3, 7]].tolist() == pytest.approx([least, least])
    free = sae.target_density > 1.01 * least
    assert free.sum() >= 20
    assert (weights[free] / weights[free].mean()).tolist() == pytest.approx([1.0] * int(free.sum()))
    assert sae.target_density.sum().item() == pytest.approx(3)
    # Budgets are nearly what features took, and so are thresholds.
    torch.testing.assert_close(sae.threshold[free], threshold[free], rtol=0.07, atol=0)


def test_features_take_what_is_above_their_thresholds_in_training_too():
    sae = FeatureChoiceSAE(8, 24, 3, mutual_choice_tokens=20 * 512)
    train(sae, 40)
    x = superposition(512, 8, n_features=16, seed=40)
    expected = sae.match(x)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    _, stats = sae.loss(x)
    assert stats["l0"] == len(expected) / 512 != 3
    sae.load_state_dict(before)
    assert torch.equal(chosen(sae, x).to_dense(), expected.to_dense())


def test_rare_features_fire_as_often_as_their_budgets_say():
    """Counts of a few are uneven, and thresholds that followed them in part would be too low."""
    sae = FeatureChoiceSAE(8, 200, 2, mutual_choice_tokens=640, aux_coefficient=0)
    sae.patience = 10
    counts, rounds = torch.zeros(200), 3000
    batches = [superposition(64, 8, n_features=16, seed=seed) for seed in range(100)]
    with torch.no_grad():
        for step in range(rounds):
            if step >= rounds - 2000:
                counts += chosen(sae, batches[step % 100]).per_feature()
            sae.loss(batches[step % 100])  # weights stay
    budgets = 2000 * 64 * sae.target_density
    assert (sae.target_density * 64).min() < 0.1
    for group in sae.target_density.argsort().chunk(4):
        assert counts[group].sum().item() == pytest.approx(budgets[group].sum().item(), rel=0.03)


def test_a_feature_that_misses_its_matches_becomes_easier_to_please():
    sae = FeatureChoiceSAE(8, 24, 3, mutual_choice_tokens=512)
    train(sae, 3)
    sae.threshold[5] = 1e3
    sae.history.tokens_since_fired[5] = 10**6
    before = sae.threshold.clone()
    sae.loss(torch.zeros(0, 8))
    assert torch.equal(sae.threshold, before)
    sae.loss(superposition(512, 8, n_features=16, seed=3))
    assert sae.threshold[5] == pytest.approx(1e3 * math.exp(-sae.tracking))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_the_first_phase_as_a_share_of_the_run(tmp_path: Path):
    sae = FeatureChoiceSAE(8, 24, 3, mutual_choice_share=0.6)
    x = torch.cat([superposition(64, 8, n_features=16, seed=seed) for seed in range(10)])
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            seen.append(bool(sae.choosing))

    trainer = pl.Trainer(
        max_steps=10,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        accelerator="cpu",
    )
    trainer.fit(sae, DataLoader(TensorDataset(x), batch_size=64))
    assert seen == [False] * 6 + [True] * 4


def test_without_a_trainer_the_first_phase_lasts_as_long_as_densities_are_measured():
    sae = FeatureChoiceSAE(8, 24, 3, dead_after_tokens=4 * 512)
    train(sae, 4)
    assert not sae.choosing
    train(sae, 1)
    assert sae.choosing


@pytest.mark.parametrize("architecture", [StandardSAE, TopKSAE, MutualChoiceSAE])
def test_starts_from_a_checkpoint_of_any_architecture(architecture: type, tmp_path: Path):
    first = architecture(8, 24, 0.1 if architecture is StandardSAE else 3)
    train(first, 30)
    path = tmp_path / "first.ckpt"
    torch.save({"loops": {}, "lightning_sae_format": 2, "state_dict": first.state_dict()}, path)
    sae = from_scratch(start_from=str(path))
    sae._trainer = SimpleNamespace(ckpt_path=None)
    sae.setup("fit")
    sae._trainer = None
    found, expected = sae.state_dict(), first.state_dict()
    for name in ("decoder.weight", "decoder.bias", "input_scale", "history.density"):
        assert torch.equal(found[name], expected[name]), name
    assert sae.history.tokens_seen == first.history.tokens_seen
    sae.loss(superposition(512, 8, n_features=16, seed=30))
    order = first.history.density.argsort(descending=True, stable=True)
    assert (sae.target_density[order].diff() <= 0).all()


@pytest.mark.filterwarnings("ignore:Budgets follow")  # a guess, for 24 features are no law
@pytest.mark.parametrize("budgets", ["measured", "zipf"])
def test_starts_from_densities_of_another_librarys_sae(budgets: str, tmp_path: Path):
    """Its files say how often features fire, and not on how many tokens that was counted."""
    first = TopKSAE(8, 24, 3, normalize_inputs="average")
    train(first, 30)
    first.history.tokens_seen.zero_()
    first.save_pretrained(tmp_path)
    sae = from_scratch(start_from=str(tmp_path), budgets=budgets, normalize_inputs="average")
    sae._trainer = SimpleNamespace(ckpt_path=None)
    sae.setup("fit")
    sae._trainer = None
    loss, stats = sae.loss(superposition(512, 8, n_features=16, seed=30))
    assert loss.isfinite()
    assert stats["l0"] == pytest.approx(3, rel=0.2)
    order = first.history.density.argsort(descending=True, stable=True)
    assert (sae.target_density[order].diff() <= 1e-6).all()


def test_a_rule_of_one_s_own_must_count_what_passes_thresholds():
    class Uncounted(FeatureChoiceSAE):
        def choose(self, scores: Scores) -> Choice:
            return Choice(super().choose(scores).matches)

    with pytest.raises(TypeError, match="must count the tokens that pass"):
        Uncounted(8, 24, 3, mutual_choice_share=0).loss(superposition(64, 8, 16, seed=0))


def test_thresholds_keep_each_features_share():
    sae = from_scratch(normalize_inputs="average")
    sae.patience = 10
    train(sae, 300)
    assert sae.threshold.shape == (24,)
    sae.eval()
    held_out = superposition(8192, 8, n_features=16, seed=-1)
    wanted = sae.target_density
    tracked = (sae.encode(held_out) > 0).float().mean(0)
    assert tracked.sum().item() == pytest.approx(3, rel=0.1)
    torch.testing.assert_close(tracked, wanted, rtol=0.3, atol=0.02)
    before = sae.threshold.clone()
    sae.calibrate(held_out)
    assert (sae.encode(held_out) > 0).sum() == 3 * 8192
    ratios = sae.threshold / before
    torch.testing.assert_close(ratios, ratios[:1].expand(24))  # one factor for all


def test_the_first_phase_can_be_calibrated():
    sae = FeatureChoiceSAE(8, 24, 3, mutual_choice_tokens=10**9)
    held_out = superposition(8192, 8, n_features=16, seed=-1)
    sae.calibrate(held_out)  # before the first batch, too
    train(sae, 2)
    sae.eval().calibrate(held_out)
    assert (sae.encode(held_out) > 0).sum() == 3 * 8192


def test_a_smaller_batch_later_on_is_chosen_from_too():
    """As the last one of an epoch is; features begin to choose in one of full size."""
    sae = FeatureChoiceSAE(8, 48, 3, mutual_choice_tokens=129, min_matches=1)
    chose = []
    for tokens in (64, 64, 1, 2, 64, 3, 64):
        sae.loss(superposition(tokens, 8, n_features=16, seed=tokens))
        chose.append(bool(sae.choosing))
    assert chose == [False] * 4 + [True] * 3
    torch.testing.assert_close(sae.target_density.sum().item(), 3.0)
    assert sae.target_density.min() * 64 >= 1 - 1e-5


def test_a_budget_too_small_for_the_dictionary_is_explained():
    sae = FeatureChoiceSAE(
        8, 1000, 2, mutual_choice_tokens=1000, min_matches=1.0
    )  # noticed in the first phase
    with pytest.raises(
        ValueError,
        match=r"n_features=1000 features min_matches=1\.0: batch_size=500 or min_matches=0\.256",
    ):
        sae.loss(torch.randn(128, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_density": 1.5}, r"max_density=1\.5 is out of range"),
        ({"max_density": 0.05}, r"k=2 matches need at least k / n_features = 0\.0833"),
        ({"budgets": "Zipf"}, "budgets='Zipf' is none of measured, uniform, zipf"),
        ({"zipf_exponent": -1.0}, r"zipf_exponent=-1\.0 must be a finite number"),
        ({"zipf_offset": float("nan")}, "zipf_offset=nan must be a finite number"),
        ({"mutual_choice_share": -0.5}, r"mutual_choice_share=-0\.5 must be a share of the run"),
        ({"mutual_choice_share": 1000}, "mutual_choice_share=1000 must be a share of the run, 0"),
        ({"mutual_choice_tokens": -1}, "mutual_choice_tokens=-1 must be a finite number"),
        ({"min_matches": -1.0}, r"min_matches=-1\.0 must be a finite number"),
    ],
)
def test_settings_out_of_range(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        FeatureChoiceSAE(8, 24, k=2, **arguments)
