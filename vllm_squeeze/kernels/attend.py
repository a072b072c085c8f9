"""Sparse paged attention in Triton, over the list of keys that the look-up made.

    attend   grid (programs,)                         a tile's queries over one share of its keys, and of its rest
    merge    grid (tiles * ROWS, H * G, D / COLUMNS)  the shares and the suffix, into the output

The lists of all tiles and KV heads are shared out over the programs by their length, whatever was chosen. A list is
cut into blocks of keys, none of which spans two splits of the look-up. Each list gets a program for every ``chunk``
blocks begun, and ``chunk`` is as small as the number of programs allows. Both kernels work this plan out from the
lengths.
"""

import triton
import triton.language as tl

from vllm_squeeze.kernels.look_up import FACTS, TOKENS, load_queries, log_of_size, share_of
from vllm_squeeze.kernels.softmax import LOG2_E, accumulate, logits_of


@triton.jit
def _plan(tiles, listed, first_tile, num_programs, H, TILES: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of each (tile, KV head), programs of each and of all before it, [TILES * HP] each; and the chunk."""
    o_th = tl.arange(0, TILES * HP)
    i_t, i_h = o_th // HP, o_th % HP
    p_tile = tiles + (first_tile + i_t) * FACTS
    m_th = (tl.load(p_tile) >= 0) & (i_h < H)
    b_always = tl.load(p_tile + 5)
    b_listed = tl.load(listed + i_t * H + i_h, mask=m_th, other=0)
    b_blocks = tl.where(m_th, tl.cdiv(b_always, BLOCK) + b_listed, 0)
    spare = num_programs - tl.sum(m_th.to(tl.int32), 0)
    chunk = tl.maximum(tl.cdiv(tl.sum(b_blocks, 0), spare), 1)
    # one also where there is nothing to attend to, to say so
    b_programs = tl.where(m_th, tl.maximum(tl.cdiv(b_blocks, chunk), 1), 0)
    b_before = tl.cumsum(b_programs, 0) - b_programs
    return b_blocks, b_programs, b_before, chunk


@triton.jit
def _count(counters, i_slot, has_clusters, num_tokens, num_loaded, num_pairs):
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
def _locate(
    i_b, end, o_n, always_blocks, num_always, b_since, b_until, b_range, p_always, p_places, p_bits,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where in the KV cache the keys of block ``i_b`` lie, [BLOCK], and which tokens attend to them, in bits."""
    is_always = i_b < always_blocks
    range_here = tl.sum(tl.where((b_since <= i_b) & (i_b < b_until), b_range, 0), 0)
    o_list = i_b * BLOCK + o_n + tl.where(is_always, 0, (range_here >> 32).to(tl.int32))
    stop = tl.where(i_b < end, tl.where(is_always, num_always, range_here.to(tl.int32)), 0)
    p_list = tl.where(is_always, p_always, p_places)
    # by halves, too small for Triton to prefetch: it would wait for all keys in flight to have these
    p_half = (p_list + o_list).to(tl.pointer_type(tl.int16))
    b_place = tl.load(p_half, mask=o_list < stop, other=0).to(tl.int32) & 0xFFFF
    b_place |= tl.load(p_half + 1, mask=o_list < stop, other=0).to(tl.int32) << 16
    p_half = (p_bits + o_list).to(tl.pointer_type(tl.int16))
    listed = o_list < tl.where(is_always, 0, stop)
    b_bits = tl.load(p_half, mask=listed, other=-1).to(tl.int32) & 0xFFFF
    b_bits |= tl.load(p_half + 1, mask=listed, other=-1).to(tl.int32) << 16
    return b_place, tl.where(o_list < stop, b_bits, 0)


@triton.jit(do_not_specialize=["first_tile"])
def attend_kernel(
    query, tokens, tiles, always_places, key_cache, value_cache, value_centroids, starts, sizes,
    scores, chosen, list_places, list_bits, listed, kept, kept_pairs, counters, partial_output, partial_lse,
    first_tile, H, scale, soft_cap,
    stride_query_token, stride_query_head, stride_block, stride_token, stride_head, stride_size_head,
    stride_centroid_head, stride_centroid, stride_always, max_centroids, max_keys,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TILES: tl.constexpr, HP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    S: tl.constexpr, STAGES: tl.constexpr, SOFT_CAP: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = ROWS * GP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_p = tl.program_id(0)
    b_blocks, b_programs, b_before, chunk = _plan(tiles, listed, first_tile, tl.num_programs(0), H, TILES, HP, BLOCK)
    o_th = tl.arange(0, TILES * HP)
    b_mine = (b_before <= i_p) & (i_p < b_before + b_programs)
    i_th = tl.max(tl.where(b_mine, o_th, -1), 0)
    if i_th < 0:
        return
    i_t, i_h = i_th // HP, i_th % HP
    i_share = i_p - tl.sum(tl.where(b_mine, b_before, 0), 0)
    begin = i_share * chunk
    end = tl.minimum(begin + chunk, tl.sum(tl.where(b_mine, b_blocks, 0), 0))

    p_tile = tiles + (first_tile + i_t) * FACTS
    i_slot, num_tokens = tl.load(p_tile), tl.load(p_tile + 1)
    first_centroid, count, num_always = tl.load(p_tile + 3).to(tl.int64), tl.load(p_tile + 4), tl.load(p_tile + 5)
    b_q = load_queries(
        query, tokens, first_tile + i_t, num_tokens, i_h, stride_query_token, stride_query_head,
        GROUP, GP, ROWS, D, DP,
    )  # fmt: skip
    o_m, o_n, o_d, o_s = tl.arange(0, M), tl.arange(0, BLOCK), tl.arange(0, DP), tl.arange(0, SPLITS)
    m_d = o_d < D
    b_bit = 1 << (o_m // GP)  # [M], of the row's token
    i_list = (i_t * H + i_h).to(tl.int64)
    # where each split's keys begin and end in the list, and which blocks are theirs
    share = share_of(count, SPLITS)
    p_starts = starts + i_h.to(tl.int64) * stride_size_head + first_centroid
    m_s = o_s * share < count
    b_kept = tl.load(kept + i_list * SPLITS + o_s, mask=m_s, other=0)
    b_first = tl.load(p_starts + o_s * share, mask=m_s, other=0)
    b_first -= tl.min(tl.where(m_s, b_first, 2147483647), 0)
    always_blocks = tl.cdiv(num_always, BLOCK)
    b_split_blocks = tl.cdiv(b_kept, BLOCK)
    b_until = always_blocks + tl.cumsum(b_split_blocks, 0)
    b_since = b_until - b_split_blocks
    # both in one number, to be found by one reduction: the place of block 0 if it were the split's, and the end
    b_range = ((b_first - b_since * BLOCK).to(tl.int64) << 32) | (b_first + b_kept).to(tl.int64)
    if begin == 0:
        num_pairs = tl.sum(tl.load(kept_pairs + i_list * SPLITS + o_s, mask=m_s, other=0), 0)
        _count(counters, i_slot, count > 0, num_tokens, tl.sum(b_kept, 0), num_pairs)

    p_always = always_places + i_slot.to(tl.int64) * stride_always
    p_places = list_places + i_list * max_keys
    p_bits = list_bits + i_list * max_keys
    p_keys = key_cache + i_h.to(tl.int64) * stride_head + o_d[None, :]
    p_values = value_cache + i_h.to(tl.int64) * stride_head + o_d[None, :]
    b_max = tl.full([M], float("-inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_o = tl.zeros([M, DP], tl.float32)
    b_place, b_bits = _locate(
        begin, end, o_n, always_blocks, num_always, b_since, b_until, b_range, p_always, p_places, p_bits, BLOCK
    )
    for i_b in tl.range(begin, end, num_stages=STAGES):
        b_place = (b_place // S).to(tl.int64) * stride_block + (b_place % S) * stride_token
        m_kv = (b_bits != 0)[:, None] & m_d[None, :]
        b_k = tl.load(p_keys + b_place[:, None], mask=m_kv, other=0.0)  # [BLOCK, DP]
        b_v = tl.load(p_values + b_place[:, None], mask=m_kv, other=0.0)  # [BLOCK, DP]
        b_wanted = (b_bits[None, :] & b_bit[:, None]) != 0
        # one block ahead, so that the places of keys are there when it is time to load these
        b_place, b_bits = _locate(
            i_b + 1, end, o_n, always_blocks, num_always, b_since, b_until, b_range, p_always, p_places, p_bits,
            BLOCK,
        )  # fmt: skip
        b_s = tl.where(b_wanted, logits_of(b_q, b_k, scale, soft_cap, SOFT_CAP), float("-inf"))  # [M, BLOCK]
        b_max, b_sum, b_o = accumulate(b_s, b_v, b_max, b_sum, b_o)

    m_m = (o_m // GP < num_tokens) & (o_m % GP < GROUP)
    if REST:
        share = tl.cdiv(count, tl.sum(tl.where(b_mine, b_programs, 0), 0))
        o_c = tl.arange(0, REST_BLOCK)
        p_scores = scores + (i_list * M + o_m[:, None]) * max_centroids
        p_chosen = chosen + i_list * max_centroids
        p_sizes = sizes + i_h.to(tl.int64) * stride_size_head + first_centroid
        p_means = value_centroids + i_h.to(tl.int64) * stride_centroid_head + first_centroid * stride_centroid
        stop = tl.minimum((i_share + 1) * share, count)
        for i_c in tl.range(i_share * share, stop, REST_BLOCK, num_stages=STAGES):
            o_row = i_c + o_c
            m_c = o_row < stop
            b_s = tl.load(p_scores + o_row[None, :], mask=m_m[:, None] & m_c[None, :], other=float("-inf"))
            b_chosen = tl.load(p_chosen + o_row, mask=m_c, other=-1)
            b_size = tl.load(p_sizes + o_row, mask=m_c, other=0)
            p_v = p_means + o_row[:, None].to(tl.int64) * stride_centroid + o_d[None, :]
            b_v = tl.load(p_v, mask=m_c[:, None] & m_d[None, :], other=0.0)  # [REST_BLOCK, DP]
            b_rest = (b_chosen[None, :] & b_bit[:, None]) == 0
            b_s = tl.where(b_rest, b_s + log_of_size(b_size)[None, :], float("-inf"))
            b_max, b_sum, b_o = accumulate(b_s, b_v, b_max, b_sum, b_o)

    b_some = b_sum > 0
    b_sum = tl.where(b_some, b_sum, 1.0)
    o_row = i_p.to(tl.int64) * M + o_m
    tl.store(partial_lse + o_row, tl.where(b_some, b_max + tl.log2(b_sum), float("-inf")), mask=m_m)
    p_o = partial_output + o_row[:, None] * D + o_d[None, :]
    tl.store(p_o, b_o / b_sum[:, None], mask=m_m[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["first_tile", "suffix_lse", "stride_lse_head", "stride_lse_token"])
def merge_kernel(
    output, suffix_lse, tokens, tiles, listed, partial_output, partial_lse,
    first_tile, num_programs, H,
    stride_output_token, stride_output_head, stride_lse_head, stride_lse_token,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    TILES: tl.constexpr, HP: tl.constexpr, KEY_BLOCK: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = ROWS * GP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_t, i_r, i_head = tl.program_id(0) // ROWS, tl.program_id(0) % ROWS, tl.program_id(1)
    i_h = i_head // GROUP
    i_tile = first_tile + i_t
    i_slot, num_tokens = tl.load(tiles + i_tile * FACTS), tl.load(tiles + i_tile * FACTS + 1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if (i_slot < 0) | (i_r >= num_tokens):
        return
    i_token = tl.load(tokens + i_tile * TOKENS + i_r).to(tl.int64)
    o_n, o_d = tl.arange(0, BLOCK), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    p_output = output + i_token * stride_output_token + i_head * stride_output_head + o_d
    b_o = tl.load(p_output, mask=m_d, other=0.0).to(tl.float32)
    largest = tl.load(suffix_lse + i_head.to(tl.int64) * stride_lse_head + i_token * stride_lse_token) * LOG2_E
    total = 1.0

    _, b_programs, b_before, _ = _plan(tiles, listed, first_tile, num_programs, H, TILES, HP, KEY_BLOCK)
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
        b_weight = tl.exp2(b_lse - next)
        decay = tl.exp2(largest - next)
        b_o = b_o * decay + tl.sum(b_part * b_weight[:, None], 0)
        total = total * decay + tl.sum(b_weight, 0)
        largest = next
    tl.store(p_output, (b_o / total).to(output.dtype.element_ty), mask=m_d)
