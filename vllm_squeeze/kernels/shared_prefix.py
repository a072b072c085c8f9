"""What it takes to have dense attention over prefixes computed by a library, for all rows that share one at once.

The library wants the queries of a prefix side by side, and knows of no suffixes:

    gather    grid (tiles * tokens, blocks of heads)    a step's query tokens, by prefix
    join      the same                                  what came of them, into attention over the suffixes

Torch says in ``kernels/reference.py`` what they must write.
"""

import torch
import triton
import triton.language as tl

from vllm_squeeze.kernels.softmax import LOG2_E
from vllm_squeeze.kernels.tables import Prefixes
from vllm_squeeze.kernels.tiles import MAX_TILE_TOKENS, TILE_FACTS, QueryTiles, most_tiles, padded, tokens_per_tile

_HEADS_BLOCK = 8


@triton.jit
def _token_of(tiles, tokens, SIZE: tl.constexpr, FACTS: tl.constexpr, TOKENS: tl.constexpr):
    """The tile of a program, its place among the tile's tokens, and the token, negative if there is none."""
    i_t, i_r = tl.program_id(0) // SIZE, tl.program_id(0) % SIZE
    is_there = (tl.load(tiles + i_t * FACTS) >= 0) & (i_r < tl.load(tiles + i_t * FACTS + 1))
    return i_t, i_r, tl.load(tokens + i_t * TOKENS + i_r, mask=is_there, other=-1).to(tl.int64)


@triton.jit
def _gather_kernel(
    query, gathered, tiles, tokens, stride_token, stride_head,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SIZE: tl.constexpr, FACTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    _, _, i_token = _token_of(tiles, tokens, SIZE, FACTS, TOKENS)
    if i_token < 0:
        return
    o_h, o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    m_o = (o_h < HEADS)[:, None] & (o_d < D)[None, :]
    b_q = tl.load(query + i_token * stride_token + o_h[:, None] * stride_head + o_d[None, :], mask=m_o)
    tl.store(gathered + tl.program_id(0).to(tl.int64) * (HEADS * D) + o_h[:, None] * D + o_d[None, :], b_q, mask=m_o)


def gather_queries(query: torch.Tensor, queries: QueryTiles, group: int) -> torch.Tensor:
    """Puts the query tokens of each prefix side by side.

    Args:
        query: [N, H * G, D].
        queries: the tokens, in tiles.
        group: query heads per KV head, G.

    Returns:
        [most tiles * tokens of a tile, H * G, D], where each slot's begin at ``queries.starts``. Where no token is it has
        not been written.
    """
    num_heads, head_size = query.shape[1:]
    assert query.stride(2) == 1
    size = tokens_per_tile(queries.num_tokens, group)
    rows = most_tiles(queries.num_tokens, queries.num_slots, group) * size
    gathered = torch.empty(rows, num_heads, head_size, dtype=query.dtype, device=query.device)
    # 8-bit floats are copied as bytes
    source, target = (x.view(torch.uint8) if x.itemsize == 1 else x for x in (query, gathered))
    _gather_kernel[(rows, triton.cdiv(num_heads, _HEADS_BLOCK))](
        source, target, queries.tiles, queries.tokens, *query.stride()[:2],
        HEADS=num_heads, BLOCK=_HEADS_BLOCK, D=head_size, DP=padded(head_size),
        SIZE=size, FACTS=TILE_FACTS, TOKENS=MAX_TILE_TOKENS,
    )  # fmt: skip
    return gathered


@triton.jit(do_not_specialize=["stride_output_token", "stride_lse_head", "stride_shared_lse_head"])
def _join_kernel(
    output, suffix_lse, shared_output, shared_lse, tiles, tokens, counters, num_kv_heads,
    stride_output_token, stride_lse_head, stride_shared_lse_head,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SIZE: tl.constexpr, FACTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    i_t, i_r, i_token = _token_of(tiles, tokens, SIZE, FACTS, TOKENS)
    if i_token < 0:
        return
    i_place = tl.program_id(0).to(tl.int64)
    if (i_r == 0) & (tl.program_id(1) == 0):
        p_tile = tiles + i_t * FACTS
        i_slot = tl.load(p_tile)
        p_counters, one = counters + i_slot * 6, tl.full([], 1, tl.int64)
        if (i_t == 0) | (tl.load(p_tile - FACTS, mask=i_t > 0, other=-1) != i_slot):
            tl.atomic_add(p_counters + 4, one * num_kv_heads, sem="relaxed")
        tl.atomic_add(p_counters + 5, one * tl.load(p_tile + 1) * num_kv_heads, sem="relaxed")

    o_h, o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    m_h = o_h < HEADS
    m_o = m_h[:, None] & (o_d < D)[None, :]
    o_o = o_h[:, None] * D + o_d[None, :]
    p_output = output + i_token * stride_output_token + o_o
    b_suffix = tl.load(p_output, mask=m_o, other=0.0).to(tl.float32)  # [BLOCK, DP]
    b_shared = tl.load(shared_output + i_place * (HEADS * D) + o_o, mask=m_o, other=0.0).to(tl.float32)
    b_suffix_lse = tl.load(suffix_lse + o_h.to(tl.int64) * stride_lse_head + i_token, mask=m_h, other=0.0)
    b_shared_lse = tl.load(shared_lse + o_h.to(tl.int64) * stride_shared_lse_head + i_place, mask=m_h, other=0.0)
    b_weight = 1 / (1 + tl.exp2((b_suffix_lse - b_shared_lse) * LOG2_E))  # of the prefix
    b_joined = b_suffix + (b_shared - b_suffix) * b_weight[:, None]
    tl.store(p_output, b_joined.to(output.dtype.element_ty), mask=m_o)


def join_shared(
    output: torch.Tensor,
    suffix_lse: torch.Tensor,
    shared_output: torch.Tensor,
    shared_lse: torch.Tensor,
    queries: QueryTiles,
    prefixes: Prefixes,
    num_kv_heads: int,
) -> None:
    """Joins attention over whole prefixes to that over what follows them, in place, and counts it.

    Args:
        output: [N, H * G, D], attention over the suffix; merged for the tokens in ``queries``, untouched for others.
        suffix_lse: [H * G, N] float32, its natural log-sum-exp.
        shared_output: attention over their prefixes, of tokens where ``gather_queries`` puts them.
        shared_lse: [H * G, as many] float32, its natural log-sum-exp.
        queries: the tokens, in tiles.
        prefixes: whose counters of exact attention are added to: a pass of each KV head for each prefix.
        num_kv_heads: H.
    """
    num_heads, head_size = output.shape[1:]
    size = tokens_per_tile(queries.num_tokens, num_heads // num_kv_heads)
    assert shared_output.is_contiguous() and output.stride()[1:] == shared_output.stride()[1:]
    assert suffix_lse.stride(1) == shared_lse.stride(1) == 1 and shared_lse.shape[1] == len(shared_output)
    _join_kernel[(len(shared_output), triton.cdiv(num_heads, _HEADS_BLOCK))](
        output, suffix_lse, shared_output, shared_lse, queries.tiles, queries.tokens, prefixes.counters, num_kv_heads,
        output.stride(0), suffix_lse.stride(0), shared_lse.stride(0),
        HEADS=num_heads, BLOCK=_HEADS_BLOCK, D=head_size, DP=padded(head_size),
        SIZE=size, FACTS=TILE_FACTS, TOKENS=MAX_TILE_TOKENS,
    )  # fmt: skip
