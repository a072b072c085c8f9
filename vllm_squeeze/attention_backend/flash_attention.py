"""The backend on NVIDIA GPUs: FlashAttention for all that is not indexed, our kernels for indexed prefixes."""

import functools
from typing import Any

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
    flash_attn_varlen_func,
)

from vllm_squeeze.attention_backend.compat import can_share_prefixes
from vllm_squeeze.attention_backend.device_layers import DeviceBuilder, DeviceLayer, DeviceRows, RecordingLayer
from vllm_squeeze.attention_backend.layers import in_model_dtype, mode_of_engine
from vllm_squeeze.attention_backend.placement import tiled_prompts
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.wiring import RECORD, SERVE
from vllm_squeeze.kernels.prompts import PromptTiles, PromptWorkspace, squeezed_prompts
from vllm_squeeze.kernels.rows import skip_prefixes
from vllm_squeeze.kernels.shared_prefix import gather_queries, join_shared
from vllm_squeeze.kernels.tables import DENSE_SLOT
from vllm_squeeze.kernels.tiles import largest_tile


class SuffixRows(DeviceRows):
    """The rows of a step as FlashAttention needs them, which attends to what follows the prefixes of squeezed rows.

    Attributes:
        suffix_lens: [max rows] int32, tokens of each row that FlashAttention attends to.
        suffix_blocks: [max rows, max blocks] int32, their block tables.
        prefix_blocks: [P, max blocks] int32, those of the prefixes of shared steps, by slot.
        side: the stream that attends to the suffixes, between the events ``begun`` and ``suffix_done``.
        prompts: the query tokens of prompts that choose together, in tiles; None where none ever do. These attend to
            what follows their prefix with what they chose.
    """

    prompts: PromptTiles | None = None

    def __init__(self, block_size: int, vllm_config: Any, residency: Residency):
        super().__init__(block_size, vllm_config, residency)
        self.suffix_lens = torch.zeros(self._max_rows, dtype=torch.int32, device=self._device)
        self.suffix_blocks = self.prefix_blocks = torch.zeros(0, dtype=torch.int32, device=self._device)
        self._vllm_config = vllm_config

    def prepare(self, group: int) -> None:
        super().prepare(group)
        self.side, self.begun, self.suffix_done = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
        if tiled_prompts(self._residency.options, self._vllm_config):
            head_size = self._vllm_config.model_config.get_head_size()
            self.prompts = PromptTiles.allocate(self._max_tokens, self._max_rows, group, head_size, self._device)

    def note(self, metadata: Any, kernel_block_size: int) -> None:
        super().note(metadata, kernel_block_size)
        width = metadata.block_table.shape[1]
        if self.suffix_blocks.shape[-1] != width:
            slots = len(self._residency.prefixes.lens)
            both = torch.zeros(self._max_rows + slots, width, dtype=torch.int32, device=self._device)
            self.suffix_blocks, self.prefix_blocks = both.split([self._max_rows, slots])

    def can_be_shared(self, num_tokens: int) -> bool:
        # that few are as fast in one tile
        return num_tokens > largest_tile(self._group) and can_share_prefixes()

    def set_rows(self, num_tokens: int) -> None:
        if not self.alone:
            skip_prefixes(
                self.block_table,
                self.seq_lens,
                self.row_slot,
                self.prefix_len,
                self._kernel_block_size,
                self.max_seq_len,
                self.suffix_lens,
                self.suffix_blocks,
            )
        super().set_rows(num_tokens)
        if self.shared:
            # of slots that no rows are on, any row will do
            torch.index_select(self.block_table, 0, self.queries.slot_rows.clamp(min=0), out=self.prefix_blocks)

    def set_prompts(self, counts: tuple[int, ...]) -> None:
        if self.prompts is not None:
            # vLLM may reckon with drafts beyond the longest row that there can be
            longest = min(self.max_seq_len, self._vllm_config.model_config.max_model_len)
            self.prompts = self.prompts.of(counts, longest)
            if counts:
                self.prompts.fill(self.row_slot, self.query_start_loc, self.seq_lens, self.prefix_len)

    def begin_capture(self, *kind: bool) -> None:
        super().begin_capture(*kind)
        self.set_prompts(())


