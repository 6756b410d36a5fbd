"""The language model that is read, and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.frozen_model import FrozenModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LanguageModel"]


class LanguageModel(FrozenModel):
    """A frozen causal language model, read at one layer; arguments are those of `FrozenModel`.

    Its inputs are token ids, (contexts, length).
    """

    def tokenizer(self, context_length: int) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            UsageError: If there is none, or the model cannot read contexts of this length.
        """
        from transformers import AutoTokenizer

        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and context_length > longest:
            raise UsageError(
                f"context_length={context_length}: model_name={self.name!r} reads up to {longest}"
            )
        tokenizer: PreTrainedTokenizerBase = self._from_pretrained(AutoTokenizer)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # all it can do without files
            raise UsageError(f"model_name={self.name!r}: there is no tokenizer")
        return tokenizer

    def read(self, inputs: Tensor, device: torch.device) -> Tensor:
        """Return the activations of token ids, (contexts, length, d_model), on this device.

        Raises:
            UsageError: If the model does not know one of the tokens.
        """
        vocabulary = self.config.get_text_config().vocab_size
        if int(inputs.max()) >= vocabulary:
            raise UsageError(
                f"model_name={self.name!r}: the tokenizer gives the token "
                f"{int(inputs.max())}, the model knows {vocabulary}"
            )
        return self.residual_stream(device).read(inputs.to(device))

    def load(self) -> Any:
        """Return the model with its weights.

        Raises:
            UsageError: If there are none in safetensors files, or not all.
        """
        from transformers import AutoModelForCausalLM

        model, found = self._from_pretrained(
            AutoModelForCausalLM,
            dtype=getattr(torch, self.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        if found["missing_keys"]:  # which transformers would make up
            missing = min(found["missing_keys"])
            raise UsageError(f"model_name={self.name!r}: its files lack the weights {missing}")
        return model
