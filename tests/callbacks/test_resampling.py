"""Resampling: what is drawn, what it changes, when, and that nothing of it is lost or differs."""

from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_sae import (
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    StandardSAE,
    TopKSAE,
)
from lightning_sae.callbacks.resampling import ResampleDeadFeatures, renew
from lightning_sae.callbacks.weighted_sample import WeightedSample
from lightning_sae.parallel import Ranks
from tests.callbacks.fakes import FakeSAE, trainer
from tests.helpers.ddp import run_on_two
from tests.helpers.superposition import superposition

D_MODEL, N_FEATURES, TOKENS = 8, 24, 32  # of a batch
DEAD = slice(0, 10)
# A Trainer that only trains is right for a test, and Lightning remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
Adam = partial(torch.optim.Adam, lr=3e-3)


def batch(seed: int, tokens: int = TOKENS) -> torch.Tensor:
    return superposition(tokens, D_MODEL, n_features=16, seed=seed) * 7 + 20


def batches(count: int) -> DataLoader:
    return DataLoader([batch(seed) for seed in range(count)], batch_size=None)


def sae_with_dead_features(make=StandardSAE, **arguments):
    torch.manual_seed(0)
    sae = make(D_MODEL, N_FEATURES, dead_after_tokens=2 * TOKENS, optimizer=Adam, **arguments)
    sae.encoder.bias.data[DEAD] = -1e6  # these cannot fire
    return sae


# What is drawn


