"""Rows are found by physical blocks alone: in every state that vLLM's KV cache can be in, none may be mistaken."""

from collections import Counter
from itertools import accumulate
from random import Random
from types import SimpleNamespace

import pytest
import torch

from tests.attention_backend.world import KVCache, Sequence, make_matcher, make_request, make_step
from tests.kernels.conftest import ON_GPU
from vllm_squeeze.attention_backend.matching import (
    ASKED_FOR,
    CACHE_SALT,
    DENSE_SLOT,
    EXACT,
    FASTER,
    NO_INDEX,
    NO_ROOM,
    NOT_COMPUTED,
    PREFILL,
    SQUEEZED,
    STOCK_SLOT,
    LiveRequests,
)
from vllm_squeeze.attention_backend.placement import FEWEST_PROMPT_TOKENS
from vllm_squeeze.attention_backend.policy import Arm
from vllm_squeeze.attention_backend.rows import RowGroup
from vllm_squeeze.attention_backend.variants import Variants
from vllm_squeeze.kernels.reference import match_rows_reference
from vllm_squeeze.kernels.rows import match_rows
from vllm_squeeze.kernels.tables import PROMPT_SLOTS

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MAX_ROWS, MAX_BLOCKS, NUM_GROUPS = 9, 40, 3
SHORTEST = 50
MANY = 10**6
NUM_VARIANTS = 2
SETTINGS = [
    None,
    None,
    {},
    {"mode": "dense"},
    {"mode": "exact"},
    {"mode": "squeezed", "budget": 0.8},
    {"budget": 0.8},
    {"mode": "squeezed"},
]


class FoundRows(RowGroup):
    def set_rows(self, num_tokens):
        self.found = list(zip(self.row_slot.tolist(), self.prefix_len.tolist()))


class FoundByKernel(FoundRows):
    _match_rows = staticmethod(match_rows)


def columns(live):
    """What ``match_rows`` takes of live blocks of one group."""
    return [(b.slot, b.index, b.block, b.context, b.most, b.length) for b in live]


def as_int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def arms_by_slot(*arms):
    return lambda step: [arms[rows.placement.slot] for rows in step]


def match(block_table, seq_lens, query_start_loc, live, num_tokens=1000):
    """Slots and prefix lengths of rows, from lists. The kernel and its oracle have to agree."""
    operands = [as_int32(numbers) for numbers in (block_table, seq_lens, query_start_loc, live)]
    found, expected = torch.zeros(2, 2, len(seq_lens), dtype=torch.int32, device=DEVICE)
    match_rows(*operands, num_tokens, *found)
    match_rows_reference(*operands, num_tokens, *expected)
    assert torch.equal(found, expected)
    return found.tolist()


