"""What holds for every architecture, without a Trainer."""

import copy
import math

import pytest
import torch
from torch import Tensor

from lightning_sae import SparseAutoencoder, StandardSAE, TopKSAE
from lightning_sae.allocation import Matches, TensorScores
from lightning_sae.checks import UsageError
from tests.helpers.architectures import (
    D_MODEL,
    N_FEATURES,
    K,
    activations,
    affinities,
    every_architecture,
    train,
    with_affinities_as_codes,
    with_importance,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every_architecture
def test_learns_in_a_plain_loop(make):
    sae = make()
    losses = train(sae, 150)
    assert losses[-1] < 0.5 * losses[0]
    sae.eval()
    x = activations(512)
    error = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5
    assert int(sae.history.tokens_seen) == 150 * 256


def test_an_architecture_may_have_another_reconstruction_loss():
    class AbsoluteSAE(TopKSAE):
        def extra_losses(self, scaled, matches, error):
            self.absolute = error.abs().mean()
            return {"reconstruction_loss": self.absolute}

    sae = AbsoluteSAE(D_MODEL, N_FEATURES, K)
    loss, stats = sae.loss(activations())
    assert loss == stats["loss"] == stats["reconstruction_loss"] == sae.absolute


@pytest.mark.parametrize("name", ["l0", "fvu", "loss", "dead_fraction", "threshold"])
def test_a_term_of_the_loss_does_not_get_lost_under_another_figure_s_name(name: str):
    class Named(TopKSAE):
        def extra_losses(self, scaled, matches, error):
            return {name: error.square().mean()}

    with pytest.raises(UsageError, match=f"^extra_losses of Named has a term '{name}', which is"):
        Named(D_MODEL, N_FEATURES, K).loss(activations())


@with_affinities_as_codes
def test_gradients_equal_dense_autograd(make):
    """The loss, written out with dense codes and no shortcut, has the same gradients.

    What trains more than these has the same test among its own.
    """
    sae = make(dead_after_tokens=100, dying_below=0.0).double()
    x = activations().double()
    sae.loss(x)  # sets the scale
    sae.history.tokens_since_fired[:20] = 1000  # so that AuxK has something to do
    reference = copy.deepcopy(sae)
    loss, stats = sae.loss(x)
    loss.backward()

    scaled = x * reference.scales(x)
    centred = scaled - reference.b_dec
    z = centred @ reference.encoder.weight.T + reference.encoder.bias
    scores = reference.scores(scaled).dense()  # of z, by whatever ranks them
    mask = reference.choose(TensorScores(scores)).matches.to_dense() > 0
    codes = torch.where(mask, z, 0.0)
    dictionary = reference.W_dec / reference.W_dec.norm(dim=1, keepdim=True)
    error = scaled - codes @ dictionary - reference.b_dec
    dense = error.pow(2).mean()
    if isinstance(reference, StandardSAE):
        dense = dense + reference.l1_coefficient * codes.sum() / len(x) / D_MODEL
    else:
        dead = reference.history.tokens_since_fired >= 100
        top = z[:, dead].relu().topk(min(D_MODEL // 2, int(dead.sum())), dim=1)
        extra = torch.zeros_like(z[:, dead]).scatter(1, top.indices, top.values)
        left = error.detach()
        aux = (left - extra @ dictionary[dead]).pow(2).mean() / (left - left.mean(0)).pow(2).mean()
        dense = dense + aux / 32
        assert stats["aux_k_loss"] > 0
    dense.backward()
    torch.testing.assert_close(loss, dense)
    for (name, ours), theirs in zip(sae.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")


@every_architecture
@pytest.mark.parametrize("training", [True, False])
def test_a_token_is_encoded_alone(make, training: bool):
    """After training, in either mode: what is loaded from a checkpoint is in `train()` mode."""
    sae = make()
    train(sae, 5)
    sae.train(training)
    x = activations()
    before = copy.deepcopy(sae.state_dict())
    together = sae.encode(x)
    alone = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(together, alone)
    assert sae.encode(x.view(4, 16, D_MODEL)).shape == (4, 16, N_FEATURES)
    torch.testing.assert_close(sae(x.view(4, 16, D_MODEL)).view(64, -1), sae(x))
    torch.testing.assert_close(sae.decode(together, like=x), sae(x))
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name


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
def test_a_batch_without_tokens_changes_nothing(make):
    """Neither before the first one that has some, nor later."""
    sae = make(dead_after_tokens=100)
    for batches in (0, 3):
        for _ in range(batches):
            sae.loss(activations(256))
        before = copy.deepcopy(sae.state_dict())
        loss, stats = sae.loss(activations(256)[:0])
        loss.backward()
        assert loss == stats["loss"] == 0
        assert stats["l0"].isnan()
        assert not any(parameter.grad.any() for parameter in sae.parameters())
        for name, value in sae.state_dict().items():
            assert torch.equal(value.nan_to_num(-1), before[name].nan_to_num(-1)), name
    sae.loss(activations(256))
    assert sae.tokens_seen == 4 * 256
    assert sae.encode(activations(256)[:0]).shape == (0, N_FEATURES)


def test_history_and_figures_count_codes_and_not_scores():
    """A score above 0 whose code is not, by rounding or by a rule of one's own, is no firing."""

    class HalfSilent(TopKSAE):
        def matches_of(self, scaled: Tensor, chosen: Matches) -> Matches:
            matches = super().matches_of(scaled, chosen)
            return matches.with_values(matches.value * (matches.feature % 2))

    sae = HalfSilent(D_MODEL, N_FEATURES, K)
    _, stats = sae.loss(activations(256))
    density = sae.history.density
    assert density[::2].max() == 0 < density[1::2].max()
    assert sae.history.tokens_since_fired[::2].min() == 256
    torch.testing.assert_close(stats["l0"], density.sum())


@every_architecture
def test_the_first_batch_sets_origin_and_scale(make):
    sae = make(normalize_inputs="average")
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


def test_nonsense_is_refused_in_one_line():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    with pytest.raises(ValueError, match=r"activations are 5 wide, expected d_model=16$"):
        sae.encode(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="48 wide, expected d_model=16; SeveralSAEs trains"):
        sae.encode(torch.zeros(3, 48))  # of three layers
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


@pytest.mark.parametrize("importance", ["token_norm", "gain"])
@with_importance
def test_every_importance_ranks_and_the_codes_stay_affinities(make, importance):
    sae = make(importance=importance)
    losses = train(sae, 100)
    assert losses[-1] < 0.7 * losses[0]
    for mode in (sae.train(), sae.eval()):
        x = activations()
        z = affinities(mode, mode.scaled(x))
        codes = mode.encode(x)
        assert 0 < (codes > 0).sum() < codes.numel()
        torch.testing.assert_close(codes[codes > 0], z[codes > 0])


@every_architecture
def test_arguments_that_a_checkpoint_keeps_make_another_of_its_kind(make):
    sae = make(k_aux=3, dead_after_tokens=77)
    again = type(sae)(**sae.hparams)
    assert again.hparams == sae.hparams
    assert (again.revival.k, again.history.dead_after_tokens) == (3, 77)


def test_options_that_no_class_has_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'aux_coeficient'"):
        TopKSAE(D_MODEL, N_FEATURES, K, aux_coeficient=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'importance'"):
        StandardSAE(D_MODEL, N_FEATURES, importance="gain")
