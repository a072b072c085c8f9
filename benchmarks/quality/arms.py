"""Puts arms of ``selection.py`` into the layers of an engine in this process, in place of the server's attention."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.quality.selection import Arm, Attention, Cost, Prefix, Units, attend, cost_of, units_of
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.worker import layers_of
from vllm_squeeze.kernels.reference import ReadTokens, dequantised, merge
from vllm_squeeze.kernels.tables import PROMPT_SLOTS

TOKENS_AT_ONCE = 256
# Ranks that are noted of each query token in each layer, to find a threshold by.
NOTED_RANKS = 64


@dataclass
class Reads:
    """What an arm read in all layers, for all query tokens that were squeezed.

    Attributes:
        cost: of the arm.
        kept: keys chosen in each layer, summed up over query tokens and KV heads; of ``pairs`` of them.
        recall: share of the attention probability that fell on keys attended to exactly, in each layer summed up over
            query tokens and heads; of ``queries`` of them.
        ranks: of keys drawn by lot.
    """

    cost: Cost
    kept: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    recall: dict[str, Any] = field(default_factory=dict)
    queries: dict[str, int] = field(default_factory=dict)
    ranks: list[torch.Tensor] = field(default_factory=list)

    def note(
        self,
        layer: str,
        attention: Attention,
        suffix_lse: torch.Tensor,
        generator: torch.Generator,
    ) -> None:
        """Counts what was read for R query tokens of one layer; ``suffix_lse`` [R, H, G] is over what follows."""
        exact, whole = (torch.logaddexp(lse, suffix_lse) for lse in (attention.exact_lse, attention.whole_lse))
        recall, kept = (exact - whole).exp(), attention.kept
        self.recall[layer] = self.recall.get(layer, 0) + recall.sum(dtype=torch.float64)
        self.queries[layer] = self.queries.get(layer, 0) + recall.numel()
        self.kept[layer] = self.kept.get(layer, 0) + kept.sum()
        self.pairs[layer] = self.pairs.get(layer, 0) + kept.numel()
        count = len(kept) * NOTED_RANKS
        token, head, key = (
            torch.randint(size, (count,), generator=generator, device=kept.device) for size in attention.ranks.shape
        )
        self.ranks.append(attention.ranks[token, head, key])

    def kept_shares(self) -> list[float]:
        """The share of the keys that was chosen in each layer."""
        return [float(self.kept[layer]) / pairs / self.cost.num_keys for layer, pairs in self.pairs.items()]

    def recalls(self) -> list[float]:
        """The share of the attention probability that was attended to exactly in each layer."""
        return [float(self.recall[layer]) / queries for layer, queries in self.queries.items()]

    def bytes(self) -> tuple[float, float]:
        """Bytes that all query tokens read, each alone, and those that dense attention would read."""
        pairs, kept = sum(self.pairs.values()), sum(map(float, self.kept.values()))
        return pairs * self.cost.fixed_bytes + self.cost.keys.read_bytes(kept, pairs), pairs * self.cost.dense_bytes

    def budget_used(self) -> float:
        """Bytes read over those that dense attention would read, every query token alone."""
        alone, dense = self.bytes()
        return alone / dense

    def threshold(self, share: float) -> float:
        """The threshold on ranks that would have chosen a share of the keys."""
        if share >= 1:
            return -math.inf
        ranks = torch.cat(self.ranks).sort(descending=True).values
        return float(ranks[int(share * len(ranks))])


class TorchLayer:
    """An arm in one layer of an engine.

    Args:
        name: of the layer.
        impl: the engine's attention in it.
        arm, threshold, share: as ``attend`` takes them.
        reads: counts what is read.
    """

    def __init__(self, name: str, impl: Any, arm: Arm, threshold: float, share: float, reads: Reads):
        self._name, self._impl, self._reads = name, impl, reads
        self._arm, self._threshold, self._share = arm, threshold, share
        self._lots = torch.Generator(impl.residency.device).manual_seed(0)
        self._known: tuple[Prefix, Units] | None = None

    def on_cpu(
        self, query: torch.Tensor, suffix_output: torch.Tensor, suffix_lse: torch.Tensor, slot: int, read: ReadTokens
    ) -> torch.Tensor:
        """In place of ``SqueezeCPUImpl.attend_prefix``, but for prompts whose tokens choose together."""
        if slot >= PROMPT_SLOTS:
            return type(self._impl).attend_prefix(self._impl, query, suffix_output, suffix_lse, slot, read)
        covered = self._impl.residency.active[slot].covered
        return self._attend(query, suffix_output, suffix_lse, *self._prefix(lambda: read(torch.arange(covered))))

    def on_device(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        suffix_lse: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        """In place of ``DeviceLayer.attend_prefixes``."""
        rows, heads = self._impl.rows, self._impl.num_kv_heads
        if rows.suffix_done is not None:
            torch.cuda.current_stream().wait_event(rows.suffix_done)
        slot, size, row = rows.queries.tiles[: len(rows.queries.tokens), :3].unbind(1)
        within = torch.arange(rows.queries.tokens.shape[1], device=query.device)
        tokens = rows.queries.tokens[(slot >= 0)[:, None] & (within < size[:, None])].long()

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            position = torch.arange(self._impl.residency.active[0].covered, device=query.device)
            page_size = key_cache.shape[1]
            places = rows.block_table[row[slot >= 0][0]].long()[position // page_size], position % page_size
            caches = (key_cache, key_scale), (value_cache, value_scale)
            return tuple(dequantised(cache[places].transpose(0, 1), scale) for cache, scale in caches)

        prefix, units = self._prefix(read)
        for some in tokens.split(TOKENS_AT_ONCE):
            suffix = output[some].unflatten(1, (heads, -1)).float(), suffix_lse[:, some].T.unflatten(1, (heads, -1))
            merged = self._attend(query[some].unflatten(1, (heads, -1)), *suffix, prefix, units)
            output[some] = merged.flatten(1, 2).to(output.dtype)

    def _prefix(self, read: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[Prefix, Units]:
        """The prefix and the arm's units of it, which stay the same."""
        if self._known is None:
            impl, residency = self._impl, self._impl.residency
            place, frame = residency.active[0], int(residency.prefixes.frames[0])
            keys, values = (vectors.float().contiguous() for vectors in read())
            table = impl.table.prefix(0, residency.room.num_centroids, frame)
            prefix = Prefix(keys, values, table, place.num_sinks, impl.scale, impl.logits_soft_cap or 0.0)
            self._known = prefix, units_of(self._arm, prefix)
        return self._known

    def _attend(
        self,
        query: torch.Tensor,
        suffix_output: torch.Tensor,
        suffix_lse: torch.Tensor,
        prefix: Prefix,
        units: Units,
    ) -> torch.Tensor:
        """Joins attention over the prefix to that over what follows it, [R, H, G, D] float32 each."""
        attention = attend(self._arm, query.float(), prefix, units, self._threshold, self._share, self._lots)
        self._reads.note(self._name, attention, suffix_lse, self._lots)
        return merge(suffix_output, suffix_lse, attention.output, attention.lse)


