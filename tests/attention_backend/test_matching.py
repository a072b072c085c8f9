import dataclasses
import math
from types import SimpleNamespace

import pytest

from tests.attention_backend.world import make_matcher, make_request, make_step
from vllm_squeeze.attention_backend.matching import (
    ASKED_FOR,
    CACHE_SALT,
    DENSE_SLOT,
    EMBEDDINGS,
    EXACT,
    FASTER,
    GONE,
    LORA,
    MULTIMODAL,
    NO_INDEX,
    NO_ROOM,
    NOT_COMPUTED,
    PREFILL,
    SQUEEZED,
    STOCK_SLOT,
    LiveBlock,
    LiveRequests,
    PrefixMatcher,
    Step,
)
from vllm_squeeze.attention_backend.policy import Arm, Work
from vllm_squeeze.attention_backend.variants import Variants, VariantSlot

SIZE = 16


def end(
    slot: int, group: int, index: int, block: int, length: int, exact: bool = False, prompt: bool = False
) -> LiveBlock:
    """The last block of a prefix of so many tokens."""
    return LiveBlock(slot, group, index, block, length, length, exact=exact, prompt=prompt)


def own(slot: int, group: int, index: int, block: int, length: int = 0, exact: bool = False) -> LiveBlock:
    """The block that a row is filling, in groups with blocks of SIZE; the row's prefix has so many tokens."""
    return LiveBlock(slot, group, index, block, index * SIZE, length, index * SIZE + SIZE - 1, exact)


LONG = list(range(100, 200))
# 6 tokens of each are the observation window; of the rest, whole blocks are covered: 80, 48, 48.
PREFIXES = [LONG, LONG[:60], list(range(300, 360))]
COVERED = [80, 48, 48]


def image_at(offset: int) -> SimpleNamespace:
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset))


@pytest.mark.parametrize(
    ("tokens", "slot"),
    [
        (LONG + [1], 0),
        (LONG[:80], 0),
        (LONG[:79] + [1, 2], 1),
        (LONG[:20] + [1] + LONG[21:], None),
        (LONG[:60] + [1] + LONG[61:], 1),
        (LONG[:48], 1),
        (LONG[:47] + [1], None),
        (LONG[:47], None),
        (LONG[:24], None),
        (LONG[:20] + [1] + LONG[21:40], None),
        (LONG[:3], None),
        (LONG[1:], None),
        (PREFIXES[2] + LONG, 2),
        ([], None),
    ],
    ids=[
        "whole", "covered-part", "one-token-off", "off-inside", "off-inside-after-nested", "nested", "one-token-off-nested",
        "one-token-short", "half", "off-inside-a-half", "a-few-tokens", "not-at-the-start", "another-text", "empty",
    ],
)  # fmt: skip
def test_the_longest_prefix_that_a_prompt_begins_with(tokens, slot):
    matcher, placements = make_matcher(PREFIXES, {0: SIZE})
    assert [placement.covered for placement in placements] == COVERED
    found, reason = matcher.match(make_request("a", tokens))
    assert reason == (NO_INDEX if slot is None else SQUEEZED)
    if slot is not None:
        assert found is placements[slot]
    else:
        # The start of a prefix is followed, as its answer may complete it.
        assert found is None or found in placements and LONG[: len(tokens)] == tokens


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_request": object()}, LORA),
        ({"cache_salt": "salt"}, CACHE_SALT),
        ({"prompt_embeds": object()}, EMBEDDINGS),
        ({"prompt_embeds": object(), "prompt_token_ids": None}, EMBEDDINGS),
        ({"mm_features": [image_at(90), image_at(79)]}, MULTIMODAL),
        ({"mm_features": [image_at(0)]}, MULTIMODAL),
        ({"mm_features": [image_at(80)]}, SQUEEZED),
        ({"mm_features": None}, SQUEEZED),
    ],
    ids=["lora", "salt", "embeddings", "embeddings-only", "image-inside", "image-first", "image-after", "no-images"],
)
def test_requests_whose_prefix_is_not_the_text_alone(changes, reason):
    matcher, placements = make_matcher(PREFIXES, {0: SIZE})
    request = make_request("a", LONG + [1], **changes)
    assert matcher.match(request) == (placements[0] if reason == SQUEEZED else None, reason)


