"""Prompts on the GPU: what follows a prefix in a prompt attends to keys that a whole tile of its tokens chooses.

Here products count, not bytes, so a tile has one choice, and tensor cores do what is chosen and nothing else:

    tile     grid (1,)                        the prompts' tokens, in tiles of one row each, once for all layers
    unpack   grid (blocks of C, H, prompts)   means in 4 bits become operands, once for all tiles of a prefix
    choose   grid (tiles, H)                  which clusters a tile's queries choose, and attention over the rest
    list     grid (tiles, H, blocks of C)     where the keys of these lie in the KV cache, and what follows the prefix
    flash    a library's attention            over them, as if each were a page
    merge    grid (tiles * tokens, H)         it and that over the rest, into the output

A cluster's rank is the log of its raised and weighted predicted attention probability, as in ``look_up``, for the query
of the tile to which it matters most; it is raised by the mean squared length of the tile's queries. Those with the
highest are chosen, a share of the keys that is the same for all tiles, heads and layers, so that all take as long.
Where they end is told by ``SAMPLE`` clusters, at equal distances. Attention over the means of all clusters is made as
they are ranked, and that over the means of the chosen ones taken off again, which leaves the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_squeeze.kernels.attend import count_tile
from vllm_squeeze.kernels.launches import Launches, alignment
from vllm_squeeze.kernels.look_up import OF_GROUP, RAISE, REST_RAISE, in_frame, load_queries
from vllm_squeeze.kernels.packing import load_packed
from vllm_squeeze.kernels.softmax import LOG2_E, capped, finite_or_zero
from vllm_squeeze.kernels.tables import (
    MAX_GROUP,
    PROMPT_SLOTS,
    SAMPLE,
    ClusterTable,
    Prefixes,
    prompt_tile_tokens,
)
from vllm_squeeze.kernels.tiles import MAX_BLOCK, padded

MAX_TILES, LIST_BYTES, MORE_KEYS = 64, 1 << 28, 1 << 14
"""Tiles at once, at most; bytes of their lists of as many keys as a prefix has, unless one has more; and further keys that
each has room for. Of longer lists there are fewer at once. More tiles are handled in turns."""

Flash = Callable[..., torch.Tensor]
"""A library's attention to keys that lie anywhere, each a page of its own, as ``squeezed_prompts`` calls it."""

