"""Activations are found in whatever form a loader hands them out."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_sae.data.batches import activations_in

X = torch.arange(6.0).view(3, 2)


@pytest.mark.parametrize("batch", [X, [X], (X, "more"), {"activations": X, "kept": None}])
def test_activations_are_found(batch: object):
    assert activations_in(batch) is X


def test_activations_are_found_in_what_torch_s_loader_makes():
    (batch,) = DataLoader(TensorDataset(X, torch.zeros(3)), batch_size=3)
    assert torch.equal(activations_in(batch), X)


def test_what_holds_no_tensor_is_told():
    with pytest.raises(TypeError, match="must hold a tensor of activations, not str"):
        activations_in(["text"])