@pytest.mark.parametrize(
    "changes", [{"lora_request": object()}, {"cache_salt": "salt"}, {"mm_features": [image_at(0)]}]
)
def test_a_request_on_no_prefix_is_no_more_than_that(changes):
    matcher, _ = make_matcher(PREFIXES, {0: SIZE})
    assert matcher.match(make_request("a", [1, 2, 3], **changes)) == (None, NO_INDEX)


@pytest.fixture
def live():
    """Follows requests: "long" and "short" on prefixes 0 and 1, "other" on none, "salted" on prefix 0 with a salt."""
    matcher, _ = make_matcher(PREFIXES, {1: SIZE})
    requests = LiveRequests(matcher, {1: SIZE})
    for id, tokens in {"long": LONG + [1], "short": LONG[:60] + [1] * 40, "other": [1] * 100}.items():
        requests.add(make_request(id, tokens))
    requests.add(make_request("salted", LONG + [2], cache_salt="salt"))
    return requests


@pytest.fixture
def dense_prefill():
    """Follows requests whose prompts are dense: "long" and "short" on prefixes 0 and 1, of 101 and 100 tokens."""
    matcher, _ = make_matcher(PREFIXES, {1: SIZE})
    requests = LiveRequests(matcher, {1: SIZE}, dense_prefill=True)
    for id, tokens in {"long": LONG + [1], "short": LONG[:60] + [1] * 40}.items():
        requests.add(make_request(id, tokens))
    return requests


NOTHING = Step([], 0, None)


def taken(live: LiveRequests) -> dict[str, int]:
    """Rows since the last call, by outcome."""
    rows = {reason: count for reason, count in live.rows.items() if count}
    live.rows.clear()
    return rows


def blocks(first: int, count: int) -> tuple[list[int], list[int]]:
    """Block ids of two groups, of which the second is the one that counts."""
    return [0] * count, list(range(first, first + count))


def test_each_row_of_a_step_is_counted_once(live):
    step = make_step(
        new=[("long", blocks(10, 7), 80, 21), ("short", blocks(20, 4), 0, 64), ("salted", blocks(30, 7), 96, 5)],
        cached=[("other", None, 100, 1)],
    )
    found, num_tokens, longest_suffix, *_ = live.step(step)
    # Group 1's block of the tokens 64 to 79. "short" has computed nothing and cannot be taken for anything.
    assert found == [end(0, 1, 4, 14, 80)]
    assert num_tokens == 21 and longest_suffix is None
    assert taken(live) == {SQUEEZED: 1, NOT_COMPUTED: 1, CACHE_SALT: 1, NO_INDEX: 1}


def test_only_scheduled_rows_count(live):
    assert live.step(make_step(cached=[("other", None, 5, 1)])) == NOTHING
    assert taken(live) == {NO_INDEX: 1}
    assert live.step(make_step()) == NOTHING
    assert taken(live) == {}


def test_chunked_prefill(live):
    """The rest of a prompt is squeezed from the chunk on that begins at or after the end of the covered part."""
    found, *_ = live.step(make_step(new=[("long", blocks(10, 3), 0, 40)]))
    assert found == [] and taken(live) == {NOT_COMPUTED: 1}
    found, *_ = live.step(make_step(cached=[("long", blocks(50, 2), 40, 39)]))
    assert found == [] and taken(live) == {NOT_COMPUTED: 1}
    found, *_ = live.step(make_step(cached=[("long", None, 79, 1)]))
    assert found == [] and taken(live) == {NOT_COMPUTED: 1}
    found, num_tokens, *_ = live.step(make_step(cached=[("long", blocks(70, 2), 80, 21)]))
    assert found == [end(0, 1, 4, 51, 80)] and num_tokens == 21
    assert taken(live) == {SQUEEZED: 1}
    # Every token of the answer.
    assert live.step(make_step(cached=[("long", None, 101, 1)])) == Step([end(0, 1, 4, 51, 80)], 1, 22)


