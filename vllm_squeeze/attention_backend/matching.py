"""The scheduler's side: which requests begin with an indexed prefix, and where it lies in the KV cache."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_squeeze.attention_backend.placement import Placement

SQUEEZED = "squeezed"
NO_INDEX = "dense: no index"
NOT_COMPUTED = "dense: prefix not in the KV cache yet"
LORA = "dense: LoRA adapter"
CACHE_SALT = "dense: cache salt"
EMBEDDINGS = "dense: prompt embeddings"
MULTIMODAL = "dense: multimodal item in the prefix"

DENSE_SLOT = -1
_FIRST = 16


class LiveBlock(NamedTuple):
    """Tells the worker what a row is: one whose block table holds ``block`` at ``index``.

    Attributes:
        slot: the row's prefix, or DENSE_SLOT for a row that must stay dense.
        group: KV cache group.
        index: position in the block table.
        block: physical block id.
        context: tokens that a row must have computed for this to hold of it; of several, the most wins.
    """

    slot: int
    group: int
    index: int
    block: int
    context: int


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

    Attributes:
        rows: rows scheduled since they were last taken, by what became of them.
    """

    def __init__(self, matcher: PrefixMatcher, block_sizes: dict[int, int]):
        self.rows: Counter[str] = Counter()
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

    def step(self, scheduled: Any) -> tuple[list[LiveBlock], int]:
        """What the worker has to know of a step.

        Args:
            scheduled: vLLM's SchedulerOutput.

        Returns:
            the live blocks, sorted, none if no row is squeezed; and the number of tokens of squeezed rows.
        """
        num_rows = len(scheduled.num_scheduled_tokens)
        if not self._live and not self._refused:
            self.rows += Counter({NO_INDEX: num_rows})
            return [], 0
        reasons = Counter(self._refused[id] for id in self._refused.keys() & scheduled.num_scheduled_tokens.keys())
        ready, waiting, num_tokens = [], [], 0
        for request_id, computed in self._update(scheduled):
            live = self._live[request_id]
            if live.begins_with_prefix and computed >= live.placement.covered and self._knows_prefix(live):
                ready.append(live)
                num_tokens += scheduled.num_scheduled_tokens[request_id]
            else:
                waiting.append((live, computed))
        not_computed = sum(live.begins_with_prefix for live, _ in waiting)
        reasons += Counter({SQUEEZED: len(ready), NOT_COMPUTED: not_computed})
        self.rows += reasons + Counter({NO_INDEX: num_rows - reasons.total()})

        blocks = {block for live in ready for block in self._prefix_blocks(live)}
        if blocks:
            shortest = min(block.context for block in blocks)
            blocks |= {
                block
                for live, computed in waiting
                if computed >= shortest
                for block in self._dense_blocks(live, computed)
            }
        return sorted(blocks), num_tokens

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

    def _prefix_blocks(self, live: _Live) -> Iterable[LiveBlock]:
        """The last block of the request's prefix, in each group: it stands for all before it."""
        for group, prefix_len in live.placement.prefix_lens.items():
            last = prefix_len // self._block_sizes[group] - 1
            yield LiveBlock(live.placement.slot, group, last, live.blocks[group][last], prefix_len)

    def _dense_blocks(self, live: _Live, computed: int) -> Iterable[LiveBlock]:
        """Keeps a request that is still computing its prefix from being taken for one on a shorter indexed prefix.

        Of the rows that hold the block which it is about to fill, only its own has computed as many tokens.
        """
        for group in live.placement.prefix_lens:
            index = computed // self._block_sizes[group]
            for block in live.blocks[group][index : index + 1]:
                yield LiveBlock(DENSE_SLOT, group, index, block, computed)
