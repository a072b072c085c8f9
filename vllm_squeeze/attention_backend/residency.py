"""The indexes' tables on one rank's device, loaded with the model so that vLLM's memory profiling counts them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.attention_backend.placement import (
    Options,
    Placement,
    attends_exactly,
    local_kv_heads,
    num_centroids,
    open_indexes,
    threshold_of,
)
from vllm_squeeze.kernels.tables import JOINS, ClusterTable, Prefixes
from vllm_squeeze.prefix_index.index_folder import LayerClusters, PrefixIndex
from vllm_squeeze.prefix_index.manifest import InvalidIndex


@dataclass(frozen=True)
class _Span:
    """Where a prefix lies in the tables of each layer."""

    first_centroid: int
    num_centroids: int
    first_member: int
    num_members: int

    @property
    def centroids(self) -> slice:
        return slice(self.first_centroid, self.first_centroid + self.num_centroids)

    @property
    def members(self) -> slice:
        return slice(self.first_member, self.first_member + self.num_members)


def layer_number(index: PrefixIndex, name: str) -> int | None:
    """The place of a layer in an index, or None if the index lacks it."""
    return next((i for i, layer in enumerate(index.manifest.layers) if layer.name == name), None)


class Residency:
    """The tables of all served prefixes on this rank.

    Attributes:
        prefixes: what the kernels read of all slots, which are empty until ``activate``.
        active: placements of the prefixes whose rows may be squeezed, by slot.
    """

    def __init__(self, vllm_config: Any, options: Options):
        self.options = options
        self.device = torch.device(vllm_config.device_config.device)
        self.active: dict[int, Placement] = {}
        self._vllm_config = vllm_config
        # The scheduler's side, which verifies the layers too, is the one that warns.
        self._indexes = open_indexes(options, vllm_config, verify=False, on_refusal=logger.debug)
        self._failed: set[int] = set()
        self._exact: frozenset[int] = frozenset()
        self._tables: list[ClusterTable] = []
        self._shared: Any = None

        slots = max(len(options.indexes), 1)
        self.prefixes = Prefixes(
            slots=torch.zeros(slots, 4, dtype=torch.int32, device=self.device),
            log_threshold=torch.full((slots,), torch.inf, device=self.device),
            counters=torch.zeros(slots, 6, dtype=torch.int64, device=self.device),
        )
        # without clusters on the device
        self._unclustered = {slot for slot, index in self._indexes.items() if attends_exactly(index.manifest, options)}
        self._spans: dict[int, _Span] = {}
        first_centroid = first_member = 0
        for slot, index in self._indexes.items():
            span = _Span(first_centroid, num_centroids(index.manifest), first_member, index.manifest.num_members)
            if slot in self._unclustered:
                span = _Span(first_centroid, 0, first_member, 0)
            self._spans[slot] = span
            first_centroid, first_member = span.centroids.stop, span.members.stop
        self.num_centroids, self._num_members = first_centroid, first_member

    @property
    def most_centroids(self) -> int:
        """Centroids of the prefix that has the most; 0 if none has any."""
        return max((span.num_centroids for span in self._spans.values()), default=0)

    @property
    def longest_prefix(self) -> int:
        """Tokens of the longest prefix."""
        return max((index.manifest.num_tokens for index in self._indexes.values()), default=1)

    def load_layer(self, name: str, num_kv_heads: int, head_size: int) -> ClusterTable | None:
        """Loads one layer of all indexes that have it; None if none does. What is exact has all layers, empty.

        Args:
            name: of the layer, in vLLM.
            num_kv_heads: of the layer on this rank.
            head_size: of the layer.
        """
        if not self._unclustered and all(layer_number(index, name) is None for index in self._indexes.values()):
            return None

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_kv_heads, *shape, dtype=dtype, device=self.device)

        table = ClusterTable(
            centroids=empty(self.num_centroids, head_size, dtype=torch.int8),
            centroid_scales=empty(self.num_centroids, dtype=torch.float32),
            value_centroids=empty(self.num_centroids, head_size, dtype=torch.int8),
            value_scales=empty(self.num_centroids, dtype=torch.float32),
            log_weights=empty(self.num_centroids, dtype=torch.float32),
            variances=empty(self.num_centroids, dtype=torch.float32),
            starts=empty(self.num_centroids, dtype=torch.int32),
            sizes=empty(self.num_centroids, dtype=torch.int32),
            members=empty(self._num_members, dtype=torch.int32),
        )
        for slot, index in self._indexes.items():
            try:
                heads = self._local_heads(index, name, num_kv_heads, head_size)
                if slot not in self._unclustered:
                    self._load(index, layer_number(index, name), heads, self._spans[slot], table)
            except InvalidIndex as error:
                # The scheduler's side has read the same files, and warned.
                self._failed.add(slot)
                logger.info("squeeze: %s", error)
        self._tables.append(table)
        return table

    def _load(self, index: PrefixIndex, number: int | None, heads: slice, span: _Span, table: ClusterTable) -> None:
        if number is None:
            raise InvalidIndex(f"{index.folder.name}: lacks a layer that another index of this model has")
        clusters = index.layer(number)
        count = clusters.sizes.shape[1]
        within = slice(span.first_centroid, span.first_centroid + count)
        for name in (field.name for field in fields(LayerClusters) if field.name != "members"):
            getattr(table, name)[:, within] = getattr(clusters, name)[heads].to(self.device)
        table.members[:, span.members] = clusters.members[heads].to(self.device)
        sizes = table.sizes[:, span.centroids]
        table.starts[:, span.centroids] = span.first_member + sizes.cumsum(1, dtype=torch.int32) - sizes

    def _local_heads(self, index: PrefixIndex, name: str, num_kv_heads: int, head_size: int) -> slice:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        world, total = get_tensor_model_parallel_world_size(), index.manifest.model.num_kv_heads
        if head_size != index.manifest.model.head_size:
            raise InvalidIndex(f"{index.folder.name}: {name} has another head size than the model")
        if num_kv_heads != local_kv_heads(index.manifest, world):
            raise InvalidIndex(f"{index.folder.name}: {name} has another number of KV heads than the model")
        first = get_tensor_model_parallel_rank() * total // world
        return slice(first, first + num_kv_heads)

    def activate(self, placements: dict[int, Placement]) -> None:
        """Fits the tables to the KV cache's blocks, and allows choices.

        A cluster loses the members that lie beyond the whole blocks which the prefix covers.
        """
        self.active = {slot: place for slot, place in placements.items() if slot in self._spans.keys() - self._failed}
        for slot, place in self.active.items():
            span = self._spans[slot]
            self.prefixes.log_threshold[slot] = place.log_threshold
            for table in self._tables:
                covered = table.members[:, span.members] < min(place.prefix_lens.values())
                before = torch.nn.functional.pad(covered.cumsum(1), (1, 0))
                starts = (table.starts[:, span.centroids] - span.first_member).long()
                ends = starts + table.sizes[:, span.centroids]
                table.sizes[:, span.centroids] = (before.gather(1, ends) - before.gather(1, starts)).int()
        self._write_slots()

    def set_budget(self, budget: float) -> None:
        """Has all choices meet another budget, from the next kernel on.

        Raises:
            ValueError: centroids and always attended tokens alone read more.
        """
        for slot, place in self.active.items():
            self.prefixes.log_threshold[slot] = threshold_of(self._indexes[slot].manifest, place.cost, budget)

    def attend_exactly(self, slots: frozenset[int]) -> None:
        """Says to which prefixes rows attend exactly from here on. The device gets it in stream order, without a wait.

        Prefixes that were placed to be exact are so always.
        """
        if slots != self._exact:
            self._exact = slots
            self._write_slots()

    def _write_slots(self) -> None:
        facts = torch.zeros(self.prefixes.slots.shape, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        for slot, place in self.active.items():
            span = self._spans[slot]
            exact = place.exact or slot in self._exact
            count, num_always = (0, place.covered) if exact else (span.num_centroids, place.num_sinks)
            facts[slot] = torch.tensor([span.first_centroid, count, num_always, JOINS.index(place.join)])
        self.prefixes.slots.copy_(facts, non_blocking=True)

    @property
    def indexes(self) -> dict[int, PrefixIndex]:
        """The opened indexes, by slot."""
        return self._indexes

    def shared(self, allocate: Callable[[], Any]) -> Any:
        """What ``allocate`` returns when first called: one for all layers."""
        if self._shared is None:
            self._shared = allocate()
        return self._shared
