import itertools
import json
from collections import Counter

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_sae.checks import UsageError
from lightning_sae.data import ActivationDataModule, StoredActivationsDataModule
from lightning_sae.data.packer import _PackOnward
from tests.data.tiny import (
    D_MODEL,
    LENGTH,
    Recorder,
    arguments,
    documents,
    same,
    save_text,
    trainer,
)
from tests.helpers.ddp import run_on_two


def take(datamodule, count):
    return list(itertools.islice(datamodule.train_dataloader(), count))


def test_every_kept_token_is_trained_on_once_an_epoch(make, model_folder):
    """Against one context at a time, packed one token at a time."""
    texts, held_out = (list(part["text"]) for part in make()._documents)
    assert sorted(texts + held_out) == sorted(documents(120))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    joined = [token for text in texts for token in [*tokenizer(text)["input_ids"], 0]]
    contexts = len(joined) // (LENGTH - 1)
    expected, prefixes = [], []
    for i in range(contexts):
        context = [0, *joined[i * (LENGTH - 1) :][: LENGTH - 1]]
        with torch.no_grad():
            states = model(torch.tensor([context]), output_hidden_states=True).hidden_states
        for place, token in enumerate(context):
            if token != 0:
                expected.append(states[2][0, place])
                prefixes.append(tuple(context[: place + 1]))
    # One batch that goes through all contexts once.
    datamodule = make(batch_size=len(expected))
    datamodule.batches_per_block = contexts * (LENGTH - 1) / len(expected) - 0.25 - 1e-9
    (batch,) = take(datamodule, 1)
    activations, expected = batch["activations"].double(), torch.stack(expected).double()
    distance, match = torch.cdist(activations, expected).min(1)
    assert distance.max() < 1e-4
    assert Counter(prefixes[i] for i in match) == Counter(prefixes)
    assert match.tolist() != sorted(match.tolist())


