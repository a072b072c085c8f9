"""Requests that begin as an indexed prefix does, but not with the whole of it."""

from random import Random

import pytest

from tests.attention_backend.world import make_matcher, make_request
from vllm_squeeze.attention_backend import misses
from vllm_squeeze.attention_backend.matching import LiveRequests
from vllm_squeeze.attention_backend.misses import DIFFERS, TOO_SHORT, Misses
from vllm_squeeze.attention_backend.stats import SqueezeStats

LONG = list(range(100, 400))
# Of these 288, 48 and 288 tokens are covered; the third goes on in another way from token 200 on.
PREFIXES = [LONG, LONG[:60], LONG[:200] + list(range(900, 1000))]
LENGTHS = [16, 17, 31, 32, 33, 47, 48, 100, 199, 200, 201, 287, 288]


@pytest.fixture
def named():
    """Follows requests on prefixes "a", "b" and "c"."""

    def follow(prefixes):
        matcher, placements = make_matcher(prefixes, {0: 16})
        for name, placement in zip("abc", placements):
            placement.name = name
        return LiveRequests(matcher, {0: 16})

    return follow


@pytest.mark.parametrize("length", LENGTHS)
def test_the_first_token_that_differs_is_found(named, length):
    """Wherever it is, and wherever the prompt ends."""
    requests = named(PREFIXES[:1])
    told = []
    requests.misses.add = lambda placement, agreed, num_tokens: told.append((placement.name, agreed, num_tokens))
    requests.add(make_request("short", LONG[:length]))
    requests.add(make_request("differs", LONG[:length] + [1] + LONG[length + 1 :]))
    assert told == ([("a", length, length), ("a", length, 300)] if length < 288 else [])


def test_causes_are_counted(named):
    requests = named([*PREFIXES[:1], PREFIXES[2]])
    random = Random(0)
    prompts = {
        ("a", TOO_SHORT): [LONG[:250], LONG[:287]],
        ("a", DIFFERS): [LONG[:220] + [1] * 300],
        ("b", DIFFERS): [PREFIXES[2][:201] + [1], PREFIXES[2][:280] + [1], PREFIXES[2][:280] + [1] * 99],
        None: [LONG, PREFIXES[2] + [1], LONG[:15], LONG[:15] + [1] * 300, [1] * 300, []],
    }
    expected = {key: len(alike) for key, alike in prompts.items() if key is not None}
    every = [prompt for alike in prompts.values() for prompt in alike]
    for number, prompt in enumerate(random.sample(every, len(every))):
        requests.add(make_request(str(number), prompt))
    assert requests.misses.counts == expected


def test_what_begins_with_a_nested_prefix_misses_none(named):
    requests = named(PREFIXES)
    requests.add(make_request("on the shorter one", LONG[:100] + [1]))
    requests.add(make_request("on none", LONG[:40] + [1]))
    assert sum(requests.misses.counts.values()) == 1


def test_one_line_for_each_index_and_one_a_minute(named, monkeypatch):
    """With the position, and without what users wrote."""
    requests, now, told = named([LONG, *([seed] * 16 + LONG for seed in (1, 2))]), [0.0], []
    requests.misses = Misses(lambda: now[0])
    monkeypatch.setattr(misses.logger, "info", lambda message, *arguments: told.append(message % arguments))
    for seconds, prompt in (
        (0, LONG[:70] + [54321] * 99), (1, LONG[:20]), (2, [1] * 16 + [54321]), (61, [1] * 16 + LONG[:4]),
        (62, [2] * 16 + [54321]), (122, [2] * 16 + LONG[:9]), (500, LONG[:30]),
    ):  # fmt: skip
        now[0] = seconds
        requests.add(make_request(str(seconds), prompt))
    found = [line.partition(" `vllm-squeeze doctor --prompt`")[0] for line in told]
    assert found == [
        "squeeze: a prompt agrees with a in its first 70 tokens, 288 must: token 70 (from 0) differs.",
        "squeeze: a prompt agrees with b in its first 20 tokens, 304 must: it is too short.",
        "squeeze: a prompt agrees with c in its first 25 tokens, 304 must: it is too short.",
    ]
    assert sum(requests.misses.counts.values()) == 7


def test_counts_of_several_reports_are_added_up():
    stats, other = SqueezeStats(), SqueezeStats()
    stats.add_misses({("a", DIFFERS): 2})
    other.add_misses({("a", DIFFERS): 3, ("a", TOO_SHORT): 1, ("b", DIFFERS): 4})
    stats.aggregate(other)
    assert stats.data["misses"] == {"a": {DIFFERS: 5, TOO_SHORT: 1}, "b": {DIFFERS: 4}}
    assert stats.reduce() == {"requests that missed an index": 10}
