"""The language model that is read, and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_sae.checks import UsageError
from lightning_sae.data.frozen_model import FrozenModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LanguageModel"]


class LanguageModel(FrozenModel):
    """A frozen language model, read at one layer; arguments are those of `FrozenModel`.

    Any causal one, alone or in a model that sees images too, and encoders such as BERT: these have
    no loss of the next token, so what concerns it is not measured. Its inputs are token ids,
    (contexts, length).
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

    def positions(self, inputs: Tensor) -> int:
        """Return the length of contexts, (contexts, length)."""
        return inputs.shape[1]

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
        """Return the model with its weights: one that predicts tokens, or else what there is.

        Raises:
            UsageError: If there are none in safetensors files, or not all.
        """
        import transformers

        causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        named = (self.config.architectures or [""])[0]
        own: Any = getattr(transformers, named, None)
        if not (isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)):
            own = transformers.AutoModel  # a configuration may say anything
        model, missing = self._with_weights(causal or own)
        if missing and causal is not None and named != causal.__name__:  # the file has no such head
            model, missing = self._with_weights(transformers.AutoModel)
        if missing:  # which transformers would make up
            raise UsageError(f"model_name={self.name!r}: its files lack the weights {missing[0]}")
        return model

    def _with_weights(self, model_class: Any) -> tuple[Any, list[str]]:
        """Return the model, and what its files lack."""
        model, found = self._from_pretrained(
            model_class,
            dtype=getattr(torch, self.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        for name in sorted(found["unexpected_keys"]):
            parts = name.split(".")
            for place, part in enumerate(parts):
                blocks = lists.get(".".join(parts[:place]))
                if blocks is not None and part.isdecimal() and int(part) >= blocks:
                    raise UsageError(
                        f"model_name={self.name!r}: its files have the weights {name}, but its "
                        f"config.json says that there are {blocks} of these blocks"
                    )
        # A pooler comes after the blocks, and is not read.
        return model, sorted(name for name in found["missing_keys"] if "pooler" not in name)
