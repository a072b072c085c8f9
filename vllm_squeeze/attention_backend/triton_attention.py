"""The backend on NVIDIA GPUs without FlashAttention: vLLM's Triton attention, and xformers beside our kernels.

vLLM's Triton kernels give no log-sum-exp, without which attention over a prefix cannot be joined to theirs. So what
follows the prefixes of squeezed rows is left to xformers; other rows get vLLM's attention in all steps.
"""

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_squeeze.attention_backend.device_layers import DeviceBuilder, DeviceLayer, DeviceRows, RecordingLayer
from vllm_squeeze.attention_backend.layers import FLOAT8, mode_of_engine
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.wiring import RECORD, SERVE
from vllm_squeeze.kernels.suffix_attention import Suffixes, attend_suffix, why_unsupported
from vllm_squeeze.kernels.tables import DENSE_SLOT

# Keys of all suffixes of a step. Bounds the memory that they are packed into.
MAX_SUFFIX_KEYS = 16384


class PackedRows(DeviceRows):
    """The rows of a step as xformers needs them.

    Attributes:
        suffixes: where the keys lie that follow the prefixes of squeezed rows.
        dense_lens: [max rows] int32, tokens of each row that vLLM attends to: of squeezed rows only this step's, which
            it cannot leave out.
    """

    def __init__(self, block_size: int, vllm_config: Any, residency: Residency):
        super().__init__(block_size, vllm_config, residency)
        self.suffixes = Suffixes.allocate(self._max_rows, self._max_tokens, MAX_SUFFIX_KEYS, self._device)
        self.dense_lens = torch.ones(self._max_rows, dtype=torch.int32, device=self._device)

    def set_rows(self, num_tokens: int) -> None:
        if not self.alone:
            self._pack_rows()
        super().set_rows(num_tokens)

    def _pack_rows(self) -> None:
        rows = len(self.seq_lens)
        query_start_loc = self.query_start_loc[: rows + 1]
        # The last rows go dense where their suffixes are too long.
        suffix_len = torch.where(self.row_slot >= 0, self.seq_lens - self.prefix_len, 0)
        squeezed = (self.row_slot >= 0) & (suffix_len.cumsum(0) <= MAX_SUFFIX_KEYS)
        self.row_slot.masked_fill_(~squeezed, DENSE_SLOT)
        self.suffixes.fill(
            squeezed, self.prefix_len, self.seq_lens, query_start_loc, self.block_table, self._kernel_block_size
        )
        self.dense_lens[:rows] = torch.where(squeezed, query_start_loc.diff(), self.seq_lens)


class SqueezeTritonImpl(DeviceLayer, TritonAttentionImpl):
    """Attention of one layer: vLLM's own in steps without squeezed rows."""

    rows_class = PackedRows

    def why_dense(self, layer: Any, dtype: torch.dtype) -> str | None:
        if reason := super().why_dense(layer, dtype):
            return reason
        if self.logits_soft_cap:
            return "a logit soft cap, which xformers lacks,"
        if self.kv_cache_dtype in FLOAT8:
            return f"a KV cache in {self.kv_cache_dtype}, which xformers does not read,"
        reason = why_unsupported(self.head_size, dtype, self.residency.device)
        return reason and f"no FlashAttention in vLLM, nor in its place xformers ({reason}),"

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.table is not None:
            room = 2, MAX_SUFFIX_KEYS, self.num_kv_heads, self.head_size
            self._workspace, self._packed = self.residency.shared(
                lambda: (self.make_workspace(), torch.empty(room, dtype=act_dtype, device=self.residency.device))
            )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        # vLLM's kernel would round the output before ours is joined to it
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = self.rows
        squeezing = rows is not None and rows.squeezing and attn_metadata is not None
        if squeezing and rows.alone:
            self.attend_prefixes(query, output, None, *self.caches_of(layer, kv_cache))
            return output
        if squeezing:
            lens = rows.dense_lens[: len(attn_metadata.seq_lens)]
            attn_metadata = dataclasses.replace(attn_metadata, seq_lens=lens)
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if squeezing:
            self._squeeze(layer, query[: attn_metadata.num_actual_tokens], kv_cache, attn_metadata, output)
        return output

    def _squeeze(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Any, output: torch.Tensor
    ) -> None:
        rows, output, caches = self.rows, output[: len(query)], self.caches_of(layer, kv_cache)
        suffix_lse = attend_suffix(
            query,
            output,
            *caches,
            rows.suffixes,
            attn_metadata.query_start_loc,
            attn_metadata.max_query_len,
            self.scale,
            self._packed,
        )
        self.attend_prefixes(query, output, suffix_lse, *caches)


class SqueezeTritonBuilder(DeviceBuilder, TritonAttentionMetadataBuilder):
    """vLLM's builder that also tells our layers of the rows of each step."""


class RecordingTritonImpl(RecordingLayer, TritonAttentionImpl):
    """vLLM's attention that remembers the last queries."""


class SqueezeTritonBackend(TritonAttentionBackend):
    """vLLM's Triton attention, and just that unless there is an index to serve or to make."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        impls = {SERVE: SqueezeTritonImpl, RECORD: RecordingTritonImpl}
        return impls.get(mode_of_engine(), TritonAttentionImpl)

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return SqueezeTritonBuilder
