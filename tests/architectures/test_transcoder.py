"""Transcoders: against their formulas over all tokens x features, in value and gradient."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lightning_sae
from lightning_sae import (
    FeatureChoiceTranscoder,
    JumpReLUTranscoder,
    MutualChoiceTranscoder,
    ResidualStream,
    TopKSAE,
    TopKTranscoder,
    UsageError,
)
from lightning_sae.callbacks import LossRecoveredCallback, ResampleDeadFeatures
from lightning_sae.core.revival import aux_k_loss
from lightning_sae.interop.folded import fold
from lightning_sae.interventions import splice
from lightning_sae.metrics import LossRecovered
from lightning_sae.several_sites import SeveralSites
from tests.helpers.language_models import CONFIGS, tiny
from tests.helpers.superposition import superposition

D_MODEL, D_TARGET, N_FEATURES, K = 16, 12, 48, 4
RULES = {
    "topk": partial(TopKTranscoder, D_MODEL, N_FEATURES, k=K, d_target=D_TARGET),
    "mutual": partial(MutualChoiceTranscoder, D_MODEL, N_FEATURES, k=K, d_target=D_TARGET),
    "feature": partial(
        *(FeatureChoiceTranscoder, D_MODEL, N_FEATURES),
        k=K,
        d_target=D_TARGET,
        mutual_choice_tokens=1000,
        zipf_exponent=1.0,
    ),
    "jumprelu": partial(
        JumpReLUTranscoder, D_MODEL, N_FEATURES, k=K, d_target=D_TARGET, bandwidth=0.1
    ),
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)
with_and_without_skip = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


def pair(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs, and a target that follows from them, far from zero and of another scale."""
    x = superposition(tokens, D_MODEL, n_features=32, seed=seed)
    weight = torch.randn(D_MODEL, D_TARGET, generator=torch.Generator().manual_seed(1))
    return 7 * x + 20, 3 * (x @ weight).relu() - 50


