"""The KV connector that serves indexes: it moves no KV, it tells the worker which rows begin with which prefix."""

import os
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from vllm_squeeze.attention_backend import compat
from vllm_squeeze.attention_backend.catalogue import Catalogue
from vllm_squeeze.attention_backend.matching import LiveRequests, Step
from vllm_squeeze.attention_backend.orders import LoadReport, Order
from vllm_squeeze.attention_backend.pins import Pins
from vllm_squeeze.attention_backend.placement import Options, full_attention_groups, tiled_prompts
from vllm_squeeze.attention_backend.policy import arms_of
from vllm_squeeze.attention_backend.stats import SqueezePromMetrics, SqueezeStats
from vllm_squeeze.attention_backend.variants import Variants
from vllm_squeeze.attention_backend.wiring import SERVE, options_of


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler's side tells the worker's side: of a step, and what to do about indexes before it."""

    step: Step
    orders: tuple[Order, ...]


class PassiveConnector(KVConnectorBase_V1, SupportsHMA):
    """A connector that never has KV to load, save or hold back."""

    requires_kv_delivery = False

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])


class SqueezeConnector(PassiveConnector):
    """Scheduler's side: follows requests that begin with an indexed prefix. Worker's side: marks their rows."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        self._requests: LiveRequests | None = None
        self._worker: Any = None
        self._kv_cache_config = kv_cache_config
        if role == KVConnectorRole.SCHEDULER:
            options = Options(**options_of(vllm_config, SERVE))
            self._catalogue = Catalogue(options, vllm_config, kv_cache_config)
            self._pins = Pins(options, vllm_config, kv_cache_config)
            groups = full_attention_groups(kv_cache_config)
            num_layers = sum(len(kv_cache_config.kv_cache_groups[group].layer_names) for group in groups)
            choose = arms_of(options, vllm_config, num_layers)
            tiled = tiled_prompts(options, vllm_config)
            dense_prefill = not tiled and options.prefill != "squeezed"
            variants, how = Variants(self._catalogue.variant_slots), (self._keep_apart, tiled)
            self._requests = LiveRequests(
                self._catalogue.matcher, groups, choose, dense_prefill, self._pins.pin, variants, *how
            )
            self._pool: Any = None
            # other engines may squeeze in other ways, and share what connectors store
            self._salt = os.urandom(16)

    # scheduler's side

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool
        self._pins.bind(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        placement = self._requests.add(request)
        if placement is not None:
            self._catalogue.want(placement)

    def _keep_apart(self, request: Any, first: int, how: str) -> None:
        salt = sha256(self._salt + how.encode()).digest()
        if not compat.salt_block_hashes(request, self._pool, first, salt):
            compat.logger.warning_once(
                "squeeze: how this vLLM hashes blocks of the KV cache is not known here; prompts that repeat a squeezed "
                "answer may read its keys, also those of exact and dense requests."
            )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        report = self._requests.remove(request.request_id)
        return False, None if report is None else report.params()

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        orders = self._catalogue.next_orders(self._requests)
        self._pins.release_unpinned()
        return StepMetadata(self._requests.step(scheduler_output), orders)

    def update_connector_output(self, connector_output: Any) -> None:
        if isinstance(report := connector_output.kv_connector_worker_meta, LoadReport):
            self._catalogue.take_report(report)

    def reset_cache(self) -> bool:
        """vLLM resets caches when weights change: the indexes are for the old ones."""
        compat.logger.warning("squeeze: the prefix cache was reset with its connectors; serving densely from here on.")
        self._catalogue.clear(self._requests)
        return True

    def shutdown(self) -> None:
        if self._requests is not None:
            self._catalogue.end()
        if self._worker is not None:
            self._worker.end()

    # worker's side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        from vllm_squeeze.attention_backend.worker import SqueezeWorker, residency_of

        residency = residency_of(self._vllm_config)
        if residency is not None:
            self._worker = SqueezeWorker(self._vllm_config, residency, self._kv_cache_config, kv_caches)
            if residency.device.type == "cuda":
                compat.prepare_cuda_graphs()

    def handle_preemptions(self, kv_connector_metadata: StepMetadata) -> None:
        if self._worker is not None:
            self._worker.expect(kv_connector_metadata.step)

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.follow(connector_metadata.orders)
            self._worker.begin_step(connector_metadata.step)

    def build_connector_worker_meta(self) -> LoadReport | None:
        return self._worker.take_report() if self._worker is not None else None

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        if self._worker is not None:
            self._worker.end_step()

    # both

    def get_kv_connector_stats(self) -> SqueezeStats | None:
        if self._requests is None:
            return self._worker.take_stats() if self._worker is not None else None
        stats = SqueezeStats()
        if self._requests.rows:
            stats.add_rows(self._requests.rows)
            self._requests.rows.clear()
        if self._requests.misses.counts:
            stats.add_misses(self._requests.misses.counts)
            self._requests.misses.counts.clear()
        if self._catalogue.changed or self._pins.changed:
            stats.set_indexes(self._catalogue.states(), self._pins.num_blocks())
            stats.add_loads(*self._catalogue.take_loads())
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> SqueezeStats:
        return SqueezeStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> SqueezePromMetrics:
        return SqueezePromMetrics(*args)
