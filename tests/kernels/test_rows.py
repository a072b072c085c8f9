"""Matching rows to prefixes and cutting these off, each in one launch, against the oracles."""

from random import Random

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.kernels.conftest import ON_GPU
from vllm_squeeze.kernels.reference import match_rows_reference, skip_prefixes_reference
from vllm_squeeze.kernels.rows import match_rows, skip_prefixes
from vllm_squeeze.kernels.tables import DENSE_SLOT, PROMPT_SLOTS, STOCK_SLOT

DEVICE = "cuda" if ON_GPU else "cpu"
MANY = 10**6


def integers(numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def random_step(random, num_rows, width, num_live, num_slots):
    """Block table, lengths, starts and live blocks of so few different numbers that most rows match several."""
    # with rows, a column and live blocks beyond those that there are
    table = integers([[random.randrange(2) for _ in range(width + 1)] for _ in range(num_rows + 2)])[:, :width]
    counts = [random.choice([0, 1, 1, 1, 5]) for _ in range(num_rows)]
    starts = integers([0, *counts, 7, 7]).cumsum(0, dtype=torch.int32)
    # of which a padded row has computed none
    seq_lens = integers([count + random.choice([0, 16, 32, 33, 48, 64, 80]) for count in counts])
    slots = [DENSE_SLOT, STOCK_SLOT, *range(num_slots)]
    live = []
    for _ in range(num_live + 5):
        needed = random.choice([16, 32, 48, 64])
        most, length = random.choice([needed, needed + 15, MANY]), random.choice([needed, 16])
        live.append((random.choice(slots), random.randrange(width + 1), random.randrange(2), needed, most, length))
    return table, seq_lens, starts, integers(live)[:num_live]


def results(match, step, num_tokens):
    """Slots and lengths, between two numbers of rows that there are not."""
    num_rows = len(step[1])
    found = integers([[77] * (num_rows + 2)] * 2)
    match(*step, num_tokens, *found[:, 1:-1])
    return found.tolist()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.sampled_from([20, 12, 5, 2, 1]),
    width=st.sampled_from([5, 3, 2, 1]),
    num_live=st.sampled_from([1, 2, 3, 7, 8, 9, 16, 20]),
    num_slots=st.integers(2, 5),
    share=st.sampled_from([1.0, 0.5, 0.0]),
)
def test_rows_are_matched_as_the_oracle_says(seed, num_rows, width, num_live, num_slots, share):
    step = random_step(Random(seed), num_rows, width, num_live, num_slots)
    expected = results(match_rows_reference, step, MANY)
    assert results(match_rows, step, MANY) == expected
    event(f"squeezed: {len(set(expected[0])) > 2}")

    counts = step[2].diff().tolist()
    num_tokens = int(share * sum(count for count, slot in zip(counts, expected[0][1:-1]) if slot >= 0))
    some = results(match_rows_reference, step, num_tokens)
    assert results(match_rows, step, num_tokens) == some
    event(f"without room: {some != expected}")


@pytest.mark.parametrize("num_rows", [255, 256, 257, 700])
def test_many_rows(num_rows):
    step = random_step(Random(num_rows), num_rows, 9, 50, 3)
    for num_tokens in (MANY, int(step[2][num_rows]) // 4):
        expected = results(match_rows_reference, step, num_tokens)
        assert len(set(expected[0])) >= 4
        assert results(match_rows, step, num_tokens) == expected


def check_suffixes(seed, num_rows, width, page_size, max_seq_len):
    """Rows of up to ``max_seq_len`` tokens, some on prefixes."""
    random = Random(seed)
    # with rows and a column beyond those that there are
    table = integers([[random.randrange(10**6) for _ in range(width + 1)] for _ in range(num_rows + 2)])[:, :width]
    seq_lens = [random.randint(0, max_seq_len) for _ in range(num_rows)]
    seq_lens[random.randrange(num_rows)] = max_seq_len
    prefix_len = integers([random.randint(0, length // page_size) * page_size for length in seq_lens])
    slots = [random.choice([DENSE_SLOT, 3, PROMPT_SLOTS, PROMPT_SLOTS + 3]) for _ in seq_lens]
    step = table, integers(seq_lens), integers(slots), prefix_len, page_size, max_seq_len
    found = []
    for skip in (skip_prefixes, skip_prefixes_reference):
        # of a step before, and more room than the rows need
        lens, blocks = integers([7] * (num_rows + 3)), integers([[7] * (width + 2)] * (num_rows + 3))
        skip(*step, lens, blocks)
        found.append((lens.tolist(), blocks.tolist()))
    assert found[0] == found[1]
    lens, blocks = found[0]
    for row, (length, slot, prefix) in enumerate(zip(seq_lens, slots, prefix_len.tolist(), strict=True)):
        assert lens[row] == (length - prefix if slot < PROMPT_SLOTS else 0)
        own = table[row, prefix // page_size : -(-length // page_size)].tolist()
        assert blocks[row][: len(own)] == own


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(1, 9),
    width=st.integers(1, 20),
    page_size=st.sampled_from([16, 32, 48]),
    data=st.data(),
)
def test_prefixes_are_skipped_as_the_oracle_says(seed, num_rows, width, page_size, data):
    check_suffixes(seed, num_rows, width, page_size, data.draw(st.integers(1, width * page_size)))


@pytest.mark.parametrize("width", [1023, 1024, 1025, 2500])
def test_long_rows(width):
    check_suffixes(width, 3, width, 16, width * 16 - 5)
    check_suffixes(width, 3, width, 16, 1024 * 16)


def test_a_step_that_vllm_says_may_be_longer_than_its_block_table():
    """As it does where a CUDA graph has to serve all lengths."""
    step = integers([[3, 7, 5]]), integers([40]), integers([0]), integers([16])
    lens, blocks = integers([0]), integers([[0, 0, 0]])
    skip_prefixes(*step, 16, 1000, lens, blocks)
    assert (lens.tolist(), blocks.tolist()) == ([24], [[7, 5, 5]])