def test_prompts_that_are_dense(dense_prefill):
    """From the prefix to the end of the prompt, which may come in chunks; then the answer is squeezed."""
    found, *_ = dense_prefill.step(make_step(new=[("long", blocks(10, 6), 80, 16)]))
    assert found == [] and taken(dense_prefill) == {PREFILL: 1}
    # Beside a squeezed row on the same prefix it is told apart by the block that it is filling.
    step = make_step(new=[("short", blocks(20, 7), 100, 1)], cached=[("long", blocks(50, 1), 96, 5)])
    assert dense_prefill.step(step) == Step([own(DENSE_SLOT, 1, 6, 50), end(1, 1, 2, 22, 48)], 1, None)
    assert taken(dense_prefill) == {SQUEEZED: 1, PREFILL: 1}
    assert dense_prefill.step(make_step(cached=[("long", None, 101, 1)])) == Step([end(0, 1, 4, 14, 80)], 1, 22)
    assert taken(dense_prefill) == {SQUEEZED: 1}


@pytest.fixture
def tiled():
    """Follows requests whose prompts' tokens choose together: "long" and "twin" on prefix 0, "short" on 1."""
    matcher, _ = make_matcher(PREFIXES, {1: SIZE})

    def choose(step):
        requests.asked = [(rows.placement.slot, rows.prompt, rows.work.tokens) for rows in step]
        return [Arm.SQUEEZED if rows.prompt else requests.arm for rows in step]

    requests = LiveRequests(matcher, {1: SIZE}, choose, tiled_prompts=True)
    requests.arm = Arm.SQUEEZED
    for id, tokens in {"long": LONG + [1], "twin": LONG + [2] * 40, "short": LONG[:60] + [1] * 40}.items():
        requests.add(make_request(id, tokens))
    return requests


def test_tokens_of_prompts_that_choose_together(tiled):
    """Where there are 16 of them in a step; fewer attend densely. Then the answer's choose each for itself."""
    step = tiled.step(make_step(new=[("long", blocks(10, 7), 80, 21), ("short", blocks(20, 7), 90, 10)]))
    assert step == Step([own(DENSE_SLOT, 1, 5, 25), end(0, 1, 4, 14, 80, prompt=True)], 0, None, prompts=(21,))
    assert taken(tiled) == {SQUEEZED: 1, PREFILL: 1} and tiled.asked == [(0, True, 21)]
    # what follows the prefixes of prompts needs no room where there are no other rows
    step = tiled.step(make_step(new=[("short", blocks(20, 7), 60, 16)]))
    assert step == Step([end(1, 1, 2, 22, 48, prompt=True)], 0, 0, prompts=(16,)) and taken(tiled) == {SQUEEZED: 1}
    # of a prompt and an answer on the same prefix, as many of each, one is told by the block that it is filling
    step = tiled.step(make_step(new=[("twin", ([0] * 9, [10, 11, 12, 13, 14, *range(60, 64)]), 80, 60)],
                                cached=[("long", None, 101, 1), ("short", None, 100, 1)]))  # fmt: skip
    others = [end(0, 1, 4, 14, 80, prompt=True), end(1, 1, 2, 22, 48)]
    assert step == Step([own(0, 1, 6, 16, 80), *others], 2, 53, prompts=(60,))
    assert tiled.asked == [(0, True, 60), (0, False, 1), (1, False, 1)] and taken(tiled) == {SQUEEZED: 3}


def test_prompts_beside_exact_answers_are_left_to_vllm(tiled):
    """In such a step the slot that they share has no clusters."""
    tiled.step(make_step(new=[("long", blocks(10, 7), 80, 21)]))
    taken(tiled)
    tiled.arm = Arm.EXACT
    step = tiled.step(make_step(new=[("twin", ([0] * 9, [10, 11, 12, 13, 14, *range(60, 64)]), 80, 60)],
                                cached=[("long", None, 101, 1)]))  # fmt: skip
    others = [own(0, 1, 6, 16, 80, exact=True), end(STOCK_SLOT, 1, 4, 14, 80)]
    assert step == Step([own(DENSE_SLOT, 1, 5, 60), *others], 1, None)
    assert taken(tiled) == {EXACT: 1, FASTER: 1}


def test_prompts_on_an_exact_prefix_are_exact():
    """Nothing is lost by it, so there is no reason to leave them to vLLM."""
    _, (placement, *_) = make_matcher(PREFIXES, {1: SIZE})
    exact = dataclasses.replace(placement, num_sinks=placement.covered)
    requests = LiveRequests(PrefixMatcher([(exact, LONG)]), {1: SIZE}, dense_prefill=True)
    requests.add(make_request("long", LONG + [1]))
    found, num_tokens, *_ = requests.step(make_step(new=[("long", blocks(10, 7), 80, 21)]))
    assert found == [end(0, 1, 4, 14, 80, exact=True)] and num_tokens == 21
    assert taken(requests) == {EXACT: 1}


