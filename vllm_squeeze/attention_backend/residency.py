"""The indexes' tables on one rank's device, made with the model so that vLLM's memory profiling counts them."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.attention_backend.placement import (
    Admission,
    Options,
    Placement,
    attends_exactly,
    local_kv_heads,
)
from vllm_squeeze.attention_backend.room import Room, Span, settle
from vllm_squeeze.attention_backend.variants import VariantSlot
from vllm_squeeze.kernels.tables import NUM_DIRECTIONS, RULES, ClusterTable, Prefixes, group_means, num_groups
from vllm_squeeze.prefix_index.budget import ReadCost
from vllm_squeeze.prefix_index.index_folder import PER_HEAD, LayerClusters, PrefixIndex
from vllm_squeeze.prefix_index.manifest import InvalidIndex, Manifest


class Residency:
    """The tables of the prefixes on this rank.

    Attributes:
        prefixes: what the kernels read of all slots, which are empty until something is loaded into them. After those
            of the prefixes come those of requests with settings of their own.
        room: that there is. What is taken of it is the scheduler's side to know, once it serves.
        active: placements of the prefixes whose rows may be squeezed, by slot.
        costs: what reading the prefix costs that lies in each slot, or lay there last: what was counted is told late.
    """

    def __init__(self, vllm_config: Any, options: Options):
        self.options = options
        self.device = torch.device(vllm_config.device_config.device)
        # The scheduler's side, which verifies the layers too, is the one that warns.
        self._indexes = Admission(options, vllm_config).open_all(on_refusal=logger.debug)
        self.room = Room.of((index.manifest for index in self._indexes), options, vllm_config)
        self.active: dict[int, Placement] = {}
        self.costs: dict[int, ReadCost] = {}
        self._spans: dict[int, Span] = {}
        self._exact: frozenset[int] = frozenset()
        self._variants: tuple[VariantSlot, ...] = ()
        self._tables: dict[str, ClusterTable] = {}
        self._shared: Any = None

        slots = self.room.num_slots + self.room.num_variants
        self.prefixes = Prefixes(
            slots=torch.zeros(slots, 4, dtype=torch.int32, device=self.device),
            lens=torch.zeros(slots, dtype=torch.int32, device=self.device),
            frames=torch.zeros(slots, dtype=torch.int32, device=self.device),
            log_threshold=torch.full((slots,), torch.inf, device=self.device),
            kept_shares=torch.zeros(slots, device=self.device),
            counters=torch.zeros(slots, 6, dtype=torch.int64, device=self.device),
        )

    def make_table(self, name: str, num_kv_heads: int, head_size: int) -> ClusterTable | None:
        """Makes room for one layer of all indexes; None if there are none that have it, nor will be.

        Args:
            name: of the layer, in vLLM.
            num_kv_heads: of the layer on this rank.
            head_size: of the layer.
        """
        manifests = [index.manifest for index in self._indexes]
        has_all_layers = self.options.watch or any(attends_exactly(manifest, self.options) for manifest in manifests)
        if not has_all_layers and all(_layer_number(manifest, name) is None for manifest in manifests):
            return None

        groups = num_groups(self.room.num_centroids)

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_kv_heads, *shape, dtype=dtype, device=self.device)

        self._tables[name] = ClusterTable(
            centroids=empty(self.room.num_centroids, head_size // 8, dtype=torch.int32),
            centroid_scales=empty(self.room.num_centroids, dtype=torch.float32),
            value_centroids=empty(self.room.num_centroids, head_size // 8, dtype=torch.int32),
            value_scales=empty(self.room.num_centroids, dtype=torch.float32),
            log_weights=empty(self.room.num_centroids, dtype=torch.float32),
            variances=empty(self.room.num_centroids, dtype=torch.float32),
            starts=empty(self.room.num_centroids, dtype=torch.int32),
            sizes=empty(self.room.num_centroids, dtype=torch.int32),
            log_sizes=empty(self.room.num_centroids, dtype=torch.float32),
            members=empty(self.room.num_members, dtype=torch.int32),
            residuals=empty(self.room.num_members, NUM_DIRECTIONS // 8, dtype=torch.int32),
            group_centroids=empty(groups, head_size // 8, dtype=torch.int32),
            group_scales=empty(groups, dtype=torch.float32),
            group_sizes=empty(groups, dtype=torch.int32),
            frames=empty(self.room.num_slots, 2, head_size, dtype=torch.float32),
            directions=empty(self.room.num_slots, NUM_DIRECTIONS, head_size, dtype=torch.float32),
        )
        return self._tables[name]

    def load_all(self, kv_cache_config: Any) -> bool:
        """Loads the indexes that there are at the start, as far as there is room for them.

        Returns:
            whether rows may be squeezed, now or once others have been loaded.
        """
        _, settled = settle(self._indexes, self.room, self.options, kv_cache_config, on_refusal=logger.debug)
        for index, placement, span in settled:
            if span is not None:
                try:
                    self.load(index, placement, span)
                except InvalidIndex as error:
                    # The scheduler's side has read the same files, and warned.
                    logger.info("squeeze: %s", error)
                else:
                    self.activate(placement, span)
        self._indexes = []
        return bool(settled) or self.options.watch > 0

    def load(
        self, index: PrefixIndex, placement: Placement, span: Span, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Loads an index into a place that no rows attend to.

        Args:
            index: opened.
            placement: of its prefix.
            span: the place.
            stopped: asked before each layer, whether to leave it at that.

        Raises:
            InvalidIndex: it is damaged, or has other layers than the model.
        """
        if span.num_centroids:
            for name, table in self._tables.items():
                if stopped():
                    return
                self._load_layer(index, name, min(placement.prefix_lens.values()), span, table)

    def activate(self, placement: Placement, span: Span) -> None:
        """Allows rows to attend to what was loaded. The device gets it in stream order."""
        self.active[span.slot], self._spans[span.slot] = placement, span
        self.prefixes.log_threshold[span.slot] = placement.log_threshold
        self.prefixes.kept_shares[span.slot] = placement.prompt_share or 0.0
        self._write_slots()

    def drop(self, slot: int) -> None:
        """Leaves a slot empty. Kernels that were launched before still find what lies there."""
        if self.active.pop(slot, None) is not None:
            self._write_slots()

    def _load_layer(self, index: PrefixIndex, name: str, covered: int, span: Span, table: ClusterTable) -> None:
        """Loads a layer. A cluster loses the members that lie beyond the whole blocks which the prefix covers."""
        number = _layer_number(index.manifest, name)
        if number is None:
            raise InvalidIndex(f"{index.folder.name}: lacks {name}, a layer of this model")
        clusters, heads = index.layer(number), self._local_heads(index, name, table)
        count = clusters.sizes.shape[1]
        if count > span.num_centroids or clusters.members.shape[1] != span.num_members:
            raise InvalidIndex(f"{index.folder.name}: {name} has other clusters than the manifest says")
        within = slice(span.first_centroid, span.first_centroid + count)
        for field in {field.name for field in fields(LayerClusters)} - {"sizes"} - PER_HEAD:
            getattr(table, field)[:, within] = getattr(clusters, field)[heads].to(self.device)
        frame = clusters.frame[heads]
        table.frames[:, span.slot] = frame.to(self.device)
        table.directions[:, span.slot] = clusters.directions[heads].to(self.device)
        members, sizes = clusters.members[heads], torch.zeros(len(table.sizes), span.num_centroids, dtype=torch.int64)
        sizes[:, :count] = clusters.sizes[heads]
        ends = sizes.cumsum(1)
        starts = ends - sizes
        before = pad((members < covered).cumsum(1), (1, 0))
        table.members[:, span.members] = members.to(self.device)
        table.residuals[:, span.members] = clusters.residuals[heads].to(self.device)
        table.starts[:, span.centroids] = (span.first_member + starts).int().to(self.device)
        sizes = (before.gather(1, ends) - before.gather(1, starts)).int()
        table.sizes[:, span.centroids] = sizes.to(self.device)
        table.log_sizes[:, span.centroids] = sizes.log().to(self.device)
        of_groups = group_means(pad(clusters.mean_keys()[heads], (0, 0, 0, span.num_centroids - count)), sizes, frame)
        for held, of_group in zip((table.group_centroids, table.group_scales, table.group_sizes), of_groups):
            held[:, span.groups] = of_group.to(self.device)

    def _local_heads(self, index: PrefixIndex, name: str, table: ClusterTable) -> slice:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        world, total = get_tensor_model_parallel_world_size(), index.manifest.model.num_kv_heads
        num_kv_heads, *_, head_size = table.frames.shape
        if head_size != index.manifest.model.head_size:
            raise InvalidIndex(f"{index.folder.name}: {name} has another head size than the model")
        if num_kv_heads != local_kv_heads(index.manifest, world):
            raise InvalidIndex(f"{index.folder.name}: {name} has another number of KV heads than the model")
        first = get_tensor_model_parallel_rank() * total // world
        return slice(first, first + num_kv_heads)

    def set_budget(self, budget: float) -> None:
        """Has all choices meet another budget, from the next kernel on.

        Raises:
            ValueError: centroids and always attended tokens alone read more.
        """
        for slot, place in self.active.items():
            self.prefixes.log_threshold[slot] = place.at_budget(budget).log_threshold

    def set_step(self, exact: frozenset[int], variants: tuple[VariantSlot, ...]) -> None:
        """Says how rows attend from here on. The device gets it in stream order, without a wait.

        Args:
            exact: slots whose rows attend to all keys. Those of prefixes that were placed to be exact always do.
            variants: how the slots beyond those of prefixes are set.
        """
        if (exact, variants) == (self._exact, self._variants):
            return
        for variant in set(variants).difference(self._variants):
            self.prefixes.log_threshold[variant.slot] = variant.log_threshold
        self._exact, self._variants = exact, variants
        self._write_slots()

    def _write_slots(self) -> None:
        num_slots, num_facts = self.prefixes.slots.shape
        facts = torch.zeros(num_slots, num_facts + 2, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        prefixes = {slot: slot for slot in self.active}
        prefixes |= {variant.slot: variant.prefix for variant in self._variants if variant.prefix in self.active}
        for slot, prefix in prefixes.items():
            place, span = self.active[prefix], self._spans[prefix]
            self.costs[slot] = place.cost
            exact = place.exact or slot in self._exact
            count, num_always = (0, place.covered) if exact else (span.num_centroids, place.num_sinks)
            rule = RULES.index(place.rule)
            facts[slot] = torch.tensor([span.first_centroid, count, num_always, rule, place.covered, span.slot])
        on_device = facts.to(self.device, non_blocking=True)
        self.prefixes.slots.copy_(on_device[:, :num_facts])
        self.prefixes.lens.copy_(on_device[:, num_facts])
        self.prefixes.frames.copy_(on_device[:, num_facts + 1])

    def shared(self, allocate: Callable[[], Any]) -> Any:
        """What ``allocate`` returns when first called: one for all layers."""
        if self._shared is None:
            self._shared = allocate()
        return self._shared


def _layer_number(manifest: Manifest, name: str) -> int | None:
    """The place of a layer in an index, or None if the index lacks it."""
    return next((i for i, layer in enumerate(manifest.layers) if layer.name == name), None)
