"""Centroid look-up in Triton: which keys each tile of queries needs.

    look_up    grid (masses + splits, H, tiles)  the log-sum-exp of one share of a prefix's groups; or, of one share of
                                                 its clusters, what each contributes if it is not looked at, which are,
                                                 which of their keys are chosen, and the list of these

Programs wait for each other: to choose, for the sums of all groups; to list, for how many keys the splits before keep.
They wait only for such as started earlier, which wait for none after them.

A tile holds up to ROWS query tokens of one prefix; with the G query heads of a KV head, padded to GP, they are the M
rows of a matrix product. Each token chooses for itself. The list has every key that any of them chose, once, with a
bit for each token that did.

Reductions have a fixed order, so equal inputs give equal bits.
"""

import triton
import triton.language as tl

from vllm_squeeze.kernels.packing import FEW_ROWS, LEAST, operand_of, packed_products, unpacked_words
from vllm_squeeze.kernels.softmax import LOG2_E, capped, finite_or_zero
from vllm_squeeze.kernels.tables import (
    MARGIN,
    MOST_PRODUCT,
    MOST_RAISE,
    MOST_REST_RAISE,
    NEIGHBOURS,
    NUM_DIRECTIONS,
    NUM_ROW_FACTS,
    RULES,
)
from vllm_squeeze.kernels.tiles import MAX_BLOCK, MAX_TILE_TOKENS, PART_KEYS, TILE_FACTS