def test_a_request_that_asks_to_be_dense(dense_prefill):
    """Beside one on the same prefix that is squeezed, all its life; and both are told what became of them."""
    for id, settings in {"dense": {"mode": "dense"}, "as usual": {}, "none": {"mode": "auto"}}.items():
        tokens = [1, 2, 3] if id == "none" else LONG + [5]
        dense_prefill.add(make_request(id, tokens, kv_transfer_params={"squeeze": settings, "other": 1}))
    new = [("dense", blocks(10, 7), 80, 21), ("as usual", (*blocks(10, 6),), 80, 21), ("none", blocks(60, 1), 0, 3)]
    assert dense_prefill.step(make_step(new=new)) == NOTHING
    assert taken(dense_prefill) == {ASKED_FOR: 1, PREFILL: 1, NO_INDEX: 1}
    step = make_step(cached=[("dense", None, 101, 1), ("as usual", blocks(50, 1), 101, 1)])
    found = [own(DENSE_SLOT, 1, 6, 16), end(0, 1, 4, 14, 80)]
    assert dense_prefill.step(step) == Step(found, 1, None)
    told = [dense_prefill.remove(id).params()["squeeze"] for id in ("dense", "as usual", "none")]
    assert told == [
        {"index": "index", "mode": "dense", "budget": None, "rows": {ASKED_FOR: 2}},
        {"index": "index", "mode": "auto", "budget": 1.0, "rows": {PREFILL: 1, SQUEEZED: 1}},
        {"index": None, "mode": "auto", "budget": None, "rows": {NO_INDEX: 1}},
    ]
    assert dense_prefill.remove("dense") is None and dense_prefill.remove("long") is None


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ("dense", "kv_transfer_params.squeeze: 'dense' is not an object of settings"),
        (None, "kv_transfer_params.squeeze: None is not an object of settings"),
        ({"rest": "drop"}, "kv_transfer_params.squeeze.rest: unknown setting; known are mode, budget"),
        ({"mode": "off"}, "kv_transfer_params.squeeze.mode: 'off' is not one of auto, squeezed, exact, dense"),
        ({"mode": ["dense"]}, "kv_transfer_params.squeeze.mode: ['dense'] is not one of auto, squeezed, exact, dense"),
        ({"budget": 0}, "kv_transfer_params.squeeze.budget: 0 is not a number in (0, 1]"),
        ({"budget": 1.5}, "kv_transfer_params.squeeze.budget: 1.5 is not a number in (0, 1]"),
        ({"budget": True}, "kv_transfer_params.squeeze.budget: True is not a number in (0, 1]"),
        ({"budget": "auto"}, "kv_transfer_params.squeeze.budget: 'auto' is not a number in (0, 1]"),
        (
            {"mode": "exact", "budget": 1},
            "kv_transfer_params.squeeze.budget: 1 is for mode auto or squeezed, not exact",
        ),
        (
            {"budget": 0.1},
            "kv_transfer_params.squeeze.budget: 0.1 is less than the 0.338 that centroids and always attended tokens "
            "read alone",
        ),
    ],
    ids=repr,
)
def test_a_request_with_wrong_settings_is_dense_and_told(live, settings, error):
    live.add(make_request("wrong", LONG + [5], kv_transfer_params={"squeeze": settings}))
    assert live.step(make_step(new=[("wrong", blocks(10, 7), 80, 21)])) == NOTHING
    assert taken(live) == {ASKED_FOR: 1}
    assert live.remove("wrong").params()["squeeze"]["error"] == error


@pytest.mark.parametrize("settings", [{"budget": 1}, {"mode": "squeezed"}], ids=repr)
def test_settings_that_an_exact_index_does_not_allow(settings):
    _, (placement, *_) = make_matcher(PREFIXES, {1: SIZE})
    requests = LiveRequests(PrefixMatcher([(placement.attended_exactly(), LONG)]), {1: SIZE}, variants=Variants([1]))
    requests.add(make_request("wrong", LONG + [5], kv_transfer_params={"squeeze": settings}))
    requests.add(make_request("right", LONG + [5], kv_transfer_params={"squeeze": {"mode": "exact"}}))
    found, *_ = requests.step(
        make_step(new=[(id, blocks(first, 7), 80, 21) for id, first in (("wrong", 10), ("right", 30))])
    )
    assert found == [own(DENSE_SLOT, 1, 5, 15), end(0, 1, 4, 34, 80, exact=True)]
    ((name, value),) = settings.items()
    assert requests.remove("wrong").params()["squeeze"]["error"] == (
        f"kv_transfer_params.squeeze.{name}: {value!r} needs clusters, which this server has none of for index; allowed "
        "are the modes auto, exact and dense"
    )
    assert requests.remove("right").params()["squeeze"] == {
        "index": "index", "mode": "exact", "budget": 1.0, "rows": {EXACT: 1}
    }  # fmt: skip


