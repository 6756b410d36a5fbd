"""The class that SAELens lacks, in SAELens."""

import pytest
import torch

pytest.importorskip("sae_lens")

from sae_lens import SAE

from lightning_sae.interop import export, saelens_adapter
from tests.helpers.foreign import tokens, trained


def test_it_is_registered_once_and_computes_what_ours_does(tmp_path):
    sae, x = trained("mutual_choice", importance="token_norm"), tokens()
    export(sae, "saelens", tmp_path)
    saelens_adapter.register()
    saelens_adapter.register()
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, saelens_adapter.TokenNormJumpReLUSAE)
    torch.testing.assert_close(loaded(x.view(2, -1, 16)).view(-1, 16), loaded(x))
    same = ((loaded.encode(x) > 0) == (sae.encode(x) > 0)).all(1)
    torch.testing.assert_close(loaded(x)[same], sae(x)[same], rtol=1e-5, atol=1e-3)