def test_inputs_are_drawn_by_the_square_of_their_loss():
    sae = sae_with_dead_features()
    sae.loss(batch(0))
    resample, x = ResampleDeadFeatures(), batch(1)
    resample._draw(sae, x.view(4, -1, D_MODEL), Ranks())
    loss = ((sae(x) - x) * sae.scales(x)).square().mean(1).detach()
    expected = WeightedSample()
    tokens = int(sae.tokens_seen)
    expected.add(sae.scaled(x), loss**2, size=N_FEATURES, seed=tokens, ranks=Ranks())
    torch.testing.assert_close(resample._samples[""].keys, expected.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(resample._samples[""].rows, expected.rows)


def test_what_training_leaves_out_is_not_drawn():
    sae = sae_with_dead_features(max_norm_multiple=8.0)
    sae.loss(batch(0))
    x = batch(1)
    x[3] += 1000
    resample = ResampleDeadFeatures()
    resample._draw(sae, x, Ranks())
    expected = {tuple(row.tolist()) for row in sae.scaled(x)[torch.arange(TOKENS) != 3]}
    assert {tuple(row.tolist()) for row in resample._samples[""].rows} <= expected


# What it changes


@pytest.mark.parametrize(
    "make",
    [Adam, partial(torch.optim.Adam, amsgrad=True), partial(torch.optim.SGD, lr=0.1, momentum=0.9)],
)
def test_features_are_renewed_as_the_source_has_it(make):
    sae = sae_with_dead_features()
    optimizer = make(sae.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        sae.loss(batch(seed))[0].backward()
        optimizer.step()
        sae.normalize_decoder()
    sae.history.tokens_since_fired[12] = 1000  # one more, whose moments are not zero yet
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    features = sae.history.dead().nonzero().squeeze(1)
    assert {*range(10), 12} <= set(features.tolist())
    inputs = torch.randn(len(features), D_MODEL)
    renew(sae, features, inputs, [optimizer])

    alive = torch.ones(N_FEATURES, dtype=torch.bool)
    alive[features] = False
    norm = sum(row.norm() for row in before["encoder.weight"][alive]) / alive.sum()
    for feature, x in zip(features.tolist(), inputs, strict=True):
        direction = (x - sae.b_dec) / (x - sae.b_dec).norm()
        torch.testing.assert_close(sae.W_dec[feature], direction)
        torch.testing.assert_close(sae.encoder.weight[feature], 0.2 * norm * direction)
    assert (sae.encoder.bias[features] == 0).all()
    assert not sae.history.dead().any()
    assert (sae.history.density[features] == 0).all()
    for parameter in (sae.W_dec, sae.encoder.weight, sae.encoder.bias):
        moments = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
        assert moments
        for moment in moments:
            assert (moment[features] == 0).all()
            assert (moment[alive] != 0).any()
    for name, value in sae.state_dict().items():
        same = value[alive] if value.shape[:1] == (N_FEATURES,) else value
        assert torch.equal(same, before[name][alive] if same is not value else before[name]), name


@pytest.mark.parametrize("make", [GatedSAE, partial(JumpReLUSAE, bandwidth=0.1)])
def test_what_else_there_is_of_a_feature_starts_anew(make):
    """A threshold is shorter by as much as its encoder, a gate's code is the gate's."""
    sae = sae_with_dead_features(make, k=3)
    optimizer = Adam(sae.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        sae.loss(batch(seed))[0].backward()
        optimizer.step()
        sae.normalize_decoder()
    if isinstance(sae, GatedSAE):
        torch.nn.init.normal_(sae.log_gain)
        torch.nn.init.normal_(sae.magnitude_bias)
    assert (sae.history.tokens_since_fired[DEAD] == 3 * TOKENS).all()
    before = {name: value.clone() for name, value in sae.named_parameters()}
    features, inputs = torch.tensor([1, 4]), sae.scaled(batch(9)[:2])
    renew(sae, features, inputs, [optimizer])
    others = torch.ones(N_FEATURES, dtype=torch.bool)
    others[features] = False
    for name in sae.renewable:
        value = sae.get_parameter(name)
        assert torch.equal(value[others], before[name][others])
        assert not torch.equal(value[features], before[name][features])
        assert (optimizer.state[value]["exp_avg"][features] == 0).all()
    codes = sae.encode(batch(9)[:2])[:, features].diagonal()
    weight = sae.encoder.weight[features]
    expected = (weight * (inputs - sae.b_dec)).sum(1)
    assert (expected > 0).all()
    torch.testing.assert_close(codes, expected)
    if isinstance(sae, JumpReLUSAE):
        alive = before["unit_threshold"][DEAD.stop :].mean()
        torch.testing.assert_close(sae.unit_threshold[features], (0.2 * alive).expand(2))


def test_all_features_may_be_dead():
    sae = sae_with_dead_features()
    sae.loss(batch(0))
    sae.history.tokens_since_fired[:] = 1000
    renew(sae, torch.arange(5), torch.randn(5, D_MODEL), [])
    torch.testing.assert_close(sae.encoder.weight[:5].norm(dim=1), torch.full((5,), 0.2))


# When


class Record(pl.Callback):
    """Notes, before each step, how many features are dead."""

    def __init__(self):
        self.dead = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.dead.append(int(pl_module.history.dead().sum()))


@pytest.mark.parametrize(
    ("make", "arguments", "firing"),
    [
        (StandardSAE, {"l1_coefficient": 0.5}, 10),
        (TopKSAE, {"k": 3, "aux_coefficient": 0.0}, 3),  # small affinities win seldom
        (MutualChoiceSAE, {"k": 3, "aux_coefficient": 0.0, "importance": "affinity"}, 3),
        (JumpReLUSAE, {"k": 3, "bandwidth": 0.05}, 10),
        (GatedSAE, {"k": 3}, 10),
    ],
)
def test_resampled_features_fire_again(make, arguments, firing, tmp_path):
    sae = sae_with_dead_features(make, **arguments)
    resample = ResampleDeadFeatures(times=1, sample_tokens=2 * TOKENS)
    record = Record()
    trainer(tmp_path, resample, record).fit(sae, batches(20))
    assert record.dead[3] >= 10  # it is due with the fourth batch: twice dead_after_tokens
    assert record.dead[4] == 0
    assert (sae.history.density[DEAD] > 0).sum() >= firing
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    assert sae.loss(batch(99))[1]["fvu"] < 0.8


@pytest.mark.parametrize(
    ("accumulate", "expected"),
    [(1, [(4, 3, 4), (8, 7, 8)]), (3, [(6, 3, 6), (9, 7, 9)])],  # in batches
)
def test_times_are_counted_in_tokens_and_follow_a_step(accumulate, expected, tmp_path, monkeypatch):
    """Inputs are drawn from the last batches before it is due, up to the step that follows."""
    drawn, renewed = [], []
    resample = ResampleDeadFeatures(4 * TOKENS, times=2, sample_tokens=2 * TOKENS)

    def draws(module, x, ranks):
        drawn.append(int(module.tokens_seen) // TOKENS)

    def renews(module, features, inputs, optimizers):
        now = int(module.tokens_seen) // TOKENS
        renewed.append((now, drawn[0], drawn[-1]))
        drawn.clear()

    monkeypatch.setattr(resample, "_draw", draws)
    monkeypatch.setattr("lightning_sae.callbacks.resampling.renew", renews)
    run = trainer(tmp_path, resample, accumulate_grad_batches=accumulate)
    run.fit(sae_with_dead_features(), batches(18))
    assert renewed == expected
    assert drawn == []  # not after the last time


class SaveEachStep(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    steps = 10  # resampled after 4 and 8, inputs drawn from 2 to 4 and from 6 to 8

    def run(folder, *callbacks, **options):
        sae = sae_with_dead_features()
        done = options.pop("done", 0)  # batches that data which resume would not repeat
        data = DataLoader([batch(done + step) for step in range(steps)], batch_size=None)
        resample = ResampleDeadFeatures(times=2, sample_tokens=3 * TOKENS)
        fit = trainer(folder, resample, *callbacks, max_steps=steps, max_epochs=-1)
        fit.fit(sae, data, **options)
        return sae.state_dict(), fit.optimizers[0].state_dict()["state"]

    expected, moments = run(tmp_path, SaveEachStep())
    assert (expected["history.density"][DEAD] > 0).all()
    for cut in range(1, steps):
        found, found_moments = run(
            tmp_path, done=cut, ckpt_path=tmp_path / f"{cut}.ckpt", weights_only=True
        )
        for name, value in expected.items():
            assert torch.equal(found[name], value), (cut, name)
        for parameter, state in moments.items():
            for name, value in state.items():
                assert torch.equal(found_moments[parameter][name], value), (cut, name)


def train_on(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Train in a plain loop on a rank's share of each batch, as DDP does."""
    sae = sae_with_dead_features()
    optimizer = Adam(sae.parameters())
    resample = ResampleDeadFeatures(times=1, sample_tokens=3 * TOKENS)
    resample.setup(None, sae, "fit")
    for step in range(8):
        x = batch(step).chunk(ranks)[rank]
        optimizer.zero_grad()
        sae.loss(x)[0].backward()
        for parameter in sae.parameters() if ranks > 1 else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        optimizer.step()
        sae.normalize_decoder()
        fit = SimpleNamespace(global_step=step + 1, optimizers=[optimizer])
        resample.on_train_batch_end(fit, sae, None, {"activations": x}, step)
    return sae.state_dict()


def test_two_ranks_resample_as_one_does():
    one = train_on(0, 1)
    first, second = run_on_two(train_on, 2)
    assert (one["history.density"][DEAD] > 0).all()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)


# What it asks for


def test_defaults_are_the_source_s(tmp_path, monkeypatch):
    resample, sae = ResampleDeadFeatures(), StandardSAE(D_MODEL, N_FEATURES)
    assert sae.history.dead_after_tokens == 12_500 * 8_192
    assert (resample.times, resample.sample_tokens) == (4, 100 * 8_192)
    resample.setup(None, sae, "fit")
    calls = []
    monkeypatch.setattr(resample, "_draw", lambda *_: None)
    monkeypatch.setattr(
        "lightning_sae.callbacks.resampling.renew",
        lambda module, *_: calls.append(int(module.tokens_seen) // 8_192),
    )
    for step in range(0, 125_001, 12_500):
        sae.history.tokens_since_fired.fill_(1)
        sae.history.tokens_seen.fill_(step * 8_192)
        fit = SimpleNamespace(global_step=step + 1, optimizers=[])
        resample.on_train_batch_end(fit, sae, None, batch(0), step) if step else None
    assert calls == [25_000, 50_000, 75_000, 100_000]


def test_what_it_cannot_do_is_refused_in_one_line(tmp_path):
    features = FeatureChoiceSAE(D_MODEL, N_FEATURES, 3)
    with pytest.raises(ValueError, match="cannot be used with FeatureChoiceSAE, which keeps thr"):
        trainer(tmp_path, ResampleDeadFeatures()).fit(features, batches(1))
    with pytest.warns(
        UserWarning, match=r"^ResampleDeadFeatures does nothing: neither FakeSAE nor"
    ):
        ResampleDeadFeatures().setup(None, FakeSAE(), "fit")
    square = StandardSAE(D_MODEL, D_MODEL)  # other rows of the same number are no features
    ResampleDeadFeatures().setup(None, square, "fit")
    for arguments in ({"every_tokens": 0}, {"times": 0}, {"sample_tokens": -1}):
        (name, value), *_ = arguments.items()
        with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
            ResampleDeadFeatures(**arguments)
