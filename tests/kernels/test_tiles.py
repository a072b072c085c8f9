"""Grouping a step's query tokens by prefix, against the plain way to do it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.conftest import ON_GPU
from vllm_squeeze.kernels.tables import Prefixes
from vllm_squeeze.kernels.tiles import MAX_SUFFIX_KEYS, MAX_SUFFIX_TILES, QueryTiles, kinds_of_tiles, tokens_per_tile

DEVICE = "cuda" if ON_GPU else "cpu"
PAGE_SIZE, NUM_SLOTS = 16, 3
FACTS = [[0, 7, 16, 0], [7, 0, 40, 0], [7, 3, 0, 1]]


def expected_tiles(row_slot, counts, size):
    """Facts and tokens of each tile, and a row of each slot."""
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    tiles, rows = [], []
    for slot, facts in enumerate(FACTS):
        mine = [row for row, other in enumerate(row_slot) if other == slot]
        tokens = [starts[row] + i for row in mine for i in range(counts[row])]
        rows.append(max(mine, default=-1))
        for first in range(0, len(tokens), size):
            tile = tokens[first : first + size]
            tiles.append(([slot, len(tile), rows[-1], *facts], tile))
    return tiles, rows


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(-1, NUM_SLOTS - 1), st.integers(0, 9)), min_size=1, max_size=12),
    group=st.sampled_from([1, 3, 4, 16]),
    spare=st.integers(0, 70),
)
def test_tokens_are_grouped_by_prefix(rows, group, spare):
    row_slot, counts = (list(column) for column in zip(*rows, strict=True))
    num_tokens = sum(count for slot, count in rows if slot >= 0)
    prefixes = Prefixes(
        slots=torch.tensor(FACTS, dtype=torch.int32, device=DEVICE),
        lens=torch.tensor([16, 40, 3], dtype=torch.int32, device=DEVICE),
        frames=torch.zeros(NUM_SLOTS, dtype=torch.int32, device=DEVICE),
        log_threshold=torch.zeros(NUM_SLOTS, device=DEVICE),
        kept_shares=torch.ones(NUM_SLOTS, device=DEVICE),
        counters=torch.zeros(NUM_SLOTS, 6, dtype=torch.int64, device=DEVICE),
    )
    block_table = torch.arange(len(rows) * 4, dtype=torch.int32, device=DEVICE).view(-1, 4)
    queries = QueryTiles.allocate(num_tokens + spare, NUM_SLOTS, 40, group, DEVICE)
    queries.tiles.fill_(5)  # of a step before
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    slots = torch.tensor(row_slot, device=DEVICE)
    queries.fill(slots, starts, block_table, prefixes, num_tokens + spare, group, PAGE_SIZE)

    tiles, slot_rows = expected_tiles(row_slot, counts, tokens_per_tile(num_tokens + spare, group))
    # and no suffixes yet
    assert queries.tiles[: len(tiles)].tolist() == [[*facts, 0] for facts, _ in tiles]
    assert (queries.tiles[len(tiles) :, 0] == -1).all()
    assert queries.tile_count.item() == len(tiles)
    for held, (_, tokens) in zip(queries.tokens.tolist(), tiles, strict=False):
        assert held[: len(tokens)] == tokens
    assert queries.slot_rows.tolist() == slot_rows
    size = tokens_per_tile(num_tokens + spare, group)
    before = [sum(facts[0] < slot for facts, _ in tiles) for slot in range(NUM_SLOTS + 1)]
    assert queries.starts.tolist() == [count * size for count in before]
    for slot, (_, _, num_always, _) in enumerate(FACTS):
        if slot_rows[slot] >= 0:
            position = torch.arange(num_always)
            places = (slot_rows[slot] * 4 + position // PAGE_SIZE) * PAGE_SIZE + position % PAGE_SIZE
            assert queries.always_places[slot, :num_always].tolist() == places.tolist()


@pytest.mark.parametrize(
    ("num_tokens", "longest", "room"),
    [
        (1, MAX_SUFFIX_KEYS, True),
        (1, MAX_SUFFIX_KEYS + 1, False),
        # tiles of 4 tokens, and of 16
        (3, MAX_SUFFIX_KEYS // 3, True),
        (4, MAX_SUFFIX_KEYS // 4 + 1, False),
        (40, MAX_SUFFIX_KEYS // 16, True),
        (40, MAX_SUFFIX_KEYS // 16 + 1, False),
        (16 * MAX_SUFFIX_TILES, 1, True),
        (16 * MAX_SUFFIX_TILES + 1, 1, False),
    ],
)
def test_room_for_suffixes(num_tokens, longest, room):
    queries = QueryTiles.allocate(16 * MAX_SUFFIX_TILES + 16, 1, 40, 4, DEVICE)
    assert queries.can_list_suffixes(num_tokens, longest, group=4) is room


@pytest.mark.parametrize(
    ("num_slots", "group", "kinds"), [(1, 4, [1, 5, 17]), (3, 4, [1, 2, 5]), (1, 1, [1, 17, 33]), (1, 16, [1, 2, 5])]
)
def test_kinds_of_tiles(num_slots, group, kinds):
    """One tile of 16 rows or many, which several prefixes can make; then of 64."""
    assert kinds_of_tiles(num_slots, group) == kinds
