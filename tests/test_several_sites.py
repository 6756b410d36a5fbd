"""Several sites in one pass, against each alone."""

import pytest
import torch

from lightning_sae.checks import UsageError
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.several_sites import SeveralSites
from tests.helpers.language_models import CONFIGS, blocks, tiny

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny(CONFIGS[request.param])


def sites(model, *pairs):
    return SeveralSites([ResidualStream(model, *pair) for pair in pairs])


@pytest.mark.parametrize(
    "pairs",
    [
        [(0,), (1,)],
        [(1,), (0,)],  # the order is the user's
        [(1, "mlp_in"), (1, "mlp_out"), (1, "z"), (1,)],
        [(0, "z"), (1, "mlp_in")],
    ],
)
def test_each_is_what_it_is_alone_and_the_model_runs_once(model, pairs):
    both, ran = sites(model, *pairs), []
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in blocks(model)]
    found = both.read(IDS)
    for handle in handles:
        handle.remove()
    alone = [ResidualStream(model, *pair).read(IDS) for pair in pairs]
    assert both.widths == [each.shape[-1] for each in alone]
    assert torch.equal(found, torch.cat(alone, -1))
    assert len(ran) <= 2  # of three blocks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_put_in_place_may_depend_on_what_came_before(model):
    both = sites(model, (1, "mlp_in"), (1, "mlp_out"))
    known, out = both.read(IDS).split(both.widths, -1)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))

    def edit(x):
        seen, old = x.split(both.widths, -1)
        assert torch.equal(seen, known)
        assert torch.equal(old, out)
        return torch.cat([0 * seen, seen @ weight], -1)

    expected = both.streams[1].replace(IDS, lambda _: known @ weight)
    assert torch.equal(both.replace(IDS, edit), expected)
    with torch.no_grad():
        assert torch.equal(both.replace(IDS, lambda x: x), model(IDS).logits)
    assert both.is_causal_language_model
    assert both.model is model


def test_nothing_can_be_put_before_what_it_depends_on(model):
    backwards = sites(model, (1, "mlp_out"), (1, "mlp_in"))
    message = r"^layer=1, site='mlp_in' comes before other sites, and nothing can be put there$"
    with pytest.raises(UsageError, match=message):
        backwards.replace(IDS, lambda x: x)


def test_a_site_that_does_not_run_is_told(model):
    both = sites(model, (0,), (1,))
    model.unused = torch.nn.Linear(2, 2)
    both.streams = (both.streams[0], ResidualStream(model, "unused"))
    with pytest.raises(UsageError, match=r"^layer='unused': \w+ did not run it in this thread$"):
        both.read(IDS)
    assert not any(m._forward_hooks for m in model.modules())