class Server:
    """Serves random requests, most on indexed prefixes, by vLLM's rules.

    Args:
        random: decides all that is not fixed.
        rows_class: what finds the rows.
        block_sizes: of the full-attention groups.
        kernel_block_size: of the attention kernel, which divides the block sizes.
        caching: whether blocks are shared.
        choosing: whether each prefix gets one of the arms in each step, else all are squeezed.
        asking: whether requests have settings of their own.
    """

    def __init__(self, random, rows_class, block_sizes, kernel_block_size, caching, choosing=False, asking=False):
        self.asking = asking
        self.random, self.block_sizes, self.kernel_block_size = random, block_sizes, kernel_block_size
        main, other = ([random.randrange(3) for _ in range(240)] for _ in range(2))
        fork = random.randrange(SHORTEST, 150)
        self.texts = [main, main[:fork] + other, other]
        # Nested ones, forked ones, and one of another text.
        self.prefixes = [text[: random.randrange(SHORTEST, 200)] for text in (main, main, main, *self.texts[1:])]
        matcher, self.placements = make_matcher(self.prefixes, block_sizes)
        self.prefill = random.choice(["dense", "squeezed", "tiles"])
        self.variants = Variants(range(len(self.prefixes), len(self.prefixes) + NUM_VARIANTS))
        dense, tiled = self.prefill == "dense", self.prefill == "tiles"
        self.live = LiveRequests(matcher, block_sizes, self.choose, dense, variants=self.variants, tiled_prompts=tiled)
        self.choosing = choosing
        self.cache = KVCache(block_sizes, caching, random)
        self.sequences, self.preempted, self.num_requests, self.num_alone = [], set(), 0, 0
        self.num_prompts = 0
        # What earlier batches left: any blocks, live ones too.
        kernel_blocks = 300 * max(size // kernel_block_size for size in block_sizes.values())
        shape = (MAX_ROWS, MAX_BLOCKS)
        self.tables = {
            group: as_int32([random.randrange(kernel_blocks) for _ in range(MAX_ROWS * MAX_BLOCKS)]).view(shape)
            for group in block_sizes
        }
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MAX_ROWS))
        self.groups = {
            group: rows_class(size, config, SimpleNamespace(device=DEVICE)) for group, size in block_sizes.items()
        }

    def choose(self, step):
        return [Arm.SQUEEZED if rows.squeezed else self.arm_on(rows.placement, rows.prompt) for rows in step]

    def arm_on(self, placement, prompt):
        """The same for all settings on a prefix, but that none is squeezed where all keys are attended to.

        And no prompt whose tokens choose together is exact.
        """
        arm = self.arms[placement.slot]
        if prompt:
            return Arm.SQUEEZED if arm is Arm.EXACT else arm
        return Arm.EXACT if placement.exact and arm is Arm.SQUEEZED else arm

    def arrive(self):
        text = self.random.choice(self.texts)
        question = [self.random.randrange(3) for _ in range(self.random.randrange(1, 20))]
        tokens = text[: self.random.randrange(1, 220)] + question
        settings = self.random.choice(SETTINGS) if self.asking else None
        request = make_request(
            str(self.num_requests),
            tokens,
            cache_salt=self.random.choice([None, None, None, "salt"]),
            kv_transfer_params=settings and {"squeeze": settings},
        )
        self.num_requests += 1
        self.live.add(request)
        self.sequences.append(Sequence(request))

    def leave(self, sequence):
        self.cache.release(sequence)
        self.sequences.remove(sequence)
        self.live.remove(sequence.request.request_id)

    def schedule(self):
        """Picks rows in any order; returns the step and, of each row, its request and number of tokens."""
        new, cached, resumed, rows = [], [], set(), []
        only_ready = self.random.random() < 0.3
        for sequence in self.random.sample(self.sequences, len(self.sequences)):
            id = sequence.request.request_id
            if self.random.random() < 0.2 or (only_ready and self.expected(sequence) is None):
                continue
            starts = not sequence.blocks
            if starts:
                self.cache.find(sequence)
            num_tokens = min(self.random.choice([1, 7, 30, 90, 240]), len(sequence.tokens) - sequence.computed)
            added = self.cache.extend(sequence, num_tokens)
            # vLLM's V2 model runner is sent a resumed request as a new one, its V1 as a resumed one.
            again = id in self.preempted and self.random.random() < 0.5
            blocks = sequence.blocks if starts else added
            by_group = tuple(list(blocks.get(group, [7, 8])) for group in range(NUM_GROUPS))
            if starts and not again:
                new.append((id, by_group, sequence.computed, num_tokens))
            else:
                resumed |= {id} if starts else set()
                cached.append((id, by_group if any(blocks.values()) else None, sequence.computed, num_tokens))
            rows.append((sequence, num_tokens))
        self.random.shuffle(rows)
        return make_step(new, cached, resumed), rows

    def step(self):
        """One step: what was squeezed has to be what should have been."""
        while len(self.sequences) < MAX_ROWS - 1 and self.random.random() < 0.5:
            self.arrive()
        self.arms = [
            self.random.choice([Arm.SQUEEZED, Arm.EXACT, Arm.STOCK]) if self.choosing else Arm.SQUEEZED
            for _ in self.prefixes
        ]
        scheduled, rows = self.schedule()
        step = self.live.step(scheduled)
        live, num_tokens, longest_suffix, variants = step[:4]
        ready = [self.expected(sequence, count) for sequence, count in rows]
        attention = [p and self.attention(sequence, p) for (sequence, _), p in zip(rows, ready)]
        usual = [sequence.request.kv_transfer_params in (None, {"squeeze": {}}) for sequence, _ in rows]
        exactly = {p.slot for p, is_usual, arm in zip(ready, usual, attention) if is_usual and arm == (Arm.EXACT, None)}
        prompts = [p is not None and self.is_prompt(sequence) for (sequence, _), p in zip(rows, ready)]
        for row, placement in enumerate(ready):
            # which have no clusters in such a step
            if prompts[row] and placement.slot in exactly:
                attention[row] = (Arm.STOCK, None)
        if not self.asking:
            assert not variants
        no_room = self.live.rows[NO_ROOM]
        assert not (no_room and live) or len(variants) == NUM_VARIANTS
        meant = {p.slot: (p.slot, p.log_threshold) for p in self.placements}
        meant |= {variant.slot: (variant.prefix, variant.log_threshold) for variant in variants}
        exact = {block.slot for block in live if block.exact}
        expected = list(ready)
        for group, found in self.find_rows(rows, live, num_tokens, step.prompts).items():
            assert not any(facts != (DENSE_SLOT, 0) for facts in found[len(rows) :])
            for row, ((slot, length), placement, arm) in enumerate(zip(found, ready, attention)):
                if slot == DENSE_SLOT:
                    may_have_no_room = no_room and self.settings_of(rows[row][0]) not in (None, {})
                    assert length == 0 and (arm in (None, (Arm.STOCK, None)) or may_have_no_room)
                    expected[row] = None
                elif prompts[row]:
                    assert (slot - PROMPT_SLOTS, length) == (placement.slot, placement.prefix_lens[group])
                    assert arm == (Arm.SQUEEZED, None) and placement.slot not in exact
                else:
                    assert (meant[slot][0], length) == (placement.slot, placement.prefix_lens[group])
                    assert arm == ((Arm.EXACT, None) if slot in exact else (Arm.SQUEEZED, meant[slot][1]))
        of_prompts = [count for (_, count), p, prompt in zip(rows, expected, prompts) if p is not None and prompt]
        assert sorted(of_prompts) == sorted(step.prompts)
        assert num_tokens + sum(of_prompts) == sum(count for (_, count), p in zip(rows, expected) if p is not None)
        self.num_prompts += len(of_prompts)
        alone = bool(rows) and None not in expected
        each = zip(rows, expected, prompts)
        ends = [sequence.computed + count - p.covered for (sequence, count), p, prompt in each if alone and not prompt]
        assert longest_suffix == (max(ends, default=0) if alone else None)
        self.num_alone += alone
        assert sum(self.live.rows.values()) == len(rows)
        chosen = Counter(found and found[0] for found in attention)
        outcomes = ((Arm.SQUEEZED, SQUEEZED), (Arm.EXACT, EXACT), (Arm.STOCK, FASTER))
        assert sum(chosen[arm] - self.live.rows[outcome] for arm, outcome in outcomes) == no_room
        assert no_room or all(self.live.rows[outcome] == chosen[arm] for arm, outcome in outcomes)
        self.seen = dict(+self.live.rows)
        self.live.rows.clear()
        self.go_on(rows)

    def is_prompt(self, sequence):
        """Whether a row's tokens choose together."""
        mode = (self.settings_of(sequence) or {}).get("mode")
        return (
            self.prefill == "tiles" and mode != "exact" and sequence.computed < len(sequence.request.prompt_token_ids)
        )

    def expected(self, sequence, count=FEWEST_PROMPT_TOKENS):
        """The placement of the prefix that a row has computed, the longest that its request begins with, or None.

        None as well where prompts are dense and it has not computed its own, or too few of its tokens would choose
        together.
        """
        if sequence.request.cache_salt:
            return None
        prompt = sequence.request.prompt_token_ids
        begun = [p for p in self.placements if prompt[: p.covered] == self.prefixes[p.slot][: p.covered]]
        longest = max(begun, key=lambda p: (p.covered, -p.slot), default=None)
        if longest is None:
            return None
        settings = self.settings_of(sequence) or {}
        if settings.get("mode") == "dense":
            return None
        if self.is_prompt(sequence) and count < FEWEST_PROMPT_TOKENS:
            return None
        dense_prefill = self.prefill == "dense" and settings.get("mode") != "exact"
        return longest if sequence.computed >= (len(prompt) if dense_prefill else longest.covered) else None

    @staticmethod
    def settings_of(sequence):
        return (sequence.request.kv_transfer_params or {}).get("squeeze")

    def attention(self, sequence, placement):
        """How a row on a prefix is to attend to it: the arm, and where it is squeezed the threshold."""
        settings = self.settings_of(sequence) or {}
        if settings.get("mode") == "exact":
            placement = placement.attended_exactly()
        elif "budget" in settings:
            placement = placement.at_budget(settings["budget"])
        prompt = self.is_prompt(sequence)
        arm = Arm.SQUEEZED if settings.get("mode") == "squeezed" else self.arm_on(placement, prompt)
        return arm, placement.log_threshold if arm is Arm.SQUEEZED and not prompt else None

    def find_rows(self, rows, live, num_tokens, prompts):
        """What the worker finds in each group, with a padded row at the end."""
        counts = [count for _, count in rows] + [0]
        ends = [sequence.computed + count for sequence, count in rows]
        found = {}
        for group, state in self.groups.items():
            table, pages = self.tables[group], self.block_sizes[group] // self.kernel_block_size
            for row, (sequence, _) in enumerate(rows):
                blocks = as_int32(sequence.blocks[group])
                # Only a row's own blocks are written; what lies beyond them is of earlier rows.
                within = torch.arange(pages, device=DEVICE)
                table[row, : len(blocks) * pages] = (blocks[:, None] * pages + within).flatten()
            metadata = SimpleNamespace(
                block_table=table,
                seq_lens=as_int32(ends + [0]),
                query_start_loc=as_int32([0, *accumulate(counts)]),
                num_actual_tokens=sum(counts),
                max_seq_len=max(ends, default=0),
            )
            state.note(metadata, self.kernel_block_size)
            state.found = [(DENSE_SLOT, 0)] * (len(rows) + 1)
            if of_group := [block for block in live if block.group == group]:
                state.begin_step(of_group, num_tokens, prompts=prompts)
            found[group] = state.found
            state.end_step()
        return found

    def go_on(self, rows):
        for sequence, count in rows:
            sequence.computed += count
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(self.next_token(sequence))
                sequence.request.num_tokens = len(sequence.tokens)
            if self.random.random() < 0.1 or len(sequence.tokens) > 250:
                self.leave(sequence)
            elif self.random.random() < 0.1:
                self.cache.release(sequence)
                self.preempted.add(sequence.request.request_id)

    def next_token(self, sequence):
        """An answer's, which leads away from the text that the prompt may be a part of."""
        text = next((text for text in self.texts if text[: len(sequence.tokens)] == sequence.tokens), [])
        return (text[len(sequence.tokens)] + 1) % 3 if len(sequence.tokens) < len(text) else self.random.randrange(3)