def test_held_out_batches_are_those_of_the_model(make, model_folder):
    datamodule = make()
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    loaders = datamodule.val_dataloader(), datamodule.test_dataloader()
    assert [len(loader) for loader in loaders] == [4, 3]
    for batch in itertools.chain(*loaders):
        ids, kept = batch["input_ids"], batch["kept"]
        expected = torch.ones_like(ids, dtype=torch.bool)
        expected[:, 0] = False
        assert torch.equal(kept, expected & (ids != 0))
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(batch["activations"], states[kept])
    validation, test = (torch.cat([b["input_ids"] for b in loader]) for loader in loaders)
    assert validation.shape == (20, LENGTH)
    assert test.shape == (12, LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    joined = "".join(text + "<|end|>" for text in datamodule._documents[1]["text"])
    bodies = torch.cat([validation, test])[:, 1:].flatten()
    assert joined.startswith(tokenizer.decode(bodies.tolist()))
    predicted = torch.cat([b["input_ids"] for b in datamodule.predict_dataloader()])
    assert torch.equal(predicted, test)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_seed_decides_and_nothing_else(make, streaming):
    datamodule = make(streaming=streaming)
    batches = take(datamodule, 9)
    list(datamodule.val_dataloader())
    list(datamodule.test_dataloader())
    for other in (datamodule, make(streaming=streaming, validation_tokens=64)):
        again = take(other, 9)
        assert [b["cursor"] for b in again] == [b["cursor"] for b in batches]
        assert same([b["activations"] for b in again], [b["activations"] for b in batches])
    differ = take(make(streaming=streaming, seed=1), 9)
    assert not same([b["activations"] for b in differ], [b["activations"] for b in batches])


def test_a_second_run_takes_all_activations_from_the_cache(make, tmp_path, monkeypatch):
    plain, cached = make(), make(cache_dir=str(tmp_path))
    batches = [b["activations"] for b in take(plain, 9)]
    held_out = [b["activations"] for b in plain.val_dataloader()]
    assert same([b["activations"] for b in take(cached, 9)], batches)
    list(cached.val_dataloader())
    cached.teardown("fit")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    again = make(cache_dir=str(tmp_path))
    assert same([b["activations"] for b in take(again, 9)], batches)
    assert same([b["activations"] for b in again.val_dataloader()], held_out)
    with pytest.raises(ValueError, match="not callable"):
        take(make(cache_dir=str(tmp_path), context_length=8, validation_tokens=64), 1)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_many_epochs_are_kept_once_and_the_same_cold_and_warm(make, tmp_path, monkeypatch, dtype):
    settings = {"cache_dir": str(tmp_path), "cache_dtype": dtype}
    assert make(**settings).description.get("rounded_to") == dtype
    cold = [b["activations"] for b in take(make(**settings), 60)]
    (folder,) = tmp_path.iterdir()
    kept = sum(len(load_file(file)["key"]) for file in folder.iterdir())
    assert kept == len(make()._train_inputs) < 60 * 64 / LENGTH
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    assert same([b["activations"] for b in take(make(**settings), 60)], cold)


def test_a_filled_cache_needs_no_model_and_is_a_stream_of_its_own(make, tmp_path, monkeypatch):
    expected = [b["activations"] for b in take(make(), 9)]
    held_out = [b["activations"] for b in make().val_dataloader()]
    filled = make(cache_dir=str(tmp_path))
    needs = filled.fill_cache(9)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    filled.fill_cache(9)  # again: nothing is computed
    again = make(cache_dir=str(tmp_path))
    assert same([b["activations"] for b in take(again, 9)], expected)
    assert same([b["activations"] for b in again.val_dataloader()], held_out)
    assert needs.folder.parent == tmp_path
    alone = StoredActivationsDataModule(
        str(needs.folder), batch_size=64, batches_per_block=4, validation_tokens=4 * LENGTH
    )
    noted = make().description.items()
    assert noted <= alone.description.items()
    (batch,) = alone.val_dataloader()
    assert not batch["kept"][:, 0].any()  # where BOS is
    for file in needs.folder.iterdir():
        found = load_file(file)
        assert torch.equal(found["kept"].bool(), make().kept(found["input_ids"]))


@pytest.mark.parametrize("filled", [False, True])
def test_what_is_held_out_of_a_run_is_held_out_of_its_folder(make, tmp_path, filled):
    run = make(cache_dir=str(tmp_path))
    if filled:
        run.fill_cache()
    else:  # in the order of a fit: a validation, some of an epoch, and another validation
        list(run.val_dataloader())
        take(run, 20)
        list(run.val_dataloader())
        list(run.test_dataloader())
    run.teardown("fit")
    (folder,) = tmp_path.iterdir()
    kept = [load_file(file)["input_ids"] for file in sorted(folder.iterdir())]
    stored = StoredActivationsDataModule(str(folder), held_out_share=0)
    trained, held_out = (
        {tuple(context) for context in torch.cat(kept)[numbers].tolist()}
        for numbers in (stored.train_inputs(), stored.held_out_inputs())
    )
    expected = [*make()._held_out_inputs["validation"], *make()._held_out_inputs["test"]]
    assert held_out == {tuple(context.tolist()) for context in expected}
    assert trained <= {tuple(context.tolist()) for context in make().train_inputs()}
    assert len(trained) + len(held_out) == len(torch.cat(kept))


def test_a_cache_that_would_be_too_large_is_refused_before_it_is_begun(make, tmp_path):
    large = make(cache_dir=str(tmp_path), cache_limit_gb=1e-5)
    message = (
        r"^cache_dir: \d+ contexts take 0.\d+ GB in '.*', more than cache_limit_gb=1e-05: raise"
    )
    with pytest.raises(UsageError, match=message):
        large.train_dataloader()
    assert not list(tmp_path.iterdir())
    endless = make(cache_dir=str(tmp_path), cache_limit_gb=1e-5, streaming=True)
    take(endless, 30)
    with pytest.warns(UserWarning, match="is reached in .*: no more activations are kept"):
        endless.teardown("fit")
    with pytest.raises(UsageError, match=r"^text='.*' has no length: say of how many steps"):
        endless.fill_cache()


def test_what_another_run_has_kept_is_told_from_what_this_one_needs(make, tmp_path):
    kept = make(cache_dir=str(tmp_path)).fill_cache()
    there = sum(file.stat().st_size for file in kept.folder.iterdir()) / 1e9
    again = make(cache_dir=str(tmp_path), cache_limit_gb=1.01 * there)
    again.train_dataloader()  # all that it needs is there
    other = make(cache_dir=str(tmp_path), cache_limit_gb=1.01 * there, context_length=LENGTH // 2)
    message = r"are not there yet, beside .* that are: more than cache_limit_gb"
    with pytest.raises(UsageError, match=message):
        other.train_dataloader()


def test_d_model_needs_no_weights(make, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    assert make().d_model == D_MODEL
    assert ActivationDataModule().d_model == 256


def test_the_packaged_model_and_text():
    datamodule = ActivationDataModule(validation_tokens=1024, test_tokens=256)
    (batch,) = itertools.islice(datamodule.val_dataloader(), 1)
    assert batch["activations"].shape == (int(batch["kept"].sum()), datamodule.d_model)
    assert datamodule.residual_stream.layer == 2


def noted_at(datamodule, cut):
    """What a checkpoint notes after so many batches."""
    for batch in take(datamodule, cut):
        datamodule.on_before_batch_transfer(batch, 0)
    return datamodule.state_dict()


@pytest.mark.parametrize("cut", [3, 4, 5, 9, 14, 23, 40])  # blocks have 4, an epoch about 13
def test_a_streamed_run_resumes_without_reading_what_came_before(make, monkeypatch, cut):
    monkeypatch.setattr("lightning_sae.data.packer.DOCUMENTS_AT_ONCE", 5)
    expected = [batch["activations"] for batch in take(make(streaming=True), cut + 4)]
    noted = noted_at(make(streaming=True), cut)
    assert len(json.dumps(noted["reading"]) if cut > 3 else "") < 2000
    again, numbers = make(streaming=True), []
    packed = _PackOnward.__call__
    monkeypatch.setattr(
        _PackOnward, "__call__", lambda *args: numbers.append(args[2][0]) or packed(*args)
    )
    again.load_state_dict(json.loads(json.dumps(noted)))
    assert same([batch["activations"] for batch in take(again, 4)], expected[cut:])
    if 4 <= cut < 9:
        assert min(numbers) > 0
    assert len(numbers) < 30  # those of the blocks that are read


def test_a_checkpoint_of_other_settings_or_without_a_place_is_read_up_to(make):
    expected = [batch["activations"] for batch in take(make(streaming=True), 9)]
    noted = noted_at(make(streaming=True), 5)
    without = make(streaming=True)
    without.load_state_dict({name: noted[name] for name in noted if name != "reading"})
    assert same([batch["activations"] for batch in take(without, 4)], expected[5:])
    other = make(streaming=True, batches_per_block=3)
    with pytest.warns(UserWarning, match="batches_per_block=3 was 4 in the checkpoint"):
        other.load_state_dict(noted)
    fresh = make(streaming=True, batches_per_block=3)
    fresh._cursor = noted["cursor"]
    assert same(*([batch["activations"] for batch in take(each, 4)] for each in (other, fresh)))


def of_resumed_rank(rank, settings, noted):
    datamodule = ActivationDataModule(**settings)
    datamodule.load_state_dict(noted)
    return [batch["activations"] for batch in take(datamodule, 6)]


def test_two_ranks_resume_what_one_has_begun(make, model_folder, text_file):
    settings = {**arguments(model_folder, text_file), "streaming": True}
    expected = [batch["activations"] for batch in take(make(streaming=True), 15)]
    ranks = run_on_two(of_resumed_rank, settings, noted_at(make(streaming=True), 9))
    together = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    assert same(together, expected[9:])


def of_rank(rank, settings, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    datamodule = ActivationDataModule(**settings)
    train = [batch["activations"] for batch in take(datamodule, 9)]
    with pytest.raises(ValueError, match=r"^batch_size=7 cannot be shared by 2 devices$"):
        ActivationDataModule(**{**settings, "batch_size": 7}).train_dataloader()
    few = ActivationDataModule(**{**settings, "test_tokens": LENGTH})
    message = r"^test_tokens=16: .* has 1 held-out contexts for it, 2 devices need one each$"
    with pytest.raises(ValueError, match=message):
        few.test_dataloader()
    return train, [batch["input_ids"] for batch in datamodule.val_dataloader()]


@pytest.mark.parametrize("streaming", [False, True])
def test_two_ranks_together_get_what_one_gets(make, model_folder, text_file, tmp_path, streaming):
    settings = {**arguments(model_folder, text_file), "streaming": streaming}
    alone = make(streaming=streaming)
    ranks = run_on_two(of_rank, settings, tmp_path)
    together = [torch.cat(parts) for parts in zip(ranks[0][0], ranks[1][0], strict=True)]
    assert same(together, [batch["activations"] for batch in take(alone, 9)])
    held_out = torch.cat([batch["input_ids"] for batch in alone.val_dataloader()])
    in_order = [ids for pair in zip(ranks[0][1], ranks[1][1], strict=True) for ids in pair]
    assert torch.equal(torch.cat(in_order), held_out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": -1}, "layer=-1 must be at least 0"),
        ({"held_out_documents": 0}, "held_out_documents=0 must be at least 1"),
        ({"context_length": 1}, "context_length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batches_per_block": 0}, "batches_per_block=0 must be at least 1"),
        ({"model_batch_size": -3}, "model_batch_size=-3 must be at least 1"),
        ({"validation_tokens": 15}, "validation_tokens=15 must be at least 16"),
        ({"test_tokens": 0}, "test_tokens=0 must be at least 16"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"cache_dtype": "int8"}, "cache_dtype='int8' is none of float32, bfloat16, float16"),
        ({"cache_limit_gb": -1}, "cache_limit_gb=-1 must be a finite number, 0 or more"),
    ],
)
def test_arguments_out_of_range(make, changed, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(**changed)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_name": "nope"}, r"^model_name='nope': "),
        ({"layer": 3}, r"^layer=3 is out of range: .* has layers 0 to 2$"),
        ({"context_length": 65}, r"^context_length=65: .* reads up to 64$"),
        ({"text": "no.txt"}, r"^text='no.txt' does not exist$"),
        ({"train_split": "no"}, r"^train_split='no': text='.*' has the splits train$"),
        ({"text_column": "no"}, r"^text_column='no': text='.*' has the columns "),
        ({"text_column": "id"}, r"^text_column holds \d+, which is not a string, at document 0$"),
        ({"batch_size": 10**6}, r"^text='.*' gives only \d+ contexts to train on; one batch needs"),
    ],
)
def test_mistakes_found_when_training_starts(make, tmp_path, changed, message, streaming):
    datamodule = make(streaming=streaming, validation_tokens=100, test_tokens=100, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path).fit(Recorder(), datamodule)
    assert "\n" not in str(caught.value)


