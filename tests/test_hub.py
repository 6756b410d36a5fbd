"""SAEs on a hub, which here is one on the loopback address."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.hub import serving

PUSH = """
import torch
from lightning_sae import MutualChoiceSAE, load

torch.manual_seed(0)
sae, x = MutualChoiceSAE(8, 16, 2), torch.randn(64, 8)
sae.loss(x)
sae.record = {"trained_on": {"model_name": "someone/model", "layer": 3}}
url = sae.push_to_hub("me/my-sae", token="hf_none")
assert url.endswith("/me/my-sae/commit/" + "a" * 40), url
for found in (load("me/my-sae"), MutualChoiceSAE.from_pretrained("me/my-sae")):
    assert torch.equal(found(x), sae(x))
    assert found.record == sae.record
"""
READ = """
from huggingface_hub import ModelCard, hf_hub_download

card = ModelCard.load("me/my-sae")
assert card.data.library_name == "lightning_sae"
assert "MutualChoiceSAE on layer 3 of someone/model" in card.text

import lightning_sae
try:
    lightning_sae.load("me/none")
except lightning_sae.UsageError as error:
    assert "me/none" in str(error)
else:
    raise AssertionError
"""


def test_an_sae_is_pushed_to_a_hub_and_loaded_from_it(tmp_path: Path):
    # In a process of its own: huggingface_hub reads addresses as it is imported.
    run = [sys.executable, "-W", "ignore", "-c", PUSH + READ]
    with serving() as environment:
        environment |= {"HF_HOME": str(tmp_path)}
        done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
