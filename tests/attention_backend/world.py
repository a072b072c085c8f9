"""A scheduler and a KV cache in miniature, which hand out blocks by vLLM's rules, for tests of the row matching."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from tests.prefix_index.small_index import PARAMETERS, make_identity, make_manifest, make_tokens
from vllm_squeeze.attention_backend.matching import PrefixMatcher
from vllm_squeeze.attention_backend.placement import Options, Placement, place
from vllm_squeeze.prefix_index.manifest import LayerEntry

OPTIONS = Options(
    indexes=[],
    folders=[],
    watch=0,
    budget=1.0,
    max_kl=0.05,
    rest="value_centroids",
    mode="squeezed",
    prefill="dense",
    memory_limit_gib=1.0,
    pin_share=0.5,
)


def make_placement(slot: int, num_tokens: int, block_sizes: dict[int, int], rule: str = "keys") -> Placement:
    """Places a prefix of so many tokens, as a server would."""
    num_members = num_tokens - PARAMETERS.num_sinks - PARAMETERS.observation_window
    identity = make_identity()
    of_cluster, of_prefix = identity.head_size + 20, 72 * identity.head_size
    num_bytes = identity.num_kv_heads * (of_cluster + of_prefix + 12 * num_members) + 100
    manifest = make_manifest(
        make_tokens(),
        [LayerEntry("layer", num_centroids=1, num_bytes=num_bytes, digest="")],
        num_tokens=num_tokens,
        num_members=num_members,
        parameters=replace(PARAMETERS, rule=rule),
    )
    placement = place(SimpleNamespace(manifest=manifest, folder=Path("index")), OPTIONS, block_sizes)
    placement.slot = slot
    return placement


def make_matcher(prefixes: list[list[int]], block_sizes: dict[int, int]) -> tuple[PrefixMatcher, list[Placement]]:
    """A matcher of these prefixes; the slot of each is its position."""
    placements = [make_placement(slot, len(prefix), block_sizes) for slot, prefix in enumerate(prefixes)]
    return PrefixMatcher(zip(placements, prefixes)), placements


def make_request(request_id: str, tokens: list[int] | None, **changes: Any) -> SimpleNamespace:
    """What the matching reads of a vLLM request."""
    return SimpleNamespace(
        **{
            "request_id": request_id,
            "prompt_token_ids": tokens,
            "num_tokens": len(tokens or ()),
            "prompt_embeds": None,
            "lora_request": None,
            "cache_salt": None,
            "mm_features": [],
            "kv_transfer_params": None,
            **changes,
        }
    )


def make_step(new: list[tuple] = (), cached: list[tuple] = (), resumed: set[str] = frozenset()) -> SimpleNamespace:
    """What the matching reads of a vLLM SchedulerOutput.

    Args:
        new: of each new request its id, block ids by group, computed tokens, and tokens scheduled.
        cached: the same of the others; block ids are the new ones, or None.
        resumed: ids of those whose blocks are all new.
    """
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=id, block_ids=blocks, num_computed_tokens=computed)
            for id, blocks, computed, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[id for id, *_ in cached],
            new_block_ids=[blocks for _, blocks, *_ in cached],
            num_computed_tokens=[computed for *_, computed, _ in cached],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens={id: scheduled for id, *_, scheduled in (*new, *cached)},
    )


class Sequence:
    """One request: its tokens, prompt and answer, and what the cache holds of it."""

    def __init__(self, request: SimpleNamespace):
        self.request = request
        self.tokens = list(request.prompt_token_ids)
        self.stop()

    def stop(self) -> None:
        """Forgets what was computed, as preemption does."""
        self.computed = 0
        self.blocks: dict[int, list[int]] = {}


class KVCache:
    """Blocks of all groups, from one pool. Equal contents are shared when caching is on, and only these.

    Args:
        block_sizes: by group.
        caching: whether requests share blocks.
        random: picks blocks, so that they are soon used again.
    """

    def __init__(self, block_sizes: dict[int, int], caching: bool, random: Random):
        self._block_sizes, self._caching, self._random = block_sizes, caching, random
        self._free = list(range(1, 300))
        self._users: Counter[int] = Counter()
        self._cached: dict[tuple, int] = {}

    def _content(self, sequence: Sequence, group: int, block: int) -> tuple:
        tokens = sequence.tokens[: (block + 1) * self._block_sizes[group]]
        return group, sequence.request.cache_salt, sequence.request.lora_request, tuple(tokens)

    def find(self, sequence: Sequence) -> None:
        """Gives a request the blocks that are there already, but never that of its last token."""
        largest = max(self._block_sizes.values())
        most = (len(sequence.tokens) - 1) // largest * largest if self._caching else 0
        hits = {}
        for group, size in self._block_sizes.items():
            contents = [self._content(sequence, group, block) for block in range(most // size)]
            blocks = [self._cached.get(content) for content in contents]
            hits[group] = blocks[: blocks.index(None)] if None in blocks else blocks
        length = min(len(blocks) * self._block_sizes[group] for group, blocks in hits.items()) // largest * largest
        sequence.computed = length
        sequence.blocks = {group: blocks[: length // self._block_sizes[group]] for group, blocks in hits.items()}
        for block in sum(sequence.blocks.values(), []):
            self._users[block] += 1
            if block in self._free:
                self._free.remove(block)

    def extend(self, sequence: Sequence, num_tokens: int) -> dict[int, list[int]]:
        """Adds blocks for the next tokens; full ones can be shared at once, in the same step. Returns the new ones."""
        added: dict[int, list[int]] = {}
        end = sequence.computed + num_tokens
        for group, size in self._block_sizes.items():
            blocks = sequence.blocks[group]
            added[group] = [self._take() for _ in range(-(-end // size) - len(blocks))]
            blocks += added[group]
            for number in range(end // size if self._caching else 0):
                self._cached.setdefault(self._content(sequence, group, number), blocks[number])
        return added

    def _take(self) -> int:
        block = self._free.pop(self._random.randrange(len(self._free)))
        self._cached = {content: held for content, held in self._cached.items() if held != block}
        self._users[block] += 1
        return block

    def release(self, sequence: Sequence) -> None:
        """Takes back a request's blocks. Their contents stay until they are used again."""
        for block in sum(sequence.blocks.values(), []):
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)
        sequence.stop()