# The kernel is interpreted where there is no GPU: fewer worlds. They are the same in every run.
FINDERS = pytest.mark.parametrize(
    ("rows_class", "num_worlds"), [(FoundRows, 30), (FoundByKernel, 10)], ids=["oracle", "kernel"]
)
GROUPS = pytest.mark.parametrize(
    ("block_sizes", "kernel_block_size"),
    [({0: 16}, 16), ({1: 32}, 16), ({0: 16, 2: 16}, 16), ({0: 16, 2: 32}, 16)],
    ids=["one-group", "kernel-blocks-of-half-a-block", "two-groups", "groups-of-other-block-sizes"],
)


@FINDERS
@GROUPS
@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "own-copies"])
def test_no_row_is_mistaken(rows_class, num_worlds, block_sizes, kernel_block_size, caching):
    """A row is squeezed if its request begins with an indexed prefix and has computed it, by the longest such one.

    A request that has computed only a shorter indexed prefix of its own stays dense: not both in its lifetime.
    """
    outcomes = Counter()
    for seed in range(num_worlds):
        server = Server(Random(seed), rows_class, block_sizes, kernel_block_size, caching)
        for _ in range(12):
            server.step()
            outcomes.update(server.seen)
        outcomes["alone"] += server.num_alone
        outcomes["prompts"] += server.num_prompts
    assert outcomes["prompts"], "no prompt's tokens have chosen together"
    assert outcomes.keys() >= {SQUEEZED, PREFILL, NOT_COMPUTED, NO_INDEX, CACHE_SALT}, "the worlds are too simple"
    assert outcomes["alone"], "no step has squeezed rows alone"


