"""The backend on the CPU: vLLM's own attention, with the outputs of squeezed rows computed anew in torch.

For laptops and continuous integration: the same index, matching and arithmetic as on the GPU, not its speed.
"""

import functools
from itertools import chain, groupby
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_squeeze.attention_backend.layers import NotesRows, SqueezeLayer, as_stored, cache_scales, mode_of_engine
from vllm_squeeze.attention_backend.recorder import ObservesQueries
from vllm_squeeze.attention_backend.rows import RowGroup
from vllm_squeeze.attention_backend.wiring import RECORD, SERVE
from vllm_squeeze.kernels.reference import (
    ReadTokens,
    attend_causal,
    attend_prefix,
    count_reads,
    dequantised,
    merge,
)
from vllm_squeeze.kernels.tables import PROMPT_SLOTS, RULES, prompt_tile_tokens

# Query tokens scored at once. Bounds the memory of a long question over a long prefix.
QUERY_CHUNK = 256


class HostRows(RowGroup):
    """The rows of a step as Python numbers.

    Attributes:
        squeezed: per squeezed row its index, slot as in ``row_slot``, prefix length, sequence length, first and last
            query token + 1.
    """

    def set_rows(self, num_tokens: int) -> None:
        starts = self.query_start_loc.tolist()
        rows = zip(self.row_slot.tolist(), self.prefix_len.tolist(), self.seq_lens.tolist(), starts, starts[1:])
        self.squeezed = [(row, *facts) for row, facts in enumerate(rows) if facts[0] >= 0]


