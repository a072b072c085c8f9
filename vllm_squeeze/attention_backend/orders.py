"""What the scheduler's side and the workers tell each other of indexes that come to the devices and leave them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from vllm_squeeze.attention_backend.placement import Placement
from vllm_squeeze.attention_backend.room import Span


class Load(NamedTuple):
    """Has a worker load an index beside what it does.

    Attributes:
        number: of the order, by which it is reported.
        folder: of the index.
        digest: of its manifest, so that all ranks load the same index.
        placement: as the scheduler's side has placed it.
        span: where it is to lie.
    """

    number: int
    folder: str
    digest: str
    placement: Placement
    span: Span


class Drop(NamedTuple):
    """Has a worker forget what lies in a slot, or is being loaded into it."""

    slot: int


Order = Load | Drop


@dataclass
class LoadReport(KVConnectorWorkerMetadata):
    """Which orders to load were carried out.

    Attributes:
        loaded: ranks that did, by number of the order.
        failed: why one could not, by number of the order.
        seconds: that the slowest took, by number of the order.
    """

    loaded: Counter[int] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def aggregate(self, other: "LoadReport") -> "LoadReport":
        seconds = {
            number: max(self.seconds.get(number, 0.0), other.seconds.get(number, 0.0))
            for number in self.seconds.keys() | other.seconds.keys()
        }
        return LoadReport(self.loaded + other.loaded, {**self.failed, **other.failed}, seconds)
