"""Sparse paged attention in Triton, over the lists of keys that the look-up made.

    attend   grid (programs,)                         a tile's queries over one share of its keys and of its rest
    merge    grid (tiles * rows, H * G, D / COLUMNS)  the shares, into the output

What a tile and KV head has to do is counted in keys: those of the prefix that are listed, those of suffixes that are,
and then the clusters of the rest, each of which takes about as long as a key. All of it is shared out over the programs
in pieces of ``chunk`` keys, whatever was chosen, and ``chunk`` is as small as the number of programs allows. Both
kernels work this plan out from the lengths of the lists.
"""

import triton
import triton.language as tl

from vllm_squeeze.kernels.look_up import FACTS, TOKENS, load_queries, share_of, token_of_row
from vllm_squeeze.kernels.packing import WHOLE, load_packed
from vllm_squeeze.kernels.softmax import LOG2_E, accumulate, finite_or_zero, logits_of

GRAIN = tl.constexpr(16)
"""Pieces of work are multiples of so many keys, so that loads are of whole rows of memory."""


@triton.jit
def _whole(num_keys):
    return tl.cdiv(num_keys, GRAIN) * GRAIN


@triton.jit
def _plan(
    tiles, listed, first_tile, num_tiles, num_programs, H,
    TILES: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Keys and work of each (tile, KV head), programs of each and of all before it, [TILES * HP] each; the chunk.

    Waits for the kernel before.
    """
    o_th = tl.arange(0, TILES * HP)
    i_t, i_h = o_th // HP, o_th % HP
    p_tile = tiles + (first_tile + i_t) * FACTS
    m_th = (tl.load(p_tile) >= 0) & (i_t < num_tiles) & (i_h < H)
    b_count, b_always, b_suffix = tl.load(p_tile + 4), tl.load(p_tile + 5), tl.load(p_tile + 7)
    if PDL:
        tl.extra.cuda.gdc_wait()
    b_listed = tl.load(listed + i_t * H + i_h, mask=m_th, other=0)
    b_keys = tl.where(m_th, tl.where(b_count > 0, b_listed, b_always), 0)
    b_work = _whole(b_keys) + tl.where(m_th, _whole(b_suffix), 0)
    if REST:
        b_work += tl.where(m_th, b_count, 0)
    spare = num_programs - tl.sum(m_th.to(tl.int32), 0)
    chunk = _whole(tl.maximum(tl.cdiv(tl.sum(b_work, 0), spare), BLOCK))
    # one also where there is nothing to attend to, to say so
    b_programs = tl.where(m_th, tl.maximum(tl.cdiv(b_work, chunk), 1), 0)
    b_before = tl.cumsum(b_programs, 0) - b_programs
    return b_keys, b_work, b_programs, b_before, chunk


@triton.jit
def count_tile(counters, i_slot, has_clusters, num_tokens, num_loaded, num_pairs):
    """Counts one tile and KV head."""
    p_counters = counters + i_slot * 6
    one = tl.full([], 1, tl.int64)
    if has_clusters:
        tl.atomic_add(p_counters, one, sem="relaxed")
        tl.atomic_add(p_counters + 1, num_loaded.to(tl.int64), sem="relaxed")
        tl.atomic_add(p_counters + 2, num_tokens.to(tl.int64), sem="relaxed")
        tl.atomic_add(p_counters + 3, num_pairs.to(tl.int64), sem="relaxed")
    else:
        tl.atomic_add(p_counters + 4, one, sem="relaxed")
        tl.atomic_add(p_counters + 5, num_tokens.to(tl.int64), sem="relaxed")


@triton.jit
def _load_places(p_places, o_key, last):
    """Where the keys ``o_key`` of a list lie in the KV cache; the last one's place beyond it."""
    # by halves, too small for Triton to prefetch: it would wait for all keys in flight to have these
    p_half = (p_places + tl.minimum(o_key, last)).to(tl.pointer_type(tl.int16))
    return (tl.load(p_half).to(tl.int32) & 0xFFFF) | (tl.load(p_half + 1).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["first_tile", "num_tiles"])
def attend_kernel(
    query, tokens, tiles, tile_count, always_places, suffix_places, suffix_bits, key_cache, value_cache,
    key_scale, value_scale, value_centroids, value_centroid_scales,
    logits, chosen, list_places, list_bits, listed, kept_pairs, counters, partial_output, partial_lse,
    first_tile, num_tiles, H, scale, soft_cap,
    stride_query_token, stride_query_head, stride_block, stride_token, stride_head,
    stride_mean_head, stride_mean, stride_size_head, stride_always, stride_suffix, max_centroids, max_keys,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TILES: tl.constexpr, HP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr,
    BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, SOFT_CAP: tl.constexpr,
    REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = ROWS * GP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_p = tl.program_id(0)
    # of one tile, while the kernel before still runs
    b_token = token_of_row(tokens, first_tile, GP, ROWS)
    b_keys, b_work, b_programs, b_before, chunk = _plan(
        tiles, listed, first_tile, num_tiles, tl.num_programs(0), H, TILES, HP, BLOCK, REST, PDL
    )
    b_mine = (b_before <= i_p) & (i_p < b_before + b_programs)
    i_th = tl.max(tl.where(b_mine, tl.arange(0, TILES * HP), -1), 0)
    if i_th < 0:
        return
    i_t, i_h = i_th // HP, i_th % HP
    num_keys = tl.sum(tl.where(b_mine, b_keys, 0), 0)
    begin = (i_p - tl.sum(tl.where(b_mine, b_before, 0), 0)) * chunk
    end = tl.minimum(begin + chunk, tl.sum(tl.where(b_mine, b_work, 0), 0))

    p_tile = tiles + (first_tile + i_t) * FACTS
    i_slot, num_tokens = tl.load(p_tile), tl.load(p_tile + 1)
    first_centroid, count, num_always = tl.load(p_tile + 3).to(tl.int64), tl.load(p_tile + 4), tl.load(p_tile + 5)
    num_suffix = tl.load(p_tile + 7)
    if TILES > 1:
        b_token = token_of_row(tokens, first_tile + i_t, GP, ROWS)
    b_q = load_queries(query, b_token, num_tokens, i_h, stride_query_token, stride_query_head, GROUP, GP, ROWS, D, DP)
    o_m, o_n, o_d = tl.arange(0, M), tl.arange(0, BLOCK), tl.arange(0, DP)
    m_m = (o_m // GP < num_tokens) & (o_m % GP < GROUP)
    b_bit = 1 << (o_m // GP)  # [M], of the row's token
    i_th_64 = (i_t * H + i_h).to(tl.int64)
    if begin == 0:
        o_s = tl.arange(0, SP)
        share = share_of(count, tl.minimum(tl.load(tile_count) - first_tile, num_tiles), SPLITS)
        m_s = o_s * share < count
        b_pairs = tl.load(kept_pairs + i_th_64 * SPLITS + o_s, mask=m_s, other=0)
        count_tile(counters, i_slot, count > 0, num_tokens, num_keys - num_always, tl.sum(b_pairs, 0))

    # a row of D elements is the unit, to tell all places apart in 32 bits
    p_keys = key_cache + i_h.to(tl.int64) * stride_head + o_d[None, :]
    p_values = value_cache + i_h.to(tl.int64) * stride_head + o_d[None, :]
    rows_of_block, rows_of_token = (stride_block // D).to(tl.int32), (stride_token // D).to(tl.int32)
    logit_scale = scale
    if key_scale is not None:
        logit_scale *= tl.load(key_scale)
    b_max = tl.full([M], float("-inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_o = tl.zeros([M, DP], tl.float32)
    suffix_at = _whole(num_keys)
    i_tile = (first_tile + i_t).to(tl.int64)
    for i_list in range(0, 2):
        # the keys of the prefix, then those of suffixes
        of_prefix, exact = i_list == 0, (i_list == 0) & (count == 0)
        length = tl.where(of_prefix, num_keys, num_suffix)
        key_begin = tl.where(of_prefix, begin, tl.maximum(begin - suffix_at, 0))
        key_end = tl.minimum(tl.where(of_prefix, end, end - suffix_at), length)
        p_places = tl.where(of_prefix, list_places + i_th_64 * max_keys, suffix_places + i_tile * stride_suffix)
        p_places = tl.where(exact, always_places + i_slot.to(tl.int64) * stride_always, p_places)
        p_bits = tl.where(of_prefix, list_bits + i_th_64 * max_keys, suffix_bits + i_tile * stride_suffix)
        free_bits = tl.where(exact, -1, 0)
        if key_begin < key_end:
            b_place = _load_places(p_places, key_begin + o_n, length - 1)
            for i_k in tl.range(key_begin, key_end, BLOCK, num_stages=STAGES):
                b_row = ((b_place // S) * rows_of_block + (b_place % S) * rows_of_token).to(tl.int64) * D
                b_k = tl.load(p_keys + b_row[:, None], mask=(o_d < D)[None, :], other=0.0)  # [BLOCK, DP]
                b_v = tl.load(p_values + b_row[:, None], mask=(o_d < D)[None, :], other=0.0)  # [BLOCK, DP]
                b_bits = tl.load(p_bits + tl.multiple_of(i_k, GRAIN) + o_n) | free_bits
                b_bits = tl.where(i_k + o_n < key_end, b_bits, 0)
                # one block ahead, so that the places of keys are there when it is time to load these
                b_place = _load_places(p_places, i_k + BLOCK + o_n, length - 1)
                b_s, unit = logits_of(b_q, b_k.to(b_q.dtype), logit_scale, soft_cap, SOFT_CAP)
                b_s = tl.where((b_bits[None, :] & b_bit[:, None]) != 0, b_s, float("-inf"))  # [M, BLOCK]
                b_max, b_sum, b_o = accumulate(b_s, unit, b_v.to(b_q.dtype), b_max, b_sum, b_o)
    if value_scale is not None:
        b_o *= tl.load(value_scale)

    if REST:
        # so that probabilities times scales are no smaller than probabilities times values, nor too small for 16 bits
        b_o *= WHOLE
        rest_at = suffix_at + _whole(num_suffix)
        first = tl.maximum(begin - rest_at, 0)
        stop = tl.minimum(end - rest_at, count)
        o_c = tl.arange(0, REST_BLOCK)
        # where rows are padded nothing was written: a row that all share is loaded once
        p_logits = logits + (i_th_64 * M + tl.where(m_m, o_m, 0)[:, None]) * max_centroids
        p_chosen = chosen + i_th_64 * max_centroids
        p_means = value_centroids + i_h.to(tl.int64) * stride_mean_head + first_centroid * stride_mean
        p_scales = value_centroid_scales + i_h.to(tl.int64) * stride_size_head + first_centroid
        for i_c in tl.range(first, stop, REST_BLOCK, num_stages=STAGES):
            o_row = tl.multiple_of(i_c, GRAIN) + o_c
            b_s = tl.load(p_logits + o_row[None, :])  # [M, REST_BLOCK]
            b_chosen = tl.where(o_row < stop, tl.load(p_chosen + o_row), -1)
            o_mean = tl.minimum(o_row, stop - 1)
            b_v = load_packed(p_means, o_mean, stride_mean, b_q.dtype, D, DP)  # [REST_BLOCK, DP]
            b_scale = tl.load(p_scales + o_mean) * WHOLE
            b_s = tl.where((b_chosen[None, :] & b_bit[:, None]) == 0, b_s, float("-inf"))
            b_max, b_sum, b_o = accumulate(b_s, 1.0, b_v, b_max, b_sum, b_o, b_scale[None, :])
        b_o *= 1 / WHOLE

    b_some = b_sum > 0
    b_sum = tl.where(b_some, b_sum, 1.0)
    o_row = i_p.to(tl.int64) * M + o_m
    tl.store(partial_lse + o_row, tl.where(b_some, b_max + tl.log2(b_sum), float("-inf")), mask=m_m)
    p_o = partial_output + o_row[:, None] * D + o_d[None, :]
    tl.store(p_o, b_o / b_sum[:, None], mask=m_m[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["first_tile", "num_tiles", "rows", "stride_lse_head", "stride_lse_token"])
def merge_kernel(
    output, suffix_lse, tokens, tiles, listed, partial_output, partial_lse,
    first_tile, num_tiles, rows, num_programs, H,
    stride_output_token, stride_output_head, stride_lse_head, stride_lse_token,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    TILES: tl.constexpr, HP: tl.constexpr, KEY_BLOCK: tl.constexpr,
    REST: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = ROWS * GP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_t, i_r, i_head = tl.program_id(0) // rows, tl.program_id(0) % rows, tl.program_id(1)
    i_h = i_head // GROUP
    i_tile = first_tile + i_t
    i_slot, num_tokens = tl.load(tiles + i_tile * FACTS), tl.load(tiles + i_tile * FACTS + 1)
    _, _, b_programs, b_before, _ = _plan(
        tiles, listed, first_tile, num_tiles, num_programs, H, TILES, HP, KEY_BLOCK, REST, PDL
    )
    if (i_slot < 0) | (i_r >= num_tokens):
        return
    i_token = tl.load(tokens + i_tile * TOKENS + i_r).to(tl.int64)
    o_n, o_d = tl.arange(0, BLOCK), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    p_output = output + i_token * stride_output_token + i_head * stride_output_head + o_d
    if suffix_lse is None:
        b_o = tl.zeros([COLUMNS], tl.float32)
        largest = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
    else:
        b_o = tl.load(p_output, mask=m_d, other=0.0).to(tl.float32)
        largest = tl.load(suffix_lse + i_head.to(tl.int64) * stride_lse_head + i_token * stride_lse_token) * LOG2_E
        total = tl.full([], 1.0, tl.float32)

    b_mine = tl.arange(0, TILES * HP) == i_t * HP + i_h
    num_parts = tl.sum(tl.where(b_mine, b_programs, 0), 0)
    first_part = tl.sum(tl.where(b_mine, b_before, 0), 0)
    i_m = i_r * GP + i_head % GROUP
    for i_n in range(0, num_parts, BLOCK):
        o_part = i_n + o_n
        m_n = o_part < num_parts
        o_row = (first_part + o_part).to(tl.int64) * M + i_m
        b_lse = tl.load(partial_lse + o_row, mask=m_n, other=float("-inf"))
        m_o = m_n[:, None] & m_d[None, :]
        b_part = tl.load(partial_output + o_row[:, None] * D + o_d[None, :], mask=m_o, other=0.0)  # [BLOCK, COLUMNS]
        next = tl.maximum(largest, tl.max(b_lse, 0))
        shift = finite_or_zero(next)
        b_weight = tl.exp2(b_lse - shift)
        decay = tl.exp2(largest - shift)
        b_o = b_o * decay + tl.sum(b_part * b_weight[:, None], 0)
        total = total * decay + tl.sum(b_weight, 0)
        largest = next
    tl.store(p_output, (b_o / total).to(output.dtype.element_ty), mask=m_d)
