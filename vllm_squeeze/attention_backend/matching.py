"""The scheduler's side: which requests begin with an indexed prefix, and where it lies in the KV cache."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_squeeze.attention_backend.placement import Placement
from vllm_squeeze.attention_backend.policy import Arm, ChooseArm, Work, always_squeezed
from vllm_squeeze.kernels.tables import DENSE_SLOT, STOCK_SLOT

SQUEEZED = "squeezed"
EXACT = "exact"
FASTER = "dense: faster"
NO_INDEX = "dense: no index"
NOT_COMPUTED = "dense: prefix not in the KV cache yet"
LORA = "dense: LoRA adapter"
CACHE_SALT = "dense: cache salt"
EMBEDDINGS = "dense: prompt embeddings"
MULTIMODAL = "dense: multimodal item in the prefix"

OUTCOMES = {Arm.SQUEEZED: SQUEEZED, Arm.EXACT: EXACT, Arm.STOCK: FASTER}

_FIRST = 16


class LiveBlock(NamedTuple):
    """Tells the worker what a row is: one whose block table holds ``block`` at ``index``.

    Attributes:
        slot: the row's prefix. STOCK_SLOT for rows on a prefix that vLLM's own attention serves in this step, and
            DENSE_SLOT for a row that must stay dense.
        group: KV cache group.
        index: position in the block table.
        block: physical block id.
        context: tokens that a row must have computed for this to hold of it; for DENSE_SLOT, so many and no more. Of
            several, the most wins.
        exact: whether rows on the prefix attend to all of its keys in this step.
    """

    slot: int
    group: int
    index: int
    block: int
    context: int
    exact: bool = False


class Step(NamedTuple):
    """What the worker has to know of a step.

    Attributes:
        live: the live blocks, sorted, none if our kernels have no rows.
        num_tokens: query tokens of the rows that they have.
        longest_suffix: tokens that follow the prefix in the longest of these rows, at most; None if the step has other
            rows too.
    """

    live: list[LiveBlock]
    num_tokens: int
    longest_suffix: int | None


class PrefixMatcher:
    """Finds the longest indexed prefix that a request begins with, in time that does not depend on their number."""

    def __init__(self, placements: Iterable[Placement], token_ids: dict[int, list[int]]):
        self._by_start: dict[tuple[int, ...], list[tuple[Placement, list[int]]]] = {}
        for placement in sorted(placements, key=lambda placement: -placement.covered):
            covered = token_ids[placement.slot][: placement.covered]
            self._by_start.setdefault(tuple(covered[:_FIRST]), []).append((placement, covered))

    def match(self, request: Any) -> tuple[Placement | None, str]:
        """Returns the placement of the request's prefix, or None, and what becomes of its rows.

        A prompt that is itself the start of a prefix has a placement too, though NO_INDEX: its answer may complete
        the prefix, and its row would then look like one on it.
        """
        if request.prompt_embeds is not None:
            return None, EMBEDDINGS
        tokens, start_of = request.prompt_token_ids, None
        for placement, covered in self._by_start.get(tuple(tokens[:_FIRST]), ()):
            if tokens[: len(covered)] != covered[: len(tokens)]:
                continue
            if len(tokens) < len(covered):
                start_of = placement
                continue
            if request.lora_request is not None:
                return None, LORA
            if request.cache_salt is not None:
                return None, CACHE_SALT
            if any(item.mm_position.offset < len(covered) for item in request.mm_features or ()):
                return None, MULTIMODAL
            return placement, SQUEEZED
        return start_of, NO_INDEX


@dataclass
class _Live:
    placement: Placement
    begins_with_prefix: bool
    blocks: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def extend(self, block_ids: tuple[list[int], ...]) -> None:
        for group in self.placement.prefix_lens:
            self.blocks[group].extend(block_ids[group])


class LiveRequests:
    """The requests that begin with an indexed prefix, from arrival to end, and what they are in each step.

    Args:
        matcher: of the indexed prefixes.
        block_sizes: by KV cache group.
        choose: how the rows of a step on one prefix attend to it.

    Attributes:
        rows: rows scheduled since they were last taken, by what became of them.
    """

    def __init__(self, matcher: PrefixMatcher, block_sizes: dict[int, int], choose: ChooseArm = always_squeezed):
        self.rows: Counter[str] = Counter()
        self._choose = choose
        self._matcher = matcher
        self._block_sizes = block_sizes
        self._live: dict[str, _Live] = {}
        self._refused: dict[str, str] = {}

    def add(self, request: Any) -> None:
        placement, reason = self._matcher.match(request)
        if placement is not None:
            self._live[request.request_id] = _Live(placement, reason == SQUEEZED)
        elif reason != NO_INDEX:
            self._refused[request.request_id] = reason

    def remove(self, request_id: str) -> None:
        self._live.pop(request_id, None)
        self._refused.pop(request_id, None)

    def step(self, scheduled: Any) -> Step:
        """Follows a step, vLLM's SchedulerOutput."""
        num_rows = len(scheduled.num_scheduled_tokens)
        if not self._live and not self._refused:
            self.rows += Counter({NO_INDEX: num_rows})
            return Step([], 0, None)
        reasons = Counter(self._refused[id] for id in self._refused.keys() & scheduled.num_scheduled_tokens.keys())
        ready, dense = defaultdict(list), []
        for request_id, computed in self._update(scheduled):
            live = self._live[request_id]
            if live.begins_with_prefix and computed >= live.placement.covered and self._knows_prefix(live):
                ready[live.placement.slot].append((live, computed, scheduled.num_scheduled_tokens[request_id]))
            else:
                reasons[NOT_COMPUTED] += live.begins_with_prefix
                dense.append((live, computed))

        blocks, stock, num_tokens, suffixes = set(), set(), 0, []
        for rows in ready.values():
            work = Work.of([count for *_, count in rows])
            arm = self._choose(rows[0][0].placement, work)
            reasons[OUTCOMES[arm]] += len(rows)
            marks = {block for live, *_ in rows for block in self._prefix_blocks(live, arm)}
            if arm is Arm.STOCK:
                stock |= marks
                dense += [(live, computed) for live, computed, _ in rows]
            else:
                blocks |= marks
                num_tokens += work.tokens
                suffixes += [computed + count - live.placement.covered for live, computed, count in rows]
        self.rows += reasons + Counter({NO_INDEX: num_rows - reasons.total()})

        if blocks:
            shortest = min(block.context for block in blocks)
            blocks |= stock
            blocks |= {
                block
                for live, computed in dense
                if computed >= shortest
                for block in self._dense_blocks(live, computed)
            }
        return Step(sorted(blocks), num_tokens, max(suffixes) if 0 < len(suffixes) == num_rows else None)

    def _update(self, scheduled: Any) -> list[tuple[str, int]]:
        """Takes note of new blocks; returns the scheduled live requests and the tokens each has computed."""
        computed = []
        for new in scheduled.scheduled_new_reqs:
            if live := self._live.get(new.req_id):
                live.blocks.clear()
                live.extend(new.block_ids)
                computed.append((new.req_id, new.num_computed_tokens))
        cached = scheduled.scheduled_cached_reqs
        for request_id, new_blocks, count in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            if live := self._live.get(request_id):
                if request_id in cached.resumed_req_ids:
                    live.blocks.clear()
                if new_blocks is not None:
                    live.extend(new_blocks)
                computed.append((request_id, count))
        return computed

    def _knows_prefix(self, live: _Live) -> bool:
        """Whether vLLM has told of all blocks of the request's prefix; if not, the row goes dense."""
        prefix_lens = live.placement.prefix_lens.items()
        return all(len(live.blocks[group]) * self._block_sizes[group] >= length for group, length in prefix_lens)

    def _prefix_blocks(self, live: _Live, arm: Arm) -> Iterable[LiveBlock]:
        """The last block of the request's prefix, in each group: it stands for all before it."""
        slot = STOCK_SLOT if arm is Arm.STOCK else live.placement.slot
        for group, prefix_len in live.placement.prefix_lens.items():
            last = prefix_len // self._block_sizes[group] - 1
            yield LiveBlock(slot, group, last, live.blocks[group][last], prefix_len, arm is Arm.EXACT)

    def _dense_blocks(self, live: _Live, computed: int) -> Iterable[LiveBlock]:
        """Keeps a request from being taken for one on another indexed prefix that it has computed too.

        That may be a shorter one, while it is still computing its own, or a longer one that its answer goes on with.
        Of the rows that hold the block which it is about to fill, only its own has computed as many tokens.
        """
        for group in live.placement.prefix_lens:
            index = computed // self._block_sizes[group]
            for block in live.blocks[group][index : index + 1]:
                yield LiveBlock(DENSE_SLOT, group, index, block, computed)