def squeezed_impls(llm: Any) -> dict[str, Any]:
    """The attention of an engine's squeezed layers, by name."""
    (found,) = llm.collective_rpc(
        lambda worker: {
            name: layer.impl
            for name, layer in layers_of(worker.vllm_config).items()
            if getattr(getattr(layer, "impl", None), "table", None) is not None
        }
    )
    return found


def residency_in(llm: Any) -> Residency:
    """What an engine holds of its one index."""
    return next(iter(squeezed_impls(llm).values())).residency


@contextmanager
def attending(llm: Any, arm: Arm, threshold: float, share: float) -> Iterator[Reads]:
    """Has an engine attend to its one indexed prefix by an arm; yields what is read.

    Args:
        llm: vLLM's, with ``enforce_eager``.
        arm, threshold, share: as ``attend`` takes them.
    """
    impls = squeezed_impls(llm)
    reads = Reads(cost_of(arm, residency_in(llm).active[0].cost))
    for name, impl in impls.items():
        layer = TorchLayer(name, impl, arm, threshold, share, reads)
        if hasattr(impl, "attend_prefix"):
            impl.attend_prefix = layer.on_cpu
        else:
            impl.attend_prefixes = layer.on_device
            # which would have kernels attend to what follows prefixes
            impl.rows.can_be_alone = lambda *_: False
    try:
        yield reads
    finally:
        for impl in impls.values():
            for shadowed in (impl, "attend_prefix"), (impl, "attend_prefixes"), (impl.rows, "can_be_alone"):
                vars(shadowed[0]).pop(shadowed[1], None)