FACTS = tl.constexpr(TILE_FACTS)
TOKENS = tl.constexpr(MAX_TILE_TOKENS)
KEYS, PAPER = tl.constexpr(RULES.index("keys")), tl.constexpr(RULES.index("paper"))
PART = tl.constexpr(PART_KEYS)
SHORT = tl.constexpr(MARGIN)
DIRECTIONS = tl.constexpr(NUM_DIRECTIONS)
MOST_AIMED = tl.constexpr(MOST_PRODUCT)
ROW_FACTS = tl.constexpr(NUM_ROW_FACTS)
LOWER_HALF = tl.constexpr(NUM_DIRECTIONS // 2 * 15 * MOST_PRODUCT)
"""More than lower halves of products sum up to, either way, so that nothing is borrowed from the upper ones."""
RAISE = tl.constexpr(MOST_RAISE)
REST_RAISE = tl.constexpr(MOST_REST_RAISE)
OF_GROUP = tl.constexpr(NEIGHBOURS)
LEAST_SHARE, MOST_SHARE = tl.constexpr(32), tl.constexpr(MAX_BLOCK)
"""Clusters of a split: it takes fewer no less long, and more than so many one after the other."""


@triton.jit
def share_of(total, num_tiles, SPLITS: tl.constexpr):
    """The length of one split's share of ``total`` clusters of one of ``num_tiles`` tiles; the last splits may have none.

    The more tiles, the fewer splits of each, so that those of all of them run at a time.
    """
    several = tl.minimum(tl.cdiv(total * num_tiles, SPLITS), MOST_SHARE)
    return tl.maximum(tl.maximum(tl.cdiv(total, SPLITS), several), LEAST_SHARE)


@triton.jit
def _range_of(i_split, total, num_tiles, SPLITS: tl.constexpr):
    """The first of one split's share of ``total`` clusters, and the first after it."""
    share = share_of(total, num_tiles, SPLITS)
    return i_split * share, tl.minimum((i_split + 1) * share, total)


@triton.jit
def in_frame(b_q, b_mean, b_spread, scale):
    """Queries [M, DP] times the spreads [DP] of a frame, as an operand, and s q.m [M] with its mean [DP]."""
    b_wide = b_q.to(tl.float32)
    b_of_mean = tl.sum(b_wide * b_mean[None, :], 1) * (scale * LOG2_E)
    return operand_of((b_wide * b_spread[None, :]).to(b_q.dtype)), b_of_mean


@triton.jit
def _logits_of_rows(
    b_q, b_of_mean, p_centroids, p_scales, o_row, end, scale, soft_cap, stride_centroid,
    D: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """s q.c [M, N] of rows ``o_row`` [N] of clusters or groups, for queries in their frame; anything from ``end`` on."""
    o_c = tl.minimum(o_row, end - 1)
    b_scale = tl.load(p_scales + o_c) * (scale * LOG2_E)
    b_s = packed_products(b_q, p_centroids, o_c, stride_centroid, D) * b_scale[None, :] + b_of_mean[:, None]
    return capped(b_s, soft_cap * LOG2_E) if SOFT_CAP else b_s


@triton.jit
def _mass_of_rows(
    b_q, b_of_mean, p_centroids, p_scales, p_sizes, begin, end, scale, soft_cap, stride_centroid,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp [M] of what rows ``begin`` to ``end`` of clusters or groups attract; minus infinity of none."""
    b_max = tl.full([b_of_mean.shape[0]], float("-inf"), tl.float32)
    b_sum = tl.zeros([b_of_mean.shape[0]], tl.float32)
    for i_c in tl.range(begin, end, BLOCK, num_stages=STAGES):
        o_row = i_c + tl.arange(0, BLOCK)
        b_size = tl.load(p_sizes + o_row, mask=o_row < end, other=0).to(tl.float32)
        b_s = _logits_of_rows(
            b_q, b_of_mean, p_centroids, p_scales, o_row, end, scale, soft_cap, stride_centroid, D, SOFT_CAP
        )  # fmt: skip
        b_s = tl.where(b_size[None, :] > 0, b_s, float("-inf"))
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = finite_or_zero(b_next)
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]) * b_size[None, :], 1)
        b_max = b_next
    return tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))


@triton.jit
def token_of_row(tokens, i_tile, GP: tl.constexpr, ROWS: tl.constexpr):
    """The query token [M] of each row of a tile; anything where padded."""
    return tl.load(tokens + i_tile * TOKENS + tl.arange(0, ROWS * GP) // GP).to(tl.int64)


@triton.jit
def load_queries(
    query, b_token, num_tokens, i_h, stride_token, stride_head,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The queries [M, DP] of a tile, zero where padded."""
    o_m, o_d = tl.arange(0, ROWS * GP), tl.arange(0, DP)
    m_q = (o_m // GP < num_tokens) & (o_m % GP < GROUP)
    p_q = query + b_token[:, None] * stride_token + (i_h * GROUP + o_m % GP)[:, None] * stride_head + o_d[None, :]
    return tl.load(p_q, mask=m_q[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _facts_of_clusters(p_sizes, p_log_sizes, p_starts, p_weights, p_variances, o_row, end, threshold):
    """Sizes, starts, what a predicted log probability must exceed, and variances of clusters ``o_row`` [N]."""
    m_c = o_row < end
    b_size, b_start = tl.load(p_sizes + o_row, mask=m_c, other=0), tl.load(p_starts + o_row, mask=m_c, other=0)
    b_log_size, b_weight = tl.load(p_log_sizes + o_row, mask=m_c), tl.load(p_weights + o_row, mask=m_c)
    b_wanted = tl.where(b_size > 0, threshold + (b_log_size - b_weight) * LOG2_E, float("inf"))
    return b_size, b_start, b_wanted, tl.load(p_variances + o_row, mask=m_c)


@triton.jit
def _choose(
    p_logits, p_masses, p_squares, b_wanted, b_variance, o_row, end, num_tokens, stride_logits,
    GROUP: tl.constexpr, GP: tl.constexpr, OF_MEAN: tl.constexpr,
):  # fmt: skip
    """A bit for each token that chooses cluster ``o_row`` [N].

    Where keys are chosen for themselves, leaves in place of the cluster's logits, which are not needed any more, by how
    much the log probability of a key that lies at the cluster's mean key exceeds the threshold of keys.
    """
    o_g = tl.arange(0, GP)
    m_s = (o_g < GROUP)[:, None] & (o_row < end)[None, :]
    b_bits = tl.zeros_like(o_row)
    # a token at a time, so that each thread has all query heads of its clusters; several are on their way
    for i_r in tl.range(0, num_tokens, loop_unroll_factor=4):
        o_m = i_r * GP + o_g
        p_s = p_logits + o_m[:, None] * stride_logits + o_row[None, :]
        b_s = tl.load(p_s, mask=m_s, other=float("-inf")) - tl.load(p_masses + o_m)[:, None]
        b_raise = tl.load(p_squares + o_m)[:, None] * b_variance[None, :]
        # less what logits were raised by already
        b_more = tl.minimum(tl.maximum(b_raise - REST_RAISE * LOG2_E, 0.0), (RAISE - REST_RAISE) * LOG2_E)
        b_log_p = b_s + b_more  # of all keys of a cluster together
        b_joined = tl.max(b_log_p, 0)
        if OF_MEAN:
            b_peak = finite_or_zero(b_joined)
            b_joined = b_peak + tl.log2(tl.sum(tl.exp2(b_log_p - b_peak[None, :]), 0) / GROUP)
        b_chosen = b_joined > b_wanted
        if not OF_MEAN:
            b_over = b_s - tl.minimum(b_raise, REST_RAISE * LOG2_E) - (b_wanted + SHORT * LOG2_E)[None, :]
            tl.store(p_s, b_over, mask=m_s & b_chosen[None, :])
        b_bits |= b_chosen.to(tl.int32) << i_r
    return b_bits


@triton.jit
def _aim(b_q, b_directions, scale):
    """Products of queries [M, DP] with directions [DP, DIRECTIONS] in 8 bits, and what each counts.

    Returns:
        [M, DIRECTIONS] int32; and [M], what one counts in logits.
    """
    b_aimed = tl.dot(b_q, b_directions.to(b_q.dtype), input_precision="ieee")
    b_unit = tl.max(tl.abs(b_aimed), 1) / MOST_AIMED
    b_inverse = tl.where(b_unit > 0, 1 / tl.where(b_unit > 0, b_unit, 1.0), 0.0)
    return tl.floor(b_aimed * b_inverse[:, None] + 0.5).to(tl.int32), b_unit * (scale * LOG2_E)


@triton.jit
def _store_aimed(p_aimed, p_units, b_aimed, b_unit, o_m):
    """Leaves what ``_aim`` returns for ``_load_aimed``."""
    M: tl.constexpr = b_aimed.shape[0]
    tl.store(p_units + o_m, b_unit)
    if M > FEW_ROWS:
        p_m = p_aimed.to(tl.pointer_type(tl.float16)) + o_m * DIRECTIONS
        tl.store(p_m[:, None] + tl.arange(0, DIRECTIONS)[None, :], b_aimed.to(tl.float16))
    else:
        # two to a word, the second in the lower half; and before them what their sum starts from
        b_first, b_second = tl.split(b_aimed.reshape(M, DIRECTIONS // 2, 2))
        p_m = p_aimed.to(tl.pointer_type(tl.int32)) + o_m
        tl.store(p_m, (tl.sum(b_aimed, 1) * LEAST << 16) + LOWER_HALF)
        o_w = 1 + tl.arange(0, DIRECTIONS // 2)
        tl.store(p_m[:, None] + o_w[None, :] * M, (b_first << 16) + b_second)


@triton.jit
def _load_aimed(p_aimed, p_units, GP: tl.constexpr, ROWS: tl.constexpr):
    """What ``_choose_keys`` takes of a tile's rows: of many products and what they count, of few where these are."""
    M: tl.constexpr = ROWS * GP
    if M > FEW_ROWS:
        # Head by head: a thread then has all heads of a token among the tensor cores' products, and nothing is moved to
        # join them.
        o_m = tl.arange(0, M) % ROWS * GP + tl.arange(0, M) // ROWS
        p_m = p_aimed.to(tl.pointer_type(tl.float16)) + o_m * DIRECTIONS
        b_aimed = tl.load(p_m[None, :] + tl.arange(0, DIRECTIONS)[:, None])
        # infinity of queries that are zero along all directions
        return o_m, b_aimed, 1 / tl.load(p_units + o_m)
    else:
        return p_aimed.to(tl.pointer_type(tl.int32)), p_units


@triton.jit
def _load_keys(p_picked, p_residuals, first_part, num_picked, num_aimed, PARTS: tl.constexpr):
    """The keys of PARTS parts of clusters, from ``first_part`` on.

    Returns:
        [PARTS, 1] the cluster of each part; [PARTS, PART] the number of each key among the members; [PARTS, PART] the
        tokens that chose its cluster, none of what is no key; [PARTS, PART] the lower and the upper word of its
        residual, of the first ``num_aimed`` parts.
    """
    o_part, o_k = first_part + tl.arange(0, PARTS)[:, None], tl.arange(0, PART)[None, :]
    m_part = o_part < num_picked
    p_part = p_picked + 4 * o_part
    m_key = o_k < tl.load(p_part + 2, mask=m_part, other=0)
    b_cluster = tl.load(p_part, mask=m_part, other=0)
    b_member = tl.load(p_part + 1, mask=m_part, other=0) + o_k
    b_bits = tl.where(m_key, tl.load(p_part + 3, mask=m_part, other=0), 0)
    p_words = p_residuals + DIRECTIONS // 8 * b_member
    m_aimed = m_key & (o_part < num_aimed)
    b_lower, b_upper = tl.load(p_words, mask=m_aimed, other=0), tl.load(p_words + 1, mask=m_aimed, other=0)
    return b_cluster, b_member, b_bits, b_lower, b_upper


@triton.jit
def _choose_keys(
    aimed, p_over, b_cluster, b_bits, b_lower, b_upper, num_tokens, stride_over,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the tokens ``b_bits`` that chose keys' clusters those that choose the keys, [PARTS, PART] each."""
    PARTS: tl.constexpr = b_bits.shape[0]
    M: tl.constexpr = ROWS * GP
    if M > FEW_ROWS:
        o_m, b_aimed, b_inverse = aimed
        p_base = p_over + o_m[None, :] * stride_over + b_cluster
        b_base = tl.load(p_base, mask=(o_m % GP < GROUP)[None, :], other=float("-inf")) * b_inverse[None, :]
        b_residuals = unpacked_words(tl.join(b_lower, b_upper).reshape(PARTS * PART, DIRECTIONS // 8), tl.float16)
        b_s = tl.dot(b_residuals, b_aimed).reshape(PARTS, PART, M) + b_base[:, None, :]
        b_most = tl.max(b_s.reshape(PARTS, PART, GP, ROWS), 2)
        return b_bits & tl.sum((b_most > 0).to(tl.int32) << tl.arange(0, ROWS), 2)
    else:
        p_aimed, p_units = aimed
        b_chosen = tl.zeros_like(b_bits)
        for i_r in range(0, num_tokens):
            m_s = ((b_bits >> i_r) & 1) != 0
            # each thread has all of its keys' elements: nothing is moved, as it would be for a product of matrices
            for i_g in tl.static_range(0, GROUP):
                i_m = i_r * GP + i_g
                p_base = p_over + i_m * stride_over + b_cluster + tl.zeros_like(b_bits)
                b_s = tl.load(p_base, mask=m_s, other=float("-inf"))
                # two products at a time, whose sum is in the upper half; what is in the lower never leaves it
                b_sum = tl.zeros_like(b_bits) + tl.load(p_aimed + i_m)
                for i_w in tl.static_range(0, DIRECTIONS // 2):
                    b_two = ((b_lower if i_w < 4 else b_upper) >> (i_w % 4 * 4)) & 0x000F000F
                    b_sum += b_two * tl.load(p_aimed + (1 + i_w) * M + i_m)
                b_s += (b_sum >> 16).to(tl.float32) * tl.load(p_units + i_m)
                b_chosen |= (b_s > 0).to(tl.int32) << i_r
        return b_chosen


@triton.jit
def _num_bits(b_bits):
    """How many bits are set in 32-bit numbers; compilers know this for one instruction."""
    b_bits = b_bits.to(tl.uint32, bitcast=True)
    b_bits -= (b_bits >> 1) & 0x55555555
    b_bits = (b_bits & 0x33333333) + ((b_bits >> 2) & 0x33333333)
    return ((((b_bits + (b_bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _say(p_words, b_word, turn):
    """Tells other programs 32 bits each, together with the turn: in 64, so that nobody hears half of it."""
    tl.atomic_xchg(p_words, (turn.to(tl.int64) << 32) | (b_word.to(tl.int64) & 0xFFFFFFFF), sem="relaxed")


@triton.jit
def _hear(p_words, m_words, turn):
    """What other programs say in this turn, once all have; 0 where masked."""
    b_word = tl.load(p_words, mask=m_words, other=0, volatile=True)
    while tl.max((m_words & ((b_word >> 32).to(tl.int32) != turn)).to(tl.int32)) > 0:
        b_word = tl.load(p_words, mask=m_words, other=0, volatile=True)
    return b_word.to(tl.int32)


@triton.jit
def _kept_before(p_kept, i_s, turn, SP: tl.constexpr):
    """Keys that the splits before ``i_s`` keep: the list is without gaps."""
    o_s = tl.arange(0, SP)
    return tl.sum(_hear(p_kept + o_s, o_s < i_s, turn), 0)


@triton.jit(do_not_specialize=["first_tile", "stride_row"])
def look_up_kernel(
    query, tokens, tiles, tile_count, log_threshold, frame_of_slot,
    centroids, centroid_scales, sizes, log_sizes, starts, log_weights, variances,
    group_centroids, group_scales, group_sizes, frames,
    members, residuals, directions, block_table, always_places,
    logits, row_facts, chosen, picked, found, list_places, list_bits, listed, turns, masses, kept, kept_pairs,
    first_tile, scale, soft_cap,
    stride_query_token, stride_query_head, stride_centroid_head, stride_centroid, stride_size_head, stride_group_head,
    stride_group_size_head, stride_frame_head, stride_member_head, stride_residual_head, stride_direction_head,
    stride_row, stride_always, max_centroids, max_parts, max_keys,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, SP: tl.constexpr, MASSES: tl.constexpr, MP: tl.constexpr, MASS_ROWS: tl.constexpr,
    SCORED: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr, S: tl.constexpr, SOFT_CAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = ROWS * GP
    i_p, i_h, i_t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # what is the same in all layers is loaded while the kernel before still runs
    p_tile = tiles + (first_tile + i_t) * FACTS
    i_slot, num_tokens, i_row = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2).to(tl.int64)
    first_centroid, count = tl.load(p_tile + 3).to(tl.int64), tl.load(p_tile + 4)
    num_always, rule = tl.load(p_tile + 5), tl.load(p_tile + 6)
    b_token = token_of_row(tokens, first_tile + i_t, GP, ROWS)
    threshold = tl.load(log_threshold + tl.maximum(i_slot, 0)) * LOG2_E
    o_d, o_n = tl.arange(0, DP), tl.arange(0, DIRECTIONS)
    i_frame = tl.load(frame_of_slot + tl.maximum(i_slot, 0))
    p_frame = frames + i_h.to(tl.int64) * stride_frame_head + i_frame * 2 * D
    p_directions = directions + i_h.to(tl.int64) * stride_direction_head + i_frame * DIRECTIONS * D
    b_directions = tl.load(p_directions + o_n[None, :] * D + o_d[:, None], mask=(o_d < D)[:, None], other=0.0)
    b_mean = tl.load(p_frame + o_d, mask=o_d < D, other=0.0)
    b_spread = tl.load(p_frame + D + o_d, mask=o_d < D, other=0.0)
    num_tiles = tl.minimum(tl.load(tile_count) - first_tile, tl.num_programs(2))
    if PDL:
        tl.extra.cuda.gdc_wait()
    # without clusters nothing is listed
    if (i_slot < 0) | (count == 0):
        return
    i_th = (i_t * tl.num_programs(1) + i_h).to(tl.int64)
    turn = tl.load(turns + i_th) + 1
    o_m, o_c, o_scored = tl.arange(0, M), tl.arange(0, BLOCK), tl.arange(0, SCORED)
    p_centroids = centroids + i_h.to(tl.int64) * stride_centroid_head + first_centroid * stride_centroid
    p_scales = centroid_scales + i_h.to(tl.int64) * stride_size_head + first_centroid
    p_sizes = sizes + i_h.to(tl.int64) * stride_size_head + first_centroid
    p_masses = masses + i_th * MASSES * MASS_ROWS
    b_q = load_queries(query, b_token, num_tokens, i_h, stride_query_token, stride_query_head, GROUP, GP, ROWS, D, DP)
    b_framed, b_of_mean = in_frame(b_q, b_mean, b_spread, scale)

    if i_p < MASSES:
        num_rows = count
        if rule != PAPER:
            first_group = first_centroid // OF_GROUP
            num_rows = tl.cdiv(count, OF_GROUP)
            p_centroids = group_centroids + i_h.to(tl.int64) * stride_group_head + first_group * stride_centroid
            p_scales = group_scales + i_h.to(tl.int64) * stride_group_size_head + first_group
            p_sizes = group_sizes + i_h.to(tl.int64) * stride_group_size_head + first_group
        begin, end = _range_of(i_p, num_rows, num_tiles, MASSES)
        b_mass = _mass_of_rows(
            b_framed, b_of_mean, p_centroids, p_scales, p_sizes, begin, end, scale, soft_cap, stride_centroid,
            D, SCORED, STAGES, SOFT_CAP,
        )  # fmt: skip
        _say(p_masses + i_p * MASS_ROWS + o_m, b_mass.to(tl.int32, bitcast=True), turn)
        return

    i_s = i_p - MASSES
    begin, end = _range_of(i_s, count, num_tiles, SPLITS)
    if begin >= end:
        return
    p_log_sizes = log_sizes + i_h.to(tl.int64) * stride_size_head + first_centroid
    p_starts = starts + i_h.to(tl.int64) * stride_size_head + first_centroid
    p_weights = log_weights + i_h.to(tl.int64) * stride_size_head + first_centroid
    p_variances = variances + i_h.to(tl.int64) * stride_size_head + first_centroid
    p_chosen = chosen + i_th * max_centroids
    # room for a part of each cluster of the splits before, and for their full parts
    before = begin + (tl.load(p_starts + begin) - tl.load(p_starts)) // PART
    p_picked = picked + 4 * (i_th * max_parts + before)

    m_m = (o_m // GP < num_tokens) & (o_m % GP < GROUP)
    b_square = tl.sum(b_q.to(tl.float32) * b_q.to(tl.float32), 1) * (scale * scale * LOG2_E / 2)
    p_all = row_facts + (i_th * SPLITS + i_s) * ROW_FACTS * M
    p_squares, p_units, p_aimed = p_all + M, p_all + 2 * M, p_all + 3 * M
    b_aimed, b_unit = _aim(b_q, b_directions, scale)
    _store_aimed(p_aimed, p_units, b_aimed, b_unit, o_m)
    tl.store(p_squares + o_m, b_square)
    p_logits = logits + i_th * M * max_centroids
    for i_c in tl.range(begin, end, SCORED, num_stages=STAGES):
        o_row = i_c + o_scored
        m_c = o_row < end
        b_log_size, b_variance = tl.load(p_log_sizes + o_row, mask=m_c), tl.load(p_variances + o_row, mask=m_c)
        b_s = _logits_of_rows(
            b_framed, b_of_mean, p_centroids, p_scales, o_row, end, scale, soft_cap, stride_centroid, D, SOFT_CAP
        )  # fmt: skip
        b_s += tl.minimum(b_square[:, None] * b_variance[None, :], REST_RAISE * LOG2_E) + b_log_size[None, :] * LOG2_E
        tl.store(p_logits + o_m[:, None] * max_centroids + o_row[None, :], b_s, mask=m_m[:, None] & m_c[None, :])

    o_i = tl.arange(0, MP)
    cluster_threshold = threshold - tl.where(rule == KEYS, SHORT * LOG2_E, 0.0)
    # loaded while the sums are under way
    b_size, b_start, b_wanted, b_variance = _facts_of_clusters(
        p_sizes, p_log_sizes, p_starts, p_weights, p_variances, begin + o_c, end, cluster_threshold
    )
    m_i = (o_i < MASSES)[:, None]
    b_word = _hear(p_masses + o_i[:, None] * MASS_ROWS + o_m[None, :], m_i, turn)
    b_masses = tl.where(m_i, b_word.to(tl.float32, bitcast=True), float("-inf"))  # [MP, M]
    b_largest = finite_or_zero(tl.max(b_masses, 0))
    b_total = tl.sum(tl.exp2(b_masses - b_largest[None, :]), 0)
    # if all clusters are empty the sum is 0, and any number will do
    tl.store(p_all + o_m, b_largest + tl.log2(tl.where(b_total > 0, b_total, 1.0)))
    # what other threads stored is read below
    tl.debug_barrier()
    num_picked = 0
    for i_c in range(begin, end, BLOCK):
        o_row = i_c + o_c
        m_c = o_row < end
        if i_c > begin:
            b_size, b_start, b_wanted, b_variance = _facts_of_clusters(
                p_sizes, p_log_sizes, p_starts, p_weights, p_variances, o_row, end, cluster_threshold
            )
        if rule == PAPER:
            b_bits = _choose(
                p_logits, p_all, p_squares, b_wanted, b_variance, o_row, end, num_tokens, max_centroids, GROUP, GP,
                True,
            )  # fmt: skip
        else:
            b_bits = _choose(
                p_logits, p_all, p_squares, b_wanted, b_variance, o_row, end, num_tokens, max_centroids, GROUP, GP,
                False,
            )  # fmt: skip
        tl.store(p_chosen + o_row, b_bits, mask=m_c)
        b_parts = tl.where(b_bits != 0, tl.cdiv(b_size, PART), 0)
        p_part = p_picked + 4 * (num_picked + tl.cumsum(b_parts, 0) - b_parts)
        for i_part in range(0, tl.max(b_parts, 0)):
            m_part = i_part < b_parts
            done = i_part * PART
            tl.store(p_part + 4 * i_part, o_row, mask=m_part)
            tl.store(p_part + 4 * i_part + 1, b_start + done, mask=m_part)
            tl.store(p_part + 4 * i_part + 2, tl.minimum(b_size - done, PART), mask=m_part)
            tl.store(p_part + 4 * i_part + 3, b_bits, mask=m_part)
        num_picked += tl.sum(b_parts, 0)

    # what other threads stored above is read below
    tl.debug_barrier()
    p_residuals = residuals + i_h.to(tl.int64) * stride_residual_head
    # room for all members of the splits before
    p_found = found + 2 * (i_th * max_keys + tl.load(p_starts + begin) - tl.load(p_starts))
    num_kept, num_pairs = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    aimed = _load_aimed(p_aimed, p_units, GP, ROWS)
    num_aimed = tl.where(rule == KEYS, num_picked, 0)
    b_cluster, b_member, b_bits, b_lower, b_upper = _load_keys(
        p_picked, p_residuals, 0, num_picked, num_aimed, PARTS_BLOCK
    )
    for i_p in range(0, num_picked, PARTS_BLOCK):
        # on their way meanwhile
        b_next_cluster, b_next_member, b_next_bits, b_next_lower, b_next_upper = _load_keys(
            p_picked, p_residuals, i_p + PARTS_BLOCK, num_picked, num_aimed, PARTS_BLOCK
        )
        if rule == KEYS:
            b_bits = _choose_keys(
                aimed, p_logits, b_cluster, b_bits, b_lower, b_upper, num_tokens, max_centroids,
                GROUP, GP, ROWS,
            )  # fmt: skip
        b_chosen = b_bits.reshape(PARTS_BLOCK * PART)
        b_kept = (b_chosen != 0).to(tl.int32)
        p_key = p_found + 2 * (num_kept + tl.cumsum(b_kept, 0) - b_kept)
        tl.store(p_key, b_member.reshape(PARTS_BLOCK * PART), mask=b_chosen != 0)
        tl.store(p_key + 1, b_chosen, mask=b_chosen != 0)
        # one sum counts keys, above, and pairs
        total = tl.sum((b_kept << 20) | _num_bits(b_chosen), 0)
        num_kept += total >> 20
        num_pairs += total & 0xFFFFF
        b_cluster, b_member, b_bits = b_next_cluster, b_next_member, b_next_bits
        b_lower, b_upper = b_next_lower, b_next_upper
    tl.store(kept_pairs + i_th * SPLITS + i_s, num_pairs)

    p_kept = kept + i_th * SPLITS
    _say(p_kept + i_s, num_kept, turn)
    p_places, p_bits = list_places + i_th * max_keys, list_bits + i_th * max_keys
    if i_s == 0:
        p_always = always_places + i_slot.to(tl.int64) * stride_always
        for i_n in range(0, num_always, BLOCK):
            m_n = i_n + o_c < num_always
            tl.store(p_places + i_n + o_c, tl.load(p_always + i_n + o_c, mask=m_n), mask=m_n)
            tl.store(p_bits + i_n + o_c, tl.full([BLOCK], -1, tl.int32), mask=m_n)
    p_members = members + i_h.to(tl.int64) * stride_member_head
    p_blocks = block_table + i_row * stride_row
    # what other threads stored above is read below
    tl.debug_barrier()
    first, o_l = -1, tl.arange(0, LIST_BLOCK)
    for i_k in range(0, num_kept, LIST_BLOCK):
        m_k = i_k + o_l < num_kept
        b_found = tl.load(p_found + 2 * (i_k + o_l), mask=m_k, other=0)
        b_found_bits = tl.load(p_found + 2 * (i_k + o_l) + 1, mask=m_k, other=0)
        b_position = tl.load(p_members + b_found, mask=m_k, other=0)
        b_block = tl.load(p_blocks + b_position // S, mask=m_k, other=0)
        if first < 0:
            # while these loads are under way
            first = num_always + _kept_before(p_kept, i_s, turn, SP)
        o_key = first + i_k + o_l
        tl.store(p_places + o_key, b_block * S + b_position % S, mask=m_k)
        tl.store(p_bits + o_key, b_found_bits, mask=m_k)
    if end == count:
        tl.store(listed + i_th, num_always + _kept_before(p_kept, i_s, turn, SP) + num_kept)
        # which all others know by now, as they have said something in it
        tl.store(turns + i_th, turn)