@FINDERS
@GROUPS
def test_no_row_left_to_vllm_is_taken_for_one_on_another_prefix(rows_class, num_worlds, block_sizes, kernel_block_size):
    """In each step prefixes get any arms: one may be squeezed while another, which begins with it, is not."""
    outcomes = Counter()
    for seed in range(num_worlds):
        server = Server(Random(seed), rows_class, block_sizes, kernel_block_size, caching=True, choosing=True)
        for _ in range(12):
            server.step()
            outcomes.update(server.seen)
    assert outcomes.keys() >= {SQUEEZED, EXACT, FASTER, PREFILL, NOT_COMPUTED}, "the worlds are too simple"


@FINDERS
@GROUPS
@pytest.mark.parametrize("choosing", [False, True], ids=["squeezed", "any-arm"])
def test_each_row_is_attended_to_as_its_request_asked(rows_class, num_worlds, block_sizes, kernel_block_size, choosing):
    """Whatever others on the same prefix, or on one that it begins with, have asked for in the same step."""
    outcomes = Counter()
    for seed in range(num_worlds):
        server = Server(Random(seed), rows_class, block_sizes, kernel_block_size, True, choosing, asking=True)
        for _ in range(12):
            server.step()
            outcomes.update(server.seen)
    assert outcomes.keys() >= {SQUEEZED, EXACT, ASKED_FOR, PREFILL, NOT_COMPUTED}, "the worlds are too simple"
    assert outcomes[NO_ROOM] or choosing, "there is room for all settings"


