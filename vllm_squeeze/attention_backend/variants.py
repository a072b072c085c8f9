"""The slots beyond those of prefixes: the same prefixes, as requests with settings of their own attend to them."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from vllm_squeeze.attention_backend.placement import Placement
from vllm_squeeze.attention_backend.request_settings import RequestSettings


class VariantSlot(NamedTuple):
    """How such a slot is set.

    Attributes:
        slot: itself.
        prefix: slot of the prefix, whose clusters it has.
        log_threshold: of the choice of clusters.
    """

    slot: int
    prefix: int
    log_threshold: float


class Variants:
    """The scheduler's side of which slot is set how.

    Args:
        slots: that there are.
    """

    def __init__(self, slots: Iterable[int] = ()):
        # that which was given back last is taken last: what its rows read may not have been counted yet
        self._free = deque(slots)
        self._taken: dict[tuple[Placement, RequestSettings], tuple[int, float]] = {}

    def take(self, placement: Placement, settings: RequestSettings, log_threshold: float) -> int | None:
        """The slot of requests on a prefix with these settings, which has to lie on the devices; None if none is left."""
        known = placement, settings
        if known not in self._taken and self._free:
            self._taken[known] = self._free.popleft(), log_threshold
        return self._taken[known][0] if known in self._taken else None

    def give_back(self, used: Iterable[tuple[Placement, RequestSettings]]) -> None:
        """Frees the slots of all settings but those that are used."""
        if self._taken:
            for known in self._taken.keys() - set(used):
                self._free.append(self._taken.pop(known)[0])

    def in_use(self) -> tuple[VariantSlot, ...]:
        """How slots are set, of prefixes that lie on the devices."""
        return tuple(
            VariantSlot(slot, placement.slot, log_threshold)
            for (placement, _), (slot, log_threshold) in self._taken.items()
            if placement.slot is not None
        )