@pytest.fixture
def asking():
    """Follows requests with settings on prefix 0, of 101 tokens; there are slots 7 and 8 for them."""
    matcher, placements = make_matcher(PREFIXES, {1: SIZE})

    def choose(step):
        requests.asked += [(rows.placement.budget, rows.placement.exact, rows.work) for rows in step]
        return [Arm.SQUEEZED if rows.squeezed else Arm.EXACT if rows.placement.exact else requests.arm for rows in step]

    requests = LiveRequests(matcher, {1: SIZE}, choose, variants=Variants([7, 8]))
    requests.arm, requests.asked, requests.placement = Arm.SQUEEZED, [], placements[0]
    for id, settings in {
        "usual": {}, "again": {"budget": 1.0}, "half": {"budget": 0.5}, "half too": {"budget": 0.5},
        "exact": {"mode": "exact"}, "always": {"mode": "squeezed", "budget": 0.5},
    }.items():  # fmt: skip
        requests.add(make_request(id, LONG + [1], kv_transfer_params={"squeeze": settings}))
    return requests


def on_shared_blocks(*ids: str) -> SimpleNamespace:
    """A step of one token of requests that share their prefix's blocks, each with a last block of its own."""
    return make_step(new=[(id, ([0] * 7, [10, 11, 12, 13, 14, 15, 20 + n]), 100, 1) for n, id in enumerate(ids)])


def test_settings_on_one_prefix(asking):
    """The prefix's last block tells most rows, whatever they have asked for, and a block of its own each other."""
    half = asking.placement.at_budget(0.5).log_threshold
    step = asking.step(on_shared_blocks("usual", "half", "again", "exact"))
    assert step == Step(
        [own(7, 1, 6, 21, 80), own(8, 1, 6, 23, 80, exact=True), end(0, 1, 4, 14, 80)],
        4,
        21,
        (VariantSlot(7, 0, half), VariantSlot(8, 0, math.inf)),
    )
    assert taken(asking) == {SQUEEZED: 3, EXACT: 1}
    one, two = Work(1, 0, 1), Work(2, 0, 2)
    assert asking.asked == [(1.0, False, two), (0.5, False, one), (1.0, True, one)]
    step = asking.step(on_shared_blocks("half", "half too", "usual"))
    assert step.live == [own(0, 1, 6, 22, 80), end(7, 1, 4, 14, 80)]
    assert asking.remove("half").params()["squeeze"] == {
        "index": "index", "mode": "auto", "budget": 0.5, "rows": {SQUEEZED: 2}
    }  # fmt: skip


@pytest.mark.parametrize("dense_prefill", [True, False])
def test_whose_blocks_are_kept_apart(dense_prefill):
    """Those of requests that may be squeezed, from the first token on that may be."""
    matcher, _ = make_matcher(PREFIXES, {1: SIZE})
    told = []
    requests = LiveRequests(
        matcher, {1: SIZE}, dense_prefill=dense_prefill, keep_apart=lambda request, *how: told.append(how)
    )
    asked = [None, {}, {"mode": "dense"}, {"mode": "exact"}, {"budget": 2}, {"budget": 0.5}, {"mode": "squeezed"}]
    for number, settings in enumerate(asked):
        for tokens in (LONG + [1], LONG[:40], [1, 2, 3]):
            params = {"squeeze": settings} if settings is not None else None
            requests.add(make_request(f"{number}-{len(tokens)}", tokens, kv_transfer_params=params))
    requests.add(make_request("salted", LONG + [1], cache_salt="salt"))
    first = 101 if dense_prefill else 80
    assert told == [(first, f"index {how}") for how in ("auto 1.0", "auto 1.0", "auto 0.5", "squeezed 1.0")]


