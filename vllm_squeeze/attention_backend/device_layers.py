"""What our layers on GPUs share, whatever attention of vLLM's they extend."""

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_squeeze.attention_backend.layers import NotesRows, SqueezeLayer, as_stored, cache_scales
from vllm_squeeze.attention_backend.recorder import ObservesQueries
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.rows import RowGroup
from vllm_squeeze.attention_backend.wiring import SERVE, options_of
from vllm_squeeze.kernels.reference import dequantised
from vllm_squeeze.kernels.rows import match_rows
from vllm_squeeze.kernels.squeezed_attention import squeezed_attention
from vllm_squeeze.kernels.tiles import QueryTiles
from vllm_squeeze.kernels.workspace import Workspace

# Tiles of queries that the prefix kernels take at once.
MAX_TILES = 8


class DeviceRows(RowGroup):
    """The rows of a step in tensors that stay where they are, as captured CUDA graphs need it.

    Attributes:
        queries: the query tokens of squeezed rows, in tiles.
        num_queries: how many of them there may be.
    """

    _match_rows = staticmethod(match_rows)

    def __init__(self, block_size: int, vllm_config: Any, residency: Residency):
        super().__init__(block_size, vllm_config, residency)
        self._max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.num_queries = 0
        self._capturing = False

    def prepare(self, group: int) -> None:
        """Makes room for the tiles of layers with ``group`` query heads per KV head."""
        self._group = group
        slots = len(self._residency.prefixes.slots)
        self.queries = QueryTiles.allocate(self._max_tokens, slots, self._residency.longest_prefix, group, self._device)

    def note(self, metadata: Any, kernel_block_size: int) -> None:
        super().note(metadata, kernel_block_size)
        if self._capturing:
            # Any token of a later step that replays this graph may be a squeezed row's.
            self.num_queries = metadata.num_actual_tokens

    def can_be_alone(self, num_tokens: int, longest_suffix: int) -> bool:
        return self.queries.can_list_suffixes(num_tokens, longest_suffix, self._group)

    def begin_capture(self, alone: bool) -> None:
        self._capturing = self.squeezing = True
        self.alone = alone
        self.queries.clear()

    def end_step(self) -> None:
        super().end_step()
        self._capturing = False

    def set_rows(self, num_tokens: int) -> None:
        step = self.query_start_loc, self.block_table
        sizes = num_tokens, self._group, self._kernel_block_size
        self.queries.fill(self.row_slot, *step, self._residency.prefixes, *sizes)
        if self.alone:
            self.queries.list_suffixes(self.prefix_len, self.seq_lens, *step, *sizes)
        self.num_queries = num_tokens


class DeviceLayer(SqueezeLayer):
    """Mixed into vLLM's attention layers (impls) on GPUs of engines that serve indexes."""

    _workspace: Workspace | None = None

    def make_workspace(self) -> Workspace:
        """What the prefix kernels need beside their operands."""
        return Workspace.allocate(
            MAX_TILES,
            self.num_kv_heads,
            self.head_size,
            self.residency.most_centroids,
            self.residency.longest_prefix,
            self.residency.device,
        )

    def attend_prefixes(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        suffix_lse: torch.Tensor | None,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        **options: Any,
    ) -> None:
        """Attention over the prefixes of the step's rows, and in steps without others over what follows them.

        Args and effect are those of ``squeezed_attention``.
        """
        rows = self.rows
        squeezed_attention(
            query,
            output,
            suffix_lse,
            key_cache,
            value_cache,
            rows.block_table,
            rows.queries.first(rows.num_queries),
            self.table,
            self.residency.prefixes,
            self.scale,
            self.residency.options.rest == "value_centroids",
            self._workspace,
            **options,
        )


class DeviceBuilder(NotesRows):
    """Mixed into vLLM's metadata builders on GPUs."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if options_of(vllm_config, SERVE) is None:
            return support
        # Full graphs of mixed batches would need room for every token of a batch to be squeezed.
        return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)


class RecordingLayer(ObservesQueries):
    """Mixed into vLLM's attention layers on GPUs of engines that make an index."""

    def read_tokens(self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> Any:
        pages = as_stored(layer, kv_cache)[blocks.to(kv_cache.device)]
        both = pages.transpose(0, 1).flatten(1, 2)[:, :num_tokens].split(self.head_size, dim=-1)  # [H, T, D] each
        return tuple(map(dequantised, both, cache_scales(layer)))