def trained(make, steps: int = 3, **options):
    torch.manual_seed(0)
    sae = make(**options)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(steps):
        loss, _ = sae.loss(*pair(256, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalize_decoder()
    return sae


def dense(sae: TopKTranscoder, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Affinities, codes and what is left of the scaled target, written out."""
    typical = (D_MODEL + (sae.input_mean * sae.input_scale).square().sum()).sqrt()
    scaled = x / x.norm(dim=1, keepdim=True) * typical
    affinities = (scaled - sae.origin) @ sae.encoder.weight.T + sae.encoder.bias
    kept = affinities.relu().topk(K, dim=1)
    codes = torch.zeros_like(affinities).scatter(1, kept.indices, kept.values)
    found = codes @ functional.normalize(sae.decoder.weight, dim=1) + sae.decoder.bias
    if sae.skip is not None:
        found = found + ((x - sae.input_mean) * sae.input_scale) @ sae.skip.T
    return affinities, codes, target * sae.target.input_scale - found


@with_and_without_skip
def test_value_and_gradient_are_those_of_the_formulas(skip: bool):
    sae = trained(RULES["topk"], skip=skip).double()
    x, target = (each.double() for each in pair(96, seed=9))
    dead = torch.arange(N_FEATURES) % 3 == 0
    sae.history.tokens_since_fired[dead] = sae.history.dead_after_tokens
    affinities, _, error = dense(sae, x, target)
    most = affinities.where(dead, -torch.inf).relu().topk(sae.revival.k, dim=1)
    revived = torch.zeros_like(affinities).scatter(1, most.indices, most.values)
    modelled = revived @ functional.normalize(sae.decoder.weight, dim=1)
    expected = error.square().mean() + aux_k_loss(error, modelled) / 32
    names, parameters = zip(*sae.named_parameters(), strict=True)
    theirs = torch.autograd.grad(expected, parameters)
    loss, stats = sae.loss(x, target)
    torch.testing.assert_close(loss, expected)
    whole = target * sae.target.input_scale
    fvu = error.square().sum() / (whole - whole.mean(0)).square().sum()
    torch.testing.assert_close(stats["fvu"], fvu.detach())
    for name, one, other in zip(names, torch.autograd.grad(loss, parameters), theirs, strict=True):
        assert other.any(), name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_small_steps():
    sae = trained(RULES["topk"], skip=True, aux_coefficient=0).double().eval()
    x, target = (each.double() for each in pair(4, seed=9))
    names, parameters = zip(*sae.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        found: Tensor = torch.func.functional_call(sae, named, (torch.cat([x, target], 1),))
        return (found - torch.cat([x, target], 1)).square().mean()

    def of_skip(values: Tensor) -> Tensor:
        return loss(*(values if name == "skip" else p for name, p in zip(names, parameters)))  # noqa: B905

    skip = dict(zip(names, parameters, strict=True))["skip"].detach().requires_grad_()
    assert torch.autograd.gradcheck(of_skip, skip)


@every_rule
@with_and_without_skip
def test_each_rule_learns_the_target(make, skip: bool):
    sae = trained(make, steps=40, skip=skip)
    x, target = pair(256, seed=99)
    assert sae.loss(x, target)[1]["fvu"] < 0.5
    sae.eval()
    torch.testing.assert_close(sae.loss(x, target)[0], sae.loss(torch.cat([x, target], 1))[0])
    found = sae(x)
    assert found.shape == (256, D_TARGET)
    torch.testing.assert_close(sae.decode(sae.encode(x), like=x), found, rtol=1e-4, atol=1e-3)
    left = (found - target).square().sum() / (target - target.mean(0)).square().sum()
    assert left < 0.5
    both = torch.cat([x, target], 1).view(2, 128, -1)
    torch.testing.assert_close(sae(both), torch.cat([x, found], 1).view(2, 128, -1))
    assert torch.equal(sae.encode(both), sae.encode(x.view(2, 128, -1)))


def test_the_targets_mean_and_scale_are_its_own():
    x, target = pair(256)
    losses = []
    for change in (1.0, 0.0), (1000.0, -3.0):
        torch.manual_seed(0)
        sae = RULES["topk"]()
        loss, _ = sae.loss(x, change[0] * target + change[1])
        losses.append(loss.item())
        torch.testing.assert_close(
            sae.target.input_mean, change[0] * target.mean(0) + change[1], rtol=1e-4, atol=1e-3
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_skip_connection_is_zero_at_first_and_learns():
    x, target = pair(256)
    losses = []
    for skip in (False, True):
        torch.manual_seed(0)
        losses.append(RULES["mutual"](skip=skip).loss(x, target)[0].item())
    assert losses[0] == losses[1]
    assert trained(RULES["mutual"], skip=True).skip.any()
    with pytest.raises(UsageError, match=r"^skip=True: decode takes inputs too, decode\(codes, li"):
        RULES["mutual"](skip=True).decode(torch.zeros(1, N_FEATURES))


def test_prefixes_reconstruct_the_target_too():
    sae = trained(RULES["topk"], prefixes=[8, 16]).double()
    x, target = (each.double() for each in pair(64, seed=9))
    _, codes, _ = dense(sae, x, target)
    whole, directions = target * sae.target.input_scale, functional.normalize(sae.W_dec, dim=1)
    errors = [
        whole - codes[:, :size] @ directions[:size] - sae.b_dec for size in (8, 16, N_FEATURES)
    ]
    expected = sum(error.square().mean() for error in errors) / 3
    torch.testing.assert_close(sae.loss(x, target)[1]["reconstruction_loss"], expected.detach())


@with_and_without_skip
def test_it_is_saved_and_loaded(skip: bool, tmp_path: Path):
    sae = trained(RULES["mutual"], skip=skip).eval()
    sae.save_pretrained(tmp_path)
    again = lightning_sae.load(tmp_path)
    assert type(again) is MutualChoiceTranscoder
    assert again.d_target == D_TARGET
    x, _ = pair(32)
    assert torch.equal(again(x), sae(x))


@with_and_without_skip
def test_it_goes_on_from_another_rule(skip: bool):
    one, other = trained(RULES["topk"], skip=skip), RULES["jumprelu"](skip=skip)
    with pytest.raises(UsageError, match=r"no transcoder with d_target=12"):
        other.take_over(TopKSAE(D_MODEL, N_FEATURES, K).state_dict())
    other.take_over(one.state_dict())
    for name in ("origin", "target.input_scale", "decoder.weight", *(["skip"] if skip else [])):
        assert torch.equal(other.state_dict()[name], one.state_dict()[name])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_recovered_is_with_the_reconstruction_in_place_of_the_mlps_output(family: str):
    model = tiny(CONFIGS[family])
    sites = SeveralSites([ResidualStream(model, 1, site) for site in ("mlp_in", "mlp_out")])
    ids = torch.randint(0, 50, (8, 9), generator=torch.Generator().manual_seed(0))
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[:, 0] = False
    torch.manual_seed(0)
    sae = TopKTranscoder(16, 32, k=4, skip=True)
    rows = sites.read(ids)[kept]
    sae.loss(rows)
    torch.nn.init.normal_(sae.skip, std=0.1)
    sae.eval()
    callback = LossRecoveredCallback()
    callback.measure(sae, sites, {"input_ids": ids, "kept": kept, "states": sites.read(ids)})
    found = callback._metric.compute()

    inputs = sites.streams[0].read(ids)

    def with_output(new: Tensor) -> Tensor:
        def put(_module, _inputs, output: Tensor) -> Tensor:
            return output.masked_scatter(kept[..., None], new)

        handle = model.get_submodule(sites.streams[1].path).register_forward_hook(put)
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        handle.remove()
        losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return losses[kept[:, :-1]].mean()

    outputs = sites.streams[1].read(ids)[kept]
    for name, new in {
        "ce_clean": outputs,
        "ce_spliced": sae(inputs[kept]).detach(),
        "ce_zero": torch.zeros_like(outputs),
        "ce_mean": sae.target.input_mean.expand_as(outputs),
    }.items():
        torch.testing.assert_close(found[name].float(), with_output(new), msg=name)
    assert isinstance(callback._metric, LossRecovered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "gain"}, "importance='gain' and multi_k_coefficient are of what"),
        ({"multi_k_coefficient": 0.1}, "importance='gain' and multi_k_coefficient are of what"),
        ({"d_target": 0}, "d_target=0 must be at least 1"),
    ],
)
def test_settings_that_it_does_not_have(options: dict, message: str):
    with pytest.raises(UsageError, match=f"^{message}"):
        RULES["topk"](**options)


def test_what_it_cannot_do_is_refused_in_one_line():
    sae = trained(RULES["topk"])
    with pytest.raises(
        UsageError, match=r"^activations are 16 wide: a transcoder takes inputs and"
    ):
        sae.loss(pair(8)[0])
    with pytest.raises(UsageError, match=r"^activations are 3 wide, expected d_model=16$"):
        sae(torch.zeros(1, 3))
    with pytest.raises(UsageError, match=r"^TopKTranscoder reconstructs something else than it"):
        fold(sae)
    stream = ResidualStream(tiny(CONFIGS["gpt2"]), 1)
    with (
        pytest.raises(UsageError, match=r"^TopKTranscoder reconstructs something else than it"),
        splice(stream, sae),
    ):
        pass
    with pytest.raises(UsageError, match=r"^ResampleDeadFeatures cannot be used with TopKTransc"):
        ResampleDeadFeatures().setup(None, sae, "fit")