@pytest.mark.parametrize("context", [150, 153, 159, 160, 164])
def test_a_row_whose_drafts_were_rejected_keeps_its_settings(context):
    """The scheduler has processed 151 tokens and reckons with 164 computed ones; the worker has kept fewer."""
    prefix = [token % 97 for token in range(100)]
    matcher, _ = make_matcher([prefix], {0: 16})
    live, shared = LiveRequests(matcher, {0: 16}, variants=Variants([1, 2])), list(range(10, 15))
    for name, settings in (("plain", {}), ("twin", {}), ("exact", {"mode": "exact"}), ("dense", {"mode": "dense"})):
        request = make_request(name, prefix + [1], kv_transfer_params={"squeeze": settings})
        request.num_tokens = 151
        live.add(request)
    blocks = {
        name: [*shared, *range(first, first + 6)] for name, first in (("exact", 20), ("dense", 40), ("plain", 60))
    }
    # in whose cache the twin has found a block that the exact one is filling
    blocks["twin"] = [*blocks["exact"][:10], 80]
    step = live.step(make_step([(name, (held,), 164, 4) for name, held in blocks.items()]))
    lens = [{"twin": 165}.get(name, context + 4) for name in blocks]
    slots, _ = match(list(blocks.values()), lens, [0, 4, 8, 12, 16], columns(step.live))
    assert slots == [1, DENSE_SLOT, 0, 0]


def test_rows_that_grow_into_a_prefix_are_counted():
    """A prompt that stops just short of a prefix may be answered with the rest of it.

    A second request, on the whole prefix, then finds the first one's block in the cache, and the first one's row
    holds what marks the second's. The tokens of both have to be reckoned with: GPU kernels get a work list that long.
    """
    prefix = [token % 97 for token in range(150)]
    matcher, (placement,) = make_matcher([prefix], {0: 16})
    live, cache = LiveRequests(matcher, {0: 16}), KVCache({0: 16}, True, Random(0))
    first = Sequence(make_request("first", prefix[: placement.covered - 1]))
    second = Sequence(make_request("second", prefix + [1]))
    for sequence in (first, second):
        live.add(sequence.request)
    cache.find(first)
    begun = cache.extend(first, placement.covered - 1)
    live.step(make_step([("first", (begun[0],), 0, placement.covered - 1)]))
    first.computed, first.tokens = placement.covered - 1, prefix[: placement.covered]
    added = cache.extend(first, 1)
    live.step(make_step(cached=[("first", (added[0],), placement.covered - 1, 1)]))
    first.computed, first.tokens = placement.covered, [*first.tokens, 1]
    cache.find(second)
    assert second.computed == placement.covered
    added = cache.extend(second, 7), cache.extend(first, 1)
    new = [("second", (second.blocks[0],), second.computed, 7)]
    blocks, num_tokens, *_ = live.step(make_step(new, cached=[("first", (added[1][0],), 144, 1)]))
    rows = columns(blocks)
    slots, _ = match([first.blocks[0], second.blocks[0]], [145, 151], [0, 1, 8], rows)
    assert slots[1] == placement.slot
    assert num_tokens == sum(count for count, slot in zip((1, 7), slots) if slot >= 0)