class KVPages:
    """Reads tokens out of the CPU backend's KV cache, whose pages are packed as its instruction set likes them.

    How an element lies in a page is found out by writing numbered elements through vLLM itself.

    Args:
        impl: vLLM's attention layer implementation.
        layer: the layer that holds it.
        kv_cache: [num_blocks, H, S, 2 * D], as vLLM keeps it.
        dtype: of the model.
    """

    def __init__(self, impl: CPUAttentionBackendImpl, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype):
        self.block_size = kv_cache.shape[2]
        self._kv_cache, self._scales = as_stored(layer, kv_cache), cache_scales(layer)
        self._offsets = _page_layout(impl, layer, kv_cache, dtype)
        self._heads = torch.arange(kv_cache.shape[1])[:, None]

    def read(self, blocks: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads keys and values, [H, M, D] each, of tokens at positions [H, M] or [M] of a row with these blocks."""
        positions = positions.expand(len(self._heads), -1)
        pages, within = blocks[positions // self.block_size], positions % self.block_size
        return tuple(
            dequantised(self._gather(offsets, pages, within), scale)
            for offsets, scale in zip(self._offsets, self._scales, strict=True)
        )

    def _gather(self, offsets: torch.Tensor, pages: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
        """Elements at ``offsets`` [S, D] of pages [H, M], for the tokens ``within`` [H, M] them: [H, M, D]."""
        num_blocks, num_heads, block_size, width = self._kv_cache.shape
        page = block_size * width
        first, per_token, per_element = (int(offsets[at]) for at in ((0, 0), (1, 0), (0, 1)))
        steps = per_token - first, per_element - first
        token, element = (torch.arange(size) for size in offsets.shape)
        if torch.equal(offsets, first + token[:, None] * steps[0] + element * steps[1]):
            # Evenly spaced: torch reads rows of a view several times faster than single elements.
            shape, strides = (num_blocks, num_heads, *offsets.shape), (num_heads * page, page, *steps)
            view = self._kv_cache.as_strided(shape, strides, self._kv_cache.storage_offset() + first)
            return view[pages, self._heads, within]
        return self._kv_cache.view(-1)[((pages * num_heads + self._heads) * page)[..., None] + offsets[within]]


_LAYOUTS: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}


def _page_layout(
    impl: CPUAttentionBackendImpl, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets of key and value elements in a page of one block and head: [S, D] int64 each."""
    _, heads, block_size, width = kv_cache.shape
    head_size, stored = width // 2, as_stored(layer, kv_cache).dtype
    isa = getattr(layer, "isa", None) or impl.isa
    known = (isa, block_size, head_size, dtype, stored)
    if known in _LAYOUTS:
        return _LAYOUTS[known]
    count = block_size * head_size
    number = torch.arange(count).view(block_size, 1, head_size).expand(-1, heads, -1)
    slots = torch.arange(block_size)
    # vLLM divides by the scales what it writes
    key_scale, value_scale = (1.0 if scale is None else scale for scale in cache_scales(layer))
    keys, values = torch.zeros(2, 2 * count, dtype=torch.int64)
    # Octal digits of the numbers, which even 8-bit floats hold exactly.
    for power in 8 ** torch.arange(7):
        digit = number // power % 8
        nothing = torch.full_like(digit, -1)
        for numbers, key, value in ((keys, digit, nothing), (values, nothing, digit)):
            page = torch.full((1, heads, block_size, width), -1.0).to(stored).view(kv_cache.dtype)
            impl.do_kv_cache_update(layer, (key * key_scale).to(dtype), (value * value_scale).to(dtype), page, slots)
            numbers += as_stored(layer, page)[0, 0].flatten().float().long() * power

    def offsets(numbers: torch.Tensor) -> torch.Tensor:
        written = (numbers >= 0).nonzero().flatten()
        assert len(written) == count, "vLLM wrote another number of elements than a page holds"
        result = torch.empty(count, dtype=torch.int64)
        result[numbers[written]] = written
        return result.view(block_size, head_size)

    _LAYOUTS[known] = offsets(keys), offsets(values)
    return _LAYOUTS[known]


class SqueezeCPUImpl(SqueezeLayer, CPUAttentionBackendImpl):
    """Attention of one layer: vLLM's for all rows, then ours in place of it for squeezed rows."""

    rows_class = HostRows

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
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if attn_metadata is not None and self.rows is not None and self.rows.squeezing:
            self._squeeze(KVPages(self, layer, kv_cache, query.dtype), query, output)
        return output

    def _squeeze(self, pages: KVPages, query: torch.Tensor, output: torch.Tensor) -> None:
        heads, size = self.num_kv_heads, self.head_size
        query = query.view(len(query), heads, -1, size)
        output = output.view(len(output), heads, -1, size)
        blocks = self.rows.block_table.long()

        def same_prefix(row: tuple[int, ...]) -> tuple[int, ...]:
            index, slot, prefix_len = row[:3]
            return slot, int(blocks[index, prefix_len // pages.block_size - 1])

        for (slot, _), group in groupby(sorted(self.rows.squeezed, key=same_prefix), key=same_prefix):
            rows = list(group)
            tokens = torch.cat([torch.arange(start, end) for *_, start, end in rows])
            suffix = [
                attend_causal(
                    query[start:end],
                    *pages.read(blocks[index], torch.arange(prefix_len, seq_len)),
                    self.scale,
                    self.logits_soft_cap,
                )
                for index, _, prefix_len, seq_len, start, end in rows
            ]
            suffix_output, suffix_lse = (torch.cat(parts) for parts in zip(*suffix))
            read = functools.partial(pages.read, blocks[rows[0][0]])
            together = slot >= PROMPT_SLOTS
            counts = [end - start for *_, start, end in rows] if together else [len(tokens)]
            size = prompt_tile_tokens(query.shape[2], self.head_size) if together else QUERY_CHUNK
            for chunk in chain.from_iterable(some.split(size) for some in torch.arange(len(tokens)).split(counts)):
                suffix = suffix_output[chunk], suffix_lse[chunk]
                merged = self.attend_prefix(query[tokens[chunk]], *suffix, slot, read)
                output[tokens[chunk]] = merged.to(output.dtype)

    def attend_prefix(
        self, query: torch.Tensor, suffix_output: torch.Tensor, suffix_lse: torch.Tensor, slot: int, read: ReadTokens
    ) -> torch.Tensor:
        """Attention over a prefix, joined to that over what follows it.

        Args:
            query: [R, H, G, D].
            suffix_output: [R, H, G, D] float32, over what follows the prefix.
            suffix_lse: [R, H, G] float32, its log-sum-exp.
            slot: of the prefix, as in ``row_slot``.
            read: reads keys and values of the prefix.

        Returns:
            [R, H, G, D] float32.
        """
        prefixes, together = self.residency.prefixes, slot >= PROMPT_SLOTS
        slot -= PROMPT_SLOTS * together
        first, count, num_sinks, rule = prefixes.slots[slot].tolist()
        output, lse, kept, loaded = attend_prefix(
            query,
            self.table.prefix(first, count, int(prefixes.frames[slot])),
            read,
            float(prefixes.log_threshold[slot]),
            num_sinks,
            self.scale,
            self.residency.options.rest == "value_centroids",
            self.logits_soft_cap,
            RULES[rule],
            float(prefixes.kept_shares[slot]) if together else None,
        )
        count_reads(prefixes.counters[slot], count > 0, kept, loaded)
        return merge(suffix_output, suffix_lse, output, lse)


class SqueezeCPUBuilder(NotesRows, CPUAttentionMetadataBuilder):
    """vLLM's builder that also tells our layers of the rows of each step."""


class RecordingCPUImpl(ObservesQueries, CPUAttentionBackendImpl):
    """vLLM's attention that remembers the last queries."""

    def read_tokens(self, layer: Any, kv_cache: torch.Tensor, blocks: torch.Tensor, num_tokens: int) -> Any:
        return KVPages(self, layer, kv_cache, self._dtype).read(blocks, torch.arange(num_tokens))


class SqueezeCPUBackend(CPUAttentionBackend):
    """Stands in for vLLM's CPU backend, and is just that one unless ``squeeze`` was chosen and has work to do."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        impls = {SERVE: SqueezeCPUImpl, RECORD: RecordingCPUImpl}
        return impls.get(mode_of_engine(), CPUAttentionBackendImpl)

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return SqueezeCPUBuilder
