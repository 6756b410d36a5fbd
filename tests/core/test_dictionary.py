"""Parameters, their precision, and the gradients they get."""

import copy
import pickle
from functools import partial

import pytest
import torch

from lightning_sae import ChunkedAdam, FeatureChoiceSAE, MutualChoiceSAE, TopKSAE
from lightning_sae.allocation import Choice, Scores
from lightning_sae.core import Dictionary
from lightning_sae.sparse import RowGradient, rows
from tests.helpers.architectures import (
    D_MODEL,
    N_FEATURES,
    K,
    activations,
    every_architecture,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_initialisation_is_tied_and_of_unit_norm():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    assert torch.equal(sae.encoder.weight, sae.W_dec)
    assert sae.encoder.weight.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES))


def test_a_larger_sample_can_set_origin_and_scale():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    sample = activations(2000)
    sae.initialize(sample)
    sae.loss(activations() + 100)
    torch.testing.assert_close(sae.input_mean, sample.mean(0))


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
    scaled = sae.scaled(torch.randn(2, D_MODEL, dtype=dtype))
    assert sae.scores(scaled).dense().dtype == torch.float32


def test_affinities_ignore_autocast():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    x = torch.randn(3, D_MODEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = sae.scores(x).dense()
    assert torch.equal(mixed, sae.scores(x).dense())


@every_architecture
def test_decoder_gradient_is_orthogonal_to_its_rows(make):
    sae = make()
    sae.loss(activations())[0].backward()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(N_FEATURES), atol=1e-6, rtol=0)


def test_a_choice_may_look_at_what_matches_add_up_to():
    class Curious(TopKSAE):
        def choose(self, scores: Scores) -> Choice:
            choice = super().choose(scores)
            self.sum_directions(choice.matches)  # without gradients: a choice has none
            return choice

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
        partial(FeatureChoiceSAE, mutual_choice_share=0, budgets="uniform", min_matches=0.1),
    ],
    ids=["topk", "mutual_choice", "feature_choice"],
)
def test_all_terms_of_a_loss_make_the_gradient_that_autograd_makes(make, tokens, monkeypatch):
    sparse = make(D_MODEL, 300, 2, aux_coefficient=0.5, dying_below=0.75).double()
    x = activations(tokens).double()
    sparse.loss(x)
    sparse.history.tokens_since_fired[::3] = sparse.history.dead_after_tokens
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


def test_gradients_are_plain_tensors_unless_parts_are_wanted():
    sae = TopKSAE(D_MODEL, 300, 2)
    x = activations(40)

    def gradients(module: Dictionary) -> set[type]:
        module.zero_grad()
        module.loss(x)[0].backward()
        return {type(module.encoder.weight.grad), type(module.decoder.weight.grad)}

    copies = sae, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))  # noqa: S301 - ours
    for each in copies:
        assert gradients(each) == {torch.Tensor}
        each.leave_gradients_in_parts()
        assert gradients(each) == {RowGradient}
        each.leave_gradients_in_parts(False)
        assert gradients(each) == {torch.Tensor}


def test_gradients_are_plain_where_no_hook_could_make_them_so():
    sae, x = TopKSAE(D_MODEL, 300, 2), activations(40)
    sae.loss(x)[0].backward()
    expected = sae.decoder.weight.grad
    frozen = copy.deepcopy(sae.requires_grad_(False)).requires_grad_()
    assigned = TopKSAE(D_MODEL, 300, 2)
    assigned.load_state_dict(sae.requires_grad_().state_dict(), assign=True)
    assigned.requires_grad_()
    for each in (frozen, assigned):
        each.zero_grad()
        each.loss(x)[0].backward()
        assert type(each.decoder.weight.grad) is torch.Tensor
        torch.testing.assert_close(each.decoder.weight.grad, expected)


@pytest.mark.parametrize("in_parts", [True, False])
def test_an_optimizer_that_was_dropped_leaves_nothing_behind(in_parts: bool):
    """What another optimizer then does is what it would have done alone."""
    weights, norms = [], []
    for dropped in (True, False):
        torch.manual_seed(0)
        sae = MutualChoiceSAE(D_MODEL, 300, 2)
        if dropped:
            ChunkedAdam(sae.parameters())
            sae.leave_gradients_in_parts(in_parts)
        # Not Adam, which makes whole steps of gradients that are nothing but rounding.
        optimizer = torch.optim.SGD(sae.parameters(), lr=1.0)
        for _ in range(3):
            loss, _ = sae.loss(activations(40))
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(sae.parameters(), 0.1))
            optimizer.step()
        weights.append([parameter.detach() for parameter in sae.parameters()])
    torch.testing.assert_close(*weights)
    torch.testing.assert_close(norms[:3], norms[3:])


def test_another_sae_s_dictionary_must_have_the_same_shape():
    """One feature must not be spread over sixteen."""
    sae = TopKSAE(8, 16, 3)
    before = copy.deepcopy(sae.state_dict())
    for other in (TopKSAE(8, 1, 1), TopKSAE(1, 16, 1)):
        with pytest.raises(ValueError, match=r"no SAE with d_model=8, n_features=16: .*"):
            sae.take_over(other.state_dict())
    with pytest.raises(ValueError, match=r"should have shape .*, not none"):
        sae.take_over({})
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_architecture
def test_what_goes_in_comes_out_in_the_same_type(make, dtype: torch.dtype):
    sae = make()
    sae.loss(activations())
    for x in (activations().to(dtype), activations().view(4, 16, D_MODEL).to(dtype)):
        codes = sae.encode(x)
        assert codes.dtype == sae.decode(codes, like=x).dtype == sae(x).dtype == dtype
        assert codes.shape == (*x.shape[:-1], N_FEATURES)
        assert sae(x).shape == x.shape


def test_the_direction_of_a_feature_is_the_code_that_is_one():
    sae = TopKSAE(8, 16, 2, normalize_inputs="average")
    one_hot = torch.nn.functional.one_hot(torch.tensor([3]), 16)  # integers
    torch.testing.assert_close(sae.decode(one_hot), sae.decoder.weight[3:4] + 0)


def test_how_far_rows_go_along_the_directions_of_matches():
    sae = TopKSAE(D_MODEL, N_FEATURES, K)
    sae.decoder.weight.data *= 3  # rows have unit norm again only after a step
    matches = sae.match(activations(100))
    rows = torch.randn(100, D_MODEL, dtype=torch.float64)
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1).double()
    expected = (rows @ directions.T)[matches.token, matches.feature]
    found = sae.along_directions(rows, matches)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
