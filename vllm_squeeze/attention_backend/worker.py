"""One rank's serving state: tells layers, before each step, which of its rows are squeezed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from vllm_squeeze.attention_backend.loader import Loader
from vllm_squeeze.attention_backend.matching import Step
from vllm_squeeze.attention_backend.orders import LoadReport, Order
from vllm_squeeze.attention_backend.placement import full_attention_groups
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.rows import RowGroup
from vllm_squeeze.attention_backend.stats import SqueezeStats


def layers_of(vllm_config: Any) -> dict[str, Any]:
    """The attention layers of the engine in this process, by name."""
    return vllm_config.compilation_config.static_forward_context


def residency_of(vllm_config: Any) -> Residency | None:
    """What the engine in this process holds of indexes; None if it serves none."""
    impls = (getattr(layer, "impl", None) for layer in layers_of(vllm_config).values())
    return next((impl.residency for impl in impls if getattr(impl, "residency", None) is not None), None)


def worker_of(vllm_config: Any) -> "SqueezeWorker | None":
    """The serving state of the engine in this process, or None where it serves no index."""
    for layer in layers_of(vllm_config).values():
        if (rows := getattr(getattr(layer, "impl", None), "rows", None)) is not None:
            return rows.worker
    return None


class Kind(NamedTuple):
    """Of a step with squeezed rows.

    Attributes:
        alone: whether it has no others, and our kernels attend to what follows their prefixes too.
        crowded: whether they are on more slots than there are for prefixes, as some have settings of their own.
        shared: whether they attend to their prefixes by FlashAttention of all rows at once.
    """

    alone: bool = False
    crowded: bool = False
    shared: bool = False


class SqueezeWorker:
    """Serving state of one engine on one rank.

    Attributes:
        squeezing: whether the current step has squeezed rows.
        kind: of the step, if it has.
        paused: whether vLLM's own attention serves all rows, whatever the scheduler's side says.
    """

    def __init__(self, vllm_config: Any, residency: Residency, kv_cache_config: Any, kv_caches: dict[str, Any]):
        self.squeezing = self.paused = False
        self.kind = Kind()
        self._residency = residency
        serving = residency.load_all(kv_cache_config)
        self._loader = Loader(residency)
        self._groups: dict[int, RowGroup] = {}
        layers = layers_of(vllm_config)
        for group, block_size in full_attention_groups(kv_cache_config).items():
            names = kv_cache_config.kv_cache_groups[group].layer_names
            names = [name for name in names if getattr(layers[name].impl, "table", None) is not None]
            if names and serving:
                first = layers[names[0]].impl
                rows = first.rows_class(block_size, vllm_config, residency)
                rows.prepare(first.num_heads // first.num_kv_heads)
                rows.worker = self
                self._groups[group] = rows
                for name in names:
                    layers[name].impl.rows = rows
                first.warm_up(layers[names[0]], kv_caches[names[0]])
        self._counted = CounterReader(residency.prefixes.counters)

    def follow(self, orders: Iterable[Order]) -> None:
        """Begins to carry out what is to be done about indexes, before the step that they came with."""
        for order in orders:
            self._loader.follow(order)

    def expect(self, step: Step) -> None:
        """Takes note, as early as a step's metadata are known, of whether and how the step has squeezed rows."""
        self.squeezing, self.kind = False, Kind()
        if not step.live:
            return
        slots, there = {block.slot for block in step.live if block.slot >= 0}, self._slots_there(step)
        self.squeezing = bool(self._groups) and not self.paused and not slots.isdisjoint(there)
        shared = self.squeezing and step.shared and self._may_be_shared(step.num_tokens)
        crowded = self.squeezing and not shared and len(slots) > self._residency.room.num_slots
        alone = (
            self.squeezing
            and not (shared or crowded)
            and step.longest_suffix is not None
            and slots <= there
            and all(rows.can_be_alone(step.num_tokens, step.longest_suffix) for rows in self._groups.values())
        )
        self.kind = Kind(alone, crowded, shared)

    def begin_step(self, step: Step) -> None:
        """Matches the rows of a step that vLLM has built."""
        self.expect(step)
        if not self.squeezing:
            return
        self._counted.expect_change()
        self._residency.set_step(frozenset(block.slot for block in step.live if block.exact), step.variants)
        there = self._slots_there(step)
        for group, rows in self._groups.items():
            live = [b for b in step.live if b.group == group and (b.slot < 0 or b.slot in there)]
            if live:
                rows.begin_step(live, step.num_tokens, *self.kind, step.prompts)

    def end_step(self) -> None:
        self.squeezing, self.kind = False, Kind()
        for rows in self._groups.values():
            rows.end_step()

    def kinds_of_steps(self, num_tokens: int) -> list[Kind]:
        """Those that there may be of so many tokens."""
        crowded = [Kind(crowded=True)] if self._residency.room.num_variants else []
        shared = [Kind(shared=True)] if self._may_be_shared(num_tokens) else []
        return [Kind(), Kind(alone=True), *crowded, *shared]

    def _may_be_shared(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens can be shared."""
        return bool(self._groups) and all(rows.can_be_shared(num_tokens) for rows in self._groups.values())

    @contextmanager
    def capturing(self, kind: Kind) -> Iterator[None]:
        """While CUDA graphs of squeezed steps of a kind are captured."""
        for rows in self._groups.values():
            rows.begin_capture(*kind)
        try:
            yield
        finally:
            self.end_step()

    def end(self) -> None:
        """Stops loading indexes."""
        self._loader.end()

    def _slots_there(self, step: Step) -> set[int]:
        """The slots whose prefixes have been loaded."""
        active = self._residency.active
        return active.keys() | {variant.slot for variant in step.variants if variant.prefix in active}

    def take_report(self) -> LoadReport | None:
        """Which orders to load have been carried out since the last call, if any."""
        return self._loader.take_report()

    def take_stats(self) -> SqueezeStats | None:
        """What was read since the last call, in bytes; None if nothing is known to have been."""
        stats = SqueezeStats()
        for slot, counts in enumerate(self._counted.take()):
            look_ups, loaded, pairs, kept, passes, exact_pairs = counts
            if pairs or exact_pairs:
                cost = self._residency.costs[slot]
                stats.add_bytes(
                    read=cost.read_bytes(loaded, look_ups) + passes * cost.dense_bytes,
                    alone=cost.read_bytes(kept, pairs) + exact_pairs * cost.dense_bytes,
                    dense=(pairs + exact_pairs) * cost.dense_bytes,
                )
        return None if stats.is_empty() else stats


class CounterReader:
    """Reads counters off the device without ever waiting for it: what it returns may be a step old."""

    def __init__(self, counters: torch.Tensor):
        self._counters = counters
        on_gpu = counters.is_cuda
        self._copy = torch.zeros_like(counters, device="cpu", pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._changed = self._pending = False
        self._taken = self._copy.clone()

    def expect_change(self) -> None:
        """Takes note that kernels which count are launched before the next ``take``. Others cost the device nothing."""
        self._changed = True

    def take(self) -> list[list[int]]:
        """Returns by how much each counter grew since the last call, as far as known; nothing if none is known to."""
        if not (self._changed or self._pending) or (self._pending and not self._copied.query()):
            return []
        if self._copied is None:
            self._copy.copy_(self._counters)
        growth = self._copy - self._taken
        self._taken += growth
        self._pending = self._copied is not None and self._changed
        if self._pending:
            self._copy.copy_(self._counters, non_blocking=True)
            self._copied.record()
        self._changed = False
        return growth.tolist()
