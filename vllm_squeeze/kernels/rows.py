"""Which rows of a step are on which prefix, and what follows it: one launch each.

Torch says in ``kernels/reference.py`` what they must write.
"""

import torch
import triton
import triton.language as tl

from vllm_squeeze.kernels.tables import DENSE_SLOT, PROMPT_SLOTS
from vllm_squeeze.kernels.tiles import padded

_FEWEST_ROWS = 256
"""Rows that the kernel is compiled for at the least, so that hardly any batch compiles it anew."""

_LIVE_BLOCK, _LIVE_FACTS = 8, 6
_COLUMNS_BLOCK = 1024


@triton.jit(do_not_specialize=["stride_row", "width", "num_rows", "num_live", "num_tokens"])
def _match_kernel(
    block_table, seq_lens, query_start_loc, live, row_slot, prefix_len,
    stride_row, width, num_rows, num_live, num_tokens,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FACTS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    o_row, o_a = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_row = o_row < num_rows
    b_start = tl.load(query_start_loc + o_row, mask=m_row, other=0)
    b_count = tl.load(query_start_loc + o_row + 1, mask=m_row, other=0) - b_start
    b_context = tl.load(seq_lens + o_row, mask=m_row, other=0) - b_count
    p_row = block_table + o_row.to(tl.int64) * stride_row
    b_computed = tl.full([ROWS], -1, tl.int32)
    b_best = tl.zeros([ROWS], tl.int32)
    for i_a in range(0, num_live, BLOCK):
        m_a = i_a + o_a < num_live
        p_live = live + (i_a + o_a) * FACTS
        b_index = tl.load(p_live + 1, mask=m_a, other=width)
        b_block = tl.load(p_live + 2, mask=m_a, other=-1)
        b_needed = tl.load(p_live + 3, mask=m_a, other=-1)
        b_allowed = tl.load(p_live + 4, mask=m_a, other=-1)
        m_held = m_row[:, None] & (b_index < width)[None, :]  # [ROWS, BLOCK]
        b_held = tl.load(p_row[:, None] + b_index[None, :], mask=m_held, other=-1)
        m_within = (b_context[:, None] >= b_needed[None, :]) & (b_context[:, None] <= b_allowed[None, :])
        b_found = tl.where(m_held & (b_held == b_block[None, :]) & m_within, b_needed[None, :], -1)
        b_most, b_at = tl.max(b_found, 1, return_indices=True)
        b_best = tl.where(b_most > b_computed, i_a + b_at, b_best)
        b_computed = tl.maximum(b_computed, b_most)

    b_slot = tl.load(live + b_best * FACTS, mask=b_computed >= 0, other=DENSE)
    b_length = tl.load(live + b_best * FACTS + 5, mask=b_computed >= 0, other=0)
    m_fits = (b_slot >= 0) & (tl.cumsum(tl.where(b_slot >= 0, b_count, 0), 0) <= num_tokens)
    tl.store(row_slot + o_row, tl.where(m_fits, b_slot, DENSE), mask=m_row)
    tl.store(prefix_len + o_row, tl.where(m_fits, b_length, 0), mask=m_row)


def match_rows(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    live: torch.Tensor,
    num_tokens: int,
    row_slot: torch.Tensor,
    prefix_len: torch.Tensor,
) -> None:
    """Matches the B rows of a step to prefixes; with the arguments of ``match_rows_reference``, which says how."""
    num_rows, width = len(seq_lens), block_table.shape[1]
    assert len(row_slot) == len(prefix_len) == num_rows
    assert live.dtype == torch.int32 and live.is_contiguous() and live.shape[1] == _LIVE_FACTS
    assert block_table.stride(1) == 1
    rows = padded(max(num_rows, _FEWEST_ROWS))
    _match_kernel[(1,)](
        block_table, seq_lens, query_start_loc, live, row_slot, prefix_len,
        block_table.stride(0), width, num_rows, len(live), num_tokens,
        ROWS=rows, BLOCK=_LIVE_BLOCK, FACTS=_LIVE_FACTS, DENSE=DENSE_SLOT,
        num_warps=min(rows // 64, 16),  # more rows for a thread spill its registers
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_row", "stride_suffix", "width", "num_columns"])
def _skip_kernel(
    block_table, seq_lens, row_slot, prefix_len, suffix_lens, suffix_blocks,
    stride_row, stride_suffix, width, num_columns,
    S: tl.constexpr, BLOCK: tl.constexpr, PROMPTS: tl.constexpr,
):  # fmt: skip
    i_row, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_prefix = tl.load(prefix_len + i_row)
    if i_b == 0:
        length = tl.load(seq_lens + i_row) - b_prefix
        tl.store(suffix_lens + i_row, tl.where(tl.load(row_slot + i_row) < PROMPTS, length, 0))
    o_column = i_b * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < num_columns
    o_shifted = tl.minimum(o_column + b_prefix // S, width - 1)
    b_block = tl.load(block_table + i_row * stride_row + o_shifted, mask=m_column, other=0)
    tl.store(suffix_blocks + i_row * stride_suffix + o_column, b_block, mask=m_column)


def skip_prefixes(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prefix_len: torch.Tensor,
    page_size: int,
    max_seq_len: int,
    suffix_lens: torch.Tensor,
    suffix_blocks: torch.Tensor,
) -> None:
    """Lengths and block tables of what follows prefixes; with the arguments of ``skip_prefixes_reference``."""
    num_rows, width = len(seq_lens), block_table.shape[1]
    num_columns = min(triton.cdiv(max_seq_len, page_size), width)
    assert len(row_slot) == len(prefix_len) == num_rows <= min(len(suffix_lens), len(suffix_blocks))
    assert num_columns <= suffix_blocks.shape[1] and suffix_blocks.stride(1) == block_table.stride(1) == 1
    _skip_kernel[(num_rows, triton.cdiv(num_columns, _COLUMNS_BLOCK))](
        block_table, seq_lens, row_slot, prefix_len, suffix_lens, suffix_blocks,
        block_table.stride(0), suffix_blocks.stride(0), width, num_columns,
        S=page_size, BLOCK=_COLUMNS_BLOCK, PROMPTS=PROMPT_SLOTS,
    )  # fmt: skip
