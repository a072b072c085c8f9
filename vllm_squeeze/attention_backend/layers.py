"""What our attention layers share, whatever attention they extend."""

from typing import Any

import torch

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.attention_backend.placement import Options
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.rows import RowGroup
from vllm_squeeze.attention_backend.wiring import RECORD, SERVE, options_of
from vllm_squeeze.attention_backend.worker import layers_of
from vllm_squeeze.kernels.tables import ClusterTable


def mode_of_engine() -> str | None:
    """Which of our connectors the engine being built uses: that to serve, that to record, or None."""
    from vllm.config import get_current_vllm_config

    vllm_config = get_current_vllm_config()
    return next((name for name in (SERVE, RECORD) if options_of(vllm_config, name) is not None), None)


def why_dense(impl: Any) -> str | None:
    """What keeps an attention layer from being squeezed, in a word or two; None if nothing does."""
    if impl.attn_type != "decoder":
        return f"{impl.attn_type} attention"
    if impl.sliding_window not in (None, -1, (-1, -1)):
        return "a sliding window"
    if impl.alibi_slopes is not None:
        return "ALiBi"
    if impl.logits_soft_cap:
        return "a logit soft cap"
    if impl.sinks is not None:
        return "learned attention sinks"
    if impl.kv_sharing_target_layer_name is not None:
        return "KV shared between layers"
    if impl.kv_cache_dtype not in ("auto", "float16", "bfloat16"):
        return f"a KV cache in {impl.kv_cache_dtype}"
    return None


class SqueezeLayer:
    """Mixed into vLLM's attention layers (impls) of engines that serve indexes.

    Attributes:
        table: the clusters of this layer, or None if it stays dense.
        rows: the rows of the current step, or None before the KV cache exists or if the layer stays dense.
        residency: what this rank holds of all indexes; None before weights are loaded.
    """

    rows_class: type[RowGroup]
    table: ClusterTable | None = None
    rows: RowGroup | None = None
    residency: Residency | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()

    def why_dense(self, dtype: torch.dtype) -> str | None:
        """What keeps this layer, with keys of this dtype, from being squeezed, in a line; None if nothing does."""
        return why_dense(self)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Loads this layer's tables while vLLM loads weights, so that its memory profiling counts them."""
        super().process_weights_after_loading(act_dtype)
        if self.residency is not None:
            return
        layers = layers_of(self._vllm_config)
        others = (getattr(getattr(layer, "impl", None), "residency", None) for layer in layers.values())
        self.residency = next((r for r in others if r is not None), None)
        if self.residency is None:
            self.residency = Residency(self._vllm_config, Options(**options_of(self._vllm_config, SERVE)))
        if reason := self.why_dense(act_dtype):
            logger.warning_once("squeeze: layers with %s stay dense.", reason)
            return
        name = next(name for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        self.table = self.residency.load_layer(name, self.num_kv_heads, self.head_size, act_dtype)


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
