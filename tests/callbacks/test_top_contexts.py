"""Text about features, as it is made and as loggers show it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sae.callbacks import TopContexts, top_contexts
from lightning_sae.callbacks.top_contexts import WIDTH
from lightning_sae.report.collect import BEFORE
from tests.callbacks.fakes import N_FEATURES, FakeData, FakeSAE, trainer
from tests.report.made import made, texts


class Tokenizer:
    """As much as there is to one with nine tokens, each a letter."""

    def __len__(self):
        return 9

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [0]}

    def batch_decode(self, ids, clean_up_tokenization_spaces):
        return ["".join("abcdefghi"[each] for each in row) for row in ids]


class DataOfText(FakeData):
    model = SimpleNamespace(tokenizer=lambda length: Tokenizer())


class CountingSAE(FakeSAE):
    n_features = N_FEATURES


def test_each_feature_has_its_contexts_the_strongest_first():
    report, codes = made()
    text = top_contexts(report.firings, report.contexts, texts)
    assert all(line.startswith("    ") or not line for line in text.splitlines())
    paragraphs = text.split("\n    \n")
    assert len(paragraphs) == codes.shape[-1]
    head, *lines = (line.strip() for line in paragraphs[0].strip().splitlines())
    share = (codes[:, 1:, 0] > 0).double().mean().item()
    assert head == f"feature 0: {share:.2%} of {12 * 39} tokens"
    highest = codes[..., 0].amax(1).sort(descending=True).values[:4]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(highest.tolist(), abs=0.005)
    context = int(codes[..., 0].amax(1).argmax())
    position = int(codes[context, :, 0].argmax())
    (here,) = texts([int(report.contexts[context, position])])
    before = "".join(texts(report.contexts[context, max(0, position - BEFORE) : position].tolist()))
    assert f"{before[-WIDTH:]}⟦{here}⟧".replace("\n", "↵") in lines[0]
    assert paragraphs[-1].strip() == f"feature 5: 0.00% of {12 * 39} tokens"


def shown(folder: Path, callback: TopContexts, module=None, data=None, stage="validate") -> str:
    logger = CSVLogger(folder, name="", version="run")
    run = trainer(folder, callback, logger=logger)
    getattr(run, stage)(module or CountingSAE(), datamodule=data or DataOfText(), verbose=False)
    files = list((folder / "run").rglob("*.md"))
    return files[0].read_text() if files else ""


def test_a_random_sample_is_shown_and_always_the_same(tmp_path):
    names = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        text = shown(tmp_path / name, TopContexts(features=5, contexts=2, seed=seed))
        heads = [line for line in text.splitlines() if "feature" in line]
        assert len(heads) == 5
        names.append([int(head.split()[1].rstrip(":")) for head in heads])
    assert names[0] == names[1] == sorted(names[0])
    assert names[0] != names[2]
    assert max(names[0]) < N_FEATURES


def test_values_and_shares_are_those_of_the_features_that_are_named(tmp_path):
    torch.manual_seed(0)
    module, data = CountingSAE(), DataOfText()
    text = shown(tmp_path, TopContexts(features=6, contexts=1, tokens=31), module, data)
    kept = [batch["kept"] for batch in data.batches]
    tokens = int(kept[0].sum()) + int(kept[1][:1].sum())  # of six contexts
    x = torch.cat([batch["activations"] for batch in data.batches])[:tokens]
    codes = module.encoder(x).detach()
    codes = codes.where(codes > 0.3, 0)
    for paragraph in text.split("\n    \n"):
        head, *lines = paragraph.strip().splitlines()
        feature = int(head.split()[1].rstrip(":"))
        share = (codes[:, feature] > 0).double().mean().item()
        assert head == f"feature {feature}: {share:.2%} of {tokens} tokens"
        values = [float(line.split()[0]) for line in lines]
        assert values == pytest.approx([codes[:, feature].max().item()] * bool(share), abs=0.005)


def test_tensorboard_has_it_of_every_validation_and_of_the_test(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="")
    run = trainer(tmp_path, TopContexts(features=3), logger=logger, max_epochs=2)
    run.fit(CountingSAE(), datamodule=DataOfText())
    run.test(CountingSAE(), datamodule=DataOfText(), verbose=False)
    events = EventAccumulator(logger.log_dir).Reload()
    (val,) = (events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.startswith("val/"))
    assert len(val) == 2
    assert val[0].tensor_proto.string_val[0].decode().count("feature") == 3
    assert any(tag.startswith("test/top_contexts") for tag in events.Tags()["tensors"])


def test_data_without_a_tokenizer_are_left_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    assert shown(tmp_path, TopContexts(), data=FakeData()) == ""
    assert "TopContexts shows nothing: the data have no tokenizer" in caplog.text


@pytest.mark.parametrize("name", ["features", "contexts", "tokens"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        TopContexts(**{name: 0})
