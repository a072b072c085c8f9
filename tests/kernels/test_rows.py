"""Matching rows in one launch, against the oracle."""

from random import Random

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.kernels.conftest import ON_GPU
from vllm_squeeze.kernels.reference import match_rows_reference
from vllm_squeeze.kernels.rows import match_rows
from vllm_squeeze.kernels.tables import DENSE_SLOT, STOCK_SLOT

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
    live = [
        (random.choice(slots), random.randrange(width + 1), random.randrange(2), random.choice([16, 32, 48, 64]))
        for _ in range(num_live + 5)
    ]
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
