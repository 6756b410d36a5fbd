"""The command `lightning_sae`: LightningCLI and the few things it needs for SAEs."""

import contextlib
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy

import lightning_sae
from lightning_sae import SparseAutoencoder
from lightning_sae.callbacks import FiniteWeights, StopOnSignal
from lightning_sae.checkpoint_io import AtomicCheckpointIO, check_checkpoint
from lightning_sae.checks import UsageError
from lightning_sae.cli.errors import one_line, one_line_errors
from lightning_sae.cli.signals import exit_on_signals
from lightning_sae.data import FrozenModelDataModule

PACKAGE = Path(lightning_sae.__file__).parent
SEEDS = 2**32 - 1
LEAST = {
    0: ("gradient_clip_val", "log_every_n_steps", "min_steps"),
    1: ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"),
}
"""Values of the Trainer's settings below which it fails late, or not at all."""


def main(args: ArgsType = None) -> None:
    """Run `lightning_sae fit|validate|test|predict`.

    Args:
        args: Command line, without the program's name. Default: that of the process.
    """
    _silence_noise()
    with exit_on_signals(), one_line_errors():
        SparseAutoencoderCLI(
            SparseAutoencoder,
            FrozenModelDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [FiniteWeights(), StopOnSignal()]},
            parser_kwargs={
                "prog": "lightning_sae",
                "description": "Train and evaluate sparse autoencoders on transformer activations.",
                "version": lightning_sae.__version__,
            },
            args=args,
        )


class Parser(LightningArgumentParser):
    """A parser that reports a mistake in one line, without a screenful of usage."""

    reading = ""
    """The configuration that is being read, and so has the mistake."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what of the message is about the user's input, and exit with 2."""
        self.exit(2, f"{one_line(self.reading + message)}\n")


class ConfigFile(ActionConfigFile):
    """`--config NAME`: a local file of that name, else the one that ships with the package."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Parse the file and add its keys to `cfg`."""
        parser.reading = f"config={values}\n"
        try:
            self.apply_config(parser, cfg, self.dest, find_config(values))
        except UnicodeDecodeError as error:
            parser.error(str(error), error)
        parser.reading = ""


def find_config(name: str) -> str:
    """Return the path of a configuration: as given if it exists, else where it is packaged.

    In a wheel the configurations lie inside the package, in a checkout beside it.
    """
    packaged = (folder / "configs" / name for folder in (PACKAGE, PACKAGE.parent))
    return next((str(path) for path in (Path(name), *packaged) if path.is_file()), name)


class SparseAutoencoderCLI(LightningCLI):
    """LightningCLI that links the SAE's width to the data and refuses runs that cannot work."""

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
        parser.link_arguments("data.d_model", "model.init_args.d_model", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and the arguments of the Trainer's methods that they hide."""
        commands = LightningCLI.subcommands()
        return {name: hidden | {"verbose", "weights_only"} for name, hidden in commands.items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse what would be ignored or found out too late."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
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

    def before_instantiate_classes(self) -> None:
        """Set what nothing that is instantiated sets."""
        torch.set_float32_matmul_precision(self._get(self.config, "float32_matmul_precision"))

    def _parse_ckpt_path(self) -> None:
        """Keep to the configuration: a checkpoint's hyperparameters must not override it."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer, which saves atomically unless the user names another way."""
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.strategy._checkpoint_io is None:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Refuse a run that would never end."""
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

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; what fails before the first step, or does not train, leaves no files behind."""
        self._check_checkpoint(subcommand)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if missing and (subcommand != "fit" or self.trainer.global_step == 0):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # another run may use a parent by now
                    for parent in missing[1:]:
                        parent.rmdir()
            raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Return the arguments of the Trainer's method; no checkpoint may run code."""
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}

    def test(self, **kwargs: Any) -> None:
        """Evaluate; the table is a callback's, not Lightning's."""
        self.trainer.test(verbose=False, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Write matches; do not also keep them in memory."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def _check_checkpoint(self, subcommand: str) -> None:
        path = self._get(self.config, "ckpt_path")
        if subcommand == "fit" and path in (None, "last", "hpc"):  # Lightning finds these, or none
            return
        if path is None or not Path(path).is_file():
            raise UsageError(f"ckpt_path={path}: {subcommand} needs the file of a trained SAE")
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            # It reads files by itself, and loads what it can before anyone may object.
            self.model.on_load_checkpoint(check_checkpoint(path))


def _silence_noise() -> None:
    """Turn off messages of Lightning 2.6 that are no news to the user."""
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    warnings.filterwarnings("ignore", "The dirpath has changed")  # `test` logs to a new folder
    # What is logged at the end of a validation comes from metrics that all ranks have synchronised.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    advertisements = ("litlogger", "litmodels")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(name in record.getMessage() for name in advertisements)
    )
