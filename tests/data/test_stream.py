import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sae.checks import UsageError
from lightning_sae.data import ActivationStream, HeldOutBatches
from lightning_sae.parallel import Ranks
from tests.helpers.ddp import WORLD_SIZE, run_on_two

LENGTH = 5
CONTEXTS = 7
BATCH = 6
MODEL_BATCH = 2  # four model batches a block, the last one short; three do not share equally
BLOCK_TOKENS = torch.arange(CONTEXTS * LENGTH).view(CONTEXTS, LENGTH)


def blocks(first):
    """Token ids that no two places share."""
    for block in itertools.count(first):
        yield BLOCK_TOKENS + block * CONTEXTS * LENGTH


def kept(input_ids):
    mask = input_ids % 11 != 3
    mask[:, 0] = False
    return mask


def read(input_ids):
    """The token's id and the number of contexts that were read with it."""
    return torch.stack([input_ids, torch.full_like(input_ids, len(input_ids))], -1).half()


def stream(start=(0, 0), seed=0, **changed):
    arguments = {
        "blocks": blocks,
        "kept": kept,
        "read": read,
        "batch_size": BATCH,
        "model_batch_size": MODEL_BATCH,
        "seed": seed,
        "source": "model_name='tiny'",
        "start": lambda: start,
    }
    return ActivationStream(**{**arguments, **changed})


def take(count, **changed):
    return list(itertools.islice(stream(**changed), count))


def same(left, right):
    return len(left) == len(right) and all(
        a["cursor"] == b["cursor"] and torch.equal(a["activations"], b["activations"])
        for a, b in zip(left, right, strict=True)
    )


def test_batches_hold_the_blocks_kept_tokens_once_each():
    batches = take(12)
    for block in range(3):
        ids = next(blocks(block))
        expected = set(ids[kept(ids)].tolist())
        count = len(expected) // BATCH
        mine, batches = batches[:count], batches[count:]
        tokens = [int(x) for batch in mine for x in batch["activations"][:, 0]]
        assert len(set(tokens)) == len(tokens) == count * BATCH  # less than a batch is dropped
        assert set(tokens) <= expected
        assert tokens != sorted(tokens)
        assert [batch["cursor"] for batch in mine] == [
            *((block, i) for i in range(1, count)),
            (block + 1, 0),
        ]


def test_batches_are_float32_and_the_model_reads_a_few_contexts_at_once():
    batch = take(1)[0]
    assert batch["activations"].dtype == torch.float32
    assert batch["activations"].shape == (BATCH, 2)
    sizes = {int(x) for batch in take(4) for x in batch["activations"][:, 1]}
    assert sizes == {2, 1}


def test_the_seed_decides():
    assert same(take(9), take(9))
    assert same(take(9), take(9, ahead=False))
    assert not same(take(9), take(9, seed=1))


def test_each_block_has_its_own_order():
    places = [
        (batch["activations"][:, 0].int() % (CONTEXTS * LENGTH)).tolist()
        for batch in take(3, kept=lambda ids: torch.ones_like(ids).bool(), batch_size=35)
    ]
    assert all(sorted(order) == list(range(35)) for order in places)
    assert places[0] != places[1] != places[2] != places[0]


@settings(deadline=None, derandomize=True, max_examples=20)
@given(cut=st.integers(1, 11))
def test_every_cursor_is_the_place_after_its_batch(cut):
    batches = take(12)
    assert same(take(12 - cut, start=batches[cut - 1]["cursor"]), batches[cut:])


def test_the_start_is_asked_at_each_pass():
    cursor = (0, 0)
    endless = stream(start=None)
    object.__setattr__(endless, "start", lambda: cursor)
    first = next(iter(endless))
    assert same([first], [next(iter(endless))])
    cursor = first["cursor"]
    assert same([next(iter(endless))], take(2)[1:])


