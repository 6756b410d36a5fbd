"""The command `lightning_sae`: LightningCLI and the few things it needs for SAEs."""

import contextlib
import logging
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_sae
from lightning_sae import ActivationDataModule, SparseAutoencoder

PACKAGE = Path(lightning_sae.__file__).parent
UNTOLD = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value",
)
"""How lines of jsonargparse's messages begin that tell about its own workings."""


def main(args: ArgsType = None) -> None:
    """Run `lightning_sae fit|validate|test|predict`.

    Args:
        args: Command line, without the program's name. Default: that of the process.
    """
    _silence_noise()
    try:
        SparseAutoencoderCLI(
            SparseAutoencoder,
            ActivationDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "lightning_sae",
                "description": "Train and evaluate sparse autoencoders on transformer activations.",
                "version": lightning_sae.__version__,
            },
            args=args,
        )
    except Exception as error:
        told = _about_the_input(error)
        if told is None:
            raise
        sys.exit(f"lightning_sae: error: {' '.join(str(told).split())}")


class Parser(LightningArgumentParser):
    """A parser that reports a mistake in one line, without a screenful of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what of the message is about the user's input, and exit with 2."""
        lines = (line.strip(" -") for line in message.splitlines())
        told = ": ".join(line.rstrip(":") for line in lines if not line.startswith(UNTOLD))
        self.exit(2, f"lightning_sae: error: {told}\n")


class ConfigFile(ActionConfigFile):
    """`--config NAME`: a local file of that name, else the one that ships with the package."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Parse the file and add its keys to `cfg`."""
        self.apply_config(parser, cfg, self.dest, find_config(values))


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
        """Let the language model decide the width of the SAE."""
        parser.link_arguments("data.d_model", "model.init_args.d_model", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and the arguments of the Trainer's methods that they hide."""
        commands = LightningCLI.subcommands()
        return {name: hidden | {"verbose", "weights_only"} for name, hidden in commands.items()}

    def _parse_ckpt_path(self) -> None:
        """Keep to the configuration: a checkpoint's hyperparameters must not override it."""

    def before_fit(self) -> None:
        """Refuse a run that would never end."""
        trainer: Any = self.trainer  # its attributes are set where type checkers do not look
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
        epochs = trainer.max_epochs != -1 and isinstance(trainer.limit_train_batches, int)
        if 0 in (trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches):
            raise ValueError(
                f"max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs} and "
                f"limit_train_batches={trainer.limit_train_batches}: one that is 0 trains nothing"
            )
        if not (timed or trainer.max_steps != -1 or epochs or trainer.fast_dev_run):
            raise ValueError(
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
            raise ValueError(f"ckpt_path={path}: {subcommand} needs the file of a trained SAE")
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            complete = {"W_dec"} <= found["state_dict"].keys() and "loops" in found
        except (RuntimeError, UnpicklingError, KeyError, AttributeError, EOFError):
            complete = False
        if not complete:
            raise ValueError(f"ckpt_path={path} is no checkpoint of an SAE, or is damaged")


def _about_the_input(error: BaseException) -> BaseException | None:
    """Return the error, or the one behind it, if it was raised to tell the user of their input.

    Such are those that this package raises, those that Lightning raises about settings, and files
    that are not there. Anything else is a bug, and its traceback is wanted.
    """
    link: BaseException | None = error
    while link is not None:
        last = traceback.extract_tb(link.__traceback__)[-1]
        ours = Path(last.filename).is_relative_to(PACKAGE)
        if ours and (last.line or "").startswith("raise "):
            return link
        link = link.__cause__  # jsonargparse wraps what a constructor raises
    told = (MisconfigurationException, FileNotFoundError)
    return error if isinstance(error, told) else None


def _silence_noise() -> None:
    """Turn off messages of Lightning 2.6 that are no news to the user."""
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
    warnings.filterwarnings("ignore", "The dirpath has changed")  # `test` logs to a new folder
    advertisements = ("litlogger", "litmodels")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(name in record.getMessage() for name in advertisements)
    )
