"""The scheduler's side: which requests begin with an indexed prefix, and where it lies in the KV cache."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, KeysView
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_squeeze.attention_backend.misses import Misses
from vllm_squeeze.attention_backend.placement import FEWEST_PROMPT_TOKENS, Placement
from vllm_squeeze.attention_backend.policy import Arm, ChooseArms, Rows, Work, always_squeezed
from vllm_squeeze.attention_backend.request_settings import RequestReport, RequestSettings
from vllm_squeeze.attention_backend.variants import Variants, VariantSlot
from vllm_squeeze.kernels.tables import DENSE_SLOT, STOCK_SLOT

SQUEEZED = "squeezed"
EXACT = "exact"
FASTER = "dense: faster"
NO_INDEX = "dense: no index"
PREFILL = "dense: prefill"
ASKED_FOR = "dense: asked for"
NO_ROOM = "dense: no room for its settings"
NOT_LOADED = "dense: index not on the device yet"
GONE = "dense: index no longer served"
NOT_COMPUTED = "dense: prefix not in the KV cache yet"
LORA = "dense: LoRA adapter"
CACHE_SALT = "dense: cache salt"
EMBEDDINGS = "dense: prompt embeddings"
MULTIMODAL = "dense: multimodal item in the prefix"

OUTCOMES = {Arm.SQUEEZED: SQUEEZED, Arm.EXACT: EXACT, Arm.SHARED: EXACT, Arm.STOCK: FASTER}

_FIRST = 16
_ANY_NUMBER = 2**31 - 1


class LiveBlock(NamedTuple):
    """Tells the worker what a row is: one whose block table holds ``block`` at ``index``.

    Attributes:
        slot: the row's prefix and settings. STOCK_SLOT for rows on a prefix that vLLM's own attention serves in this
            step, and DENSE_SLOT for a row that must stay dense.
        group: KV cache group.
        index: position in the block table.
        block: physical block id.
        context: tokens that a row must have computed for this to hold of it. Of several, the most wins.
        length: tokens of the prefix, 0 for DENSE_SLOT.
        most: tokens that the row may have computed.
        exact: whether rows of the slot attend to all keys of the prefix in this step.
        prompt: whether the rows are prompts', whose tokens choose together.
    """

    slot: int
    group: int
    index: int
    block: int
    context: int
    length: int
    most: int = _ANY_NUMBER
    exact: bool = False
    prompt: bool = False


class Step(NamedTuple):
    """What the worker has to know of a step.

    Attributes:
        live: the live blocks, first those of single rows, none if our kernels have no rows.
        num_tokens: query tokens of the rows that they have, but for those of prompts that choose together.
        longest_suffix: tokens that follow the prefix in the longest of these rows, at most, but for those prompts; None
            if the step has other rows too.
        variants: how the slots beyond those of prefixes are set.
        shared: whether these rows, all of which are exact, do best to attend to their prefixes by FlashAttention of all
            rows at once.
        prompts: query tokens of each prompt whose tokens choose together.
    """

    live: list[LiveBlock]
    num_tokens: int
    longest_suffix: int | None
    variants: tuple[VariantSlot, ...] = ()
    shared: bool = False
    prompts: tuple[int, ...] = ()


_NOTHING = Step([], 0, None)


class PrefixMatcher:
    """Finds the longest indexed prefix that a request begins with, in time that does not depend on their number.

    Args:
        prefixes: the placement of each, and its token ids.
    """

    def __init__(self, prefixes: Iterable[tuple[Placement, list[int]]] = ()):
        self._by_start: dict[tuple[int, ...], list[tuple[Placement, list[int]]]] = {}
        for placement, token_ids in prefixes:
            self.add(placement, token_ids)

    def add(self, placement: Placement, token_ids: list[int]) -> None:
        """From here on requests may begin with this prefix too."""
        covered = token_ids[: placement.covered]
        alike = self._by_start.setdefault(tuple(covered[:_FIRST]), [])
        alike.append((placement, covered))
        alike.sort(key=lambda prefix: -len(prefix[1]))

    def remove(self, placement: Placement) -> None:
        """Has no request begin with this prefix from here on."""
        for start, alike in self._by_start.items():
            if any(other is placement for other, _ in alike):
                self._by_start[start] = [prefix for prefix in alike if prefix[0] is not placement]

    def match(self, request: Any) -> tuple[Placement | None, str]:
        """Returns the placement of the request's prefix, or None, and what becomes of its rows.

        A prompt that is itself the start of a prefix has a placement too, though NO_INDEX: its answer may complete
        the prefix, and its row would then look like one on it.
        """
        if request.prompt_embeds is not None:
            return None, EMBEDDINGS
        tokens, start_of = request.prompt_token_ids, None
        for placement, covered in self._by_start.get(tuple(tokens[:_FIRST]), ()):
            if len(tokens) < len(covered):
                if _begins_with(covered, tokens):
                    start_of = placement
                continue
            if not _begins_with(tokens, covered):
                continue
            if request.lora_request is not None:
                return None, LORA
            if request.cache_salt is not None:
                return None, CACHE_SALT
            if any(item.mm_position.offset < len(covered) for item in request.mm_features or ()):
                return None, MULTIMODAL
            return placement, SQUEEZED
        return start_of, NO_INDEX

    def nearest(self, tokens: list[int]) -> tuple[Placement, int] | None:
        """Of the prefixes that begin with the same 16 tokens, that with which most agree, and how many; None without."""
        alike = self._by_start.get(tuple(tokens[:_FIRST]), ())
        agreed = [(_agreement(tokens, covered), placement) for placement, covered in alike]
        if not agreed:
            return None
        most, placement = max(agreed, key=lambda found: found[0])
        return placement, most


def _agreement(tokens: list[int], others: list[int]) -> int:
    """How many leading tokens are the same, of which the first 16 are."""
    agreed, step, end = _FIRST, _FIRST, min(len(tokens), len(others))
    while agreed < end and step:
        step = min(step, end - agreed)
        if tokens[agreed : agreed + step] == others[agreed : agreed + step]:
            agreed += step
            step *= 2
        else:
            step //= 2
    return agreed


def _begins_with(tokens: list[int], start: list[int]) -> bool:
    """Whether the first of at least as many tokens are ``start``, which is not empty."""
    # A slice is a copy. The last token tells most texts apart without one, also those of one chat template.
    return tokens[len(start) - 1] == start[-1] and tokens[: len(start)] == start


@dataclass(slots=True)
class _Live:
    """What is known of a request.

    Attributes:
        request: vLLM's.
        placement: of the prefix that it begins with, or is the start of.
        settings: by which its rows attend to the prefix, as ``RequestSettings.on`` has them.
        variant: the prefix as its rows attend to it.
        begins_with_prefix: whether it is the former.
        ready_from: tokens that must have been computed before its row is more than dense: the prefix, or the prompt.
        together_to: of tokens before this one those of a step choose together: the prompt's, or none.
        never: why its rows are to be dense all the same; None if they are not.
        block_sizes: by KV cache group.
        blocks: that vLLM has told of, by KV cache group.
        prefix_ends: the last block of the request's prefix, in each group: it stands for all before it. As LiveBlock's
            group, index, block, context and length. None until vLLM has told of all blocks of the prefix; the row goes
            dense.
    """

    request: Any
    placement: Placement
    settings: RequestSettings
    variant: Placement
    begins_with_prefix: bool
    ready_from: int
    together_to: int
    never: str | None
    block_sizes: dict[int, int]
    blocks: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    prefix_ends: tuple[tuple[int, ...], ...] | None = None

    def why_dense(self, computed: int) -> str:
        """What becomes of a row that has computed so many tokens, and is not ready for more."""
        if computed < self.placement.covered:
            return NOT_COMPUTED
        if self.never is not None:
            return self.never
        return PREFILL if computed < self.ready_from else NOT_LOADED

    def clear(self) -> None:
        """Forgets the blocks."""
        self.blocks.clear()
        self.prefix_ends = None

    def extend(self, block_ids: tuple[list[int], ...]) -> None:
        for group in self.placement.prefix_lens:
            self.blocks[group].extend(block_ids[group])
        if self.prefix_ends is None and self.begins_with_prefix:
            self.prefix_ends = self._find_ends()

    def prefix_blocks(self) -> list[int]:
        """The blocks of the prefix, in order, of one KV cache group after the other."""
        lens = self.placement.prefix_lens.items()
        return [block for group, len in lens for block in self.blocks[group][: len // self.block_sizes[group]]]

    def own_blocks(
        self, slot: int, computed: int, length: int, exact: bool = False, prompt: bool = False
    ) -> Iterator[LiveBlock]:
        """Tells the request's row from all others, whatever prefixes they share, by the block that it is filling.

        Others find a block in the cache once it is full, if only in this very step: they have computed all of it. The
        scheduler may reckon with drafts that the worker has not kept: then it is an earlier block, of tokens beyond
        those that are known.
        """
        for group in self.placement.prefix_lens:
            size, blocks = self.block_sizes[group], self.blocks[group]
            for index in range(min(computed, self.request.num_tokens - 1) // size, computed // size + 1):
                for block in blocks[index : index + 1]:
                    most = (index + 1) * size - 1
                    yield LiveBlock(slot, group, index, block, index * size, length, most, exact, prompt)

    def _find_ends(self) -> tuple[tuple[int, ...], ...] | None:
        ends = []
        for group, prefix_len in self.placement.prefix_lens.items():
            last = prefix_len // self.block_sizes[group] - 1
            if last >= len(self.blocks[group]):
                return None
            ends.append((group, last, self.blocks[group][last], prefix_len, prefix_len))
        return tuple(ends)


class LiveRequests:
    """The requests that begin with an indexed prefix, from arrival to end, and what they are in each step.

    Args:
        matcher: of the indexed prefixes.
        block_sizes: by KV cache group.
        choose: how the rows of a step attend to their prefixes.
        dense_prefill: whether a prompt's tokens are dense where attention to the prefix would not be exact.
        tiled_prompts: else whether they choose together.
        pin: told, in each step of a row, of a computed prefix that is to stay in the KV cache, and asked for, its blocks.
        variants: the slots for settings of requests.
        keep_apart: told of a request that may be squeezed, its first token that may be, and how: blocks of the KV cache
            that hold such tokens are for requests that are squeezed alike.

    Attributes:
        running: the requests that have arrived and not ended, by id.
        rows: rows scheduled since they were last taken, by what became of them.
        misses: requests whose prompts begin as a prefix does, but not with the whole of it.
    """

    def __init__(
        self,
        matcher: PrefixMatcher,
        block_sizes: dict[int, int],
        choose: ChooseArms = always_squeezed,
        dense_prefill: bool = False,
        pin: Callable[[Placement, Callable[[], list[int]]], None] = lambda placement, block_ids: None,
        variants: Variants | None = None,
        keep_apart: Callable[[Any, int, str], None] = lambda request, first, how: None,
        tiled_prompts: bool = False,
    ):
        self.running: dict[str, Any] = {}
        self.rows: Counter[str] = Counter()
        self.misses = Misses()
        self._choose = choose
        self._matcher = matcher
        self._block_sizes = block_sizes
        self._dense_prefill, self._tiled_prompts = dense_prefill, tiled_prompts
        self._pin = pin
        self._variants = variants or Variants()
        self._keep_apart = keep_apart
        self._live: dict[str, _Live] = {}
        self._refused: dict[str, str] = {}
        self._reports: dict[str, RequestReport] = {}

    def add(self, request: Any) -> Placement | None:
        """Follows a request that has arrived; returns the placement of its prefix if that could be squeezed for it."""
        self.running[request.request_id] = request
        placement, reason = self._matcher.match(request)
        if reason == NO_INDEX and (nearest := self._matcher.nearest(request.prompt_token_ids)) is not None:
            self.misses.add(*nearest, len(request.prompt_token_ids))
        report = RequestReport.of(request.kv_transfer_params)
        if report is not None:
            self._reports[request.request_id] = report
        if placement is None:
            if reason != NO_INDEX:
                self._refused[request.request_id] = reason
            return None
        settings, variant, never = RequestSettings(), placement, None
        if report is not None and reason == SQUEEZED:
            settings, variant, never = self._as_asked(placement, report)
        dense_prompt = self._dense_prefill and not variant.exact
        num_prompt = len(request.prompt_token_ids)
        ready_from = num_prompt if dense_prompt else placement.covered
        together_to = num_prompt if self._tiled_prompts and not variant.exact else 0
        self._live[request.request_id] = _Live(
            request, placement, settings, variant, reason == SQUEEZED, ready_from, together_to, never, self._block_sizes
        )
        if reason != SQUEEZED or never is not None:
            return None
        if not variant.exact:
            self._keep_apart(request, ready_from, f"{placement.name} {settings.mode} {variant.budget}")
        return placement

    def _as_asked(self, placement: Placement, report: RequestReport) -> tuple[RequestSettings, Placement, str | None]:
        """How a request that has settings attends to its prefix, as in ``_Live``; the report is told too."""
        report.index = placement.name
        if report.settings.mode != "dense":
            try:
                settings, variant = report.settings.on(placement)
            except ValueError as error:
                report.refuse(error)
            else:
                report.budget = variant.budget
                return settings, variant, None
        return RequestSettings(), placement, ASKED_FOR

    def on(self, prefix: list[int]) -> set[str]:
        """The running requests whose prompts begin with these tokens, or are the start of them."""
        prompts = {id: request.prompt_token_ids or [] for id, request in self.running.items()}
        return {id for id, tokens in prompts.items() if tokens[: len(prefix)] == prefix[: len(tokens)]}

    def num_on(self, placement: Placement) -> int:
        """How many running requests are followed for a prefix."""
        return sum(live.placement is placement for live in self._live.values())

    def leave_dense(self, placement: Placement) -> None:
        """Has the rows on a prefix be dense from here on, as its index is gone."""
        for live in self._live.values():
            if live.placement is placement:
                live.never = GONE

    def remove(self, request_id: str) -> RequestReport | None:
        """Forgets a request; returns what it is to be told, if it had settings."""
        self.running.pop(request_id, None)
        self._live.pop(request_id, None)
        self._refused.pop(request_id, None)
        return self._reports.pop(request_id, None)

    def step(self, scheduled: Any) -> Step:
        """Follows a step, vLLM's SchedulerOutput."""
        counts = scheduled.num_scheduled_tokens
        if not self._live and not self._refused:
            self._count({}, counts.keys())
            return _NOTHING
        outcomes = {request_id: self._refused[request_id] for request_id in self._refused.keys() & counts.keys()}
        self._variants.give_back((live.placement, live.settings) for live in self._live.values() if not live.never)
        ready, dense = defaultdict(lambda: defaultdict(list)), []
        for request_id, live, computed in self._update(scheduled):
            placement = live.placement
            if placement.pinned and live.prefix_ends is not None and computed >= placement.covered:
                self._pin(placement, live.prefix_blocks)
            waits = placement.slot is None or live.never is not None
            is_ready = live.prefix_ends is not None and computed >= live.ready_from and not waits
            prompt = computed < live.together_to
            if is_ready and not (prompt and counts[request_id] < FEWEST_PROMPT_TOKENS):
                ready[placement][live.settings, prompt].append((request_id, live, computed))
                continue
            dense.append((live, computed))
            if live.begins_with_prefix:
                outcomes[request_id] = PREFILL if is_ready else live.why_dense(computed)

        ends, own, num_tokens, num_rows, longest_suffix, prompts = set(), set(), 0, 0, 0, []
        groups = list(_grouped(ready))
        works = [Work.of([counts[request_id] for request_id, _, _ in rows]) for _, _, rows, _ in groups]
        arms = self._choose(
            [
                Rows(rows[0][1].variant, work, settings.mode == "squeezed", prompt)
                for (_, (settings, prompt), rows, _), work in zip(groups, works, strict=True)
            ]
        )
        # a slot has its clusters in a step, or has none
        exact_slots = {
            placement.slot
            for (placement, (settings, _), _, _), arm in zip(groups, arms, strict=True)
            if arm in (Arm.EXACT, Arm.SHARED) and settings == RequestSettings()
        }
        for (placement, (settings, prompt), rows, most_rows), work, arm in zip(groups, works, arms, strict=True):
            request_ids = [request_id for request_id, _, _ in rows]
            if prompt and placement.slot in exact_slots:
                arm = Arm.STOCK
            # prompts have no other settings than their prefix
            slot = placement.slot if prompt else self._slot(placement, settings, rows[0][1].variant, arm)
            outcomes.update(dict.fromkeys(request_ids, NO_ROOM if slot is None else OUTCOMES[arm]))
            squeezed = slot is not None and arm is not Arm.STOCK
            exact = squeezed and arm is not Arm.SQUEEZED
            if most_rows:
                prefix_ends = {end for ends_of_one in {live.prefix_ends for _, live, _ in rows} for end in ends_of_one}
                ends |= {
                    LiveBlock(slot if squeezed else STOCK_SLOT, *end, exact=exact, prompt=prompt and squeezed)
                    for end in prefix_ends
                }
            elif squeezed:
                for _, live, computed in rows:
                    own |= set(live.own_blocks(slot, computed, placement.covered, exact, prompt))
            if squeezed:
                if prompt:
                    prompts += [counts[request_id] for request_id in request_ids]
                else:
                    num_tokens += work.tokens
                    longest = max(computed + counts[request_id] for request_id, _, computed in rows)
                    longest_suffix = max(longest_suffix, longest - placement.covered)
                num_rows += len(rows)
            else:
                dense += [(live, computed) for _, live, computed in rows]
        self._count(outcomes, counts.keys())
        if not num_rows:
            return _NOTHING

        # not taken for rows on another prefix that they have computed too: a shorter one, while their own is being
        # computed, or a longer one that an answer goes on with
        shortest = min(block.length for block in ends | own if block.slot >= 0)
        for live, computed in dense:
            if computed >= shortest:
                own |= set(live.own_blocks(DENSE_SLOT, computed, length=0))
        live, shared = [*sorted(own), *sorted(ends)], Arm.SHARED in arms
        suffix = longest_suffix if num_rows == len(counts) else None
        return Step(live, num_tokens, suffix, self._variants.in_use(), shared, tuple(prompts))

    def _slot(self, placement: Placement, settings: RequestSettings, variant: Placement, arm: Arm) -> int | None:
        """The slot of rows on a prefix with the same settings; None if there is none left."""
        if arm is Arm.STOCK or settings == RequestSettings():
            return placement.slot
        return self._variants.take(placement, settings, variant.log_threshold)

    def _count(self, outcomes: dict[str, str], scheduled: KeysView[str]) -> None:
        """Counts what became of the scheduled requests' rows; those that have no outcome are on no index."""
        self.rows.update(outcomes.values())
        if on_no_index := len(scheduled) - len(outcomes):
            self.rows[NO_INDEX] += on_no_index
        for request_id in self._reports.keys() & scheduled:
            self._reports[request_id].rows[outcomes.get(request_id, NO_INDEX)] += 1

    def _update(self, scheduled: Any) -> list[tuple[str, _Live, int]]:
        """Takes note of new blocks; returns the scheduled live requests and the tokens each has computed."""
        computed = []
        for new in scheduled.scheduled_new_reqs:
            if live := self._live.get(new.req_id):
                live.clear()
                live.extend(new.block_ids)
                computed.append((new.req_id, live, new.num_computed_tokens))
        cached = scheduled.scheduled_cached_reqs
        for row, request_id in enumerate(cached.req_ids):
            if request_id in self._live:
                live, new_blocks = self._live[request_id], cached.new_block_ids[row]
                if request_id in cached.resumed_req_ids:
                    live.clear()
                if new_blocks is not None:
                    live.extend(new_blocks)
                computed.append((request_id, live, cached.num_computed_tokens[row]))
        return computed


_Rows = list[tuple[str, _Live, int]]
"""Requests in a step: their ids, what is known of them, and the tokens that each has computed."""


_Kind = tuple[RequestSettings, bool]
"""The settings of rows, and whether they are prompts' whose tokens choose together."""


def _grouped(
    ready: dict[Placement, dict[_Kind, _Rows]],
) -> Iterator[tuple[Placement, _Kind, _Rows, bool]]:
    """Rows by prefix and kind, and whether they are most of those on the prefix.

    These are told by the prefix's last block, in one mark for all of them; others each by a block of its own.
    """
    for placement, groups in ready.items():
        most = max(groups, key=lambda kind: len(groups[kind]))
        for kind, rows in groups.items():
            yield placement, kind, rows, kind == most
