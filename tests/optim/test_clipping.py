"""Fused optimizers are clipped in mixed precision too."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.optim.test_chunked_adam import fit


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_in_mixed_precision(precision, fused, algorithm, tmp_path: Path):
    """Losses are in float32 all the same, so that only a scale can make a difference."""
    adam = partial(torch.optim.Adam, lr=1e-2, eps=1e-2, fused=fused)  # else its steps have no scale
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0) if precision == "16-mixed" else None
    mixed = MixedPrecision(precision, "cpu", scaler)
    expected = fit(tmp_path / "exact", adam, **clip)["state_dict"]
    found = fit(tmp_path / "mixed", adam, plugins=[mixed], **clip)["state_dict"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    free = fit(tmp_path / "free", adam)["state_dict"]
    assert not torch.allclose(free["decoder.weight"], expected["decoder.weight"], atol=1e-3)
