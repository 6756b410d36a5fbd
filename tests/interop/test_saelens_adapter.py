"""The class that SAELens lacks, in SAELens."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sae_lens")

from sae_lens import SAE

from lightning_sae import FeatureChoiceSAE, load
from lightning_sae.interop import export, saelens_adapter
from tests.helpers.foreign import tokens, trained
from tests.helpers.hub import serving


@pytest.mark.parametrize(
    "options", [{"importance": "token_norm"}, {"rank_discount": 1.0}, {"rank_discount": 0.5}]
)
def test_it_is_registered_once_and_computes_what_ours_does(options, tmp_path):
    sae, x = trained("mutual_choice", **options), tokens()
    export(sae, "saelens", tmp_path)
    saelens_adapter.register()
    saelens_adapter.register()
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, saelens_adapter.GeneralJumpReLUSAE)
    torch.testing.assert_close(loaded(x.view(2, -1, 16)).view(-1, 16), loaded(x))
    same = ((loaded.encode(x) > 0) == (sae.encode(x) > 0)).all(1)
    torch.testing.assert_close(loaded(x)[same], sae(x)[same], rtol=1e-5, atol=1e-3)


COMMAND = "import sys; from lightning_sae.cli import main; main(sys.argv[1:])"


def imported(path: str, hub: Path, folder: Path, *options: str) -> str:
    """Import an SAE from a hub that has what is in a folder; return what failed, if it did."""
    line = ["import", f"--path=saelens:{path}", f"--output={folder}", *options]
    run = [sys.executable, "-W", "ignore", "-c", COMMAND, *line]
    with serving(hub) as environment:
        environment |= {"HF_HOME": str(folder.with_name("home"))}
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stderr if done.returncode else ""


def test_a_repository_of_saelens_is_read_by_saelens(tmp_path: Path):
    sae, x = trained("mutual_choice"), tokens()
    export(sae, "saelens", tmp_path / "hub/someone/saes/layer_3")
    assert not imported("someone/saes:layer_3", tmp_path / "hub", tmp_path / "out")
    found = load(tmp_path / "out")
    same = ((found.encode(x) > 0) == (sae.encode(x) > 0)).all(1)
    torch.testing.assert_close(found(x)[same], sae(x)[same], rtol=1e-5, atol=1e-3)
    assert "layer_4" in imported("someone/saes:layer_4", tmp_path / "hub", tmp_path / "none")


def test_gemma_scope_is_read_by_saelens(tmp_path: Path):
    """In its own format, npz; the smallest of its SAEs, which has embeddings for activations."""
    name, d_model, n_features = "embedding/width_4k/average_l0_6", 2304, 4096
    generator = np.random.default_rng(0)
    params = {
        "W_enc": generator.standard_normal((d_model, n_features), dtype=np.float32),
        "W_dec": generator.standard_normal((n_features, d_model), dtype=np.float32),
        "b_enc": generator.standard_normal(n_features, dtype=np.float32),
        "b_dec": generator.standard_normal(d_model, dtype=np.float32),
        "threshold": 2 + generator.random(n_features, dtype=np.float32),
    }
    where = tmp_path / "hub/google/gemma-scope-2b-pt-res" / name
    where.mkdir(parents=True)
    np.savez(where / "params.npz", **params)
    release = f"gemma-scope-2b-pt-res:{name}"
    assert "k is not known" in imported(release, tmp_path / "hub", tmp_path / "out")
    assert not imported(release, tmp_path / "hub", tmp_path / "out", "--k=6")
    found = load(tmp_path / "out")
    assert type(found) is FeatureChoiceSAE
    assert found.k == 6
    trained_on = json.loads((tmp_path / "out/config.json").read_text())["trained_on"]
    assert trained_on["model_name"] == "gemma-2-2b"

    x = torch.from_numpy(generator.standard_normal((64, d_model), dtype=np.float32))
    w_enc, w_dec, b_enc, b_dec, threshold = map(torch.from_numpy, params.values())
    affinities = x @ w_enc / d_model**0.5 + b_enc  # SAELens undoes how embeddings were scaled
    codes = affinities.where(affinities > threshold, 0)
    assert codes.count_nonzero() > 64
    torch.testing.assert_close(found(x), codes @ w_dec * d_model**0.5 + b_dec, rtol=1e-4, atol=0.05)
