"""Trained SAEs by what a command line calls them."""

from pathlib import Path

import pytest
import torch

from lightning_sae import ActivationDataModule, MutualChoiceSAE, UsageError
from lightning_sae.cli.trained import imported, trained
from lightning_sae.interop import export, load_foreign
from tests.helpers.foreign import assert_same, there_and_back
from tests.helpers.foreign import trained as trained_sae


@pytest.mark.filterwarnings("ignore:What the SAE was trained on cannot be read")
def test_own_ones_and_those_of_another_library(tmp_path: Path):
    sae = trained_sae("mutual_choice")
    sae.save_pretrained(tmp_path / "own")
    there_and_back(sae, "saelens", tmp_path / "theirs")
    assert_same(trained(str(tmp_path / "own")), sae)
    assert_same(trained(f"saelens:{tmp_path / 'theirs'}"), sae)
    with pytest.raises(UsageError, match="there is no such folder"):
        trained("saelens:nowhere")


def test_mean_and_scale_are_those_of_the_activations_it_is_for(tmp_path: Path):
    torch.manual_seed(0)
    sae = MutualChoiceSAE(256, 64, 4, rank_discount=0)
    sae.loss(torch.randn(512, 256))
    export(sae, "openmoss", tmp_path / "theirs")
    data = ActivationDataModule("quickstart", 1, validation_tokens=512)
    found = imported(load_foreign(f"openmoss:{tmp_path / 'theirs'}"), 4, data)
    x = torch.cat([batch["activations"] for batch in data.val_dataloader()])
    torch.testing.assert_close(found.input_mean, x.mean(0), rtol=0.1, atol=0.1)
    export(trained_sae("topk"), "sparsify", tmp_path / "narrow")
    with pytest.raises(UsageError, match="256 wide, expected d_model=16"):
        imported(load_foreign(f"sparsify:{tmp_path / 'narrow'}"), 4, data)