@pytest.mark.parametrize("ahead", [True, False])
def test_a_block_is_read_when_needed_or_one_ahead(ahead):
    read_blocks = []

    def counted(input_ids):
        read_blocks.append(int(input_ids[0, 0]) // (CONTEXTS * LENGTH))
        return read(input_ids)

    batches = iter(stream(read=counted, ahead=ahead))
    assert not read_blocks
    for _ in range(4):
        next(batches)
    assert set(read_blocks[4:]) <= ({1} if ahead else set())
    next(batches)  # of the second block
    batches.close()
    assert read_blocks[:8] == [0] * 4 + [1] * 4
    assert set(read_blocks[8:]) <= ({2} if ahead else set())


@pytest.mark.parametrize("first", [0, 2])
def test_a_block_is_not_read_ahead_of_the_last_batch_that_will_be_asked_for(first):
    read_blocks = []

    def counted(input_ids):
        read_blocks.append(int(input_ids[0, 0]) // (CONTEXTS * LENGTH))
        return read(input_ids)

    every = take(12)
    for left in (4 - first, 5 - first):  # the first block has four batches
        read_blocks.clear()
        limited = stream((0, first), read=counted, left=lambda count=left: count)
        batches = iter(limited)
        for _ in range(left):
            next(batches)
        batches.close()
        assert set(read_blocks) == ({0} if left == 4 - first else {0, 1})
        assert same(list(itertools.islice(limited, 8)), every[first : first + 8])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite(bad):
    def spoiled(input_ids):
        activations = read(input_ids)
        activations[input_ids == CONTEXTS * LENGTH + 4] = bad
        return activations

    batches = iter(stream(read=spoiled))
    assert len(list(itertools.islice(batches, 4))) == 4
    message = r"^model_name='tiny', block 1: the activations have NaN or Inf$"
    with pytest.raises(ValueError, match=message):
        next(batches)
    with pytest.raises(ValueError, match=r"^held-out text: the activations have NaN or Inf$"):
        list(HeldOutBatches(next(blocks(1)), kept, spoiled, MODEL_BATCH, "held-out text"))


def test_activations_that_are_not_kept_may_be_anything():
    def spoiled(input_ids):
        return read(input_ids).masked_fill(~kept(input_ids)[..., None], float("nan"))

    assert same(take(9, read=spoiled), take(9))


def test_a_block_without_one_batch():
    tokens = int(kept(next(blocks(0))).sum())
    assert len(take(1, batch_size=tokens)) == 1
    message = rf"^batch_size={tokens + 1}: block 0 has only {tokens} tokens to train on; raise "
    with pytest.raises(ValueError, match=message):
        take(1, batch_size=tokens + 1)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(contexts=st.integers(1, 20), model_batch_size=st.integers(1, 6))
def test_held_out_batches_are_the_contexts_in_order(contexts, model_batch_size):
    ids = torch.arange(contexts * LENGTH).view(contexts, LENGTH)
    batches = HeldOutBatches(ids, kept, read, model_batch_size, "")
    assert len(batches) == len(list(batches))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids)
    for batch in batches:
        assert 1 <= len(batch["input_ids"]) <= model_batch_size
        assert torch.equal(batch["kept"], kept(batch["input_ids"]))
        assert batch["activations"].dtype == torch.float32
        expected = read(batch["input_ids"])[batch["kept"]].float()
        assert torch.equal(batch["activations"], expected)
        assert torch.equal(batch["states"], read(batch["input_ids"]))
        assert torch.equal(ids[batch["first"]], batch["input_ids"][0])


def test_inputs_may_be_numbers_of_images():
    numbers = torch.arange(7)

    def read_images(numbers):
        return torch.stack([numbers, -numbers], -1)[:, None].expand(-1, 3, -1).half()

    def kept_patches(numbers):
        return torch.ones(len(numbers), 3).bool()

    def number_blocks(first):
        return (numbers + 7 * block for block in itertools.count(first))

    batches = take(7, blocks=number_blocks, kept=kept_patches, read=read_images)
    seen = torch.cat([batch["activations"] for batch in batches])[:, 0].int().bincount()
    assert seen[:7].sum() == seen[7:14].sum() == 18  # three batches of each block
    assert seen.max() == 3
    held_out = list(HeldOutBatches(numbers, kept_patches, read_images, 2, "", "image_numbers"))
    assert torch.equal(torch.cat([batch["image_numbers"] for batch in held_out]), numbers)
    assert "input_ids" not in held_out[0]


class SecondOfTwo(Ranks):
    """As if another process had the other half of the tokens, though it is not there."""

    size, index = 2, 1


def test_ranks_say_which_share_of_a_batch_is_here():
    whole, mine = take(9), take(9, ranks=SecondOfTwo())
    for all_tokens, second in zip(whole, mine, strict=True):
        assert torch.equal(second["activations"], all_tokens["activations"][BATCH // 2 :])
        assert second["cursor"] == all_tokens["cursor"]
    ids = next(blocks(0))
    held_out = HeldOutBatches(ids, kept, read, MODEL_BATCH, "", ranks=SecondOfTwo())
    assert len(held_out) == 2  # of four: 2, 2, 2 and 1 contexts
    assert [batch["input_ids"].tolist() for batch in held_out] == [
        ids[2:4].tolist(),
        ids[6:].tolist(),
    ]
    assert [batch["first"] for batch in held_out] == [2, 6]


def batches_of_rank(rank, cases):
    """What a rank gets of each case's stream, and of its held-out contexts."""
    results = []
    for contexts, model_batch_size in cases:
        ids = torch.arange(contexts * LENGTH).view(contexts, LENGTH)

        def of_case(first, ids=ids):
            return (ids + block * ids.numel() for block in itertools.count(first))

        train = take(9, blocks=of_case, model_batch_size=model_batch_size)
        held_out = HeldOutBatches(ids, kept, read, model_batch_size, "")
        results.append((train, len(held_out), list(held_out)))
    return results


def test_two_ranks_together_get_what_one_gets():
    # Among them: model batches that two ranks cannot share equally, and fewer of them than ranks.
    cases = [(7, 2), (6, 2), (7, 3), (7, 7), (2, 1), (3, 1), (7, 50)]
    alone = batches_of_rank(0, cases)
    ranks = run_on_two(batches_of_rank, cases)
    for case, one, *both in zip(cases, alone, *ranks, strict=True):
        for whole, *parts in zip(one[0], *(rank[0] for rank in both), strict=True):
            assert {part["cursor"] for part in parts} == {whole["cursor"]}
            assert [len(part["activations"]) for part in parts] == [BATCH // WORLD_SIZE] * 2
            together = torch.cat([part["activations"] for part in parts])
            assert torch.equal(together, whole["activations"])
        assert both[0][1] == both[1][1] == len(both[0][2]) == len(both[1][2])
        assert all(len(batch["input_ids"]) for rank in both for batch in rank[2])
        in_order = [batch for pair in zip(both[0][2], both[1][2], strict=True) for batch in pair]
        ids = torch.cat([batch["input_ids"] for batch in in_order])
        assert torch.equal(ids, torch.cat([batch["input_ids"] for batch in one[2]])), case


def test_that_no_position_counts_is_told_and_no_advice_given_that_does_not_help():
    def nothing(input_ids):
        return torch.zeros_like(input_ids, dtype=torch.bool)

    message = r"^model_name='tiny', block 0: none of its 35 positions counts \(`kept` is 0 at"
    with pytest.raises(UsageError, match=message):
        take(1, kept=nothing)
    held_out = HeldOutBatches(BLOCK_TOKENS, nothing, read, MODEL_BATCH, "the text, held out")
    with pytest.raises(UsageError, match=r"^the text, held out: none of their positions counts"):
        list(held_out)