def test_a_row_left_to_vllm_that_grows_into_a_longer_prefix_stays_there():
    """Its prompt begins with a short prefix and its answer goes on with a longer one, which another row is on."""
    prefix = [token % 97 for token in range(150)]
    matcher, placements = make_matcher([prefix[:70], prefix], {0: 16})
    live = LiveRequests(matcher, {0: 16}, arms_by_slot(Arm.STOCK, Arm.SQUEEZED))
    shared = list(range(10, 19))
    for name, tokens in (("short", prefix[:80]), ("long", prefix + [1])):
        live.add(make_request(name, tokens))
    new = [("short", ([*shared, 20],), 150, 1), ("long", ([*shared, 30],), 144, 7)]
    blocks, num_tokens, *_ = live.step(make_step(new))
    assert [placement.covered for placement in placements] == [64, 144]
    assert num_tokens == 7 and live.rows == {FASTER: 1, SQUEEZED: 1}
    rows = columns(blocks)
    slots, _ = match([[*shared, 20], [*shared, 30]], [151, 151], [0, 1, 8], rows)
    assert slots == [DENSE_SLOT, 1]


def test_a_row_left_to_vllm_whose_drafts_were_rejected_stays_there():
    """The scheduler reckons with drafts, of which the worker then keeps fewer: it finds fewer computed tokens."""
    prefix = [token % 97 for token in range(150)]
    matcher, _ = make_matcher([prefix[:70], prefix], {0: 16})
    live = LiveRequests(matcher, {0: 16}, arms_by_slot(Arm.SQUEEZED, Arm.STOCK))
    shared = list(range(10, 14))
    for name, tokens in (("short", prefix[:80]), ("long", prefix + [1])):
        live.add(make_request(name, tokens))
    new = [("short", ([*shared, 20, 21],), 81, 1), ("long", ([*shared, *range(30, 37)],), 155, 4)]
    blocks, *_ = live.step(make_step(new))
    rows = columns(blocks)
    table = [[*shared, 20, 21, *[0] * 5], [*shared, *range(30, 37)]]
    slots, _ = match(table, [82, 152 + 4], [0, 1, 5], rows)
    assert slots == [0, DENSE_SLOT]


@pytest.mark.parametrize(("context", "slot"), [(31, -1), (32, 4), (47, 4), (48, -1), (49, 4), (64, 9), (80, 9)])
def test_the_longest_prefix_wins_and_a_row_still_computing_its_own_is_dense(context, slot):
    """Slot 4 ends with block 7 after 32 tokens, slot 9 with block 5 after 64; a row at token 48 fills block 6."""
    live = [[DENSE_SLOT, 2, 6, 48, 48, 0], [4, 1, 7, 32, MANY, 32], [9, 3, 5, 64, MANY, 64]]
    found = match([[3, 7, 6, 5]], [context + 5], [0, 5], live)
    assert found == [[slot], [{-1: 0, 4: 32, 9: 64}[slot]]]


@pytest.mark.parametrize(("context", "slot"), [(31, -1), (32, 4), (63, 4), (64, -1), (70, -1), (96, 9)])
def test_rows_on_a_prefix_left_to_vllm_are_dense_from_its_end_on(context, slot):
    """Slot 4 ends with block 7, slot 9 with block 2; between them ends a prefix, with block 5, that is not squeezed."""
    live = [[STOCK_SLOT, 3, 5, 64, MANY, 64], [4, 1, 7, 32, MANY, 32], [9, 5, 2, 96, MANY, 96]]
    slots, _ = match([[3, 7, 6, 5, 8, 2]], [context + 5], [0, 5], live)
    assert slots == [slot]


def test_a_prefix_that_is_longer_than_a_block_table_matches_no_row():
    assert match([[3, 7]], [500], [0, 1], [[0, 2, 7, 48, MANY, 48]]) == [[DENSE_SLOT], [0]]


def test_rows_for_whose_tokens_there_is_no_room_go_dense():
    """All but the third are on a prefix, with 2, 1 and 3 tokens: room for 5 is not enough for the last."""
    table, seq_lens, starts = [[3, 7], [3, 7], [4, 5], [3, 7]], [34, 33, 60, 35], [0, 2, 3, 8, 11]
    assert match(table, seq_lens, starts, [[1, 1, 7, 32, MANY, 32]], 6) == [[1, 1, DENSE_SLOT, 1], [32, 32, 0, 32]]
    assert match(table, seq_lens, starts, [[1, 1, 7, 32, MANY, 32]], 5) == [
        [1, 1, DENSE_SLOT, DENSE_SLOT],
        [32, 32, 0, 0],
    ]
