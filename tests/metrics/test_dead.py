import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.metrics import DeadFeatures
from tests.metrics.samples import N_FEATURES, sample, split


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_a_feature_is_dead_if_no_batch_saw_it_fire(sizes, seed):
    codes = sample(sum(sizes) + 1, seed)
    dead = DeadFeatures(N_FEATURES)
    for batch in split(codes, [*sizes, 1]):
        dead.update(batch["codes"])
    alive = {feature for row in codes["codes"].tolist() for feature, z in enumerate(row) if z > 0}
    torch.testing.assert_close(dead.compute(), torch.tensor(1 - len(alive) / N_FEATURES))


def test_extremes():
    dead = DeadFeatures(3)
    dead.update(torch.zeros(5, 3))
    assert dead.compute() == 1
    dead.update(torch.ones(1, 3))
    assert dead.compute() == 0
    assert dead.tokens == 6


def test_no_count_overflows_for_many_features_and_tokens():
    dead = DeadFeatures(2**20)
    dead.update(torch.ones(1, 2**20))
    dead.merge_state(
        {"fires": torch.zeros(2**20, dtype=torch.int64), "tokens": torch.tensor(2**60)}
    )
    assert dead.compute() == 0
