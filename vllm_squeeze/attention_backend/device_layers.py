"""What our layers on GPUs share, whatever attention of vLLM's they extend."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_squeeze.attention_backend.layers import NotesRows, SqueezeLayer, as_stored, cache_scales
from vllm_squeeze.attention_backend.matching import DENSE_SLOT, LiveBlock
from vllm_squeeze.attention_backend.recorder import ObservesQueries
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.rows import RowGroup
from vllm_squeeze.attention_backend.wiring import SERVE, options_of
from vllm_squeeze.kernels.reference import dequantised
from vllm_squeeze.kernels.rows import match_rows
from vllm_squeeze.kernels.squeezed_attention import squeezed_attention
from vllm_squeeze.kernels.tiles import QueryTiles, kinds_of_tiles
from vllm_squeeze.kernels.workspace import Workspace

# Tiles of queries that the prefix kernels take at once.
MAX_TILES = 8


class DeviceRows(RowGroup):
    """The rows of a step in tensors that stay where they are, as captured CUDA graphs need it.

    Attributes:
        queries: the query tokens of squeezed rows, in tiles.
        num_queries: how many of them there may be.
        suffix_done: when another stream has attended to suffixes; None if none does.
    """

    suffix_done: torch.cuda.Event | None = None

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
        self.queries = QueryTiles.allocate(
            self._max_tokens, slots, self._residency.room.longest_prefix, group, self._device
        )

    @property
    def num_slots(self) -> int:
        """Of how many prefixes squeezed rows may be in this step. Fewer make fewer tiles."""
        of_all = self.crowded or self.shared
        return len(self._residency.prefixes.slots) if of_all else self._residency.room.num_slots

    @property
    def step_queries(self) -> QueryTiles:
        """``queries`` as kernels take them that are launched for this step, or captured for steps like it."""
        return self.queries.first(self.num_queries, self.num_slots)

    def warm_up(self, page_size: int) -> None:
        """Compiles the kernels that find a step's rows, by a step that has none."""
        nothing = torch.zeros(2, dtype=torch.int32, device=self._device)
        metadata = SimpleNamespace(
            block_table=nothing[None], seq_lens=nothing[:1], query_start_loc=nothing, num_actual_tokens=0, max_seq_len=1
        )
        self.note(metadata, page_size)
        for alone in (False, True):
            self.begin_step([LiveBlock(DENSE_SLOT, 0, 0, 0, 0, 0)], 1, alone)
        self.end_step()
        self.queries.clear()

    def note(self, metadata: Any, kernel_block_size: int) -> None:
        super().note(metadata, kernel_block_size)
        if self._capturing:
            # Any token of a later step that replays this graph may be a squeezed row's.
            self.num_queries = metadata.num_actual_tokens

    def can_be_alone(self, num_tokens: int, longest_suffix: int) -> bool:
        tiles = self.queries.first(num_tokens, self._residency.room.num_slots)
        return tiles.can_list_suffixes(num_tokens, longest_suffix, self._group)

    def begin_capture(self, alone: bool, crowded: bool, shared: bool) -> None:
        self._capturing = self.squeezing = True
        self.alone, self.crowded, self.shared = alone, crowded, shared
        self.queries.clear()

    def end_step(self) -> None:
        super().end_step()
        self._capturing = False

    def set_rows(self, num_tokens: int) -> None:
        step = self.query_start_loc, self.block_table
        sizes = num_tokens, self._group, self._kernel_block_size
        self.queries.fill(self.row_slot, *step, self._residency.prefixes, *sizes)
        if self.alone and num_tokens:
            tiles = self.queries.first(num_tokens, self.num_slots)
            tiles.list_suffixes(self.prefix_len, self.seq_lens, *step, *sizes)
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
            self.residency.room.most_centroids,
            self.residency.room.longest_prefix,
            self.residency.device,
        )

    def caches_of(self, layer: Any, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of vLLM's layer, views [num_blocks, S, H, D] in the dtype they are stored in."""
        return as_stored(layer, kv_cache).transpose(1, 2).split(self.head_size, dim=-1)

    def kernel_options(self, layer: Any) -> dict[str, Any]:
        """How the kernels attend in vLLM's layer."""
        key_scale, value_scale = cache_scales(layer)
        return {"soft_cap": self.logits_soft_cap or 0.0, "key_scale": key_scale, "value_scale": value_scale}

    def warm_up(self, layer: Any, kv_cache: torch.Tensor) -> None:
        caches = self.caches_of(layer, kv_cache)
        self.rows.warm_up(caches[0].shape[1])
        for self.rows.crowded in (True, False):
            for num_tokens in kinds_of_tiles(self.rows.num_slots, self.num_heads // self.num_kv_heads):
                shape = num_tokens, self.num_heads, self.head_size
                query = torch.zeros(shape, dtype=self.dtype, device=kv_cache.device)
                suffix_lse = torch.zeros(self.num_heads, num_tokens, device=kv_cache.device)
                self.rows.num_queries = num_tokens
                for lse in (None, suffix_lse):
                    self.attend_prefixes(query, torch.empty_like(query), lse, *caches, **self.kernel_options(layer))

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
            rows.step_queries,
            self.table,
            self.residency.prefixes,
            self.scale,
            self.residency.options.rest == "value_centroids",
            self._workspace,
            suffix_done=None if suffix_lse is None else rows.suffix_done,
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
