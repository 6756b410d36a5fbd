"""Which tokens are changed in runs of every kind; of generations, by loops without a cache."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lightning_sae import ResidualStream
from lightning_sae.interventions import splice, steer
from lightning_sae.interventions.positions import special_tokens
from tests.helpers.architectures import ARCHITECTURES
from tests.interventions.tiny import FAMILIES, LAYER, ids_of, kept_of, model_of, sae_of
from tests.test_model_families import gemma3, qwen2_vl, tiny_model

MASKS = {
    "none": [[1] * 7] * 2,
    "left": [[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1] * 7],
}
LENGTH = 7


@pytest.fixture(params=FAMILIES)
def stream(request):
    return ResidualStream(model_of(request.param), LAYER)


def spliced(sae, kept):
    def edit(x):
        new = x.clone()
        new[kept] = sae(x[kept])
        return new

    return edit


def greedy(stream, sae, ids, mask, tokens, kept_of=kept_of):
    """Greedy decoding without a cache, in which each run is edited by hand."""
    logits = []
    for _ in range(tokens):
        run = stream.replace(ids, spliced(sae, kept_of(ids, mask)), mask)
        logits.append(run[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids, torch.stack(logits, dim=1)


def generated(stream, ids, mask=None, tokens=6, **options):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    found = stream.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return found.sequences, torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("padding", MASKS)
def test_a_forward_pass(stream, padding):
    ids, mask = ids_of(), torch.tensor(MASKS[padding])
    ids[0, 3] = 0  # a special token
    sae, kept = sae_of(stream), kept_of(ids, mask)
    if padding != "left":  # whose learned positions transformers counts from the first column
        expected = stream.replace(ids, spliced(sae, kept), mask)
        with splice(stream, sae), torch.no_grad():
            found = stream.model(ids, attention_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    x, padded = stream.read(ids, mask), mask == 0
    with splice(stream, sae):
        read = stream.read(ids, mask)
    assert torch.equal(read[~kept], x[~kept])
    assert padded.any() == (padding != "none")
    torch.testing.assert_close(read[kept], sae(x[kept]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cached", [True, False])
def test_generation_is_what_a_loop_without_a_cache_gives(stream, padding, cached):
    ids, mask = ids_of(), torch.tensor(MASKS[padding])
    sae = sae_of(stream)
    clean, _ = generated(stream, ids, mask)
    with splice(stream, sae):
        found, logits = generated(stream, ids, mask, use_cache=cached)
    expected, theirs = greedy(stream, sae, ids, mask, 6)
    assert torch.equal(found, expected)
    assert not torch.equal(found, clean)
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", ["mlp_out", "z", "by its path"])
def test_a_site_within_a_block_is_changed_on_the_same_tokens(stream, site):
    """Its block is given a cache that has the new tokens by then."""
    if site == "by its path":
        stream = ResidualStream(stream.model, f"{stream.path}.mlp")
    else:
        stream = ResidualStream(stream.model, LAYER, site)
    ids, sae = ids_of(), sae_of(stream)
    where = (torch.arange(20) % 3 == 1).expand(2, 20)
    with splice(stream, sae, where=where):
        found, logits = generated(stream, ids)
    mask = torch.ones_like(ids)
    expected, theirs = greedy(stream, sae, ids, mask, 6, lambda ids, _: where[:, : ids.shape[1]])
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)


def test_named_tokens_are_those_of_the_whole_text(stream):
    ids, mask = ids_of(), torch.tensor(MASKS["left"])
    sae = sae_of(stream)
    where = torch.zeros(2, 11, dtype=torch.bool)
    where[0, [0, 4, 8]] = where[1, [3, 9, 10]] = True
    expected, theirs = greedy(
        stream,
        sae,
        ids,
        mask,
        6,
        lambda ids, _: nn.functional.pad(where, (0, 9))[:, : ids.shape[1]],
    )
    with splice(stream, sae, where=where):
        found, logits = generated(stream, ids, mask)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)


def test_only_what_is_generated(stream):
    ids = ids_of()
    sae = sae_of(stream)
    where = torch.arange(20)[None] >= LENGTH
    _, clean = generated(stream, ids)
    with splice(stream, sae, where=where):
        _, logits = generated(stream, ids)
    assert torch.equal(logits[:, 0], clean[:, 0])
    assert not torch.equal(logits[:, 1], clean[:, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=["static cache", "prompt in chunks", "two answers"],
)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_ways_to_generate(stream, options, padding):
    ids, mask = ids_of(), torch.tensor(MASKS[padding])
    sae = sae_of(stream)
    answers = options.get("num_return_sequences", 1)
    for where in (None, torch.tensor([[False] * 4 + [True] * 5, [True] * 3 + [False] * 6])):
        named = None if where is None else nn.functional.pad(where, (0, 9))

        def kept(ids, mask, named=named):
            return kept_of(ids, mask) if named is None else named[:, : ids.shape[1]]

        expected, theirs = greedy(stream, sae, ids, mask, 6, kept)
        with splice(stream, sae, where=where):
            found, logits = generated(stream, ids, mask, **options)
        assert torch.equal(found, expected.repeat_interleave(answers, 0))
        torch.testing.assert_close(
            logits, theirs.repeat_interleave(answers, 0), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("padding", ["none", "left"])
def test_beams(stream, padding):
    """Without a cache whole texts are run again, so what is edited does not hang on beams."""
    ids, mask = ids_of(), torch.tensor(MASKS[padding])
    sae = sae_of(stream)
    where = torch.tensor([[False] * 4 + [True] * 5, [True] * 3 + [False] * 6])
    for settings in ({}, {"where": where}):
        with splice(stream, sae, **settings):
            both = [
                generated(stream, ids, mask, num_beams=3, use_cache=cached)[0]
                for cached in (True, False)
            ]
        assert torch.equal(*both)


@pytest.mark.parametrize("model_type", ["falcon_mamba", "bloom", "recurrent_gemma", "opt"])
def test_caches_of_other_families(model_type):
    stream = ResidualStream(tiny_model(model_type), LAYER)
    ids, mask = ids_of(), torch.ones(2, LENGTH, dtype=torch.int64)
    torch.manual_seed(0)
    sae = ARCHITECTURES["topk"].func(stream.d_model, 64, 4)
    sae.loss(stream.read(ids_of(8, 12, seed=3))[:, 1:])
    special = special_tokens(stream, sae)
    assert special == {0, 1, 2}

    def kept(ids, _mask):
        found = ids > 2
        found[:, 0] = False
        return found

    expected, theirs = greedy(stream, sae, ids, mask, 5, kept)
    with splice(stream, sae):
        found, logits = generated(stream, ids, mask, tokens=5)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [qwen2_vl, gemma3])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_models_that_see_images_too(make, padding):
    stream = ResidualStream(make(), LAYER)
    ids, mask = ids_of() + 3, torch.tensor(MASKS[padding])
    torch.manual_seed(0)
    sae = ARCHITECTURES["topk"].func(stream.d_model, 64, 4)
    sae.loss(stream.read(ids)[:, 1:])
    clean = stream.read(ids, mask)
    with splice(stream, sae):
        found = stream.read(ids, mask)
        both = [generated(stream, ids, mask, tokens=4, use_cache=each) for each in (True, False)]
    assert torch.equal((found != clean).any(2), kept_of(ids, mask))
    assert torch.equal(both[0][0], both[1][0])
    torch.testing.assert_close(both[0][1], both[1][1], rtol=1e-3, atol=1e-4)


def test_a_cache_that_does_not_count():
    stream = ResidualStream(tiny_model("falcon_mamba"), LAYER)
    ids = ids_of()
    sae = ARCHITECTURES["topk"].func(stream.d_model, 64, 4)
    where = torch.ones(1, 9, dtype=torch.bool)
    message = r"^where: the model's cache does not say how many tokens came before; run it with"
    with (
        pytest.raises(ValueError, match=message),
        steer(stream, sae, {0: 1.0}, where=where),
    ):
        generated(stream, ids)
    with steer(stream, sae, {0: 1.0}, where=where):
        generated(stream, ids, use_cache=False)


def test_a_loop_of_ones_own_with_a_cache(stream):
    ids, mask = ids_of(), torch.ones(2, LENGTH, dtype=torch.int64)
    sae = sae_of(stream)
    _, theirs = greedy(stream, sae, ids, mask, 3)
    found = []
    with splice(stream, sae), torch.no_grad():
        run = stream.model(ids, use_cache=True)
        for _ in range(3):
            found.append(run.logits[:, -1])
            new = found[-1].argmax(1, keepdim=True)
            run = stream.model(new, past_key_values=run.past_key_values)
    torch.testing.assert_close(torch.stack(found, 1), theirs, rtol=1e-4, atol=1e-4)


def test_texts_side_by_side_in_a_row():
    """Where positions begin again, so does a text; its first token is let alone."""
    stream = ResidualStream(model_of("llama"), LAYER)
    ids = ids_of(1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    sae = sae_of(stream)
    with splice(stream, sae), torch.no_grad():
        found = stream.model(ids, position_ids=positions, output_hidden_states=True)
    clean = stream.model(ids, position_ids=positions, output_hidden_states=True)
    same = [
        torch.equal(a, b)
        for a, b in zip(found.hidden_states[2][0], clean.hidden_states[2][0], strict=True)
    ]
    assert same == [True, False, False, True, False, False, False]


def test_a_wrapper_that_goes_around_the_models_call(stream):
    """As those that add adapters do: `forward` is called, and hooks of the whole model are not."""
    ids, mask = ids_of(), torch.tensor(MASKS["right"])
    ids[0, 2] = 0
    sae = sae_of(stream)
    with splice(stream, sae), torch.no_grad():
        expected = stream.model(ids, attention_mask=mask).logits
        found = stream.model.forward(ids, attention_mask=mask).logits
    assert torch.equal(found, expected)


def test_embeddings_in_place_of_ids(stream):
    ids, mask = ids_of(), torch.tensor(MASKS["right"])
    sae = sae_of(stream)
    embedded = stream.model.get_input_embeddings()(ids)
    with splice(stream, sae), torch.no_grad():
        expected = stream.model(ids, attention_mask=mask).logits
        found = stream.model(inputs_embeds=embedded, attention_mask=mask).logits
    assert torch.equal(found, expected)


def test_a_decoder_of_an_encoder():
    config = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**config, num_heads=2)).eval()
    stream = ResidualStream(model, "decoder.block.0")
    ids, decoder_ids = ids_of(2, 7), ids_of(2, 4, seed=3)
    decoder_ids[1, 2] = 1  # its end of text
    sae = ARCHITECTURES["topk"]()
    with torch.no_grad():
        clean = model(ids, decoder_input_ids=decoder_ids, output_hidden_states=True)
        x = clean.decoder_hidden_states[1]
        sae.loss(x)
        with splice(stream, sae):
            run = model(
                ids,
                attention_mask=torch.ones_like(ids),
                decoder_input_ids=decoder_ids,
                output_hidden_states=True,
            )
    same = (run.decoder_hidden_states[1] == x).all(2)
    assert same.tolist() == [[True, False, False, False], [True, False, True, False]]


def test_the_record_says_which_tokens_are_special(stream):
    sae = sae_of(stream)
    assert special_tokens(stream, sae) == {0}
    stream.model.generation_config.eos_token_id = [0, 9]
    assert special_tokens(stream, sae) == {0, 9}
    sae.record = {"trained_on": {"special_tokens": [4, 5]}}
    assert special_tokens(stream, sae) == {4, 5}
    for nothing in ({"trained_on": None}, {"trained_on": {"special_tokens": "all"}}, {}):
        sae.record = nothing  # anyone may have written it
        assert special_tokens(stream, sae) == {0, 9}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (torch.ones(3, 7, dtype=torch.bool), "^where is of 3 contexts, the run is of 2$"),
        (torch.ones(2, 7), r"^where of shape \(2, 7\) and torch.float32: it must be a bool mask"),
    ],
)
def test_masks_that_do_not_fit(stream, where, message):
    sae = sae_of(stream)
    with pytest.raises(ValueError, match=message), steer(stream, sae, {0: 1.0}, where=where):
        stream.model(ids_of())
