"""How far a batch moves the thresholds of features that choose."""

import torch

from lightning_sae.architectures.threshold_tracking import track

RATES = {"tracking": 0.02, "patience": 1000}


def moved(passing: list[int], budgets: list[float], missed: list[float]) -> torch.Tensor:
    thresholds = torch.ones(len(passing))
    track(thresholds, torch.tensor(passing), torch.tensor(budgets), torch.tensor(missed), **RATES)
    return thresholds


def test_thresholds_rise_with_too_many_and_fall_with_too_few():
    more, same, less = moved([20, 10, 5], [10.0] * 3, [0.0] * 3).tolist()
    assert less < same == 1.0 < more
    assert more == torch.tensor(10 / (1000 + 10 / 0.02)).exp()


def test_patience_is_over_with_a_feature_that_misses_its_matches():
    patient, impatient = moved([0, 0], [10.0, 10.0], [19.0, 21.0]).log().tolist()
    torch.testing.assert_close(impatient, -0.02)
    torch.testing.assert_close(patient, -10 / 1500)


def test_no_batch_moves_a_threshold_far_or_to_zero():
    thresholds = moved([10**6, 0], [1.0, 0.0], [0.0, 100.0])
    torch.testing.assert_close(thresholds, torch.tensor([0.5, 0.0]).exp())
    sunk = torch.full((1,), 1e-3)
    track(sunk, torch.zeros(1), torch.full((1,), 1e9), torch.full((1,), 1e9), **RATES)
    assert sunk.item() == torch.tensor(1e-3).item()
