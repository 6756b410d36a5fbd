"""What holds for every architecture."""

import copy
import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, SparseAutoencoder, StandardSAE, TopKSAE
from lightning_sae.allocation import Matches, Scores, TensorScores
from lightning_sae.sparse import rows
from tests.helpers.superposition import superposition

D_MODEL, N_FEATURES, K = 16, 48, 4
ARCHITECTURES = {
    "standard": partial(StandardSAE, D_MODEL, N_FEATURES, 0.5),
    "topk": partial(TopKSAE, D_MODEL, N_FEATURES, K),
    "mutual_choice": partial(MutualChoiceSAE, D_MODEL, N_FEATURES, K),
    "feature_choice_uniform": partial(
        FeatureChoiceSAE, D_MODEL, N_FEATURES, K, budgets="uniform", mutual_choice_for=0
    ),
    "feature_choice_zipf": partial(
        FeatureChoiceSAE, D_MODEL, N_FEATURES, K, mutual_choice_for=0, zipf_exponent=1.0
    ),
    "feature_choice_in_two_phases": partial(
        FeatureChoiceSAE,
        *(D_MODEL, N_FEATURES, K),
        mutual_choice_for=1000,  # tokens
        zipf_exponent=1.0,  # so few tokens allow no fit
        zipf_offset=1.0,
    ),
}
# A Trainer that only trains is right for a test, and Lightning remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
every_architecture = pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def activations(tokens: int = 64) -> torch.Tensor:
    """Activations with a large mean and an odd scale, as residual streams have them."""
    return superposition(tokens, D_MODEL, n_features=32, seed=tokens) * 7 + 20