class SqueezeImpl(DeviceLayer, FlashAttentionImpl):
    """Attention of one layer: vLLM's own in steps without squeezed rows."""

    rows_class = SuffixRows

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.table is not None:
            self._workspace, self._prompt_workspace = self.residency.shared(
                lambda: (self.make_workspace(), self._make_prompt_workspace())
            )

    def _make_prompt_workspace(self) -> PromptWorkspace | None:
        if not tiled_prompts(self.residency.options, self._vllm_config):
            return None
        room, group = self.residency.room, self.num_heads // self.num_kv_heads
        limits = room.most_centroids, room.longest_prefix, self._vllm_config.model_config.max_model_len
        return PromptWorkspace.allocate(self.table, group, *limits, self.dtype)

    def warm_up(self, layer: Any, kv_cache: torch.Tensor) -> None:
        super().warm_up(layer, kv_cache)
        rows, group = self.rows, self.num_heads // self.num_kv_heads
        if rows.prompts is not None:
            # of a step that has none
            rows.prompts = rows.prompts.of((1,), 1)
            facts = rows.query_start_loc, rows.seq_lens, rows.prefix_len
            rows.prompts.fill(torch.full_like(rows.row_slot, DENSE_SLOT), *facts)
            query = torch.zeros(1, self.num_heads, self.head_size, dtype=self.dtype, device=kv_cache.device)
            self._attend_prompts(layer, query, query.clone(), *self.caches_of(layer, kv_cache))
            rows.set_prompts(())
        rows.num_queries = largest_tile(group) + 1
        if rows.can_be_shared(rows.num_queries):
            shape = rows.num_queries, self.num_heads, self.head_size
            query = torch.zeros(shape, dtype=self.dtype, device=kv_cache.device)
            attended = gather_queries(query, rows.step_queries, group)
            suffix_lse, lse = (torch.zeros(self.num_heads, len(x), device=query.device) for x in (query, attended))
            join_shared(query, suffix_lse, attended, lse, rows.step_queries, self.residency.prefixes, self.num_kv_heads)

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
        if rows is None or not rows.squeezing or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        caches = self.caches_of(layer, kv_cache)
        suffix_lse = None if rows.alone else self._attend_suffix(layer, query, *caches, attn_metadata, output)
        if rows.shared:
            self._attend_shared(layer, query, *caches, output, suffix_lse)
            return output
        if rows.prompts is not None and rows.prompts.num_tiles:
            self._attend_prompts(layer, query, output, *caches)
        if rows.num_queries:
            self.attend_prefixes(
                in_model_dtype(query, layer, output.dtype),
                output,
                suffix_lse,
                *caches,
                **self.kernel_options(layer),
            )
        return output

    def caches_of(self, layer: Any, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # FlashAttention's loads want canonical strides where there is one KV head.
        keys, values = super().caches_of(layer, kv_cache)
        return canonicalize_singleton_dim_strides(keys), canonicalize_singleton_dim_strides(values)

    def _attend_suffix(
        self,
        layer: Any,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """FlashAttention over what follows prefixes, on a stream beside the look-up, which needs nothing of it.

        Returns:
            log-sum-exp [heads, tokens]; it and the output are there when ``rows.suffix_done`` is.
        """
        rows = self.rows
        num_tokens, num_rows = attn_metadata.num_actual_tokens, len(attn_metadata.seq_lens)
        rows.begun.record()
        with torch.cuda.stream(rows.side):
            rows.side.wait_event(rows.begun)
            suffix_lse = self._flash(
                layer,
                q=query[:num_tokens],
                k=key_cache,
                v=value_cache,
                out=output[:num_tokens],
                cu_seqlens_q=attn_metadata.query_start_loc,
                max_seqlen_q=attn_metadata.max_query_len,
                seqused_k=rows.suffix_lens[:num_rows],
                max_seqlen_k=attn_metadata.max_seq_len,
                causal=True,
                block_table=rows.suffix_blocks[:num_rows],
                num_splits=attn_metadata.max_num_splits,
            )
            rows.suffix_done.record()
        return suffix_lse

    def _attend_shared(
        self,
        layer: Any,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        suffix_lse: torch.Tensor,
    ) -> None:
        """FlashAttention over prefixes, each for the queries of all its rows at once, joined to that over suffixes."""
        rows, prefixes = self.rows, self.residency.prefixes
        queries, group = rows.step_queries, self.num_heads // self.num_kv_heads
        size = largest_tile(group)
        gathered = gather_queries(query, queries, group)
        attended = torch.empty_like(gathered, dtype=output.dtype)
        lse = self._flash(
            layer,
            q=gathered,
            k=key_cache,
            v=value_cache,
            out=attended,
            cu_seqlens_q=queries.starts,
            # all may be on one prefix; were it more, FlashAttention would spread keys over fewer programs
            max_seqlen_q=-(-queries.num_tokens // size) * size,
            seqused_k=prefixes.lens,
            max_seqlen_k=self.residency.room.longest_prefix,
            causal=False,
            block_table=rows.prefix_blocks,
            num_splits=0,
        )
        torch.cuda.current_stream().wait_event(rows.suffix_done)
        join_shared(output, suffix_lse, attended, lse, queries, prefixes, self.num_kv_heads)

    def _attend_prompts(
        self,
        layer: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> None:
        """Attention of prompts whose tokens choose together."""
        rows = self.rows
        squeezed_prompts(
            query,
            output,
            key_cache,
            value_cache,
            rows.block_table,
            rows.prompts,
            self.table,
            self.residency.prefixes,
            self.scale,
            self.residency.options.rest == "value_centroids",
            self._prompt_workspace,
            functools.partial(self._flash, layer, causal=True, num_splits=0),
            self.logits_soft_cap or 0.0,
            None if rows.alone else rows.suffix_done,
        )

    def _flash(self, layer: Any, k: torch.Tensor, block_table: torch.Tensor, **operands: Any) -> torch.Tensor:
        """Has FlashAttention write its output; returns the log-sum-exp [heads, tokens]."""
        per_row_and_head = len(block_table), k.shape[2]
        _, lse = flash_attn_varlen_func(
            **operands,
            k=k,
            block_table=block_table,
            softmax_scale=self.scale,
            softcap=self.logits_soft_cap,
            # FlashAttention wants queries in 8 bits where keys are, as vLLM hands them over.
            q_descale=layer._q_scale.expand(per_row_and_head) if self.supports_quant_query_input else None,
            k_descale=layer._k_scale.expand(per_row_and_head),
            v_descale=layer._v_scale.expand(per_row_and_head),
            fa_version=self.vllm_flash_attn_version,
            return_softmax_lse=True,
        )
        return lse


class SqueezeBuilder(DeviceBuilder, FlashAttentionMetadataBuilder):
    """vLLM's builder that also tells our layers of the rows of each step."""

    def update_block_table(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted(super().update_block_table(*args, **kwargs))

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        # vLLM would read a prefix common to all rows densely, also in a step that squeezes them.
        return not self._serving and super().use_cascade_attention(*args, **kwargs)


class RecordingImpl(RecordingLayer, FlashAttentionImpl):
    """vLLM's attention that remembers the last queries."""


class SqueezeBackend(FlashAttentionBackend):
    """FlashAttention, and just that unless there is an index to serve or to make."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        impls = {SERVE: SqueezeImpl, RECORD: RecordingImpl}
        return impls.get(mode_of_engine(), FlashAttentionImpl)

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return SqueezeBuilder
