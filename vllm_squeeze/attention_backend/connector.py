"""The KV connector that serves indexes: it moves no KV, it tells the worker which rows begin with which prefix."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from vllm_squeeze.attention_backend import compat
from vllm_squeeze.attention_backend.matching import LiveRequests, PrefixMatcher, Step
from vllm_squeeze.attention_backend.placement import Options, full_attention_groups, open_indexes, place_all
from vllm_squeeze.attention_backend.policy import arms_of
from vllm_squeeze.attention_backend.stats import SqueezePromMetrics, SqueezeStats
from vllm_squeeze.attention_backend.wiring import SERVE, options_of


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler's side tells the worker's side."""

    step: Step


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
            self._requests = self._follow_requests(vllm_config)

    def _follow_requests(self, vllm_config: Any) -> LiveRequests:
        options = Options(**options_of(vllm_config, SERVE))
        indexes = open_indexes(options, vllm_config, verify=True)
        placements = place_all(indexes, options, vllm_config, self._kv_cache_config)
        for slot, placement in placements.items():
            compat.logger.info(
                "squeeze: slot %d serves %s (%d tokens, %d squeezed) %s",
                slot,
                indexes[slot].folder.name,
                placement.cost.num_tokens,
                placement.covered,
                "exactly" if placement.exact else f"at a budget of {placement.budget:g}",
            )
        tokens = {slot: indexes[slot].token_ids.tolist() for slot in placements}
        matcher = PrefixMatcher(placements.values(), tokens)
        groups = full_attention_groups(self._kv_cache_config)
        num_layers = sum(len(self._kv_cache_config.kv_cache_groups[group].layer_names) for group in groups)
        return LiveRequests(matcher, groups, arms_of(options, vllm_config, num_layers), options.prefill == "dense")

    # scheduler's side

    def on_new_request(self, request: Any) -> None:
        self._requests.add(request)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        report = self._requests.remove(request.request_id)
        return False, None if report is None else report.params()

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return StepMetadata(self._requests.step(scheduler_output))

    def reset_cache(self) -> bool:
        """vLLM resets caches when weights change: the indexes are for the old ones."""
        compat.logger.warning("squeeze: the prefix cache was reset with its connectors; serving densely from here on.")
        self._requests = LiveRequests(PrefixMatcher([], {}), {})
        return True

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
            self._worker.begin_step(connector_metadata.step)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        if self._worker is not None:
            self._worker.end_step()

    # both

    def get_kv_connector_stats(self) -> SqueezeStats | None:
        if self._requests is None:
            return self._worker.take_stats() if self._worker is not None else None
        if not self._requests.rows:
            return None
        stats = SqueezeStats()
        stats.add_rows(self._requests.rows)
        self._requests.rows.clear()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> SqueezeStats:
        return SqueezeStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> SqueezePromMetrics:
        return SqueezePromMetrics(*args)
