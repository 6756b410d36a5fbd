"""What `lightning_sae --help` says, and `lightning_sae fit --help` first of all."""

import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from lightning_sae.cli.configurations import packaged_configs

__all__ = ["SENTENCES", "opening", "overview"]

SENTENCES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "fit": "Train an SAE.",
        "validate": "Measure a trained SAE on the tokens that training validates on.",
        "test": "Measure a trained SAE on further tokens, and print a table.",
        "predict": "Write which features fire on which tokens, and how strongly.",
        "report": "Show what the features of a trained SAE fire on, as a page for a browser.",
        "export": "Write a trained SAE for another library, load it there, and compare.",
        "import": "Read an SAE of another library, and save it as `lightning_sae.load` finds it.",
        "cache": "Keep what `fit` and `test` would read in --data.cache_dir, and train nothing.",
    }
)
"""What each command does. So the docstrings of the last four begin, which take long to import."""
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
_OPENING: Final = """\
{sentence}

{examples}

Print every setting, or what a class takes:

  lightning_sae {command} --config topk.yaml --print_config
  lightning_sae {command} --model.help TopKSAE
"""
_TRAINING: Final = """\
  lightning_sae fit --config topk.yaml --model.k 32 --trainer.max_steps 10000
  lightning_sae fit --config topk.yaml --data.model_name gpt2 --data.layer 6

Go on with a run:

  lightning_sae fit --config topk.yaml --ckpt_path last.ckpt"""
_MEASURING: Final = """\
  lightning_sae {command} --config topk.yaml --ckpt_path last.ckpt"""


def opening(command: str) -> dict[str, str]:
    """Return how the help of a command begins that takes configurations.

    Returns:
        `usage` and `description`, as parsers of arguments call them.
    """
    examples = _TRAINING if command == "fit" else _MEASURING.format(command=command)
    what = _OPENING.format(command=command, sentence=SENTENCES[command], examples=examples)
    usage = f"lightning_sae {command} [--config FILE ...] [--KEY VALUE ...]"
    return {"usage": usage, "description": what}


def overview() -> str:
    """Return the text, with what needs no import of torch."""
    listed = "\n".join(f"  {name:9} {what}" for name, what in SENTENCES.items())
    by_folder: dict[str, list[str]] = {}
    for each in sorted(set(packaged_configs())):
        by_folder.setdefault(each.rpartition("/")[0], []).append(each)
    wrapped = (textwrap.wrap(" ".join(names), 98) for _, names in sorted(by_folder.items()))
    named = "\n".join(f"  {line}" for lines in wrapped for line in lines)
    return _TEXT.format(commands=listed, configurations=named)
