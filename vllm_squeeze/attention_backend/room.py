"""Where indexes lie on the devices: their slots, and their parts of each layer's tables. The same on every rank."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vllm_squeeze.attention_backend.placement import (
    OnRefusal,
    Options,
    Placement,
    attends_exactly,
    device_bytes,
    full_attention_groups,
    place,
    prefix_bytes,
    room_for_centroids,
    token_bytes,
)
from vllm_squeeze.kernels.tables import NEIGHBOURS
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import IndexParameters, InvalidIndex, Manifest

WATCHED_SLOTS = 8
"""Prefixes that a server which watches folders has room for at a time, at the least."""
VARIANT_SLOTS = 8
"""Settings of requests, beside the server's own, that there is room for at a time: each takes a slot for a prefix."""
MOST_CENTROIDS = 1.5 * IndexParameters.centroids
"""Per token of a prefix, in such a server: clusters that are too large were split."""


class Needs(NamedTuple):
    """What an index takes in each layer's tables, of a KV head; centroids in whole groups."""

    centroids: int
    members: int

    @classmethod
    def of(cls, manifest: Manifest, options: Options) -> "Needs":
        exact = attends_exactly(manifest, options)
        return cls(0, 0) if exact else cls(room_for_centroids(manifest), manifest.num_members)


class Span(NamedTuple):
    """Where an index lies: its slot, and its part of each layer's tables."""

    slot: int
    first_centroid: int
    num_centroids: int
    first_member: int
    num_members: int

    @property
    def centroids(self) -> slice:
        return slice(self.first_centroid, self.first_centroid + self.num_centroids)

    @property
    def groups(self) -> slice:
        """Clusters come in whole groups."""
        return slice(self.first_centroid // NEIGHBOURS, (self.first_centroid + self.num_centroids) // NEIGHBOURS)

    @property
    def members(self) -> slice:
        return slice(self.first_member, self.first_member + self.num_members)


@dataclass(frozen=True)
class Room:
    """What there is on each device, and what of it is taken.

    Attributes:
        num_slots: prefixes that may lie there at a time.
        num_centroids, num_members: of a KV head in each layer's tables.
        longest_prefix: tokens of the longest prefix that our kernels take.
        most_centroids: of one prefix, at most.
        num_variants: slots that follow those of prefixes, for requests with settings of their own; none where all
            attention is exact.
        taken: by the indexes that lie there.
    """

    num_slots: int
    num_centroids: int
    num_members: int
    longest_prefix: int
    most_centroids: int
    num_variants: int = 0
    taken: frozenset[Span] = frozenset()

    @classmethod
    def of(cls, manifests: Iterable[Manifest], options: Options, vllm_config: Any) -> "Room":
        """Room for these indexes, or for as many of them as the memory limit allows; all that it allows where folders
        are watched, as others may come."""
        manifests = list(manifests)
        needs = [Needs.of(manifest, options) for manifest in manifests]
        centroids, members = sum(need.centroids for need in needs), sum(need.members for need in needs)
        most = max((need.centroids for need in needs), default=0)
        longest = max((manifest.num_tokens for manifest in manifests), default=1)
        limit, slots = options.memory_limit_gib * 2**30, max(len(options.indexes), 1)
        if options.watch:
            longest = vllm_config.model_config.max_model_len
            share = max(MOST_CENTROIDS, *(need.centroids / need.members for need in needs if need.members), 0.0)
            slots = max(slots, WATCHED_SLOTS)
            of_tokens = max(limit - slots * prefix_bytes(vllm_config), 0)
            members = int(of_tokens / token_bytes(share, vllm_config))
            centroids = int(members * share)
            most = min(math.ceil(longest * share), centroids)
        elif (needed := sum(device_bytes(manifest, options, vllm_config) for manifest in manifests)) > limit:
            centroids, members = (math.ceil(count * limit / needed) for count in (centroids, members))
        variants = VARIANT_SLOTS if options.mode != "exact" and (options.watch or most) else 0
        return cls(slots, centroids, members, longest, most, variants)

    @property
    def variant_slots(self) -> range:
        """The slots that follow those of prefixes."""
        return range(self.num_slots, self.num_slots + self.num_variants)

    def check(self, name: str, num_tokens: int, needs: Needs) -> None:
        """Raises InvalidIndex if there would be no room for an index even if it were the only one."""
        for what, needed, most in (
            ("tokens", num_tokens, self.longest_prefix),
            ("clusters", needs.centroids, min(self.most_centroids, self.num_centroids)),
            ("clustered tokens", needs.members, self.num_members),
        ):
            if needed > most:
                raise InvalidIndex(f"{name}: {needed} {what}; this server has room for {most}")

    def find(self, needs: Needs) -> Span | None:
        """Where an index fits, the first such place; None if there is none."""
        slot = next((slot for slot in range(self.num_slots) if all(span.slot != slot for span in self.taken)), None)
        centroid = _gap([(s.first_centroid, s.num_centroids) for s in self.taken], needs.centroids, self.num_centroids)
        member = _gap([(s.first_member, s.num_members) for s in self.taken], needs.members, self.num_members)
        if None in (slot, centroid, member):
            return None
        return Span(slot, centroid, needs.centroids, member, needs.members)

    def with_taken(self, span: Span) -> "Room":
        """The same with a place taken."""
        return replace(self, taken=self.taken | {span})

    def without(self, span: Span) -> "Room":
        """The same with a place free again."""
        return replace(self, taken=self.taken - {span})


def _gap(taken: list[tuple[int, int]], size: int, end: int) -> int | None:
    """Where so many fit between what is taken (first, count), the first such place; None if there is none."""
    at = 0
    for first, count in sorted(taken):
        if first - at >= size:
            break
        at = max(at, first + count)
    return at if end - at >= size else None


class Settled(NamedTuple):
    """An index that is served, and where it lies on the devices; None if it has to wait for others to leave."""

    index: PrefixIndex
    placement: Placement
    span: Span | None


def settle(
    indexes: Iterable[PrefixIndex], room: Room, options: Options, kv_cache_config: Any, on_refusal: OnRefusal
) -> tuple[Room, list[Settled]]:
    """Gives room to the indexes that there are at the start, one after the other, while there is any.

    All ranks and the scheduler's side do the same. ``on_refusal`` is told of those that cannot be placed.

    Returns:
        the room, with what is taken, and the indexes.
    """
    groups, settled = full_attention_groups(kv_cache_config), []
    for index in indexes:
        try:
            placement = place(index, options, groups)
        except InvalidIndex as error:
            on_refusal(str(error))
            continue
        span = room.find(Needs.of(index.manifest, options))
        if span is not None:
            room, placement.slot = room.with_taken(span), span.slot
        settled.append(Settled(index, placement, span))
    return room, settled
