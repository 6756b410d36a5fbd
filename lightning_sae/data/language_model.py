"""The language model that is read: its configuration, tokenizer and weights, each when needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_sae.data.cache import ActivationCache, model_fingerprint
from lightning_sae.quickstart import FOLDER
from lightning_sae.residual_stream import ResidualStream, check_layer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from lightning_sae.data.stream import Read

__all__ = ["Dtype", "LanguageModel"]

Dtype = Literal["float32", "bfloat16", "float16"]


class LanguageModel:
    """A frozen causal language model, read at one layer.

    Args:
        name: "quickstart", a folder or a hub id.
        layer: Block whose output is read, from 0.
        revision: Branch, tag or commit on the hub. None: the main branch.
        dtype: What the model computes in: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: The dtype is none of these.
    """

    def __init__(self, name: str, layer: int, *, revision: str | None, dtype: Dtype) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"lm_dtype={dtype!r} should be one of {', '.join(get_args(Dtype))}")
        self.name = name
        self.layer = layer
        self.dtype = dtype
        # Not `str(Path(name))`, which would make a hub id of "./name".
        home = Path(name).expanduser() if name.startswith("~") else name
        self._path = str(FOLDER if name == "quickstart" else home)
        self._revision = revision or "main"
        self._stream: ResidualStream | None = None

    def __str__(self) -> str:
        return f"model_name={self.name!r}, layer={self.layer}, lm_dtype={self.dtype!r}"

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration, read without any weights.

        Raises:
            ValueError: There is no such model, or it has no such layer.
        """
        from transformers import AutoConfig

        with self._one_line_errors():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self._path, revision=self._revision
            )
        check_layer(config, self.layer)
        return config

    def tokenizer(self, context_length: int) -> PreTrainedTokenizerBase:
        """Loads the tokenizer.

        Raises:
            ValueError: There is none, or the model cannot read contexts of this length.
        """
        from transformers import AutoTokenizer

        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and context_length > longest:
            raise ValueError(
                f"context_length={context_length}: model_name={self.name!r} reads up to {longest}"
            )
        with self._one_line_errors():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self._path, revision=self._revision
            )
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # all it can do without files
            raise ValueError(f"model_name={self.name!r}: there is no tokenizer")
        return tokenizer

    def residual_stream(self, device: torch.device) -> ResidualStream:
        """Returns the layer on this device; the first call loads the weights.

        Raises:
            ValueError: There are no weights in safetensors files.
        """
        # Weights made or moved in inference mode, which `Trainer.test` runs in, could not be
        # differentiated through in a later `fit`.
        with torch.inference_mode(mode=False):
            if self._stream is None:
                self._stream = ResidualStream(self._load(), self.layer)
            if self._stream.device != device:
                model: nn.Module = self._stream.model
                model.to(device)
        return self._stream

    def reader(self, device: torch.device, cache_dir: str | None) -> Read:
        """Returns what reads activations on this device, through a cache if there is a folder."""

        def read(input_ids: Tensor) -> Tensor:
            vocabulary = self.config.get_text_config().vocab_size
            if int(input_ids.max()) >= vocabulary:
                raise ValueError(
                    f"model_name={self.name!r}: the tokenizer gives the token "
                    f"{int(input_ids.max())}, the model knows {vocabulary}"
                )
            return self.residual_stream(device).read(input_ids.to(device))

        if cache_dir is None:
            return read
        weights = model_fingerprint(self._path, self.config, self._revision)
        folder = f"{Path(self.name).name}-layer-{self.layer}-{self.dtype}-{weights}"
        return ActivationCache(read, Path(cache_dir).expanduser() / folder, device)

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        with self._one_line_errors():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                self._path,
                revision=self._revision,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
            )
        return model.eval().requires_grad_(requires_grad=False)

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            if self._path.startswith((".", "/")) and not Path(self._path).is_dir():
                reason = "there is no such folder"
            raise ValueError(f"model_name={self.name!r}: {reason}") from error
