"""Tokens as they read in a text, of three kinds of tokenizers."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_sae.report.token_texts import token_texts
from tests.data import tiny


def wrapped(model, pre_tokenizer, decoder) -> PreTrainedTokenizerFast:
    core = Tokenizer(model)
    core.pre_tokenizer, core.decoder = pre_tokenizer, decoder
    return PreTrainedTokenizerFast(tokenizer_object=core)


def sentencepiece() -> PreTrainedTokenizerFast:
    words = {"?": 0, "▁a": 1, "▁the": 2, "the": 3, ".": 4}
    return wrapped(models.WordLevel(words), pre_tokenizers.Metaspace(), decoders.Metaspace())


def wordpiece() -> PreTrainedTokenizerFast:
    words = {"?": 0, "a": 1, "the": 2, "##the": 3, "##.": 4}
    return wrapped(
        models.WordPiece(words),
        pre_tokenizers.Whitespace(),
        decoders.WordPiece(),
    )


@pytest.mark.parametrize("make", [sentencepiece, wordpiece])
def test_a_token_shows_its_space_and_no_marks(make):
    assert token_texts(make(), [2, 3, 4]) == [" the", "the", "."]


def test_those_of_bytes_are_what_they_decode_to():
    tokenizer = tiny.tokenizer(tiny.END, tiny.END)
    ids = tokenizer(" kato\n")["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == " kato\n"
    assert token_texts(tokenizer, [tokenizer.eos_token_id]) == [tiny.END]


def test_one_that_the_tokenizer_does_not_know_has_its_number():
    assert token_texts(sentencepiece(), [77, 2]) == ["<77>", " the"]
    assert token_texts(sentencepiece(), []) == []
