"""What our attention layers share, whatever attention they extend."""

from typing import Any

import torch

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.attention_backend.placement import Options
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.rows import RowGroup
from vllm_squeeze.attention_backend.wiring import RECORD, SERVE, options_of
from vllm_squeeze.attention_backend.worker import layers_of, residency_of
from vllm_squeeze.kernels.tables import MAX_GROUP, ClusterTable

FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""The 8-bit floats of a KV cache by vLLM's names for them."""


def mode_of_engine() -> str | None:
    """Which of our connectors the engine being built uses: that to serve, that to record, or None."""
    from vllm.config import get_current_vllm_config

    vllm_config = get_current_vllm_config()
    return next((name for name in (SERVE, RECORD) if options_of(vllm_config, name) is not None), None)


def why_dense(layer: Any) -> str | None:
    """What keeps an attention layer from being squeezed, in a word or two; None if nothing does."""
    impl = layer.impl
    if impl.attn_type != "decoder":
        return f"{impl.attn_type} attention"
    if impl.sliding_window not in (None, -1, (-1, -1)):
        return "a sliding window"
    if impl.alibi_slopes is not None:
        return "ALiBi"
    if impl.sinks is not None:
        return "learned attention sinks"
    if impl.kv_sharing_target_layer_name is not None:
        return "KV shared between layers"
    if impl.num_queries_per_kv > MAX_GROUP:
        return f"more than {MAX_GROUP} query heads for a KV head"
    if impl.kv_cache_dtype not in ("auto", "float16", "bfloat16", *FLOAT8):
        return f"a KV cache in {impl.kv_cache_dtype}"
    if layer._k_scale.numel() > 1 or layer._v_scale.numel() > 1:
        return "a scale for each KV head"
    return None


def as_stored(layer: Any, kv_cache: torch.Tensor) -> torch.Tensor:
    """A layer's KV cache as a view in the dtype that its keys have; vLLM keeps 8-bit floats as bytes."""
    float8 = FLOAT8.get(layer.impl.kv_cache_dtype)
    return kv_cache if float8 is None else kv_cache.view(float8)


def cache_scales(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the keys and the values in a layer's KV cache are multiplied by, one float32 each; None without a scale."""
    return (layer._k_scale, layer._v_scale) if layer.impl.kv_cache_dtype in FLOAT8 else (None, None)


def in_model_dtype(query: torch.Tensor, layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Queries in the model's dtype. vLLM hands those of some layers over in 8-bit floats, as it does their KV cache."""
    if query.dtype == dtype:
        return query
    return torch.mul(query.float(), layer._q_scale, out=torch.empty_like(query, dtype=dtype))


class SqueezeLayer:
    """Mixed into vLLM's attention layers (impls) of engines that serve indexes.

    Attributes:
        table: the clusters of this layer, or None if it stays dense.
        rows: the rows of the current step, or None before the KV cache exists or if the layer stays dense.
        residency: what this rank holds of all indexes; None before weights are loaded.
        dtype: of the model, which queries have in our kernels.
    """

    rows_class: type[RowGroup]
    table: ClusterTable | None = None
    rows: RowGroup | None = None
    residency: Residency | None = None
    dtype: torch.dtype

    def __init__(self, *args: Any, **kwargs: Any):
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()

    def why_dense(self, layer: Any, dtype: torch.dtype) -> str | None:
        """What keeps vLLM's layer with this impl, and queries of this dtype, from being squeezed; None if nothing."""
        return why_dense(layer)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Makes this layer's table while vLLM loads weights, so that its memory profiling counts it."""
        super().process_weights_after_loading(act_dtype)
        self.dtype = act_dtype
        if self.residency is not None:
            return
        self.residency = residency_of(self._vllm_config)
        if self.residency is None:
            self.residency = Residency(self._vllm_config, Options(**options_of(self._vllm_config, SERVE)))
        layers = layers_of(self._vllm_config)
        name = next(name for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        if reason := self.why_dense(layers[name], act_dtype):
            logger.warning_once("squeeze: layers with %s stay dense.", reason)
            return
        self.table = self.residency.make_table(name, self.num_kv_heads, self.head_size)

    def warm_up(self, layer: Any, kv_cache: torch.Tensor) -> None:
        """Compiles what steps with squeezed rows need, before the first of them. vLLM's layer holds this impl."""


class NotesRows:
    """Mixed into vLLM's metadata builders: tells our layers of the rows of each step, in engines that serve indexes."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._serving = options_of(vllm_config, SERVE) is not None

    def build(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted(super().build(*args, **kwargs))

    def _noted(self, metadata: Any) -> Any:
        if self._serving:
            layers = layers_of(self.vllm_config)
            impls = (getattr(layers.get(name), "impl", None) for name in self.layer_names)
            rows = next((impl.rows for impl in impls if getattr(impl, "rows", None) is not None), None)
            if rows is not None:
                rows.note(metadata, self.kv_cache_spec.block_size)
        return metadata
