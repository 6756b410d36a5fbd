"""Mistakes at the command line: one line that names the key and the value, and nothing is left."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import arguments

FILES = {
    "empty.jsonl": b"",
    "broken.jsonl": b'{"text": "a"\n[',
    "broken_later.jsonl": b'{"text": "a b c d"}\n' * 3000 + b'{"text": \n',
    "numbers.jsonl": b'{"text": 1}\n' * 200,
    "nulls.jsonl": b'{"text": null}\n' * 200,
    "short.txt": b"a b\n\n" * 60,
    "table.csv": b"text\na\n",
    "file": b"",
    "empty.ckpt": b"",
    "flow.yaml": b"model: [1",
    "list.yaml": b"- 1",
    "unknown.yaml": b"modle: {k: 3}\n",
    "empty.yaml": b"",
    "binary.yaml": b"\xff\xfe\x00\x01",
}


def checkpoint_callback(**init_args: Any) -> str:
    return json.dumps([{"class_path": "ModelCheckpoint", "init_args": init_args}])


def scheduler(name: str = "StepLR", **init_args: Any) -> str:
    return json.dumps({"class_path": name, "init_args": init_args})


CASES: list[tuple[str, Any, str]] = [
    # the SAE
    ("model.k", 0, "k=0 is out of range: it must be 1 to n_features=256"),
    ("model.k", 257, "k=257 is out of range"),
    ("model.k", "many", "\"model.k\": Expected a <class 'int'>. Got value: many"),
    ("model.k", 1.5, "\"model.k\": Expected a <class 'int'>. Got value: 1.5"),
    ("model.k", "null", "required: k"),
    ("model.kk", 3, "'model.kk' is not accepted, did you mean 'k'?"),
    ("model.n_features", 0, "n_features=0"),
    ("model.n_features", "inf", "\"model.n_features\": Expected a <class 'int'>. Got value: inf"),
    ("model.d_model", 99, "model.d_model=99: leave it out"),
    ("model.init_args.d_model", 99, "model.d_model=99: leave it out"),
    ("model.k_aux", 0, "k_aux=0"),
    ("model.aux_every", 0, "aux_every=0"),
    ("model.aux_coefficient", -1, "aux_coefficient=-1"),
    ("model.aux_coefficient", "nan", "\"model.aux_coefficient\": Expected a <class 'float'>"),
    ("model.dead_after_tokens", 0, "dead_after_tokens=0"),
    ("model.optimizer.lr", -1, "optimizer: Invalid learning rate: -1"),
    ("model.optimizer.lr", "nan", '"model.optimizer.lr": '),
    ("model.optimizer.betas", "[0.9]", '"model.optimizer.betas": Expected a tuple with 2 elements'),
    ("model.optimizer.betas", "[2, 0.9]", "optimizer: Invalid beta parameter at index 0: 2.0"),
    ("model.optimizer.weight_decay", -1, "optimizer: Invalid weight_decay value: -1"),
    ("model.optimizer.eps", -1, "optimizer: Invalid epsilon value: -1"),
    ("model.optimizer", "NoSuch", '"model.optimizer": there is no class NoSuch'),
    ("model.lr_scheduler", "NoSuch", '"model.lr_scheduler": there is no class NoSuch'),
    ("model.lr_scheduler", scheduler(), "required: step_size"),
    ("model", "NoSuchSAE", '"model": there is no class NoSuchSAE'),
    ("model", "torch.nn.Linear", "not correspond to a subclass of SAEModule"),
    ("model", "lightning_sae.SparseAutoencoder", "but is abstract"),
    # the data
    ("data", "torch.nn.Linear", "does not correspond to a subclass of"),
    ("data.model_name", "no/such-model", "model_name='no/such-model'"),
    ("data.model_name", "./nowhere", "model_name='./nowhere': there is no such folder"),
    ("data.model_name", "/etc", "model_name='/etc'"),
    ("data.model_name", "../../etc", "model_name='../../etc'"),
    ("data.layer", 4, "layer=4 is out of range"),
    ("data.layer", -1, "layer=-1"),
    ("data.layer", "last", "layer='last': GPT2LMHeadModel has no such module"),
    ("data.text", "", "text='' is no data set"),
    ("data.text", "missing.parquet", "text='missing.parquet' does not exist"),
    ("data.text", "empty.jsonl", "text='empty.jsonl' has no documents"),
    ("data.text", "broken.jsonl", "text='broken.jsonl' cannot be read"),
    ("data.text", "broken_later.jsonl", "text='broken_later.jsonl' cannot be read"),
    ("data.text", "numbers.jsonl", "1, which is not a string"),
    ("data.text", "nulls.jsonl", "text='nulls.jsonl' gives only 0 contexts"),
    ("data.text", "short.txt", "text='short.txt' gives only 0 contexts"),
    ("data.text", "table.csv", "text='table.csv' should end in one of"),
    ("data.text", "no/such-text", "text='no/such-text' cannot be read"),
    ("data.text_column", "body", "text_column='body'"),
    ("data.train_split", "nope", "train_split='nope'"),
    ("data.validation_split", "nope", "validation_split='nope'"),
    ("data.validation_split", "train", "validation_split='train'"),
    ("data.held_out_documents", 0, "held_out_documents=0"),
    ("data.held_out_documents", 10**6, "held_out_documents=1000000"),
    ("data.batch_size", 0, "batch_size=0"),
    ("data.context_length", 1, "context_length=1"),
    ("data.batches_per_block", 0, "batches_per_block=0"),
    ("data.model_batch_size", 0, "model_batch_size=0"),
    ("data.model_dtype", "int8", '"data.model_dtype": '),
    ("data.validation_tokens", 0, "validation_tokens=0"),
    ("data.test_tokens", 1, "test_tokens=1"),
    ("data.seed", -1, "seed=-1"),
    ("data.cache_dir", "file", "'file/"),
    ("data.cache_dir", "/proc/nowhere", "/proc/nowhere"),
    # the Trainer
    ("trainer.max_steps", -1, "max_steps is not set"),
    ("trainer.max_steps", 0, "max_steps=0"),
    ("trainer.max_steps", -2, "You passed in -2"),
    ("trainer.max_steps", "ten", "\"trainer.max_steps\": Expected a <class 'int'>. Got value: ten"),
    ("trainer.max_epochs", 0, "max_epochs=0"),
    ("trainer.max_time", "soon", "Timer(duration='soon')"),
    ("trainer.val_check_interval", 0, "trainer.val_check_interval=0 must be at least 1"),
    ("trainer.val_check_interval", 0.5, "trainer.val_check_interval=0.5 must be at least 1"),
    ("trainer.val_check_interval", "often", "`val_check_interval`: 'often'"),
    ("trainer.check_val_every_n_epoch", 0, "trainer.check_val_every_n_epoch=0"),
    ("trainer.accumulate_grad_batches", 0, "trainer.accumulate_grad_batches=0 must be at least 1"),
    ("trainer.accumulate_grad_batches", -1, "trainer.accumulate_grad_batches=-1"),
    ("trainer.gradient_clip_val", -1, "trainer.gradient_clip_val=-1 must be at least 0"),
    ("trainer.gradient_clip_val", "nan", '"trainer.gradient_clip_val": '),
    ("trainer.gradient_clip_algorithm", "x", "`gradient_clip_algorithm` x is invalid"),
    ("trainer.log_every_n_steps", -1, "trainer.log_every_n_steps=-1"),
    ("trainer.min_steps", -4, "trainer.min_steps=-4"),
    ("trainer.limit_train_batches", 0, "limit_train_batches=0"),
    ("trainer.limit_train_batches", 0.5, "`Trainer(limit_train_batches)` must be `1.0` or an int"),
    ("trainer.limit_val_batches", -1, "-1 for limit_val_batches"),
    ("trainer.devices", 0, "Trainer(devices='0')"),
    ("trainer.devices", "many", "`devices`"),
    ("trainer.num_nodes", 0, "`num_nodes` must be a positive integer, but got 0"),
    ("trainer.accelerator", "abacus", "accelerator='abacus'"),
    ("trainer.precision", "4-bit", '"trainer.precision": '),
    ("trainer.strategy", "nope", "strategy='nope'"),
    ("trainer.profiler", "nope", "profiler"),
    ("trainer.plugins", "Nope", '"trainer.plugins": Expected a dot import path string: Nope'),
    ("trainer.callbacks", "Nope", '"trainer.callbacks": '),
    ("trainer.callbacks", checkpoint_callback(every_n_train_steps=-1), "every_n_train_steps=-1"),
    ("trainer.callbacks", checkpoint_callback(save_top_k=3), "ModelCheckpoint(save_top_k=3"),
    ("trainer.logger", "Nope", '"trainer.logger": '),
    ("trainer.logger.init_args.save_dir", "file", "/file/topk"),
    ("trainer.nonsense", 1, "--trainer.nonsense=1"),
    # the run
    ("seed_everything", -1, "seed_everything=-1 must be 0 to 4294967295"),
    ("seed_everything", 2**40, "seed_everything=1099511627776"),
    ("seed_everything", "x", '"seed_everything": '),
    ("ckpt_path", "missing.ckpt", "ckpt_path=missing.ckpt: fit needs"),
    ("ckpt_path", ".", "ckpt_path=.: fit needs"),
    ("ckpt_path", "hpc", "ckpt_path=hpc: there is no hpc_ckpt_*.ckpt in"),
    ("ckpt_path", "best", "ckpt_path=best: fit needs"),
    ("ckpt_path", "https://127.0.0.1:9/x.ckpt", "ckpt_path=https://127.0.0.1:9/x.ckpt: fit needs"),
    ("ckpt_path", "empty.ckpt", "ckpt_path=empty.ckpt is no checkpoint of an SAE, or is damaged"),
    ("ckpt_path", "short.txt", "ckpt_path=short.txt is no checkpoint"),
    ("config", "nowhere.yaml", "config=nowhere.yaml"),
    ("config", "flow.yaml", "config=flow.yaml: Problems parsing config"),
    ("config", "list.yaml", "config=list.yaml: Unexpected config: - 1"),
    ("config", "empty.yaml", "config=empty.yaml: Unexpected config"),
    ("config", "binary.yaml", "config=binary.yaml: 'utf-8' codec"),
    ("config", "unknown.yaml", "'modle.k'"),
    ("config", ".", "config=."),
]
LINES: list[tuple[list[str], str]] = [
    (["train"], "train is none of fit, validate, test, predict, report, export, import, cache"),
    (["repot"], "cache, did you mean 'report'?"),
    (["fit"], "required: fit.data, fit.model"),
    (["fit", "--nonsense"], "--nonsense"),
    (["fit", "--config"], "--config: expected one argument"),
    (["fit", "--config", "topk.yaml", "stray"], "stray"),
    (
        ["test", "--config", "topk.yaml"],
        "ckpt_path=None: test needs the checkpoint or folder",
    ),
    (["validate", "--config", "topk.yaml"], "ckpt_path=None: validate needs"),
    (["predict", "--config", "topk.yaml"], "ckpt_path=None: predict needs"),
]


def test_there_are_enough_of_them():
    assert len(CASES) + len(LINES) >= 60


@pytest.mark.parametrize(
    ("key", "value", "expected"), CASES, ids=[f"{key}={value}" for key, value, _ in CASES]
)
def test_a_mistake_is_told(key: str, value: Any, expected: str, text: Path, told, tmp_path: Path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    settings = {"data.text": text} | ({} if key == "config" else {key: value})
    line = arguments(**settings)
    if key == "config":
        line[3:3] = ["--config", value]  # after the shipped one
    assert expected in told(line)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[" ".join(line) for line, _ in LINES])
def test_a_wrong_line_is_told(line: list[str], expected: str, told, tmp_path: Path):
    assert expected in told(line)
    assert not list(tmp_path.iterdir())


def test_a_schedule_of_no_length(text: Path, told):
    """Torch takes it, and divides by it after the first step."""
    line = arguments(**{"data.text": text, "model.lr_scheduler": scheduler(step_size=0)})
    assert "lr_scheduler=StepLR has a length of 0: integer modulo by zero" in told(line)


def test_a_schedule_that_is_shorter_than_the_run(text: Path, told):
    """Torch says so when it is over."""
    schedule = scheduler("OneCycleLR", max_lr=0.1, total_steps=3)
    line = arguments(**{"data.text": text, "model.lr_scheduler": schedule})
    assert "lr_scheduler=OneCycleLR: Tried to step 4 times" in told(line)


def test_a_schedule_that_is_none(text: Path, told):
    schedule = scheduler("OneCycleLR", max_lr=0.1, total_steps=-1)
    line = arguments(**{"data.text": text, "model.lr_scheduler": schedule})
    assert "lr_scheduler: Expected positive integer total_steps, but got -1" in told(line)


def test_a_model_parallel_strategy_cannot_read_an_earlier_format(text: Path, told, tmp_path: Path):
    old = Path(__file__).parents[1] / "checkpoints_format_1" / "topk.ckpt"
    strategy = {"class_path": "ModelParallelStrategy"}
    changes = {"trainer.strategy": json.dumps(strategy), "trainer.accelerator": "cpu"}
    line = told(arguments(**{"data.text": text, "ckpt_path": old}, **changes))
    assert f"ckpt_path={old} has format 1, which a ModelParallelStrategy cannot read" in line
    assert not list(tmp_path.iterdir())
