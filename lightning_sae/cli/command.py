"""The command `lightning_sae`: LightningCLI and the few things it needs for SAEs."""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy

import lightning_sae
from lightning_sae import SeveralSAEs
from lightning_sae.callbacks import (
    FiniteWeights,
    HParamsTab,
    SavePretrained,
    StopOnSignal,
    TruthCallback,
)
from lightning_sae.checkpoint_format import FORMAT, PARTS, format_of, is_sae, require_one
from lightning_sae.checkpoint_io import AtomicCheckpointIO, open_checkpoint, require_intact
from lightning_sae.checks import UsageError
from lightning_sae.cli.cache import fill_cache
from lightning_sae.cli.console import show_steps
from lightning_sae.cli.errors import one_line_errors, refusals
from lightning_sae.cli.exchange import export_sae, import_sae
from lightning_sae.cli.from_checkpoint import (
    of_another_library,
    of_folder,
    tell_changes,
    with_its_settings,
)
from lightning_sae.cli.nearest import meant
from lightning_sae.cli.noise import silence_noise
from lightning_sae.cli.overview import SENTENCES, opening
from lightning_sae.cli.parser import ConfigFile, Parser, run_function
from lightning_sae.cli.report import report
from lightning_sae.cli.run_folders import own_folders
from lightning_sae.cli.signals import exit_on_signals
from lightning_sae.data import StreamDataModule
from lightning_sae.interop import FoldedSAE, is_foreign, load_foreign
from lightning_sae.optim.resumable import SAEModule
from lightning_sae.quickstart import packaged_sae

__all__ = ["SparseAutoencoderCLI", "run"]

COMMANDS: Final[Mapping[str, Callable[..., None]]] = MappingProxyType(
    {"report": report, "export": export_sae, "import": import_sae}
)
"""Those that are no methods of the Trainer, and so none of LightningCLI's subcommands."""
DESCRIPTION: Final = "Train and evaluate sparse autoencoders on transformer activations."
FILLING: Final = (inspect.getdoc(fill_cache) or "").partition("\n\nArgs:")[0]
SEEDS: Final = 2**32 - 1
NEEDED: Final = {"fit": "a checkpoint to resume; model.start_from takes any trained SAE"}
"""What a subcommand needs in place of any trained SAE."""
LEAST: Final = {
    0: ("gradient_clip_val", "log_every_n_steps", "min_steps"),
    1: ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"),
}
"""Values of the Trainer's settings below which it fails late, or not at all."""


def run(args: ArgsType = None) -> None:
    """Run `lightning_sae fit|validate|test|predict`, or one of `COMMANDS`.

    Args:
        args: Command line, without the program's name. Default: that of the process.
    """
    silence_noise()
    if not sys.flags.safe_path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for classes of the user's; `python -m` has it by itself
    given = sys.argv[1:] if args is None else args
    with exit_on_signals(), one_line_errors():
        name, rest = (given[0], given[1:]) if isinstance(given, list) and given else ("", [])
        if name in COMMANDS:
            run_function(COMMANDS[name], name, rest)
            return
        caching = name == "cache"
        known = list(SENTENCES)
        if name and not name.startswith("-") and name not in known:
            raise UsageError(f"{name} is none of {', '.join(known)}{meant(name, known)}")
        cli = SparseAutoencoderCLI(
            SAEModule,  # an SAE, or several
            StreamDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Else checkpoints name code to make the module with, which no one may run.
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "callbacks": [
                    *(FiniteWeights(), StopOnSignal(), SavePretrained(), HParamsTab()),
                    TruthCallback(),
                ]
            },
            parser_kwargs={
                "prog": "lightning_sae cache" if caching else "lightning_sae",
                "description": FILLING if caching else DESCRIPTION,
                "version": lightning_sae.__version__,
                "usage": opening("cache")["usage"] if caching else None,
                **{name: opening(name) for name in LightningCLI.subcommands()},
            },
            args=rest if caching else args,
            run=not caching,
        )
        if caching:
            fill_cache(cli.datamodule, cli.trainer)