def test_settings_that_are_left_to_vllm(asking):
    """But not those that say always."""
    asking.arm = Arm.STOCK
    step = asking.step(on_shared_blocks("usual", "half", "always"))
    assert step.live == [
        own(DENSE_SLOT, 1, 6, 20), own(DENSE_SLOT, 1, 6, 21), own(7, 1, 6, 22, 80), end(STOCK_SLOT, 1, 4, 14, 80),
    ]  # fmt: skip
    assert (step.num_tokens, step.longest_suffix) == (1, None)
    assert taken(asking) == {FASTER: 2, SQUEEZED: 1}


def test_more_settings_than_there_is_room_for(asking):
    step = asking.step(on_shared_blocks("usual", "half", "exact", "always"))
    assert step.live == [
        own(DENSE_SLOT, 1, 6, 23), own(7, 1, 6, 21, 80), own(8, 1, 6, 22, 80, exact=True), end(0, 1, 4, 14, 80),
    ]  # fmt: skip
    assert (step.num_tokens, step.longest_suffix) == (3, None)
    assert taken(asking) == {SQUEEZED: 2, EXACT: 1, NO_ROOM: 1}
    asking.remove("half")
    assert asking.step(on_shared_blocks("always")) == NOTHING, "another request at half the budget is there"
    asking.remove("half too")
    assert asking.step(on_shared_blocks("always")).live == [end(7, 1, 4, 14, 80)]
    assert taken(asking) == {NO_ROOM: 1, SQUEEZED: 1}


def test_settings_on_an_index_that_goes(asking):
    asking.step(on_shared_blocks("half"))
    asking.placement.slot = None
    assert asking.step(on_shared_blocks("half")) == NOTHING
    asking.placement.slot = 2
    assert asking.step(on_shared_blocks("half")).variants[0][:2] == (7, 2)
    asking.leave_dense(asking.placement)
    taken(asking)
    assert asking.step(on_shared_blocks("half")) == NOTHING
    assert taken(asking) == {GONE: 1}


def test_the_last_token_of_a_cached_prompt_is_dense(dense_prefill):
    assert dense_prefill.step(make_step(new=[("long", blocks(10, 7), 100, 1)])) == NOTHING
    assert taken(dense_prefill) == {PREFILL: 1}


def test_a_request_still_computing_is_kept_from_a_shorter_prefix(live):
    """While another row is squeezed by the nested prefix that both begin with, the longer one's stays dense."""
    found, num_tokens, *_ = live.step(
        make_step(new=[("short", blocks(20, 7), 48, 52), ("long", ([0] * 5, [20, 21, 22, 40, 41]), 48, 30)])
    )
    assert found == [own(DENSE_SLOT, 1, 3, 40), end(1, 1, 2, 22, 48)]
    assert num_tokens == 52
    assert taken(live) == {SQUEEZED: 1, NOT_COMPUTED: 1}


def test_requests_that_share_blocks_need_one_entry(live):
    live.add(make_request("twin", LONG + [3, 4]))
    found, num_tokens, *_ = live.step(
        make_step(new=[("long", blocks(10, 7), 80, 21), ("twin", (*blocks(10, 7),), 96, 6)])
    )
    assert found == [end(0, 1, 4, 14, 80)] and num_tokens == 27
    found, *_ = live.step(make_step(new=[("twin", blocks(60, 7), 96, 6)], cached=[("long", None, 101, 1)]))
    assert found == [end(0, 1, 4, 14, 80), end(0, 1, 4, 64, 80)]


@pytest.fixture
def choosing():
    """Follows requests on prefixes 0 and 1, each of which gets the arm in ``arms``; what was asked is in ``asked``."""
    matcher, _ = make_matcher(PREFIXES, {1: SIZE})

    def choose(step):
        requests.asked |= {rows.placement.slot: rows.work for rows in step}
        return [requests.arms[rows.placement.slot] for rows in step]

    requests = LiveRequests(matcher, {1: SIZE}, choose)
    requests.arms, requests.asked = {0: Arm.SQUEEZED, 1: Arm.SQUEEZED}, {}
    for id, tokens in {"long": LONG + [1], "twin": LONG + [2], "short": LONG[:60] + [1] * 40}.items():
        requests.add(make_request(id, tokens))
    return requests


