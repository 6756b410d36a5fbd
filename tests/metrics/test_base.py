import copy
import inspect
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_sae.metrics import (
    L0,
    Correlation,
    DeadFeatures,
    FeatureDensity,
    FractionOfVarianceUnexplained,
    L0StandardDeviation,
    LossRecovered,
    ZipfStatistics,
)
from lightning_sae.metrics.base import TotalsMetric
from lightning_sae.numerics import ratio, widest_float
from tests.metrics.samples import all_metrics, sample, split, update, values


class Totals(TotalsMetric):
    def __init__(self):
        super().__init__()
        self.add_total("count")
        self.add_total("sums", 2, dtype=torch.float64)

    def update(self, count, sums):
        self.add_to_totals(count=count, sums=sums)

    def compute(self):
        return self.sums / self.count


ODD = 2**24 + 1  # not a float32
FINE = 1 + 2**-40  # not a float32 either

CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "to float16": lambda m: m.to(dtype=torch.float16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "cpu": lambda m: m.cpu(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("inside", [True, False])
def test_totals_survive_casts_exactly(cast, inside):
    metric = Totals()
    metric.update(ODD, torch.tensor([FINE, -FINE], dtype=torch.float64))
    module = nn.ModuleList([metric, nn.Linear(1, 1)]) if inside else metric
    cast(module)
    metric.update(1, torch.zeros(2, dtype=torch.float64))
    assert metric.count.dtype == torch.int64
    assert metric.count == ODD + 1
    assert metric.sums.dtype == torch.float64
    assert metric.sums.tolist() == [FINE, -FINE]
    metric.reset()
    assert (metric.count.dtype, metric.sums.dtype) == (torch.int64, torch.float64)


def test_set_dtype_leaves_totals_alone():
    metric = Totals()
    metric.update(ODD, torch.tensor([FINE, -FINE], dtype=torch.float64))
    metric.set_dtype(torch.float16)
    assert metric.count == ODD
    assert metric.sums.tolist() == [FINE, -FINE]


def test_totals_and_their_defaults_follow_the_device():
    metric = Totals().to("meta")
    assert metric.device.type == metric.count.device.type == metric.sums.device.type == "meta"
    metric.reset()
    assert metric.count.device.type == "meta"


def test_devices_without_float64_get_float32():
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cuda", 1)) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_does_not_depend_on_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        share = ratio(torch.tensor([ODD - 1, 0]), torch.tensor(ODD))
    finally:
        torch.set_default_dtype(torch.float32)
    assert share.dtype == torch.float32
    assert share.tolist() == [torch.tensor((ODD - 1) / ODD).item(), 0]
    assert ratio(torch.tensor(0), torch.tensor(0)).isnan()


def test_ratio_of_many_totals_is_that_of_each():
    totals = ODD - torch.arange(400_000).view(2, -1)
    shares = ratio(totals, torch.tensor(ODD))
    assert torch.equal(shares, (totals.double() / ODD).float())


def test_count_does_not_stop_at_the_limits_of_floats():
    density = FeatureDensity(1).to(torch.bfloat16)
    for _ in range(300):  # bfloat16 counts to 256
        density.update(torch.ones(1, 1, dtype=torch.bfloat16))
    assert density.fires.tolist() == [300]
    density.merge_state({"fires": torch.tensor([2**24]), "tokens": torch.tensor(2**24)})
    for _ in range(3):  # float32 counts to 2^24
        density.update(torch.ones(1, 1, dtype=torch.bfloat16))
    assert density.tokens == 2**24 + 303
    density.merge_state({"fires": torch.tensor([2**60]), "tokens": torch.tensor(2**60)})
    assert density.fires.tolist() == [2**60 + 2**24 + 303]


def test_updates_alternate_in_and_out_of_inference_mode():
    whole = sample(8)
    for name, metric in all_metrics().items():
        first, second = split(whole, [3, 5])
        with torch.inference_mode():
            metric.reset()
            update(metric, first)
        update(metric, second)
        torch.testing.assert_close(metric.compute(), values([whole])[name])


def test_no_metric_keeps_a_graph():
    batch = {name: tensor.requires_grad_() for name, tensor in sample(4).items()}
    metrics = MetricCollection(all_metrics())
    for value in metrics(**batch).values():  # forward() enables gradients
        assert not value.requires_grad


@pytest.mark.parametrize("name", all_metrics())
def test_copies_are_independent_and_keep_their_state(name):
    metric, (first, second) = all_metrics()[name], split(sample(9), [4, 5])
    update(metric, first)
    expected = metric.compute()
    for copied in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):  # noqa: S301 (our own bytes)
        torch.testing.assert_close(copied.compute(), expected)
        update(copied, second)
        torch.testing.assert_close(copied.compute(), values([first, second])[name])
    torch.testing.assert_close(metric.compute(), expected)
    metric.reset()
    update(metric, second)
    torch.testing.assert_close(metric.compute(), values([second])[name])


@pytest.mark.parametrize("name", all_metrics())
def test_forward_returns_the_batch_value_and_accumulates(name):
    metric, batches = all_metrics()[name], split(sample(9), [4, 5])
    for batch in batches:
        value = metric(**metric._filter_kwargs(**batch))
        torch.testing.assert_close(value, values([batch])[name])
    torch.testing.assert_close(metric.compute(), values(batches)[name])


@pytest.mark.parametrize("name", all_metrics())
def test_merged_states_count_as_one(name):
    batches = split(sample(9), [4, 5])
    one, other = all_metrics()[name], all_metrics()[name]
    update(one, batches[0])
    update(other, batches[1])
    one.merge_state(other)
    torch.testing.assert_close(one.compute(), values(batches)[name])


def test_no_state_in_the_state_dict():
    metrics = MetricCollection(all_metrics())
    metrics.update(**sample(3))
    assert metrics.state_dict() == {}


@pytest.mark.filterwarnings(r"ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("batches", [[], [sample(0)], [sample(0), sample(0)]])
def test_nothing_seen_is_nan(batches):
    for value in values(batches).values():
        assert value.isnan().all()


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6), seed=st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_split_into_batches_gives_the_same_values(sizes, seed):
    whole = sample(sum(sizes), seed)
    for name, value in values(split(whole, sizes)).items():
        expected = values([whole])[name]
        exact = name not in ("fvu", "correlation")
        torch.testing.assert_close(
            value, expected, rtol=0 if exact else 1e-6, atol=0, equal_nan=True, msg=name
        )


# What torchmetrics asks of a metric, and what is asked of torchmetrics

MAKE = {
    Correlation: (),
    DeadFeatures: (7,),
    FeatureDensity: (7,),
    FractionOfVarianceUnexplained: (3,),
    L0: (),
    L0StandardDeviation: (),
    LossRecovered: (),
    ZipfStatistics: (7,),
}


@pytest.mark.parametrize("kind", MAKE)
def test_every_metric_takes_what_every_metric_of_torchmetrics_takes(kind):
    options = {
        "compute_on_cpu": True,
        "dist_sync_on_step": True,
        "process_group": "a group",
        "dist_sync_fn": max,
        "distributed_available_fn": min,
        "sync_on_compute": False,
        "compute_with_cache": False,
    }
    metric = kind(*MAKE[kind], **options)
    assert {name: getattr(metric, name) for name in options} == options
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `colour`"):
        kind(*MAKE[kind], colour="red")


@pytest.mark.parametrize("method", ["_sync_dist", "_apply"])
def test_private_methods_are_called_as_those_they_replace(method):
    """`test_ranks.py` and the casts above notice when they are not called any more."""
    ours, theirs = (
        [(each.name, each.default) for each in inspect.signature(owner).parameters.values()]
        for owner in (getattr(TotalsMetric, method), getattr(Metric, method))
    )
    assert ours == theirs
