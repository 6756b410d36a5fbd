"""What `lightning_sae --help` says: which commands there are, and where to begin."""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Final

__all__ = ["OF_THE_TRAINER", "overview"]

OF_THE_TRAINER: Final = {
    "fit": "Train an SAE.",
    "validate": "Measure a trained SAE on the tokens that training validates on.",
    "test": "Measure a trained SAE on further tokens, and print a table.",
    "predict": "Write which features fire on which tokens, and how strongly.",
}
_TEXT: Final = """\
usage: lightning_sae COMMAND [--config FILE ...] [--KEY VALUE ...]
       lightning_sae COMMAND --help

Trains sparse autoencoders on the activations of transformers, and measures them.

  lightning_sae fit --config mutual_choice.yaml
  tensorboard --logdir runs

trains one on the language model that ships with the package, offline and within minutes, and shows
its curves. Configurations say everything; keys after them change what they say, and later ones win:

  lightning_sae fit --config topk.yaml --config models/gpt2_small.yaml --model.k 64

commands:
{commands}

configurations that ship with the package:
{configurations}
"""


def overview(further: Mapping[str, Callable[..., None]], configurations: Iterable[str]) -> str:
    """Return the text.

    Args:
        further: Commands beside those of the Trainer, whose docstrings say in a line what they do.
        configurations: Names of those that ship.
    """
    commands = OF_THE_TRAINER | {
        name: (inspect.getdoc(function) or "").splitlines()[0] for name, function in further.items()
    }
    listed = "\n".join(f"  {name:9} {what}" for name, what in commands.items())
    by_folder: dict[str, list[str]] = {}
    for each in sorted(set(configurations)):
        by_folder.setdefault(each.rpartition("/")[0], []).append(each)
    wrapped = (textwrap.wrap(" ".join(names), 98) for _, names in sorted(by_folder.items()))
    named = "\n".join(f"  {line}" for lines in wrapped for line in lines)
    return _TEXT.format(commands=listed, configurations=named)
