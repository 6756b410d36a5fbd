"""The commands `export` and `import`."""

import json
import re
from pathlib import Path

import pytest
import torch

from lightning_sae import FeatureChoiceSAE, MutualChoiceSAE, TopKSAE, load
from lightning_sae.cli import main
from lightning_sae.interop import export, load_foreign, unfold
from tests.helpers.foreign import RECORD, assert_same, trained

QUICKSTART = {"trained_on": {"model_name": "quickstart", "layer": 1, "text": "quickstart"}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:What the SAE was trained on cannot be read")
def test_an_sae_leaves_and_comes_back(capsys):
    sae = trained("topk")
    sae.save_pretrained("mine")
    main(["export", "--ckpt_path=mine", "--to=saelens", "--output=theirs"])
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("random activations, 1,024 tokens: largest error ")
    assert told[-1] == "theirs is for saelens."
    main(["import", "--path=saelens:theirs", "--output=again"])
    assert capsys.readouterr().out == "again holds a TopKSAE: lightning_sae.load('again')\n"
    again = load("again")
    assert_same(sae, again)
    assert again.record == RECORD


def test_real_activations_are_compared_where_they_can_be_read(capsys):
    torch.manual_seed(0)
    sae = MutualChoiceSAE(256, 64, 4, rank_discount=0)
    sae.loss(torch.randn(512, 256))
    sae.record = QUICKSTART
    sae.save_pretrained("mine")
    main(["export", "--ckpt_path=mine", "--to=openmoss", "--output=theirs", "--tokens=500"])
    random, real, _ = capsys.readouterr().out.splitlines()
    assert random.startswith("random activations, 1,024 tokens")
    assert real.startswith("real activations, 500 tokens")


@pytest.mark.filterwarnings("ignore:What the SAE was trained on is not known")
def test_a_discount_is_left_out_if_that_is_asked_for(capsys):
    torch.manual_seed(0)
    sae = MutualChoiceSAE(256, 64, 4)
    sae.loss(torch.randn(512, 256))
    sae.record = QUICKSTART
    sae.save_pretrained("mine")
    line = ["export", "--ckpt_path=mine", "--to=openmoss", "--tokens=500"]
    with pytest.raises(SystemExit, match=r"rank_discount=1\.0: export with without_discount=true"):
        main([*line, "--output=theirs"])
    main([*line, "--output=theirs", "--without_discount=true"])
    cost, _, real, _ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"FVU of the SAE \d\.\d{4}, without the discount \d\.\d{4}", cost)
    assert "L0 4.000 here, 4.000 by" in real
    again = unfold(load_foreign("openmoss:theirs"), k=4)
    assert isinstance(again, MutualChoiceSAE)
    assert again.discount is None
    card = Path("theirs/README.md").read_text("utf-8")
    (fvu,) = re.findall(r"\(FVU\) \| (\S+) \|", card)
    assert float(fvu) == pytest.approx(float(cost.split()[-1]), rel=0.2)  # of other tokens
    assert "loss recovered" in card
    TopKSAE(256, 64, 4).save_pretrained("plain")
    with pytest.raises(SystemExit, match="TopKSAE has no rank_discount"):
        main([*line, "--ckpt_path=plain", "--output=other", "--without_discount=true"])


def test_mean_and_scale_are_measured_where_they_can_be_read():
    sae = TopKSAE(256, 64, 4, normalize_inputs="average")
    sae.loss(torch.randn(512, 256))
    sae.record = QUICKSTART
    sae.save_pretrained("mine")
    main(["export", "--ckpt_path=mine", "--to=sparsify", "--output=theirs", "--tokens=256"])
    main(["import", "--path=sparsify:theirs", "--output=again", "--tokens=2000"])
    again = load("again")
    assert again.input_mean.norm() > 1
    x = again.input_mean + torch.randn(2000, 256) / again.input_scale
    assert 0.5 < again.loss(x)[0] < 2  # in units in which all of the variance is 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_feature_choice_goes_on_from_a_topk_sae_of_another_library(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning_sae"])
    torch.manual_seed(0)
    theirs = TopKSAE(256, 64, 4, normalize_inputs="average")
    theirs.loss(torch.randn(512, 256))
    theirs.record = QUICKSTART
    export(theirs, "sparsify", "theirs")
    main(["import", "--path=sparsify:theirs", "--output=ours", "--tokens=512"])
    fit = "fit --config feature_choice.yaml --model.start_from ours --model.n_features 64"
    fit += " --model.k 4 --model.normalize_inputs average --model.mutual_choice_share 0.5"
    fit += " --model.optimizer.init_args.lr 1e-5 --data.layer 1 --data.batch_size 256"
    fit += " --data.batches_per_block 2 --data.validation_tokens 512"
    fit += " --trainer.max_steps 4 --trainer.val_check_interval 4"
    main([*fit.split(), "--trainer.enable_progress_bar=false"])
    sae = load("runs/feature_choice/version_0/pretrained")
    assert isinstance(sae, FeatureChoiceSAE)
    assert sae.choosing
    assert torch.equal(sae.input_mean, load("ours").input_mean)
    assert (sae.W_dec * theirs.W_dec).sum(1).min() > 0.999
    assert sae.record["measured"]["l0"] == pytest.approx(4, rel=0.2)


MISTAKES = [
    (["export", "--ckpt_path=none", "--to=saelens", "--output=out"], "none is no file or folder"),
    (["export", "--to=saelens", "--output=out"], "arguments are required: ckpt_path"),
    (["export", "--ckpt_path=mine", "--to=other", "--output=out"], "saelens"),
    (["export", "--ckpt_path=mine", "--to=sparsify", "--output=out"], "it has no thresholds"),
    (["export", "--ckpt_path=mine", "--to=saelens", "--output=mine"], "holds files already"),
    (["import", "--path=mine", "--output=out"], "begins with none of saelens:"),
    (["import", "--path=saelens:none", "--output=out"], "there is no such folder"),
]


@pytest.mark.filterwarnings("ignore:What the SAE was trained on")
@pytest.mark.parametrize(("line", "told"), MISTAKES)
def test_a_mistake_is_told_in_one_line(line: list[str], told: str, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trained("mutual_choice").save_pretrained("mine")
    with pytest.raises(SystemExit) as stopped:
        main(line)
    message = capsys.readouterr().err if stopped.value.code == 2 else str(stopped.value.code)
    assert told in message
    assert message.strip().count("\n") == 0
    kept = json.loads(Path("mine/config.json").read_text())
    assert kept["architecture"] == "MutualChoiceSAE"
