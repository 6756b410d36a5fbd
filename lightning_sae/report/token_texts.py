"""Tokens as a person reads them in a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["token_texts"]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return each token as it reads after another one: with its space, if it begins with one.

    Alone, tokenizers of the kind of SentencePiece would leave out that space, and those of the
    kind of WordPiece show marks.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        ids: Token ids. Those that the tokenizer does not know, as where a model has more, are
            shown by their number.
    """
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    known = [each for each in ids if each < len(tokenizer)]
    options = {"clean_up_tokenization_spaces": False}
    alone, *decoded = tokenizer.batch_decode([before, *([*before, i] for i in known)], **options)
    texts = {i: text.removeprefix(alone) for i, text in zip(known, decoded, strict=True)}
    return [texts.get(each, f"<{each}>") for each in ids]