def test_too_little_held_out_text(make, tmp_path):
    text = str(save_text(tmp_path / "text.jsonl", count=30))
    few = make(text=text, held_out_documents=3, validation_tokens=64, test_tokens=10**6)
    contexts = sum(len(batch["input_ids"]) for batch in few.test_dataloader())
    assert 0 < contexts < 10**6 // LENGTH
    none = make(text=text, held_out_documents=3, validation_tokens=10**6)
    assert len(none.val_dataloader()) > 0
    with pytest.raises(ValueError, match=r"^test_tokens=192: .* has 0 held-out contexts for it"):
        none.test_dataloader()


def test_its_description_says_which_tokens_are_special(make):
    data = make()
    batch = next(iter(data.test_dataloader()))
    special = data.describe()["special_tokens"]
    later = batch["input_ids"][:, 1:]
    assert special == [0]
    assert torch.equal(batch["kept"][:, 1:], ~torch.isin(later, torch.tensor(special)))


def test_batches_of_several_sites_are_those_of_each_beside_each_other(make):
    both = make(layer=[1, 2], site=["mlp_in", "mlp_out"])
    assert both.widths == [D_MODEL] * 4
    alone = [make(layer=layer, site=site) for layer in (1, 2) for site in ("mlp_in", "mlp_out")]
    found, *each = ([b["activations"] for b in take(one, 6)] for one in (both, *alone))
    assert same(found, [torch.cat(rows, -1) for rows in zip(*each, strict=True)])
    (batch,) = itertools.islice(both.val_dataloader(), 1)
    assert batch["activations"].shape == (int(batch["kept"].sum()), 4 * D_MODEL)