def train(sae: SparseAutoencoder, steps: int, lr: float = 3e-3) -> list[float]:
    """Train in a plain loop, no Trainer."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        loss, _ = sae.loss(superposition(256, D_MODEL, n_features=32, seed=step) * 7 + 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
        losses.append(loss.item())
    return losses


@every_architecture
def test_learns_in_a_plain_loop(make):
    sae = make()
    losses = train(sae, 150)
    assert losses[-1] < 0.5 * losses[0]
    sae.eval()
    x = activations(512)
    error = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5
    assert int(sae.tokens_seen) == 150 * 256


@every_architecture
def test_gradients_equal_dense_autograd(make):
    """The loss, written out with dense codes and no shortcut, has the same gradients."""
    sae = make(dead_after_tokens=100, dying_below=0.0).double()
    x = activations().double()
    sae.loss(x)  # sets the scale
    sae.tokens_since_fired[:20] = 1000  # so that AuxK has something to do
    reference = copy.deepcopy(sae)
    loss, stats = sae.loss(x)
    loss.backward()

    scaled = x * reference.input_scale
    centred = scaled - reference.b_dec
    affinities = centred @ reference.encoder.weight.T + reference.encoder.bias
    mask = reference.choose(TensorScores(affinities)).to_dense() > 0
    codes = torch.where(mask, affinities, 0.0)
    dictionary = reference.W_dec / reference.W_dec.norm(dim=1, keepdim=True)
    error = scaled - codes @ dictionary - reference.b_dec
    dense = error.pow(2).mean()
    if isinstance(reference, StandardSAE):
        dense = dense + reference.l1_coefficient * codes.sum() / len(x) / D_MODEL
    else:
        dead = reference.tokens_since_fired >= 100
        top = affinities[:, dead].relu().topk(min(D_MODEL // 2, int(dead.sum())), dim=1)
        extra = torch.zeros_like(affinities[:, dead]).scatter(1, top.indices, top.values)
        left = error.detach()
        aux = (left - extra @ dictionary[dead]).pow(2).mean() / (left - left.mean(0)).pow(2).mean()
        dense = dense + aux / 32
        assert stats["aux_k_loss"] > 0
    dense.backward()
    torch.testing.assert_close(loss, dense)
    for (name, ours), theirs in zip(sae.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")


@every_architecture
def test_decoder_gradient_is_orthogonal_to_its_rows(make):
    sae = make()
    sae.loss(activations())[0].backward()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(N_FEATURES), atol=1e-6, rtol=0)


@every_architecture
def test_a_token_is_encoded_alone_in_eval_mode(make):
    sae = make()
    train(sae, 5)
    sae.eval()
    x = activations()
    together = sae.encode(x)
    alone = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(together, alone)
    assert sae.encode(x.view(4, 16, D_MODEL)).shape == (4, 16, N_FEATURES)
    torch.testing.assert_close(sae(x.view(4, 16, D_MODEL)).view(64, -1), sae(x))


@every_architecture
def test_eval_mode_changes_nothing(make):
    sae = make()
    train(sae, 2)
    sae.eval()
    before = copy.deepcopy(sae.state_dict())
    _, stats = sae.loss(activations())
    assert "aux_k_loss" not in stats
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name


@every_architecture
def test_the_first_batch_sets_origin_and_scale(make):
    sae = make()
    x = activations()
    _, stats = sae.loss(x)
    torch.testing.assert_close(sae.input_mean, x.mean(0))
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0) * sae.input_scale)
    scaled = (x - x.mean(0)) * sae.input_scale
    torch.testing.assert_close(scaled.square().sum(1).mean(), torch.tensor(float(D_MODEL)))
    # Scaled activations have unit variance, so the two measures of the error agree.
    torch.testing.assert_close(stats["reconstruction_loss"], stats["fvu"])
    sae.loss(x + 1)
    torch.testing.assert_close(sae.input_mean, x.mean(0))  # only the first


def test_a_larger_sample_can_set_origin_and_scale():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    sample = activations(2000)
    sae.initialize(sample)
    sae.loss(activations() + 100)
    torch.testing.assert_close(sae.input_mean, sample.mean(0))


def test_initialisation_is_tied_and_of_unit_norm():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    assert torch.equal(sae.encoder.weight, sae.W_dec)
    assert sae.encoder.weight.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES))


def test_dead_features_are_counted_in_tokens_and_revived():
    sae = TopKSAE(D_MODEL, N_FEATURES, K, dead_after_tokens=128)
    sae.encoder.bias.data[:10] = -1e3  # these cannot fire
    for seed in range(3):
        _, stats = sae.loss(activations(64) + seed)
    assert (sae.tokens_since_fired[:10] == 192).all()
    assert sae.dead_features_mask()[:10].all()
    assert stats["dead_fraction"] >= 10 / N_FEATURES
    sae.encoder.bias.data[0] = 1e3
    sae.loss(activations(64))
    assert sae.tokens_since_fired[0] == 0


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_stays_exact_in_sixteen_bits(make, dtype: torch.dtype):
    sae = make()
    sae.loss(activations())
    exact = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    sae.to(dtype)
    assert sae.W_dec.dtype == dtype
    for name, buffer in sae.named_buffers():
        assert torch.equal(buffer, exact[name]), name
        assert buffer.dtype == exact[name].dtype
    assert sae.affinities(torch.randn(2, D_MODEL, dtype=dtype)).dtype == torch.float32


def test_affinities_ignore_autocast():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    x = torch.randn(3, D_MODEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = sae.affinities(x)
    assert torch.equal(mixed, sae.affinities(x))


class Host(pl.LightningModule):
    """Somebody else's module that trains an SAE among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K)
        self.probe = nn.Linear(D_MODEL, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        sae_loss, stats = self.sae.loss(x)
        self.log("l0", stats["l0"])
        return sae_loss + functional.mse_loss(self.probe(self.sae(x)).squeeze(1), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def quiet_trainer(**kwargs) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def loader(tokens: int = 2048, *columns: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(activations(tokens), *columns), batch_size=128)


def test_trains_as_a_child_of_another_module():
    host = Host()
    before = host.sae.W_dec.detach().clone()
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(host, loader(2048, torch.randn(2048)))
    assert not torch.allclose(before, host.sae.W_dec)
    assert trainer.callback_metrics["l0"] == pytest.approx(K)
    host.eval()
    assert host.sae(activations()).shape == (64, D_MODEL)


@every_architecture
@pytest.mark.parametrize("accumulate", [1, 3])
def test_checkpoint_from_python_restores_everything(make, accumulate: int, tmp_path):
    sae = make(optimizer=torch.optim.AdamW)
    trainer = quiet_trainer(max_steps=5, accumulate_grad_batches=accumulate, max_epochs=-1)
    trainer.fit(sae, loader(4096))
    path = tmp_path / "sae.ckpt"
    trainer.save_checkpoint(path)

    raw = torch.load(path, weights_only=True)  # no code runs on loading
    norms = raw["state_dict"]["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(N_FEATURES), atol=1e-6, rtol=0)

    again = type(sae).load_from_checkpoint(path)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    x = activations()
    assert torch.equal(again.eval()(x), sae.eval()(x))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_decoder_norms_are_exact_in_files_that_a_callback_writes(accumulate: int, tmp_path):
    """Callbacks write checkpoints before the module's own end-of-batch hook runs."""
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=checkpoint,
        max_steps=3,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        norms = torch.load(file, weights_only=True)["state_dict"]["W_dec"].norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(N_FEATURES), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_longer_run_goes_on_learning_from_a_finished_one(tmp_path):
    """The rate fell to zero; with more steps to go it must be above zero again."""
    first = TopKSAE(D_MODEL, N_FEATURES, K)
    trainer = quiet_trainer(max_steps=4)
    trainer.fit(first, loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = TopKSAE(D_MODEL, N_FEATURES, K)
    trainer = quiet_trainer(max_steps=8)
    trainer.fit(second, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert not torch.allclose(first.encoder.weight, second.encoder.weight)


def test_the_learning_rate_falls_linearly_to_zero():
    class Rates(pl.Callback):
        seen: list[float] = []  # noqa: RUF012 - one run

        def on_train_batch_start(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    sae = TopKSAE(D_MODEL, N_FEATURES, K, optimizer=partial(torch.optim.Adam, lr=1.0))
    quiet_trainer(max_steps=4, callbacks=rates).fit(sae, loader())
    assert rates.seen == [1.0, 0.75, 0.5, 0.25]


def test_thresholds_of_another_k_are_refused(tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(MutualChoiceSAE(D_MODEL, N_FEATURES, K), loader())
    trainer.save_checkpoint(tmp_path / "mutual.ckpt")
    other = MutualChoiceSAE(D_MODEL, N_FEATURES, K + 1)
    with pytest.raises(ValueError, match="thresholds are for k=4, not for k=5"):
        quiet_trainer().test(other, loader(), ckpt_path=tmp_path / "mutual.ckpt")


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(TopKSAE(D_MODEL, N_FEATURES, K), loader())
    trainer.save_checkpoint(tmp_path / "topk.ckpt")
    for other in (MutualChoiceSAE(D_MODEL, N_FEATURES, K), TopKSAE(D_MODEL, N_FEATURES + 1, K)):
        with pytest.raises(ValueError, match="the checkpoint holds TopKSAE") as caught:
            quiet_trainer().test(other, loader(), ckpt_path=tmp_path / "topk.ckpt")
        assert "\n" not in str(caught.value)


def test_evaluation_in_a_trainer_measures_held_out_tokens():
    sae = MutualChoiceSAE(D_MODEL, N_FEATURES, K, optimizer=partial(torch.optim.Adam, lr=3e-3))
    trainer = quiet_trainer(max_epochs=10)
    trainer.fit(sae, loader(4096), loader(1000))  # sanity checking precedes calibration
    assert {"val/fvu", "val/l0_std", "val/dying_fraction"} <= trainer.callback_metrics.keys()
    metrics = trainer.test(sae, loader(1000), verbose=False)[0]
    sae.eval()
    x = activations(1000)
    codes = sae.encode(x)
    assert metrics["test/l0"] == pytest.approx((codes > 0).sum(1).float().mean().item())
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert metrics["test/fvu"] == pytest.approx(fvu.item(), rel=1e-4)
    dead = (codes > 0).sum(0) == 0
    assert metrics["test/dead_fraction"] == pytest.approx(dead.float().mean().item())
    assert metrics["test/threshold"] == pytest.approx(sae.threshold.item())


def test_predict_returns_matches():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    matches = quiet_trainer().predict(sae, loader(128))
    assert len(matches) == 1
    sae.eval()
    assert torch.equal(matches[0].to_dense(), sae.encode(activations(128)))


def test_nonsense_is_refused_in_one_line():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    with pytest.raises(ValueError, match="activations are 5 wide, expected d_model=16"):
        sae.encode(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="must be finite and not all the same"):
        sae.loss(torch.ones(8, D_MODEL))
    with pytest.raises(ValueError, match="must be finite"):
        sae.loss(activations().fill_(math.nan))
    with pytest.raises(ValueError, match="k_aux=0 must be at least 1"):
        TopKSAE(D_MODEL, N_FEATURES, K, k_aux=0)
    with pytest.raises(ValueError, match="aux_coefficient=nan must be a finite number"):
        TopKSAE(D_MODEL, N_FEATURES, K, aux_coefficient=math.nan)
    with pytest.raises(ValueError, match="n_features=0 must be at least 1"):
        StandardSAE(D_MODEL, 0)
    with pytest.raises(TypeError, match="abstract"):
        SparseAutoencoder(4, 4)


@every_architecture
def test_weights_that_are_not_finite_are_noticed(make):
    """A NaN affinity is never chosen, so the loss alone would not tell."""
    sae = make()
    sae.loss(activations())
    sae.encoder.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="affinities are not finite after 64 tokens"):
        sae.loss(activations())


def test_a_batch_that_is_not_finite_stops_the_run():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    sae.loss(activations())
    bad = TensorDataset(activations(128).fill_(math.inf))
    with pytest.raises(ValueError, match="affinities are not finite after"):
        quiet_trainer(max_steps=3).fit(sae, DataLoader(bad, batch_size=64))


@pytest.mark.parametrize("importance", ["token_norm", "gain"])
@pytest.mark.parametrize("make", list(ARCHITECTURES.values())[1:], ids=list(ARCHITECTURES)[1:])
def test_every_importance_ranks_and_the_codes_stay_affinities(make, importance):
    sae = make(importance=importance)
    losses = train(sae, 100)
    assert losses[-1] < 0.7 * losses[0]
    for mode in (sae.train(), sae.eval()):
        x = activations()
        affinities = mode.affinities(mode.scaled(x))
        codes = mode.encode(x)
        assert 0 < (codes > 0).sum() < codes.numel()
        torch.testing.assert_close(codes[codes > 0], affinities[codes > 0])


@pytest.fixture
def default_bfloat16():
    """As in a step of "bf16-true"."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_density_is_the_mean_until_the_window_is_full_and_then_follows():
    sae = TopKSAE(D_MODEL, N_FEATURES, K, dead_after_tokens=3 * 64)
    counts = []
    for seed in range(3):
        x = superposition(64, D_MODEL, n_features=32, seed=seed)
        counts.append(sae.match(x).per_feature() if seed else None)
        sae.loss(x)
        if seed == 0:
            counts[0] = (sae.density * 64).round()
    torch.testing.assert_close(sae.density, sum(counts) / (3 * 64))
    before = sae.density.clone()
    now = sae.match(x).per_feature() / 64
    sae.loss(x)
    torch.testing.assert_close(sae.density, before + (now - before) / 3)
    assert sae.density.sum() == pytest.approx(K, rel=0.05)


def test_density_has_32_bits_also_where_16_are_the_default(default_bfloat16):
    sae = TopKSAE(D_MODEL, N_FEATURES, K).float()
    x = activations(300).float()
    sae.loss(x)
    fires = sae.match(x).per_feature()
    assert torch.equal(sae.density, fires.float() / torch.tensor(300.0, dtype=torch.float32))


@every_architecture
@pytest.mark.parametrize("every", [1, 3])
def test_dying_features_are_helped_by_their_deficit(make, every):
    """The aux loss, written out with dense codes, has the same value and gradients."""
    help_them = {"dying_below": 0.5, "aux_coefficient": 1 / 32, "aux_every": every}
    sae = make(dead_after_tokens=10**6, **help_them).double()
    x = activations().double()
    sae.loss(x)
    # Densities along a law but for five features, two of which are dead.
    sae.density = (0.4 / (torch.arange(N_FEATURES) + 2.0)).float()
    sae.density[[10, 20, 30]] *= torch.tensor([0.1, 0.15, 0.7])
    sae.density[[40, 41]] = 0
    sae.tokens_since_fired[[40, 41]] = 10**6
    sae.tokens_seen.fill_(10**6)
    deficit, dead = sae.deficit(), sae.dead_features_mask()
    dying = (deficit > 0.5) & ~dead
    assert {10, 20} <= set(dying.nonzero().flatten().tolist())
    assert not dying[30]
    reference = copy.deepcopy(sae)

    scaled = sae.scaled(x)
    matches = sae.match(x)
    error = scaled - sae.reconstruct(matches)
    loss = sae.penalties(scaled, matches, error)["aux_zipf_loss"]
    loss.backward()

    affinities = reference.affinities(scaled[::every])
    dictionary = reference.W_dec / reference.W_dec.norm(dim=1, keepdim=True)
    target = error[::every].detach()
    total = torch.zeros((), dtype=torch.float64)
    for members, weight, places, part in ((dead, dead, 8, 2), (dying, deficit, 1, 1)):
        weighted = (affinities * weight)[:, members].relu()
        top = weighted.topk(min(places, int(members.sum())), dim=1)
        codes = torch.zeros_like(weighted).scatter(1, top.indices, top.values)
        left = (part * target - codes @ dictionary[members]).pow(2).mean()
        total = total + left / (target - target.mean(0)).pow(2).mean()
    (total / 32).backward()
    torch.testing.assert_close(loss, total / 32)
    for name in ("W_dec", "b_dec", "encoder.weight", "encoder.bias"):
        ours, theirs = sae.get_parameter(name).grad, reference.get_parameter(name).grad
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_dying_below_is_a_share(share: float):
    with pytest.raises(ValueError, match=r"dying_below=.* must be a share, 0 to less than 1"):
        TopKSAE(D_MODEL, N_FEATURES, K, dying_below=share)


def test_a_choice_may_look_at_what_matches_add_up_to():
    class Curious(TopKSAE):
        def choose(self, scores: Scores) -> Matches:
            chosen = super().choose(scores)
            self.sum_directions(chosen)  # without gradients: a choice has none
            return chosen

    gradients = []
    for kind in (TopKSAE, Curious):
        torch.manual_seed(0)
        sae = kind(8, 32, 3)
        sae.loss(torch.randn(20, 8))[0].backward()
        gradients.append(sae.W_dec.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("tokens", [40, 400])  # fewer than features, and more
@pytest.mark.parametrize(
    "make",
    [
        partial(TopKSAE, multi_k_coefficient=0.1),
        partial(MutualChoiceSAE, importance="token_norm"),
        partial(FeatureChoiceSAE, mutual_choice_for=0, budgets="uniform", min_matches=0.1),
    ],
    ids=["topk", "mutual_choice", "feature_choice"],
)
def test_all_terms_of_a_loss_make_the_gradient_that_autograd_makes(make, tokens, monkeypatch):
    sparse = make(D_MODEL, 300, 2, aux_coefficient=0.5, dying_below=0.75).double()
    x = activations(tokens).double()
    sparse.loss(x)
    sparse.tokens_since_fired[::3] = sparse.dead_after_tokens
    dense = copy.deepcopy(sparse)
    loss, stats = sparse.loss(x)
    loss.backward()
    monkeypatch.setattr(rows, "DENSE_ABOVE", -1.0)  # products of whole matrices
    expected, _ = dense.loss(x)
    expected.backward()
    assert stats["aux_zipf_loss"] > 0
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