_TILE_FACTS = tl.constexpr(6)
_FIRST_PROMPT = tl.constexpr(PROMPT_SLOTS)
_SAMPLE = tl.constexpr(SAMPLE)
_HALVINGS = tl.constexpr(24)
MOST_OVER_MASS = tl.constexpr(8.0)
"""By how much, to the base 2, the log probability of a cluster may exceed 0 in the rest: 16-bit floats hold 2**15."""
NEGLIGIBLE = tl.constexpr(2.0**-64)
"""Of what all clusters attract: so much of the rest is what rounding left of a difference, or might as well be."""
_FEWEST_ROWS = 256
_UNPACK_BLOCK = 64
_CHOOSE_BYTES, _PICK_BLOCK = 1 << 15, 1024
_LIST_BLOCK, _LIST_KEYS, _OTHERS_BLOCK = 64, 8, 128


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "size"])
def _tile_kernel(
    row_slot, query_start_loc, seq_lens, prefix_len, tiles, prompt_slots, num_rows, num_tiles, size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_row, o_t = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_row = o_row < num_rows
    b_slot = tl.load(row_slot + o_row, mask=m_row, other=-1) - _FIRST_PROMPT
    b_start = tl.load(query_start_loc + o_row, mask=m_row, other=0)
    b_count = tl.load(query_start_loc + o_row + 1, mask=m_row, other=0) - b_start
    b_prefix = tl.load(prefix_len + o_row, mask=m_row, other=0)
    b_before = tl.load(seq_lens + o_row, mask=m_row, other=0) - b_prefix - b_count  # of the suffix
    m_prompt = b_slot >= 0
    b_prompt = m_prompt.to(tl.int32)
    tl.store(prompt_slots + tl.cumsum(b_prompt, 0) - 1, b_slot, mask=m_prompt)
    tl.store(prompt_slots + o_row, tl.full([ROWS], -1, tl.int32), mask=m_row & (o_row >= tl.sum(b_prompt, 0)))
    b_tiles = tl.where(m_prompt, tl.cdiv(b_count, size), 0)
    b_first = tl.cumsum(b_tiles, 0) - b_tiles
    for i in range(0, tl.max(b_tiles, 0)):
        m_t = (i < b_tiles) & (b_first + i < num_tiles)
        p_tile = tiles + (b_first + i) * _TILE_FACTS
        tl.store(p_tile, b_slot, mask=m_t)
        tl.store(p_tile + 1, o_row, mask=m_t)
        tl.store(p_tile + 2, b_start + i * size, mask=m_t)
        b_end = tl.minimum((i + 1) * size, b_count)
        tl.store(p_tile + 3, b_end - i * size, mask=m_t)
        tl.store(p_tile + 4, b_prefix, mask=m_t)
        tl.store(p_tile + 5, b_before + b_end, mask=m_t)
    # the rest of them are none
    for i_t in range(tl.sum(b_tiles, 0), num_tiles, BLOCK):
        tl.store(tiles + (i_t + o_t) * _TILE_FACTS, tl.full([BLOCK], -1, tl.int32), mask=i_t + o_t < num_tiles)


@triton.jit
def _unpack_rows(
    p_packed, p_scales, p_unpacked, o_row, end, stride, D: tl.constexpr, DP: tl.constexpr, SCALED: tl.constexpr
):
    """Writes vectors ``o_row`` [N], before ``end``, of packed ones; times their scales if they are to be ``SCALED``."""
    o_d, m_row = tl.arange(0, DP), o_row < end
    o_packed = tl.minimum(o_row, end - 1)
    b_v = load_packed(p_packed, o_packed, stride, tl.float32, D, DP)
    if SCALED:
        b_v *= tl.load(p_scales + o_packed)[:, None]
    p_v = p_unpacked + o_row[:, None].to(tl.int64) * D + o_d[None, :]
    tl.store(p_v, b_v.to(p_unpacked.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def _unpack_kernel(
    prompt_slots, slots, centroids, value_centroids, value_scales, group_centroids, keys, values, group_keys,
    stride_centroid_head, stride_centroid, stride_mean_head, stride_mean, stride_size_head, stride_group_head,
    stride_group_size_head,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_p = tl.arange(0, ROWS)
    i_slot = tl.load(prompt_slots + i_p)
    # of those on one prefix the first does it
    b_before = tl.load(prompt_slots + o_p, mask=o_p < i_p, other=-1)
    if (i_slot < 0) | (tl.max((b_before == i_slot).to(tl.int32), 0) > 0):
        return
    first, count = tl.load(slots + i_slot * 4).to(tl.int64), tl.load(slots + i_slot * 4 + 1)
    if i_b * BLOCK >= count:
        return
    o_row, at = i_b * BLOCK + tl.arange(0, BLOCK), i_h * stride_size_head + first
    p_keys = centroids + i_h * stride_centroid_head + first * stride_centroid
    _unpack_rows(p_keys, None, keys + at * D, o_row, count, stride_centroid, D, DP, False)
    o_group, of_group = i_b * (BLOCK // OF_GROUP) + tl.arange(0, BLOCK // OF_GROUP), first // OF_GROUP
    p_groups = group_centroids + i_h * stride_group_head + of_group * stride_centroid
    at_group, num_groups = i_h * stride_group_size_head + of_group, tl.cdiv(count, OF_GROUP)
    _unpack_rows(p_groups, None, group_keys + at_group * D, o_group, num_groups, stride_centroid, D, DP, False)
    if REST:
        p_means = value_centroids + i_h * stride_mean_head + first * stride_mean
        _unpack_rows(p_means, value_scales + at, values + at * D, o_row, count, stride_mean, D, DP, True)


@triton.jit
def _load_rows(p_vectors, o_row, D: tl.constexpr, DP: tl.constexpr):
    """Vectors ``o_row`` [N] as [N, DP], zero where padded."""
    o_d = tl.arange(0, DP)
    p_v = p_vectors + (o_row.to(tl.int64)[:, None] * D + o_d[None, :])
    return tl.load(p_v) if D == DP else tl.load(p_v, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def _predicted(b_keys, b_framed, b_scale, b_of_mean, b_mass, soft_cap, SOFT_CAP: tl.constexpr):
    """s q.c [N, M] of clusters or groups, less a number for each query: what is joined over these lies in one warp."""
    b_s = tl.dot(b_keys, tl.trans(b_framed), input_precision="ieee")
    if SOFT_CAP:
        return capped(b_s * b_scale[:, None] + b_of_mean[None, :], soft_cap * LOG2_E) - b_mass[None, :]
    return b_s * b_scale[:, None] + (b_of_mean - b_mass)[None, :]


@triton.jit
def _rest_of(b_s, b_log_size, b_raise):
    """What clusters [N] attract that are not chosen [N, M], over what all do."""
    b_more = b_log_size * LOG2_E + tl.minimum(b_raise, REST_RAISE * LOG2_E)
    return tl.exp2(tl.minimum(b_s + b_more[:, None], MOST_OVER_MASS))


@triton.jit
def _by_parts(b_p):
    """Sums [N / 16, 8, M] over the rows of [N, M] that lie in one thread."""
    return tl.sum(b_p.reshape(b_p.shape[0] // 16, 2, 8, b_p.shape[1]), 1)


@triton.jit
def _threshold_of(b_rank, b_size, share):
    """The largest rank that is not chosen, where the highest are as long as they have a share of all keys."""
    wanted = share * tl.sum(b_size, 0).to(tl.float32)
    m_some = b_rank > float("-inf")
    low, high = tl.min(tl.where(m_some, b_rank, float("inf")), 0) - 1, tl.max(b_rank, 0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = tl.sum(tl.where(b_rank > middle, b_size, 0), 0).to(tl.float32) <= wanted
        low, high = tl.where(fits, low, middle), tl.where(fits, middle, high)
    threshold = tl.max(tl.where(b_rank <= high, b_rank, float("-inf")), 0)
    return tl.where(share < 1, threshold, float("-inf"))


@triton.jit(do_not_specialize=["first_tile", "max_centroids"])
def _choose_kernel(
    query, tiles, slots, kept_shares, frame_of_slot,
    keys, centroid_scales, values, sizes, log_sizes, starts, log_weights, variances,
    group_rows, key_rows, value_rows, group_scales, group_sizes, frames,
    gathered, framed, ranks, picked, num_picked, listed, rest_output, rest_lse,
    first_tile, scale, soft_cap,
    stride_query_token, stride_query_head, stride_size_head, stride_group_size_head, stride_frame_head, max_centroids,
    GROUP: tl.constexpr, GP: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PICK_BLOCK: tl.constexpr, REST: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = SIZE * GP
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    i_th = (i_t * tl.num_programs(1) + i_h).to(tl.int64)
    p_tile = tiles + (first_tile + i_t) * _TILE_FACTS
    i_slot, first_token, num_tokens = tl.load(p_tile), tl.load(p_tile + 2).to(tl.int64), tl.load(p_tile + 3)
    tl.store(num_picked + i_th, 0)
    if i_slot < 0:
        tl.store(listed + i_th, 0)
        return
    first_centroid, count = tl.load(slots + i_slot * 4).to(tl.int64), tl.load(slots + i_slot * 4 + 1)
    num_always = tl.load(slots + i_slot * 4 + 2)
    # the library reckons with as many queries in each tile, and has the last see all keys
    num_after = tl.load(p_tile + 5) + SIZE - num_tokens
    o_m, o_d, o_c = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, BLOCK)
    m_m, m_d = (o_m // GP < num_tokens) & (o_m % GP < GROUP), o_d < D
    b_token = first_token + o_m // GP
    b_q = load_queries(query, b_token, num_tokens, i_h, stride_query_token, stride_query_head, GROUP, GP, SIZE, D, DP)
    p_gathered = gathered + ((i_th * SIZE + o_m // GP) * GROUP + o_m % GP)[:, None] * D + o_d[None, :]
    tl.store(p_gathered, b_q, mask=(o_m % GP < GROUP)[:, None] & m_d[None, :])
    o_rest = i_th * M + o_m
    if count == 0:
        tl.store(listed + i_th, num_always + num_after)
        if REST:
            tl.store(rest_lse + o_rest, tl.full([M], float("-inf"), tl.float32))
        return
    # else the compiler has a loop's products wait for each other, as it might end before it began
    tl.assume(count > 0)
    p_frame = frames + i_h.to(tl.int64) * stride_frame_head + tl.load(frame_of_slot + i_slot) * 2 * D
    b_mean, b_spread = tl.load(p_frame + o_d, mask=m_d, other=0.0), tl.load(p_frame + D + o_d, mask=m_d, other=0.0)
    b_framed, b_of_mean = in_frame(b_q, b_mean, b_spread, scale)
    # so many rows are one operand, which products take from shared memory if it was loaded
    p_framed = framed + (i_th * M + o_m)[:, None] * DP + o_d[None, :]
    tl.store(p_framed, b_framed[0])
    tl.debug_barrier()
    b_framed = tl.load(p_framed)
    # the mean over all rows
    square = tl.sum(tl.sum(b_q.to(tl.float32) * b_q.to(tl.float32), 1), 0) * (scale * scale * LOG2_E / 2)
    square /= (num_tokens * GROUP).to(tl.float32)

    of_groups = i_h.to(tl.int64) * stride_group_size_head + first_centroid // OF_GROUP
    first_group, num_groups = of_groups.to(tl.int32), tl.cdiv(count, OF_GROUP)
    p_group_scales, p_group_sizes = group_scales + of_groups, group_sizes + of_groups
    # the largest of rows that lie in one thread, and sums over these
    b_max = tl.full([BLOCK // 16, 8, M], float("-inf"), tl.float32)
    b_sum, b_none = tl.zeros([BLOCK // 16, 8, M], tl.float32), tl.zeros([M], tl.float32)
    for i_c in tl.range(0, num_groups, BLOCK, num_stages=STAGES):
        m_c = i_c + o_c < num_groups
        b_scale = tl.load(p_group_scales + i_c + o_c, mask=m_c, other=0.0) * (scale * LOG2_E)
        b_size = tl.load(p_group_sizes + i_c + o_c, mask=m_c, other=0).to(tl.float32)
        b_log_size = tl.where(b_size > 0, tl.log2(tl.maximum(b_size, 1.0)), float("-inf"))
        b_keys = group_rows.load([first_group + i_c, 0])
        b_s = _predicted(b_keys, b_framed, b_scale, b_of_mean, b_none, soft_cap, SOFT_CAP) + b_log_size[:, None]
        b_s = b_s.reshape(BLOCK // 16, 2, 8, M)
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = finite_or_zero(b_next)
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
        b_max = b_next
    b_largest = finite_or_zero(tl.max(tl.max(b_max, 1), 0))
    b_mass = tl.sum(tl.sum(b_sum * tl.exp2(b_max - b_largest[None, None, :]), 1), 0)
    # if all clusters are empty the sum is 0, and any number will do; where rows are padded nothing attracts
    b_mass = b_largest + tl.log2(tl.where(b_mass > 0, b_mass, 1.0))
    b_mass = tl.where(m_m, b_mass, float("inf"))

    of_head = i_h.to(tl.int64) * stride_size_head + first_centroid
    first_row = of_head.to(tl.int32)
    p_keys, p_scales, p_values = keys + of_head * D, centroid_scales + of_head, values + of_head * D
    p_sizes, p_log_sizes, p_variances = sizes + of_head, log_sizes + of_head, variances + of_head
    p_ranks = ranks + i_th * max_centroids
    b_sums = tl.zeros([BLOCK // 16, 8, M], tl.float32)
    b_o = tl.zeros([DP, M], tl.float32)
    for i_c in tl.range(0, count, BLOCK, num_stages=STAGES):
        m_c = i_c + o_c < count
        b_scale = tl.load(p_scales + i_c + o_c, mask=m_c, other=0.0) * (scale * LOG2_E)
        b_raise = tl.load(p_variances + i_c + o_c, mask=m_c, other=0.0) * square
        b_log_size = tl.load(p_log_sizes + i_c + o_c, mask=m_c, other=float("-inf"))
        b_keys = key_rows.load([first_row + i_c, 0])
        b_s = _predicted(b_keys, b_framed, b_scale, b_of_mean, b_mass, soft_cap, SOFT_CAP)
        b_rank = tl.max(b_s, 1) + tl.minimum(b_raise, RAISE * LOG2_E)
        b_rank += tl.load(log_weights + of_head + i_c + o_c, mask=m_c, other=0.0) * LOG2_E
        tl.store(p_ranks + i_c + o_c, tl.where(b_log_size > float("-inf"), b_rank, float("-inf")), mask=m_c)
        if REST:
            b_p = _rest_of(b_s, b_log_size, b_raise)
            b_sums += _by_parts(b_p)
            b_v = value_rows.load([first_row + i_c, 0])
            b_o = tl.dot(tl.trans(b_v), b_p.to(b_v.dtype), b_o, input_precision="ieee")
    # what other threads stored is read below
    tl.debug_barrier()
    num_sampled = tl.minimum(count, _SAMPLE)
    o_s = tl.arange(0, _SAMPLE)
    m_s = o_s < num_sampled
    o_sampled = (o_s.to(tl.int64) * count // num_sampled).to(tl.int32)
    b_sampled_rank = tl.load(p_ranks + o_sampled, mask=m_s, other=float("-inf"))
    b_sampled_size = tl.load(p_sizes + o_sampled, mask=m_s, other=0)
    threshold = _threshold_of(b_sampled_rank, b_sampled_size, tl.load(kept_shares + i_slot))

    num_keys, so_far = num_always, 0
    p_picked = picked + 4 * i_th * max_centroids
    o_p = tl.arange(0, PICK_BLOCK)
    for i_c in range(0, count, PICK_BLOCK):
        o_pick = i_c + o_p
        m_p = o_pick < count
        b_chosen = tl.load(p_ranks + o_pick, mask=m_p, other=float("-inf")) > threshold
        b_keys = tl.where(b_chosen, tl.load(p_sizes + o_pick, mask=m_p, other=0), 0)
        # one scan counts chosen clusters, above, and their keys
        b_both = (b_chosen.to(tl.int64) << 32) | b_keys
        b_before = tl.cumsum(b_both, 0) - b_both
        p_pick = p_picked + 4 * (so_far + (b_before >> 32).to(tl.int32))
        tl.store(p_pick, o_pick, mask=b_chosen)
        tl.store(p_pick + 1, num_keys + b_before.to(tl.int32), mask=b_chosen)
        tl.store(p_pick + 2, tl.load(starts + of_head + o_pick, mask=m_p), mask=b_chosen)
        tl.store(p_pick + 3, b_keys, mask=b_chosen)
        total = tl.sum(b_both, 0)
        so_far += (total >> 32).to(tl.int32)
        num_keys += total.to(tl.int32)
    tl.store(num_picked + i_th, so_far)
    tl.store(listed + i_th, num_keys + num_after)
    if REST:
        # the rest is all less what is chosen
        tl.debug_barrier()
        for i_c in tl.range(0, tl.maximum(so_far, 1), BLOCK, num_stages=STAGES):
            m_c = i_c + o_c < so_far
            o_row = tl.load(p_picked + 4 * (i_c + o_c), mask=m_c, other=0)
            b_scale = tl.load(p_scales + o_row) * (scale * LOG2_E)
            b_raise = tl.load(p_variances + o_row) * square
            b_log_size = tl.where(m_c, tl.load(p_log_sizes + o_row), float("-inf"))
            b_keys = _load_rows(p_keys, o_row, D, DP)
            b_s = _predicted(b_keys, b_framed, b_scale, b_of_mean, b_mass, soft_cap, SOFT_CAP)
            b_p = _rest_of(b_s, b_log_size, b_raise)
            b_sums -= _by_parts(b_p)
            b_v = _load_rows(p_values, o_row, D, DP)
            b_o = tl.dot(tl.trans(b_v), (-b_p).to(b_v.dtype), b_o, input_precision="ieee")
        b_sum = tl.sum(tl.sum(b_sums, 1), 0)
        b_some = b_sum > NEGLIGIBLE
        b_sum = tl.where(b_some, b_sum, 1.0)
        tl.store(rest_lse + o_rest, tl.where(b_some, b_mass + tl.log2(b_sum), float("-inf")))
        p_o = rest_output + o_rest[:, None] * D + o_d[None, :]
        tl.store(p_o, tl.trans(b_o * (1 / b_sum)[None, :]), mask=m_d[None, :])


@triton.jit(do_not_specialize=["first_tile", "max_centroids", "max_keys", "stride_row"])
def _list_kernel(
    tiles, slots, members, block_table, picked, num_picked, listed, places,
    first_tile, stride_member_head, stride_row, rows_of_block, rows_of_token, rows_of_head, max_centroids, max_keys,
    SIZE: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_th = (i_t * tl.num_programs(1) + i_h).to(tl.int64)
    p_tile = tiles + (first_tile + i_t) * _TILE_FACTS
    i_slot, i_row, num_tokens = tl.load(p_tile), tl.load(p_tile + 1).to(tl.int64), tl.load(p_tile + 3)
    if i_slot < 0:
        return
    p_blocks, p_places = block_table + i_row * stride_row, places + i_th * max_keys
    first_row = i_h * rows_of_head
    num_always, prefix_len, num_suffix = tl.load(slots + i_slot * 4 + 2), tl.load(p_tile + 4), tl.load(p_tile + 5)
    num_others = num_always + num_suffix + SIZE - num_tokens
    # chosen keys lie between those attended to always and the suffix, whose last is there for padded queries too
    num_chosen = tl.load(listed + i_th) - num_others
    for i_k in range(i_b * OTHERS, num_others, tl.num_programs(2) * OTHERS):
        o_k = i_k + tl.arange(0, OTHERS)
        m_k, m_suffix = o_k < num_others, o_k >= num_always
        b_position = tl.where(m_suffix, prefix_len + tl.minimum(o_k - num_always, num_suffix - 1), o_k)
        b_block = tl.load(p_blocks + b_position // S, mask=m_k, other=0)
        b_place = b_block * rows_of_block + b_position % S * rows_of_token + first_row
        tl.store(p_places + o_k + tl.where(m_suffix, num_chosen, 0), b_place, mask=m_k)
    left = tl.load(num_picked + i_th) - i_b * BLOCK
    o_c, o_k = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    p_pick = picked + 4 * (i_th * max_centroids + i_b * BLOCK + o_c)
    m_c = o_c < left
    b_key, b_start = tl.load(p_pick + 1, mask=m_c, other=0), tl.load(p_pick + 2, mask=m_c, other=0)
    b_size = tl.load(p_pick + 3, mask=m_c, other=0)
    p_members = members + i_h.to(tl.int64) * stride_member_head
    for i_k in range(0, tl.max(b_size, 0), KEYS):
        m_k = (i_k + o_k)[None, :] < b_size[:, None]
        b_position = tl.load(p_members + b_start[:, None] + (i_k + o_k)[None, :], mask=m_k, other=0)
        b_block = tl.load(p_blocks + b_position // S, mask=m_k, other=0)
        b_place = b_block * rows_of_block + b_position % S * rows_of_token + first_row
        tl.store(p_places + b_key[:, None] + (i_k + o_k)[None, :], b_place, mask=m_k)


@triton.jit(do_not_specialize=["first_tile", "stride_lse_head"])
def _merge_kernel(
    output, attended, attended_lse, rest_output, rest_lse, tiles, slots, listed, counters,
    first_tile, H, stride_output_token, stride_output_head, stride_lse_head,
    GROUP: tl.constexpr, GP: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    i_t, i_r, i_h = tl.program_id(0) // SIZE, tl.program_id(0) % SIZE, tl.program_id(1)
    p_tile = tiles + (first_tile + i_t) * _TILE_FACTS
    i_slot, num_tokens = tl.load(p_tile), tl.load(p_tile + 3)
    if (i_slot < 0) | (i_r >= num_tokens):
        return
    i_th = (i_t * H + i_h).to(tl.int64)
    if i_r == 0:
        count, num_always = tl.load(slots + i_slot * 4 + 1), tl.load(slots + i_slot * 4 + 2)
        num_kept = tl.load(listed + i_th) - num_always - tl.load(p_tile + 5) - (SIZE - num_tokens)
        count_tile(counters, i_slot, count > 0, num_tokens, num_kept, num_kept * num_tokens)

    o_g, o_d = tl.arange(0, GP), tl.arange(0, DP)
    m_g = o_g < GROUP
    m_o = m_g[:, None] & (o_d < D)[None, :]
    i_place = i_th * SIZE + i_r  # where the library has the token
    b_o = tl.load(attended + (i_place * GROUP + o_g)[:, None] * D + o_d[None, :], mask=m_o, other=0.0)
    if REST:
        o_row = i_place * GP + o_g
        b_lse = tl.load(attended_lse + o_g.to(tl.int64) * stride_lse_head + i_place, mask=m_g, other=0.0) * LOG2_E
        b_rest_lse = tl.load(rest_lse + o_row, mask=m_g, other=float("-inf"))
        # where nothing is left it may hold anything
        m_rest = m_o & (b_rest_lse > float("-inf"))[:, None]
        b_rest = tl.load(rest_output + o_row[:, None] * D + o_d[None, :], mask=m_rest, other=0.0)
        b_share = (1 / (1 + tl.exp2(b_rest_lse - b_lse)))[:, None]
        b_o = b_o.to(tl.float32) * b_share + b_rest * (1 - b_share)
    i_token, i_head = (tl.load(p_tile + 2) + i_r).to(tl.int64), i_h * GROUP + o_g
    p_output = output + i_token * stride_output_token + i_head[:, None] * stride_output_head + o_d[None, :]
    tl.store(p_output, b_o.to(output.dtype.element_ty), mask=m_o)


@dataclass(frozen=True)
class PromptTiles:
    """The query tokens of a step's prompts that are squeezed, in tiles of one row each. The same for all layers.

    Attributes:
        num_prompts: how many prompts there may be.
        num_tiles: how many tiles there may be.
        max_keys: of a tile's list, at most.
        size: tokens of a tile, at most.
        tiles: [at least as many, 6] int32, per tile: slot of the prefix or -1 where there is no tile, row of the block
            table, first token, number of tokens, tokens of the prefix, and keys after it that the last token sees.
        slots: [at least as many as prompts] int32, of each prompt the slot of its prefix, or -1 where there is none.
    """

    num_prompts: int
    num_tiles: int
    max_keys: int
    size: int
    tiles: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def allocate(
        cls, max_tokens: int, max_rows: int, group: int, head_size: int, device: torch.device | str
    ) -> "PromptTiles":
        """Room for ``max_tokens`` tokens of ``max_rows`` rows; no tiles yet."""
        size = prompt_tile_tokens(group, head_size)

        def none(*shape: int) -> torch.Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        return cls(0, 0, 0, size, none(max_tokens // size + max_rows, _TILE_FACTS.value), none(max_rows))

    def of(self, counts: Sequence[int], max_seq_len: int) -> "PromptTiles":
        """The same, of a step of prompts of so many tokens, and of rows of up to so many with those before."""
        num_tiles = sum(-(-count // self.size) for count in counts)
        return PromptTiles(len(counts), num_tiles, max_seq_len + self.size, self.size, self.tiles, self.slots)

    def fill(
        self,
        row_slot: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        prefix_len: torch.Tensor,
    ) -> None:
        """Finds the tiles of a step, without waiting for the device.

        Args:
            row_slot: [B] int32, of each row that is a squeezed prompt's the slot of its prefix plus PROMPT_SLOTS.
            query_start_loc: [at least B + 1] int32, the first token of each row.
            seq_lens: [B] int32, tokens of each row, this step's among them.
            prefix_len: [B] int32, those of its prefix.
        """
        _tile_kernel[(1,)](
            row_slot, query_start_loc, seq_lens, prefix_len, self.tiles, self.slots,
            len(row_slot), self.num_tiles, self.size,
            ROWS=padded(max(len(row_slot), _FEWEST_ROWS)), BLOCK=MAX_BLOCK,
        )  # fmt: skip


@dataclass(frozen=True)
class PromptWorkspace:
    """What the kernels need beside their operands, for t tiles at a time, of n tokens, M rows when padded.

    C_all counts the clusters of all prefixes, G_all their groups.

    Attributes:
        keys, values: [H * C_all, D] in the queries' dtype, of prompts' prefixes the mean key of each cluster, in its
            frame and not scaled, and its mean value; in blocks of as many as are loaded at once, padded with zeros.
        group_keys: [H * G_all, D], the mean key of each group, like ``keys``.
        gathered, attended: [t * H * n, G, D], queries, and attention over the lists.
        framed: [t * H * M, D or more], queries in the frames of their prefixes.
        starts: [t * H + 1] int32, where those of each tile and head begin.
        ranks: [t * H, C] float32, of clusters.
        picked: [t * H, C, 4] int32, of chosen ones: which they are, where their keys go in the list, where their
            members begin, and how many these are.
        num_picked, listed: [t * H] int32, how many are chosen, and keys of each list.
        places: int32, the lists, one after the other: rows of D elements in the cache.
        rest_output, rest_lse: [t * H, M, D] and [t * H, M] float32, of the clusters that were not chosen; the latter to
            the base 2.
        num_tiles: t.
        launch: launches kernels on all this.
    """

    keys: TensorDescriptor
    values: TensorDescriptor
    group_keys: TensorDescriptor
    gathered: torch.Tensor
    framed: torch.Tensor
    attended: torch.Tensor
    starts: torch.Tensor
    ranks: torch.Tensor
    picked: torch.Tensor
    num_picked: torch.Tensor
    listed: torch.Tensor
    places: torch.Tensor
    rest_output: torch.Tensor
    rest_lse: torch.Tensor
    num_tiles: int
    launch: Launches = field(default_factory=Launches)

    @classmethod
    def allocate(
        cls,
        table: ClusterTable,
        group: int,
        max_centroids: int,
        longest_prefix: int,
        max_seq_len: int,
        dtype: torch.dtype,
    ) -> "PromptWorkspace":
        """Makes room for any step.

        Args:
            table: the clusters of all prefixes.
            group: query heads of a KV head.
            max_centroids: of a prefix.
            longest_prefix: tokens of the longest.
            max_seq_len: tokens of a row, with those before, at most.
            dtype: of queries.
        """
        num_kv_heads, *_, head_size = table.frames.shape
        device = table.frames.device
        num_tiles = max(min(MAX_TILES, LIST_BYTES // (4 * num_kv_heads * longest_prefix)), 1)
        lists, size = num_tiles * num_kv_heads, prompt_tile_tokens(group, head_size)
        longest_list = max_seq_len + size
        keys_at_once = max(num_tiles * min(longest_list, longest_prefix + MORE_KEYS), longest_list)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        width = _width(head_size)
        block = [min(MAX_BLOCK, _CHOOSE_BYTES // (width * dtype.itemsize)), width]

        def in_blocks(sizes: torch.Tensor) -> TensorDescriptor:
            # those of other prefixes are looked at too, beyond a prefix's last, and must be finite
            vectors = torch.zeros(sizes.numel(), head_size, dtype=dtype, device=device)
            return TensorDescriptor(vectors, [*vectors.shape], [*vectors.stride()], block)

        rows = size * padded(group)
        return cls(
            keys=in_blocks(table.sizes),
            values=in_blocks(table.sizes),
            group_keys=in_blocks(table.group_sizes),
            gathered=empty(lists * size, group, head_size, dtype=dtype),
            framed=empty(lists * rows, width, dtype=dtype),
            attended=empty(lists * size, group, head_size, dtype=dtype),
            starts=torch.arange(lists + 1, dtype=torch.int32, device=device) * size,
            ranks=empty(lists, max(max_centroids, 1), dtype=torch.float32),
            picked=empty(lists, max(max_centroids, 1), 4),
            num_picked=empty(lists),
            listed=empty(lists),
            # it may be looked at beyond a list's end
            places=torch.zeros(num_kv_heads * keys_at_once, dtype=torch.int32, device=device),
            rest_output=empty(lists, rows, head_size, dtype=torch.float32),
            rest_lse=empty(lists, rows, dtype=torch.float32),
            num_tiles=num_tiles,
        )


def rows_of(cache: torch.Tensor) -> torch.Tensor:
    """A paged cache [num_blocks, S, H, D] as pages of one key of one head, [rows, 1, 1, D]: rows of D elements.

    The key at (block, place, head) is in the row that their strides come to, over D.
    """
    head_size = cache.shape[-1]
    last = sum((size - 1) * stride for size, stride in zip(cache.shape[:3], cache.stride()[:3]))
    return cache.as_strided((last // head_size + 1, 1, 1, head_size), (head_size, head_size, head_size, 1))


def _width(head_size: int) -> int:
    """Elements of a vector as products take it."""
    return max(16, padded(head_size))


def squeezed_prompts(
    query: torch.Tensor,
    output: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    prompts: PromptTiles,
    table: ClusterTable,
    prefixes: Prefixes,
    scale: float,
    rest: bool,
    workspace: PromptWorkspace,
    flash: Flash,
    soft_cap: float = 0.0,
    output_done: torch.cuda.Event | None = None,
) -> None:
    """Attention of prompts over their prefixes and what follows these.

    Args:
        query: [N, H * G, D].
        output: [N, H * G, D]; written for the tokens in ``prompts``, untouched for others.
        key_cache, value_cache: [num_blocks, S, H, D], views of the paged cache with the same strides, multiples of D.
        block_table: [B, max_blocks] int32.
        prompts: the tokens to squeeze, in tiles.
        table: the clusters of all prefixes.
        prefixes: none with more clusters than the workspace has room for, nor tokens than a list may have.
        scale: softmax scale.
        rest: whether clusters that were not chosen contribute through their mean value.
        workspace: of the same H, G, D and dtype.
        flash: causal attention by the library: the last query of a list sees all keys, and each before it one less.
            Takes ``q`` [R, G, D]; ``k`` and ``v`` as ``rows_of``; ``cu_seqlens_q`` [L + 1], where the queries of each
            list begin, no more than ``max_seqlen_q``; ``block_table`` [L, ``max_seqlen_k``], the lists; ``seqused_k``
            [L], keys of each; and ``out``, which it writes. Returns the natural log-sum-exp [G, R].
        soft_cap: bound on the logits, by a hyperbolic tangent; 0 for none.
        output_done: where another stream writes ``output``: what to wait for before writing it.
    """
    num_kv_heads, *_, head_size = table.frames.shape
    group, page_size = query.shape[1] // num_kv_heads, key_cache.shape[1]
    assert query.shape == output.shape and query.dtype == key_cache.dtype == workspace.gathered.dtype
    assert key_cache.stride() == value_cache.stride() and all(s % head_size == 0 for s in key_cache.stride()[:3])
    assert prompts.size == prompt_tile_tokens(group, head_size) and group <= MAX_GROUP
    size, padded_group, width = prompts.size, padded(group), _width(head_size)
    max_centroids, max_keys = workspace.ranks.shape[1], prompts.max_keys
    tiles_at_once = min(workspace.num_tiles, len(workspace.places) // (num_kv_heads * max_keys))
    assert tiles_at_once, f"lists of {max_keys} keys are longer than there is room for"
    rows_of_prompts = padded(max(prompts.num_prompts, _FEWEST_ROWS))
    rows_of_block, rows_of_token, rows_of_head = (stride // head_size for stride in key_cache.stride()[:3])
    query_strides, output_strides = query.stride()[:2], output.stride()[:2]
    launch, tile = workspace.launch, (group, padded_group, size, head_size, width)
    # what else the launches have is the workspace's, or of all layers
    key = (
        rest, soft_cap > 0, rows_of_prompts, page_size, query_strides, output_strides, output.dtype, key_cache.stride(),
        alignment(query, output, block_table, *table.tensors()),
    )  # fmt: skip
    keys, values = rows_of(key_cache), rows_of(value_cache)
    launch(
        _unpack_kernel, (-(-max_centroids // _UNPACK_BLOCK), num_kv_heads, prompts.num_prompts), key,
        prompts.slots, prefixes.slots, table.centroids, table.value_centroids, table.value_scales,
        table.group_centroids, workspace.keys.base, workspace.values.base, workspace.group_keys.base,
        *table.centroids.stride()[:2], *table.value_centroids.stride()[:2], table.sizes.stride(0),
        table.group_centroids.stride(0), table.group_sizes.stride(0),
        head_size, width, _UNPACK_BLOCK, rows_of_prompts, rest,
    )  # fmt: skip
    for first_tile in range(0, prompts.num_tiles, tiles_at_once):
        tiles_now = min(prompts.num_tiles - first_tile, tiles_at_once)
        lists = tiles_now * num_kv_heads
        launch(
            _choose_kernel, (tiles_now, num_kv_heads, 1), key,
            query, prompts.tiles, prefixes.slots, prefixes.kept_shares, prefixes.frames,
            workspace.keys.base, table.centroid_scales, workspace.values.base, table.sizes, table.log_sizes,
            table.starts, table.log_weights, table.variances,
            workspace.group_keys, workspace.keys, workspace.values,
            table.group_scales, table.group_sizes, table.frames,
            workspace.gathered, workspace.framed, workspace.ranks, workspace.picked, workspace.num_picked,
            workspace.listed, workspace.rest_output, workspace.rest_lse,
            first_tile, scale, soft_cap,
            *query_strides, table.sizes.stride(0), table.group_sizes.stride(0), table.frames.stride(0), max_centroids,
            *tile, workspace.keys.block_shape[0], 2 if rest else 3, _PICK_BLOCK, rest, soft_cap > 0,
            num_warps=8,
        )  # fmt: skip
        launch(
            _list_kernel, (tiles_now, num_kv_heads, -(-max_centroids // _LIST_BLOCK)), key,
            prompts.tiles, prefixes.slots, table.members, block_table, workspace.picked, workspace.num_picked,
            workspace.listed, workspace.places,
            first_tile, table.members.stride(0), block_table.stride(0), rows_of_block, rows_of_token, rows_of_head,
            max_centroids, max_keys,
            size, page_size, _LIST_BLOCK, _LIST_KEYS, _OTHERS_BLOCK,
        )  # fmt: skip
        queries = slice(lists * size)
        attended = workspace.attended[queries]
        attended_lse = flash(
            q=workspace.gathered[queries],
            k=keys,
            v=values,
            out=attended,
            cu_seqlens_q=workspace.starts[: lists + 1],
            max_seqlen_q=size,
            seqused_k=workspace.listed[:lists],
            max_seqlen_k=max_keys,
            block_table=workspace.places[: lists * max_keys].view(lists, max_keys),
        )
        if output_done is not None and first_tile == 0:
            torch.cuda.current_stream().wait_event(output_done)
        launch(
            _merge_kernel, (tiles_now * size, num_kv_heads, 1), key,
            output, attended, attended_lse, workspace.rest_output, workspace.rest_lse,
            prompts.tiles, prefixes.slots, workspace.listed, prefixes.counters,
            first_tile, num_kv_heads, *output_strides, attended_lse.stride(0),
            *tile, rest,
            num_warps=1,
        )  # fmt: skip