class SparseAutoencoderCLI(LightningCLI):
    """LightningCLI that links the SAE's width to the data and refuses runs that cannot work."""

    _foreign: FoldedSAE | None = None

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose `--config` also finds packaged configurations."""
        kwargs.setdefault("dump_header", [f"lightning_sae=={lightning_sae.__version__}"])
        parser = Parser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="A YAML file, or the name of one that ships with the package. Later ones win.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the language model decide the width, and the user how exact products are."""
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="As torch.set_float32_matmul_precision: with `high`, a GPU computes in TF32.",
        )
        widths = {"d_model": 0, "d_target": -1}  # the latter of transcoders
        for name, place in widths.items():
            to, which = f"model.init_args.{name}", itemgetter(place)
            parser.link_arguments("data.widths", to, compute_fn=which, apply_on="instantiate")
        parser.link_arguments("data.sites", "model.init_args.sites", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and the arguments of the Trainer's methods that they hide."""
        commands = LightningCLI.subcommands()
        return {name: hidden | {"verbose", "weights_only"} for name, hidden in commands.items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse what would be ignored or found out too late."""
        super().parse_arguments(parser, args)
        config = self._settings
        measures = self.config.get("subcommand") not in ("fit", None)
        if measures and not isinstance(args, dict | Namespace):
            given = sys.argv[1:] if args is None else args
            path = config.get("ckpt_path") or ""
            self._foreign = load_foreign(path) if is_foreign(path) else None
            tokens = with_its_settings(given, config, self._foreign)
            if tokens != list(given):
                self.config = parser.parse_args(tokens)
                packaged, config = config, self._settings
                tell_changes(packaged, config)
        width = config.model.get("init_args", {}).get("d_model")
        if width is not None:
            parser.error(f"model.d_model={width}: leave it out, it is the language model's")
        if not 0 <= config.seed_everything <= SEEDS:
            parser.error(f"seed_everything={config.seed_everything} must be 0 to {SEEDS}")
        for least, names in LEAST.items():
            for name in names:
                value = config.trainer[name]
                if isinstance(value, int | float) and value < least:
                    parser.error(f"trainer.{name}={value} must be at least {least}")

    @property
    def _settings(self) -> Any:
        """What was parsed: of the subcommand, where there is one."""
        return self.config[self.config.subcommand] if "subcommand" in self.config else self.config

    def _parse_ckpt_path(self) -> None:
        """Keep to the configuration: a checkpoint's hyperparameters must not override it.

        Private of LightningCLI, which calls it whatever it is told, and has no argument for that.
        """

    def before_instantiate_classes(self) -> None:
        """Set what nothing that is instantiated sets."""
        precision = self._settings.float32_matmul_precision
        torch.set_float32_matmul_precision(precision)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer, which saves atomically unless the user names another way.

        Raises:
            UsageError: If the Trainer refuses its settings.
        """
        with refusals(ValueError, TypeError, RuntimeError, ImportError):
            trainer = super().instantiate_trainer(**kwargs)
        named = self._settings.trainer.callbacks or []
        named = named if isinstance(named, list) else [named]  # it may be one
        show_steps(trainer, {pkgutil.resolve_name(each.class_path) for each in named})
        # Private of Lightning's Strategy, whose public property cannot tell that none was named.
        if trainer.strategy._checkpoint_io is None:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Refuse a run that would never end.

        Raises:
            UsageError: If it is one, or has no step at all.
        """
        trainer: Any = self.trainer  # its attributes are set where type checkers do not look
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
        epochs = trainer.max_epochs != -1 and isinstance(trainer.limit_train_batches, int)
        if 0 in (trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches):
            raise UsageError(
                f"max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs} and "
                f"limit_train_batches={trainer.limit_train_batches}: one that is 0 trains nothing"
            )
        if not (timed or trainer.max_steps != -1 or epochs or trainer.fast_dev_run):
            raise UsageError(
                "max_steps is not set and the stream of activations is endless: "
                "set trainer.max_steps (or trainer.max_time)"
            )

    # LightningCLI calls these in place of the Trainer's methods

    def fit(self, **kwargs: Any) -> None:
        """Train."""
        self._run("fit", **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the tokens to validate on."""
        self._run("validate", **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Evaluate; the table is a callback's, not Lightning's."""
        self._run("test", **kwargs, verbose=False)

    def predict(self, **kwargs: Any) -> None:
        """Write matches; do not also keep them in memory."""
        self._run("predict", **kwargs | {"return_predictions": False})

    def _run(self, subcommand: str, **kwargs: Any) -> None:
        path: Any = kwargs.get("ckpt_path") and packaged_sae(kwargs["ckpt_path"])
        measured = subcommand != "fit" and path is not None
        if measured and is_foreign(path):
            foreign, self._foreign = self._foreign or load_foreign(path), None
            sae = of_another_library(self.model, self.datamodule, foreign)
            kwargs |= {"model": sae, "ckpt_path": None}
        elif measured and Path(path).is_dir():
            kwargs |= {"model": of_folder(self.model, self.datamodule, path), "ckpt_path": None}
        else:
            self._check_checkpoint(subcommand, path)
        with own_folders(self.trainer, subcommand):
            getattr(self.trainer, subcommand)(**kwargs, weights_only=True)

    def _check_checkpoint(self, subcommand: str, path: str | None) -> None:
        if subcommand == "fit" and path in (None, "last", "hpc"):  # Lightning finds these, or none
            root = self.trainer.default_root_dir
            if path == "hpc" and not get_filesystem(root).glob(f"{root}/hpc_ckpt_*.ckpt"):
                raise UsageError(f"ckpt_path=hpc: there is no hpc_ckpt_*.ckpt in {root}")
            return
        if path is None or not Path(path).is_file():
            needed = NEEDED.get(subcommand, "the checkpoint or folder of a trained SAE")
            raise UsageError(f"ckpt_path={path}: {subcommand} needs {needed}")
        try:
            found = open_checkpoint(path)
        except UsageError:
            found = {"state_dict": {}}
        if not isinstance(self.model, SeveralSAEs):
            require_one(found, f"ckpt_path={path}")
        _require_saes(found, path)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            # It reads files by itself, and loads what it can before anyone may object.
            require_intact(path)
            if format_of(found) < FORMAT:
                raise UsageError(
                    f"ckpt_path={path} has format {format_of(found)}, which a "
                    "ModelParallelStrategy cannot read: load it and save it once with "
                    "AtomicCheckpointIO, on one device"
                )
            self.model.on_load_checkpoint(found)


def _require_saes(found: Mapping[str, Any], path: str) -> None:
    if not ((is_sae(found["state_dict"]) or PARTS in found) and "loops" in found):
        raise UsageError(f"ckpt_path={path} is no checkpoint of an SAE, or is damaged")
