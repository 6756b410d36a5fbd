import math

import pytest
import torch

from lightning_sae.metrics import next_token_losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_a_slow_reference(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator).to(dtype)
    input_ids = torch.randint(7, (3, 5), generator=generator)
    losses = next_token_losses(logits, input_ids)
    assert losses.dtype == torch.float32
    assert losses.shape == (3, 4)
    for c in range(3):
        for t in range(4):
            exponentials = [math.exp(logit) for logit in logits[c, t].tolist()]
            probability = exponentials[input_ids[c, t + 1]] / sum(exponentials)
            assert losses[c, t].item() == pytest.approx(-math.log(probability), rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (2, 1)])
def test_no_token_to_predict(shape):
    losses = next_token_losses(torch.zeros(*shape, 7), torch.zeros(shape, dtype=torch.int64))
    assert losses.shape == (shape[0], shape[1] - 1)


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 7), (6, 7)])
def test_shapes_must_agree(shape):
    with pytest.raises(ValueError, match=r"logits of shape .* must be \(contexts, length, voc"):
        next_token_losses(torch.zeros(shape), torch.zeros(2, 3, dtype=torch.int64))
