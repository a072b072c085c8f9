"""The scheduler's side of which indexes there are, and which of them lie on the devices.

An index that appears is read whole and placed; from then on requests that begin with its prefix are followed, though
dense. It is loaded where there is room, or once a request wants it, in place of those that were not wanted for longest.
Its rows are squeezed when all ranks have it, and the requests have ended that were there before anyone followed them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.attention_backend.matching import LiveRequests, PrefixMatcher
from vllm_squeeze.attention_backend.orders import Drop, Load, LoadReport, Order
from vllm_squeeze.attention_backend.placement import (
    Admission,
    OnRefusal,
    Options,
    Placement,
    full_attention_groups,
    place,
    warn,
)
from vllm_squeeze.attention_backend.room import Needs, Room, Span, settle
from vllm_squeeze.attention_backend.stats import LOADING, ON_DEVICES, WAITING
from vllm_squeeze.attention_backend.watcher import Seen, Watcher
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, is_pinned
from vllm_squeeze.prefix_index.manifest import InvalidIndex


@dataclass(eq=False)
class _Known:
    """An index that is served.

    Attributes:
        index: opened and read whole.
        placement: of its prefix.
        span: where it lies on the devices, or will; None while it has no room.
        number: of the order to load it; None if none is under way.
        num_loaded: ranks that have carried it out.
        elders: requests on the prefix that nobody follows, as they were there before.
        wanted: whether it is to be loaded.
        failed: whether a rank could not load it.
        last_wanted: when a request wanted it last, in requests.
    """

    index: PrefixIndex
    placement: Placement
    span: Span | None = None
    number: int | None = None
    num_loaded: int = 0
    elders: set[str] = field(default_factory=set)
    wanted: bool = True
    failed: bool = False
    last_wanted: int = 0

    @property
    def state(self) -> str:
        if self.placement.slot is not None:
            return ON_DEVICES
        return WAITING if self.span is None else LOADING


class Catalogue:
    """The indexes of an engine.

    Attributes:
        matcher: of the prefixes of all of them.
        variant_slots: beyond those of prefixes.
        changed: whether any came to another state since ``states`` was last asked for.
    """

    def __init__(self, options: Options, vllm_config: Any, kv_cache_config: Any, on_refusal: OnRefusal = warn):
        self.changed, self._loads = True, (0, 0.0)
        self._options, self._refuse = options, on_refusal
        self._groups = full_attention_groups(kv_cache_config)
        self._num_ranks = vllm_config.parallel_config.world_size
        self._clock = self._num_orders = 0
        self._orders: list[Order] = []
        self._known: dict[Path, _Known] = {}
        admission = Admission(options, vllm_config)
        indexes = admission.open_all(on_refusal)
        room = Room.of((index.manifest for index in indexes), options, vllm_config)
        self.variant_slots = room.variant_slots
        self._room, settled = settle(indexes, room, options, kv_cache_config, on_refusal)
        for index, placement, span in settled:
            try:
                index.verify()
            except InvalidIndex as error:
                # the workers keep the room, as they do not look, until another takes it
                on_refusal(str(error))
                self._room = self._room.without(span) if span is not None else self._room
                continue
            placement.pinned = is_pinned(index.folder)
            self._known[index.folder] = _Known(index, placement, span, wanted=span is None)
            self._say(index, placement)
        self.matcher = PrefixMatcher(
            (known.placement, known.index.token_ids.tolist()) for known in self._known.values()
        )
        self._watcher = None
        if options.watch:
            folders = [Path(folder) for folder in options.folders]
            at_start = [Path(folder) for folder in options.indexes]
            self._watcher = Watcher(folders, options.watch, at_start, admission.open)

    def want(self, placement: Placement) -> None:
        """Takes note that a request begins with a prefix."""
        self._clock += 1
        known = self._of(placement)
        known.last_wanted = self._clock
        if known.span is None and not known.failed:
            known.wanted = True

    def next_orders(self, requests: LiveRequests) -> tuple[Order, ...]:
        """Follows what happened since the last step; returns what workers have to do.

        Args:
            requests: of the engine, which forget indexes that are gone.
        """
        if self._watcher is not None:
            while not self._watcher.seen.empty():
                self._follow(self._watcher.seen.get(), requests)
        for known in self._known.values():
            if known.placement.slot is not None:
                continue
            if known.wanted and known.span is None:
                self._make_room(known, requests)
            elif known.num_loaded == self._num_ranks:
                known.elders &= requests.running.keys()
                if not known.elders:
                    known.placement.slot, self.changed = known.span.slot, True
        orders, self._orders = tuple(self._orders), []
        return orders

    def take_report(self, report: LoadReport) -> None:
        """Takes note of what workers have loaded."""
        for known in self._known.values():
            if reason := report.failed.get(known.number):
                self._refuse(reason)
                self._release(known)
                known.failed = True
            elif number := report.loaded.get(known.number, 0):
                known.num_loaded += number
                if known.num_loaded == self._num_ranks:
                    loads, seconds = self._loads
                    self._loads, self.changed = (loads + 1, seconds + report.seconds[known.number]), True

    def states(self) -> dict[str, str]:
        """The state of each index, one of STATES, by its name."""
        self.changed = False
        return {known.placement.name: known.state for known in self._known.values()}

    def take_loads(self) -> tuple[int, float]:
        """How many indexes were loaded while serving since the last call, and what that took together, in seconds."""
        taken, self._loads = self._loads, (0, 0.0)
        return taken

    def clear(self, requests: LiveRequests) -> None:
        """Forgets all indexes, for good."""
        self.end()
        self._watcher = None
        for folder in list(self._known):
            self._forget(folder, requests)

    def end(self) -> None:
        """Stops looking for indexes."""
        if self._watcher is not None:
            self._watcher.end()

    def _of(self, placement: Placement) -> _Known:
        return next(known for known in self._known.values() if known.placement is placement)

    def _say(self, index: PrefixIndex, placement: Placement) -> None:
        logger.info(
            "squeeze: serving %s (%d tokens, %d squeezed) %s%s",
            index.folder.name,
            placement.cost.num_tokens,
            placement.covered,
            "exactly" if placement.exact else f"at a budget of {placement.budget:g}",
            "" if placement.slot is not None else "; not on the devices yet",
        )

    def _follow(self, seen: Seen, requests: LiveRequests) -> None:
        """Has what is known agree with what there is."""
        known = self._known.get(seen.folder)
        if seen.index is None:
            if seen.reason is not None:
                self._refuse(seen.reason)
            if known is not None:
                logger.info("squeeze: %s is no longer served.", seen.folder.name)
                self._forget(seen.folder, requests)
            return
        try:
            placement = place(seen.index, self._options, self._groups)
            self._room.check(placement.name, placement.cost.num_tokens, Needs.of(seen.index.manifest, self._options))
        except InvalidIndex as error:
            self._follow(Seen(seen.folder, None, reason=str(error)), requests)
            return
        if (
            known is not None
            and known.index.manifest == seen.index.manifest
            and known.placement.budget == placement.budget
        ):
            known.placement.pinned = seen.pinned
            return
        if known is not None:
            self._forget(seen.folder, requests)
        placement.pinned = seen.pinned
        tokens = seen.index.token_ids.tolist()
        self._known[seen.folder] = _Known(seen.index, placement, elders=requests.on(tokens[: placement.covered]))
        self.matcher.add(placement, tokens)
        self.changed = True
        self._say(seen.index, placement)

    def _forget(self, folder: Path, requests: LiveRequests) -> None:
        known = self._known.pop(folder)
        self.matcher.remove(known.placement)
        known.placement.pinned = False
        requests.leave_dense(known.placement)
        self._release(known)

    def _release(self, known: _Known) -> None:
        """Takes an index from the devices, or stops its being loaded."""
        if known.span is not None:
            self._room = self._room.without(known.span)
            self._orders.append(Drop(known.span.slot))
        known.placement.slot = known.span = known.number = None
        known.num_loaded, self.changed = 0, True

    def _make_room(self, known: _Known, requests: LiveRequests) -> None:
        """Has an index loaded, if there is room for it or others can leave. It may be that it has to go on waiting."""
        needs, room, leaving = Needs.of(known.index.manifest, self._options), self._room, []
        idle = self._idle(requests) if known.last_wanted else iter(())
        while (span := room.find(needs)) is None:
            if (other := next(idle, None)) is None:
                # only a request's wish is worth waiting for
                known.wanted = known.last_wanted > 0
                return
            room = room.without(other.span)
            leaving.append(other)
        for other in leaving:
            self._release(other)
            other.wanted = False
        self._room, known.span, known.wanted, self.changed = room.with_taken(span), span, False, True
        self._num_orders += 1
        known.number = self._num_orders
        folder, digest = str(known.index.folder), known.index.manifest.digest
        self._orders.append(Load(known.number, folder, digest, known.placement, span))

    def _idle(self, requests: LiveRequests) -> Iterator[_Known]:
        """Indexes on the devices that no request is on, the one that was not wanted for longest first."""
        there = (known for known in self._known.values() if known.placement.slot is not None)
        idle = (known for known in there if not requests.num_on(known.placement))
        return iter(sorted(idle, key=lambda known: known.last_wanted))