# "long" and "twin" on prefix 0, of which the second has a question of 6 tokens; "short" on 1, which 0 begins with.
NESTED = make_step(
    new=[
        ("long", ([0] * 7, [20, 21, 22, 40, 41, 42, 43]), 100, 1),
        ("twin", ([0] * 7, [20, 21, 22, 40, 41, 52, 53]), 96, 6),
        ("short", ([0] * 7, [20, 21, 22, 33, 34, 35, 36]), 99, 1),
    ]
)
LONG_BLOCK, SHORT_BLOCK = end(0, 1, 4, 41, 80), end(1, 1, 2, 22, 48)


def test_the_choice_is_for_all_rows_on_a_prefix(choosing):
    assert choosing.step(NESTED) == Step([LONG_BLOCK, SHORT_BLOCK], 8, 52)
    assert choosing.asked == {0: Work(decoding=1, prefilling=1, tokens=7), 1: Work(1, 0, 1)}
    assert taken(choosing) == {SQUEEZED: 3}


def test_rows_that_attend_exactly(choosing):
    choosing.arms[0] = Arm.EXACT
    assert choosing.step(NESTED) == Step([LONG_BLOCK._replace(exact=True), SHORT_BLOCK], 8, 52)
    assert taken(choosing) == {EXACT: 2, SQUEEZED: 1}


def test_rows_whose_prefixes_are_shared(choosing):
    """They are exact, and those left to vLLM are not among them."""
    choosing.arms = {0: Arm.SHARED, 1: Arm.SHARED}
    exact = [LONG_BLOCK._replace(exact=True), SHORT_BLOCK._replace(exact=True)]
    assert choosing.step(NESTED) == Step(exact, 8, 52, shared=True)
    assert taken(choosing) == {EXACT: 3}
    choosing.arms[0] = Arm.STOCK
    step = choosing.step(NESTED)
    assert step.shared and step.live[-1] == exact[1] and (step.num_tokens, step.longest_suffix) == (1, None)
    assert taken(choosing) == {EXACT: 1, FASTER: 2}


def test_rows_that_are_left_to_vllm_are_kept_from_a_shorter_prefix(choosing):
    choosing.arms[0] = Arm.STOCK
    blocks, num_tokens, longest_suffix, *_ = choosing.step(NESTED)
    assert blocks == [
        own(DENSE_SLOT, 1, 6, 43), own(DENSE_SLOT, 1, 6, 53), end(STOCK_SLOT, 1, 4, 41, 80),
        SHORT_BLOCK,
    ]  # fmt: skip
    assert num_tokens == 1 and longest_suffix is None
    assert taken(choosing) == {FASTER: 2, SQUEEZED: 1}


def test_a_step_that_is_left_to_vllm_has_nothing_for_the_worker(choosing):
    choosing.arms = {0: Arm.STOCK, 1: Arm.STOCK}
    assert choosing.step(NESTED) == NOTHING
    assert taken(choosing) == {FASTER: 3}


@pytest.mark.parametrize("sent_as", ["new", "resumed"])
def test_preempted_and_resumed(live, sent_as):
    """A resumed request has other blocks, whether vLLM's V2 runner sends it as new or its V1 runner as resumed."""
    live.step(make_step(new=[("long", blocks(10, 7), 80, 21)]))
    assert live.step(make_step(cached=[("other", None, 5, 1)])) == NOTHING
    taken(live)
    again = ("long", blocks(90, 7), 0, 102)
    found, *_ = live.step(make_step(new=[again]) if sent_as == "new" else make_step(cached=[again], resumed={"long"}))
    assert found == [] and taken(live) == {NOT_COMPUTED: 1}
    found, *_ = live.step(make_step(cached=[("long", None, 102, 1)]))
    assert found == [end(0, 1, 4, 94, 80)] and taken(live) == {SQUEEZED: 1}


@pytest.mark.parametrize("scheduled", [True, False], ids=["after-steps", "before-any-step"])
def test_what_has_ended_is_forgotten(live, scheduled):
    if scheduled:
        live.step(make_step(new=[("long", blocks(10, 7), 80, 21)]))
    for id in ("long", "short", "other", "salted", "never-seen"):
        live.remove(id)
        live.remove(id)
    taken(live)
    step = make_step(new=[("long", blocks(10, 7), 80, 21), ("salted", blocks(30, 7), 80, 21)])
    assert live.step(step) == NOTHING
    assert taken(live) == {NO_INDEX: 2}
