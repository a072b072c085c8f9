"""Where indexes lie on the devices: never over each other, and as many as there is room for."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention_backend.world import OPTIONS
from vllm_squeeze.attention_backend.room import MOST_CENTROIDS, VARIANT_SLOTS, WATCHED_SLOTS, Needs, Room
from vllm_squeeze.prefix_index.budget import bytes_of_groups, bytes_of_prefix, bytes_per_cluster
from vllm_squeeze.prefix_index.manifest import InvalidIndex

ROOM = Room(num_slots=4, num_centroids=20, num_members=100, longest_prefix=90, most_centroids=15)


def overlap(first: slice, second: slice) -> bool:
    return max(first.start, second.start) < min(first.stop, second.stop)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 15), st.integers(0, 90)), max_size=30))
def test_places_do_not_overlap(moves):
    """Indexes come, and the first that came leave; what is found is free, and nothing is found only if nothing is."""
    room, there = ROOM, []
    for leave, centroids, members in moves:
        if leave and there:
            room = room.without(there.pop(0))
            continue
        span = room.find(Needs(centroids, members))
        if span is None:
            fits = [
                any(not any(overlap(slice(at, at + size), other) for other in others) for at in range(end - size + 1))
                for size, end, others in (
                    (centroids, ROOM.num_centroids, [span.centroids for span in there]),
                    (members, ROOM.num_members, [span.members for span in there]),
                )
            ]
            assert len(there) == ROOM.num_slots or not all(fits)
            continue
        assert (span.num_centroids, span.num_members) == (centroids, members)
        assert span.centroids.stop <= ROOM.num_centroids and span.members.stop <= ROOM.num_members
        for other in there:
            assert span.slot != other.slot
            assert not overlap(span.centroids, other.centroids) and not overlap(span.members, other.members)
        room = room.with_taken(span)
        there.append(span)
    assert room.taken == set(there)


def test_a_gap_is_filled():
    room = ROOM
    first, second, third = (Needs(5, 30), Needs(5, 20), Needs(10, 50))
    spans = []
    for needs in (first, second, third):
        spans.append(room.find(needs))
        room = room.with_taken(spans[-1])
    assert room.find(Needs(1, 1)) is None and room.find(Needs(0, 0)).slot == 3
    room = room.without(spans[1])
    assert room.find(Needs(6, 1)) is None and room.find(Needs(1, 21)) is None
    assert room.find(second) == spans[1]


@pytest.mark.parametrize(
    ("tokens", "needs", "message"),
    [
        (91, Needs(1, 1), "a: 91 tokens; this server has room for 90"),
        (90, Needs(16, 1), "a: 16 clusters; this server has room for 15"),
        (90, Needs(15, 101), "a: 101 clustered tokens; this server has room for 100"),
    ],
)
def test_what_would_not_fit_alone(tokens, needs, message):
    with pytest.raises(InvalidIndex, match=message):
        ROOM.check("a", tokens, needs)
    ROOM.check("a", 90, Needs(15, 100))


def test_a_watching_server_sets_all_of_its_limit_aside():
    model = SimpleNamespace(
        max_model_len=1000,
        hf_text_config=SimpleNamespace(num_hidden_layers=6),
        get_head_size=lambda: 64,
        get_num_kv_heads=lambda parallel: 2,
    )
    config = SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(pipeline_parallel_size=2))
    options = SimpleNamespace(**{**vars(OPTIONS), "watch": 1.0, "memory_limit_gib": 2**-10})
    room = Room.of([], options, config)
    clusters = room.num_centroids * bytes_per_cluster(64, rest=True) + bytes_of_groups(room.num_centroids, 64)
    taken = 3 * 2 * (clusters + room.num_members * (4 + 8) + WATCHED_SLOTS * bytes_of_prefix(64))
    assert 0.99 * 2**20 < taken <= 2**20
    assert (room.num_slots, room.longest_prefix) == (WATCHED_SLOTS, 1000)
    assert room.most_centroids == math.ceil(1000 * MOST_CENTROIDS)
    assert room.variant_slots == range(WATCHED_SLOTS, WATCHED_SLOTS + VARIANT_SLOTS)
    options.mode = "exact"
    assert not Room.of([], options, config).variant_slots
