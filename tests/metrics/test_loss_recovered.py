import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_sae.metrics import L0, LossRecovered, loss_recovered
from lightning_sae.metrics.loss_recovered import ablated_losses
from lightning_sae.residual_stream import ResidualStream
from tests.helpers.ddp import run_on_two

D_MODEL, VOCABULARY = 8, 13


def random_gpt2(dtype: torch.dtype = torch.float32) -> ResidualStream:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": D_MODEL, "vocab_size": VOCABULARY}
    config = GPT2Config(**sizes, initializer_range=0.7, bos_token_id=0, eos_token_id=0)
    return ResidualStream(GPT2LMHeadModel(config).eval().to(dtype), layer=0)


@pytest.fixture(scope="module")
def stream() -> ResidualStream:
    return random_gpt2()


def contexts(count: int, length: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(VOCABULARY, (count, length), generator=generator)
    return input_ids, torch.rand(count, length, generator=generator) > 0.3


MEAN = torch.linspace(-1, 1, D_MODEL)


def shrink(x: Tensor) -> Tensor:
    return 0.8 * x


def value_of(stream, reconstruct, *batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    metric = LossRecovered()
    for input_ids, kept in batches:
        metric.update(stream, input_ids, reconstruct, kept, MEAN)
    return metric.compute()


def slow_reference(stream, reconstruct, input_ids: Tensor, kept: Tensor) -> dict[str, float]:
    """One position at a time, in float64, with edits written as loops."""

    def logits(change):
        def edit(x):
            x = x.clone()
            for c, t in kept.nonzero().tolist():
                x[c, t] = change(x[c, t].unsqueeze(0))[0]
            return x

        with torch.no_grad():
            return stream.replace(input_ids, edit).double()

    runs = {
        "clean": logits(lambda x: x),
        "spliced": logits(reconstruct),
        "zero": logits(lambda x: 0 * x),
        "mean": logits(lambda x: MEAN.unsqueeze(0)),
    }
    scored = [(c, t) for c, t in kept.nonzero().tolist() if t + 1 < input_ids.shape[1]]

    def p(name, c, t):
        return (runs[name][c, t] - runs[name][c, t].logsumexp(0)).exp()

    ce = {
        name: -sum(math.log(p(name, c, t)[input_ids[c, t + 1]]) for c, t in scored) / len(scored)
        for name in runs
    }
    kl = 0.0
    for c, t in scored:
        clean, spliced = p("clean", c, t), p("spliced", c, t)
        kl += (clean * (clean / spliced).log()).sum().item()
    return {
        "loss_recovered_zero": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        "loss_recovered_mean": (ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]),
        "delta_ce": ce["spliced"] - ce["clean"],
        "kl": kl / len(scored),
        **{f"ce_{name}": value for name, value in ce.items()},
    }


def test_every_value_equals_the_slow_reference(stream):
    input_ids, kept = contexts(5)
    expected = slow_reference(stream, shrink, input_ids, kept)
    actual = value_of(stream, shrink, (input_ids, kept))
    assert list(actual) == list(expected)
    assert abs(expected["delta_ce"]) > 1e-3
    for name, value in expected.items():
        assert actual[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert actual[name].dtype == torch.float32


def test_splicing_the_activation_itself_loses_nothing(stream):
    values = value_of(stream, lambda x: x, contexts(3), contexts(2, seed=5))
    assert values["loss_recovered_zero"] == values["loss_recovered_mean"] == 1
    assert values["delta_ce"] == values["kl"] == 0


def test_splicing_an_ablation_recovers_nothing(stream):
    assert value_of(stream, torch.zeros_like, contexts(3))["loss_recovered_zero"] == 0
    spliced_mean = value_of(stream, lambda x: MEAN.expand_as(x), contexts(3))
    assert spliced_mean["loss_recovered_mean"] == 0
    assert spliced_mean["kl"] > 0


def test_batches_weigh_by_scored_positions(stream):
    first, second = contexts(4), contexts(1, length=3, seed=2)
    first[1][1:] = False  # unequal numbers of kept positions
    apart = [slow_reference(stream, shrink, *batch) for batch in (first, second)]
    scored = [batch[1][:, :-1].sum().item() for batch in (first, second)]
    actual = value_of(stream, shrink, first, second)
    for name in ("delta_ce", "kl", "ce_clean", "ce_zero"):
        expected = sum(n * v[name] for n, v in zip(scored, apart, strict=True)) / sum(scored)
        assert actual[name].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("side", ["before", "after"])
def test_padded_contexts_count_as_they_do_one_by_one(stream, side):
    alone = [contexts(1, length=length, seed=length) for length in (6, 4, 3)]
    expected = value_of(stream, shrink, *alone)
    # Padding is a token like any other, but for the mask.
    ids, kept = torch.full((3, 6), 7), torch.ones(3, 6, dtype=torch.bool)
    mask = torch.zeros_like(ids)
    for row, (input_ids, its_kept) in enumerate(alone):
        length = input_ids.shape[1]
        here = slice(6 - length, 6) if side == "before" else slice(length)
        ids[row, here], kept[row, here], mask[row, here] = input_ids[0], its_kept[0], 1
    metric = LossRecovered()
    for known in ({}, {"states": stream.read(ids, mask)}):
        metric.reset()
        metric.update(stream, ids, shrink, kept, MEAN, attention_mask=mask, **known)
        for name, value in metric.compute().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


class Recorder:
    """A stream whose activations are given and whose logits are those, with what was edited."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.edited, self.alive = x, [], []
        self.most_alive = 0

    def replace(self, input_ids, edit):
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.alive) + 1)
        logits = edit(self.x)
        self.edited.append(logits.clone())
        self.alive.append(weakref.ref(logits))
        return logits


def test_only_kept_positions_are_edited_and_reconstruct_sees_only_them():
    x = torch.randn(2, 4, D_MODEL, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[False, True, True, False], [True, False, False, True]])
    recorder, seen = Recorder(x), []

    def reconstruct(rows):
        seen.append(rows.clone())
        return rows + 1

    LossRecovered().update(recorder, torch.zeros(2, 4, dtype=torch.int64), reconstruct, kept, MEAN)
    assert torch.equal(seen[0], x[kept])
    assert len(seen) == 1
    replacements = (x, x + 1, torch.zeros_like(x), MEAN.expand_as(x))
    for edited, replacement in zip(recorder.edited, replacements, strict=True):
        assert torch.equal(edited, torch.where(kept.unsqueeze(-1), replacement, x))


def test_no_more_than_two_runs_of_logits_are_held_at_once():
    recorder = Recorder(torch.randn(2, 4, D_MODEL))
    input_ids = torch.zeros(2, 4, dtype=torch.int64)
    LossRecovered().update(recorder, input_ids, shrink, input_ids == 0, MEAN)
    assert len(recorder.alive) == 4
    assert recorder.most_alive <= 2


def test_states_and_ablated_losses_at_hand_change_nothing_but_the_runs(stream):
    input_ids, kept = contexts(4)
    states, ran = stream.read(input_ids), []

    class Counting:
        def replace(self, input_ids, edit, **known):
            ran.append(known)
            return stream.replace(input_ids, edit, **known)

    expected = value_of(stream, shrink, (input_ids, kept))
    ablated = ablated_losses(Counting(), input_ids, kept, MEAN, states=states)
    metric = LossRecovered()
    metric.update(Counting(), input_ids, shrink, kept, MEAN, states=states, ablated=ablated)
    assert metric.compute() == expected
    assert len(ran) == 4
    assert all(known["states"] is states for known in ran)


@pytest.mark.parametrize("keep", [[], [-1]])
def test_without_a_scored_position_the_model_is_not_run(keep):
    input_ids, kept = contexts(2)
    kept[:] = False
    kept[:, keep] = True
    recorder = Recorder(torch.randn(2, 6, D_MODEL))
    metric = LossRecovered()
    metric.update(recorder, input_ids, shrink, kept, MEAN)
    assert recorder.edited == []
    assert all(value.isnan() for value in metric.compute().values())


def test_the_function_of_logits_agrees_with_the_metric(stream):
    input_ids, kept = contexts(4)
    recorded: list[Tensor] = []

    class Listening:
        def replace(self, input_ids, edit):
            recorded.append(stream.replace(input_ids, edit))
            return recorded[-1]

    expected = value_of(Listening(), shrink, (input_ids, kept))
    clean, spliced, zero, mean = recorded
    actual = loss_recovered(input_ids, kept, clean=clean, spliced=spliced, zero=zero, mean=mean)
    assert actual == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_model_and_reconstruction_may_differ_in_dtype(dtype):
    stream = random_gpt2(torch.bfloat16)
    values = value_of(stream, lambda x: x.to(dtype), contexts(2))
    assert values["delta_ce"] == values["kl"] == 0


def test_no_gradient_is_kept_even_by_forward(stream):
    scale = nn.Parameter(torch.tensor(0.5))
    metric, (input_ids, kept) = LossRecovered(), contexts(2)
    values = metric(stream, input_ids, lambda x: scale * x, kept, MEAN)
    assert not any(value.requires_grad for value in values.values())


def test_in_one_collection_with_other_metrics(stream):
    input_ids, kept = contexts(5)
    collection = MetricCollection({"l0": L0(), "loss": LossRecovered()}, prefix="val/")
    contexts_part = {"input_ids": input_ids, "kept": kept, "mean": MEAN}
    collection.update(
        codes=torch.ones(3, 2), residual_stream=stream, reconstruct=shrink, **contexts_part
    )
    values, expected = collection.compute(), value_of(stream, shrink, (input_ids, kept))
    assert values == {"val/l0": 2, **{f"val/{name}": value for name, value in expected.items()}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kept": torch.ones(2, 5, dtype=torch.bool)}, r"kept of shape \(2, 5\)"),
        ({"kept": torch.ones(2, 6)}, "torch.float32"),
        ({"input_ids": torch.zeros(12, dtype=torch.int64)}, r"must be \(contexts, length\)"),
        ({"mean": torch.zeros(1, D_MODEL)}, r"mean of shape \(1, 8\).*d_model=8"),
        ({"reconstruct": lambda x: x[:1]}, r"reconstruct returned shape \(1, 8\)"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing_behind(stream, wrong, message):
    input_ids, kept = contexts(2)
    arguments = {"input_ids": input_ids, "reconstruct": shrink, "kept": kept, "mean": MEAN}
    metric = LossRecovered()
    with pytest.raises(ValueError, match=message):
        metric.update(stream, **(arguments | wrong))
    assert metric.tokens == metric.ce_clean == 0


def value_of_rank(rank: int, batches: list[list[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    return value_of(random_gpt2(), shrink, *batches[rank])


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_two_ranks_equal_one(stream, cut):
    batches = [contexts(2, seed=seed) for seed in range(3)]
    expected = value_of(stream, shrink, *batches)
    for values in run_on_two(value_of_rank, [batches[:cut], batches[cut:]]):
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0, msg=name)


def test_where_ablation_costs_nothing_there_is_nothing_to_recover():
    """Else it would be a thousand or minus twenty, by what rounding made of the ablation."""
    input_ids, kept = contexts(3)
    clean = torch.randn(*input_ids.shape, 16, generator=torch.Generator().manual_seed(0))
    right = torch.nn.functional.one_hot(input_ids.roll(-1, 1) % 16, 16).float()
    ids = input_ids % 16
    shares = {}
    for worse in (-0.005, 1e-5, 0.005, 0.1):  # logits of the right token, and about as many nats
        ablated = clean - worse * right
        found = loss_recovered(
            ids, kept, clean=clean, spliced=clean - 0.01 * right, zero=ablated, mean=clean - right
        )
        shares[worse] = found["loss_recovered_zero"].item()
        assert 0.9 < found["loss_recovered_mean"] < 1
        assert found["delta_ce"] > 0
    assert all(math.isnan(shares[worse]) for worse in (-0.005, 1e-5, 0.005))
    assert shares[0.1] == pytest.approx(0.9, abs=0.01)
