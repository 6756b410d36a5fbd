"""The parser of the command line: configurations by name, and mistakes in one line."""

import inspect
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, Union, cast
from weakref import WeakSet

from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_sae.checks import UsageError
from lightning_sae.cli.configurations import find_config, packaged_configs
from lightning_sae.cli.errors import one_line, refusals
from lightning_sae.cli.nearest import (
    meant_file,
    with_nearest_class,
    with_nearest_key,
    with_nearest_value,
)

__all__ = ["ConfigFile", "Parser", "run_function"]

T = TypeVar("T")


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of a description, which may be examples."""


class Parser(LightningArgumentParser):
    """A parser that reports a mistake in one line, without a screenful of usage."""

    reading = ""
    """The configuration that is being read, and so has the mistake."""
    made: ClassVar[WeakSet["Parser"]] = WeakSet()
    """All that there are: an argument that no subcommand knows is told of by their parent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter} | kwargs)
        self.made.add(self)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what of the message is about the user's input, and exit with 2.

        Raises:
            ArgumentError: In the parser of a class inside another: that has more to say.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        told = with_nearest_value(with_nearest_class(one_line(self.reading + message)))
        self.exit(2, f"{with_nearest_key(told, list(self.made))}\n")

    def add_lightning_class_args(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add what a class takes, and let an integer be one where a float may stand too.

        `Optional[Union[int, float]]`, as the Trainer has it of numbers or shares of batches, is for
        Python the same as with float first, and may come from its cache as that, whatever library
        was the first to write one: 1 batch would be 1.0, all of them. Types of arguments are
        private of argparse and jsonargparse, and are settled here when they are there.

        Returns:
            The names of its arguments.
        """
        names = super().add_lightning_class_args(*args, **kwargs)
        for action in cast(list[Any], self._actions):
            if getattr(action, "_typehint", None) == int | float | None:
                action._typehint = Union[int, float, None]  # noqa: UP007 - keeps the order
        return names

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what does not fit, and say which key a wrong one may be meant for.

        Raises:
            KeyError: If there is no such key.
            TypeError: If a value is not valid.
        """
        try:
            super().validate(*args, **kwargs)
        except KeyError as error:
            parser = getattr(error, "subcommand_parser", self)
            error.args = (with_nearest_key(str(error), [parser]),)
            raise

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Namespace:
        """Return the configuration with an object in place of each class that it names.

        Raises:
            UsageError: If a constructor refuses its arguments. Anything else that one raises is as
                it was, and not in the wrappings of jsonargparse.
        """
        failures: list[Exception] = []

        def construct(class_type: type[T], *args: Any, **kwargs: Any) -> T:
            try:
                return class_type(*args, **kwargs)
            except Exception as error:
                failures.append(error)
                raise

        self.add_instantiator(construct, object)
        with refusals(ValueError, ImportError):  # the latter if what an option needs is not there
            try:
                return cast(Namespace, super().instantiate_classes(*args, **kwargs))
            except UsageError:
                raise
            except Exception as error:
                failures.insert(0, error)
            raise failures[-1]


def run_function(function: Callable[..., None], name: str, args: list[str]) -> None:
    """Call a function with arguments of a command line, which its docstring explains.

    Args:
        function: What to call.
        name: What the command line calls it.
        args: The command line after that.
    """
    what, _, _ = (inspect.getdoc(function) or "").partition("\n\n")
    parser = Parser(prog=f"lightning_sae {name}", description=what)
    parser.add_function_arguments(function, as_group=False)
    function(**parser.parse_args(args).as_dict())


class ConfigFile(ActionConfigFile):
    """`--config NAME`: a local file of that name, else the one that ships with the package."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Parse the file and add its keys to `cfg`."""
        parser.reading = f"config={values}\n"
        path = find_config(values)
        near = "" if Path(path).is_file() else meant_file(values, packaged_configs())
        if near:
            parser.error(f"there is no such file{near}")
        try:
            self.apply_config(parser, cfg, self.dest, path)
        except UnicodeDecodeError as error:
            parser.error(str(error), error)
        parser.reading = ""
