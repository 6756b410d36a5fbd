"""Every private name of another library that the package leans on, and that it is still there.

A library may drop such a name, or change what it takes, in any release. A new one needs an entry
here, and where it is used a line that says why nothing public will do.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from huggingface_hub import ModelHubMixin
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core import saving
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map

import lightning_sae
from lightning_sae.sparse import RowGradient

PACKAGE = Path(lightning_sae.__file__).parent
# set on every class they make
OF_METACLASSES = {"_abc_impl", "_backward_cls", "_is_protocol", "_is_runtime_protocol"}
NO_SECRETS = {"_asdict", "_fields", "_replace"}  # public: a named tuple has no other names for them


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def trainer() -> Any:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def connector() -> Any:
    return trainer()._logger_connector


def versions(logger: Any) -> list[Any]:
    before, logger._version = logger._version, 7
    return [before, logger.version]


MEAN = ["mean_value", "weight"]  # the states of a MeanMetric
PIECE = torch.zeros(2, 2)
HUB = [
    *("cls", "model_id", "revision", "cache_dir", "force_download", "local_files_only", "token"),
    "model_kwargs",
]
PRIVATE: dict[str, list[tuple[str, Callable[[], Any], Any]]] = {
    "_actions": [
        # All arguments of a parser.
        ("argparse", lambda: [each.dest for each in ArgumentParser()._actions], ["help"]),
    ],
    "_apply": [
        # Moves and converts what a module holds, whichever of `to`, `half`, `cuda` ... is called.
        ("torch.nn.Module", lambda: parameters(torch.nn.Module._apply), ["self", "fn", "recurse"]),
        (
            "torchmetrics.Metric",
            lambda: parameters(torchmetrics.Metric._apply),
            ["self", "fn", "exclude_state"],
        ),
    ],
    "_average_model": [
        # torch's `AveragedModel`, from `setup` on.
        ("WeightAveraging", lambda: WeightAveraging()._average_model, None),
        ("AveragedModel", lambda: AveragedModel(torch.nn.Linear(1, 1)).use_buffers, False),
    ],
    "_C": [
        # Where the context manager is that keeps results of operations from becoming subclasses.
        ("torch", lambda: callable(torch._C.DisableTorchFunctionSubclass), True),
    ],
    "_cache": [
        # The states as they were before ranks added theirs.
        ("torchmetrics.Metric", lambda: torchmetrics.MeanMetric()._cache, None),
    ],
    "_checkpoint_io": [
        # What the user named; None if nothing.
        ("Strategy", lambda: SingleDeviceStrategy()._checkpoint_io, None),
    ],
    "_modules": [
        # The children of a module, in which a copy of it shares them with the original.
        ("torch.nn.Module", lambda: list(torch.nn.ReLU()._modules), []),
    ],
    "_orig_mod": [
        # The model that a compiled one was made of.
        (
            "torch.compile",
            lambda: type(torch.compile(torch.nn.ReLU(), backend="eager")._orig_mod),
            torch.nn.ReLU,
        ),
    ],
    "_parse_ckpt_path": [
        # Overridden to do nothing.
        ("LightningCLI", lambda: parameters(LightningCLI._parse_ckpt_path), ["self"]),
        (
            "LightningCLI",
            lambda: "_parse_ckpt_path" in LightningCLI.__init__.__code__.co_names,
            True,
        ),
    ],
    "_class_path": [
        # An argument that checkpoints of its command line have.
        ("LightningCLI", lambda: "_class_path" in source(LightningCLI), True),
    ],
    "_forward_cache": [
        # The value of a step; of a metric that is not in use, None.
        ("torchmetrics.Metric", lambda: torchmetrics.MeanMetric()._forward_cache, None),
    ],
    "_foreach_mul_": [
        # How `clip_grad_norm_` scales gradients.
        (
            "torch.ops.aten",
            lambda: torch.ops.aten._foreach_mul_.Tensor([PIECE], torch.ones(())),
            None,
        ),
    ],
    "_foreach_norm": [
        # How `clip_grad_norm_` measures them.
        ("torch.ops.aten", lambda: torch.ops.aten._foreach_norm.Scalar([PIECE], 2)[0].item(), 0.0),
    ],
    "_foreach_zero_": [
        # How `zero_grad(set_to_none=False)` of an optimizer clears them.
        ("torch.ops.aten", lambda: torch.ops.aten._foreach_zero_([PIECE]), None),
    ],
    "_get_train_description": [
        # Overridden to say what is counted.
        (
            "RichProgressBar",
            lambda: parameters(RichProgressBar._get_train_description),
            ["self", "current_epoch"],
        ),
    ],
    "_instantiator": [
        # An argument that makes `load_from_checkpoint` call whatever function it names.
        ("LightningModule", lambda: "_instantiator" in inspect.getsource(saving), True),
    ],
    "_last_global_step_saved": [
        # Which step a callback has saved: it does not save that again.
        ("ModelCheckpoint", lambda: ModelCheckpoint()._last_global_step_saved, 0),
        (
            "ModelCheckpoint",
            lambda: (
                "_last_global_step_saved"
                in inspect.getsource(ModelCheckpoint._should_skip_saving_checkpoint)
            ),
            True,
        ),
    ],
    "_logger_connector": [
        # Gives loggers the values of a step.
        (
            "Trainer",
            lambda: connector().update_train_step_metrics.__name__,
            "update_train_step_metrics",
        ),
    ],
    "_make_wrapper_subclass": [
        # Makes a tensor that has a shape, and no memory of its own.
        (
            "torch.Tensor",
            lambda: torch.Tensor._make_wrapper_subclass(RowGradient, (2, 3)).shape,
            (2, 3),
        ),
    ],
    "_pytree": [
        # Finds the tensors in whatever an operation is given.
        (
            "torch.utils",
            lambda: tree_map(lambda x: x + 1, [1, (2,), {"a": 3}]),
            [2, (3,), {"a": 4}],
        ),
    ],
    "_from_pretrained": [
        # What a class of huggingface_hub's mixin overrides, as its documentation says.
        ("ModelHubMixin", lambda: parameters(ModelHubMixin._from_pretrained.__func__), HUB),
    ],
    "_save_pretrained": [
        # Its counterpart.
        (
            "ModelHubMixin",
            lambda: parameters(ModelHubMixin._save_pretrained),
            ["self", "save_directory"],
        ),
    ],
    "_reductions": [
        # All states and how they are joined.
        ("torchmetrics.Metric", lambda: list(torchmetrics.MeanMetric()._reductions), MEAN),
    ],
    "_results": [
        # All values of the loop under way by name; None without one.
        ("Trainer", lambda: trainer()._results, None),
    ],
    "_schema": [
        # Says whether an operation changes what it is given.
        ("torch.ops", lambda: torch.ops.aten.add_.Tensor._schema.is_mutable, True),
    ],
    "_signal_connector": [
        # Where a signal is noted that the loops look for after each step.
        ("Trainer", lambda: trainer()._signal_connector.received_sigterm, False),
    ],
    "_sync_dist": [
        # Joins the states of all ranks, once `_cache` is made.
        (
            "torchmetrics.Metric",
            lambda: parameters(torchmetrics.Metric._sync_dist),
            ["self", "dist_sync_fn", "process_group"],
        ),
    ],
    "_version": [
        # How often a tensor has changed in place; torch's notes on autograd name it.
        ("torch.Tensor", lambda: torch.zeros(2).add_(1)._version, 1),
        # What a class sets to have it written into state dicts; a comment in torch says so.
        (
            "torch.nn.Module",
            lambda: torch.nn.BatchNorm1d(1).state_dict()._metadata[""],
            {"version": 2},
        ),
        # The number of a run; None until it is asked for, unless the user named one.
        ("TensorBoardLogger", lambda: versions(TensorBoardLogger("")), [None, 7]),
        ("CSVLogger", lambda: versions(CSVLogger("")), [None, 7]),
    ],
    "_trainer": [
        # None in a plain loop, where `trainer` raises.
        ("LightningModule", lambda: pl.LightningModule()._trainer, None),
    ],
    "_typehint": [
        # What an argument may be, in the order in which it is tried.
        (
            "jsonargparse",
            lambda: ArgumentParser().add_argument("-n", type=int | None)._typehint,
            int | None,
        ),
    ],
}


@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_still_there(name: str):
    for owner, look, expected in PRIVATE[name]:
        try:
            found = look()
        except AttributeError as error:
            pytest.fail(f"{owner}.{name} is gone, which {places().get(name)} use: {error}")
        assert found == expected, f"{owner}.{name} has changed, which {places().get(name)} use"


def test_every_one_is_listed():
    assert places().keys() == PRIVATE.keys(), f"private names of other libraries: {places()}"


def test_none_is_set_by_accident():
    """A private attribute of ours, in a class that inherits from one with the same."""
    assert not {
        f"{ours.__qualname__}.{name}": base.__qualname__
        for ours in classes()
        for name in set(re.findall(r"self\.(_[a-z]\w*)\b[^=\n]*=[^=]", source(ours)))
        for base in foreign_bases(ours)
        if name not in PRIVATE and re.search(rf"self\.{name}\b", source(base))
    }


def places() -> dict[str, list[str]]:
    """Private names of other libraries, and the files that use them."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    ours = {name for tree in trees.values() for name in defined(tree)} | NO_SECRETS
    found: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for name in sorted(set(used(tree)) - ours):
            found.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    for each in classes():
        for name in vars(each):
            if is_private(name) and any(name in vars(base) for base in foreign_bases(each)):
                found.setdefault(name, []).append(f"{each.__module__}.{each.__qualname__}")
    return found


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None and name not in OF_METACLASSES


def used(tree: ast.AST) -> Iterator[str]:
    """Private attributes, private arguments, and private modules and names that are imported."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]  # for `getattr`, or an argument
        yield from filter(is_private, names)


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives to something of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


def classes() -> list[type]:
    """All classes of the package."""
    found = {}
    for module in pkgutil.walk_packages([str(PACKAGE)], "lightning_sae."):
        if module.name.endswith(("__main__", "saelens_adapter")):  # the latter needs SAELens
            continue
        for each in vars(importlib.import_module(module.name)).values():
            if isinstance(each, type) and each.__module__.startswith("lightning_sae."):
                found[each.__qualname__] = each
    return list(found.values())


def foreign_bases(each: type) -> list[type]:
    return [base for base in each.__mro__ if not base.__module__.startswith("lightning_sae.")]


def source(each: type) -> str:
    try:
        return inspect.getsource(each)
    except (OSError, TypeError):  # it is built in
        return ""
