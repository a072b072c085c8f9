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

from vllm_squeeze.kernels.packing import FEW_ROWS, LEAST, operand_of, packed_products
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
from vllm_squeeze.kernels.tiles import MAX_BLOCK, MAX_TILE_TOKENS, PART_KEYS, PARTS_AT_ONCE, TILE_FACTS

FACTS = tl.constexpr(TILE_FACTS)
TOKENS = tl.constexpr(MAX_TILE_TOKENS)
KEYS, PAPER = tl.constexpr(RULES.index("keys")), tl.constexpr(RULES.index("paper"))
PARTS, PART = tl.constexpr(PARTS_AT_ONCE), tl.constexpr(PART_KEYS)
SHORT = tl.constexpr(MARGIN)
DIRECTIONS = tl.constexpr(NUM_DIRECTIONS)
MOST_AIMED = tl.constexpr(MOST_PRODUCT)
LEAST_UNIT = tl.constexpr(1e-30)
"""Of queries that are zero along all directions."""
MOST_BASE, LEAST_BASE = tl.constexpr(32767.0), tl.constexpr(-32768)
"""More than the products of a query with what tells a key apart sum up to, either way."""
ROW_FACTS = tl.constexpr(NUM_ROW_FACTS)
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)
"""Triton's interpreter knows no instructions of a device."""
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
    p_bases, p_logits, p_masses, p_squares, p_units, b_wanted, b_variance, o_row, end, end_based, num_tokens,
    stride_logits, GROUP: tl.constexpr, GP: tl.constexpr, M: tl.constexpr, OF_MEAN: tl.constexpr,
):  # fmt: skip
    """A bit for each token that chooses cluster ``o_row`` [N].

    Of those before ``end_based``, whose keys are chosen for themselves, notes by how much the log probability of a key at
    the cluster's mean key exceeds the threshold of keys, in units of the query's products with directions: rounded up, as
    a sum of these is whole, and cut off where no such sum makes a difference.
    """
    o_g = tl.arange(0, GP)
    m_s = (o_g < GROUP)[:, None] & (o_row < end)[None, :]
    b_bits = tl.zeros_like(o_row)
    # a token at a time, so that each thread has all query heads of its clusters; of large tiles four are on their way
    AT_ONCE: tl.constexpr = 4 if M > FEW_ROWS else 1
    for i_first in range(0, num_tokens, AT_ONCE):
        b_facts = ()
        for i_r in tl.static_range(AT_ONCE):
            o_m = (i_first + i_r) * GP + o_g
            p_s = p_logits + o_m[:, None] * stride_logits + o_row[None, :]
            b_logits = tl.load(p_s, mask=m_s & (o_m < num_tokens * GP)[:, None], other=float("-inf"))
            b_facts = b_facts + ((b_logits, tl.load(p_masses + o_m), tl.load(p_squares + o_m), tl.load(p_units + o_m)),)
        for i_r in tl.static_range(AT_ONCE):
            o_m = (i_first + i_r) * GP + o_g
            b_logits, b_mass, b_square, b_unit = b_facts[i_r]
            b_s, b_raise = b_logits - b_mass[:, None], b_square[:, None] * b_variance[None, :]
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
                b_base = tl.ceil(b_over * b_unit[:, None])
                b_base = tl.minimum(tl.maximum(b_base, -MOST_BASE), MOST_BASE).to(tl.int16)
                p_base = p_bases + o_row[None, :] * M + o_m[:, None]
                tl.store(p_base, b_base, mask=(b_chosen & (o_row < end_based))[None, :])
            b_bits |= b_chosen.to(tl.int32) << (i_first + i_r)
    return b_bits


@triton.jit
def _aim(b_q, b_directions, scale):
    """Products of queries [M, DP] with directions [DP, DIRECTIONS] in 8 bits.

    Returns:
        [M, DIRECTIONS] int32; and [M], how many of these a logit to the base 2 is.
    """
    b_aimed = tl.dot(b_q, b_directions.to(b_q.dtype), input_precision="ieee")
    b_inverse = 1 / tl.maximum(tl.max(tl.abs(b_aimed), 1) / MOST_AIMED, LEAST_UNIT)
    return tl.floor(b_aimed * b_inverse[:, None] + 0.5).to(tl.int32), b_inverse / (scale * LOG2_E)


@triton.jit
def _store_aimed(p_aimed, b_aimed, o_m):
    """Leaves what ``_aim`` returns for ``_load_aimed``: for each row what a sum of products starts from, as elements are
    stored by how much they exceed LEAST, and words of four, in the order in which bytes of residuals have them."""
    M: tl.constexpr = b_aimed.shape[0]
    o_n = tl.arange(0, DIRECTIONS)
    b_bytes = (b_aimed & 0xFF) << (o_n // 4 % 2 * 8 + o_n % 2 * 16)[None, :]
    b_words = tl.sum(tl.sum(b_bytes.reshape(M, DIRECTIONS // 8, 2, 2, 2), 4), 2).reshape(M, DIRECTIONS // 4)
    tl.store(p_aimed + o_m, tl.sum(b_aimed, 1) * LEAST)
    tl.store(p_aimed + (1 + tl.arange(0, DIRECTIONS // 4))[None, :] * M + o_m[:, None], b_words)


@triton.jit
def _sum_of_products(b_residuals, b_aimed, b_sum):
    """``b_sum`` and the products of four bytes each, of which those of ``b_residuals`` are from 0 to 15; all int32."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [b_residuals, b_aimed, b_sum], tl.int32, True, 1
        )
    else:
        for i_b in tl.static_range(4):
            b_sum += ((b_residuals >> (8 * i_b)) & 15) * ((b_aimed << (24 - 8 * i_b)) >> 24)
        return b_sum


@triton.jit
def _word_of(b_lower, b_upper):
    """Two numbers of 32 bits as one of 64: in one piece, so that nobody reads half of it."""
    return (b_upper.to(tl.int64) << 32) | (b_lower.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _halves_of(b_word):
    """The numbers that ``_word_of`` joined."""
    return b_word.to(tl.int32), (b_word >> 32).to(tl.int32)


@triton.jit
def _num_bits(b_bits):
    """How many bits are set in 32-bit numbers; compilers know this for one instruction."""
    b_bits = b_bits.to(tl.uint32, bitcast=True)
    b_bits -= (b_bits >> 1) & 0x55555555
    b_bits = (b_bits & 0x33333333) + ((b_bits >> 2) & 0x33333333)
    return ((((b_bits + (b_bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _load_parts(p_picked, o_part, num_picked):
    """Parts ``o_part`` of clusters: their clusters, first members, numbers of keys, none from the last on, and bits."""
    p_part = p_picked + 2 * o_part[:, None] + tl.arange(0, 2)[None, :]
    b_first, b_second = tl.split(tl.load(p_part, mask=(o_part < num_picked)[:, None], other=0))
    b_cluster, b_member = _halves_of(b_first)
    b_size, b_bits = _halves_of(b_second)
    return b_cluster, b_member, b_size, b_bits


@triton.jit
def _load_residuals(p_residuals, part, num_aimed):
    """The residuals of the keys of parts, each in two words; nothing where no token chooses keys for themselves."""
    _, b_member, b_size, _ = part
    b_size = tl.where(num_aimed > 0, b_size, 0)
    b_residuals = ()
    for i_k in tl.static_range(PART):
        b_residuals = b_residuals + _halves_of(tl.load(p_residuals + b_member + i_k, mask=i_k < b_size, other=0))
    return b_residuals


@triton.jit
def _load_bases(p_base, b_bits, i_r, GROUP: tl.constexpr, GP: tl.constexpr):
    """What ``_choose`` noted of clusters for the query heads of a token, of those ``b_bits`` that chose them."""
    m_s, b_bases = ((b_bits >> i_r) & 1) != 0, ()
    for i_g in tl.static_range(GROUP):
        b_bases = b_bases + (tl.load(p_base + i_r * GP + i_g, mask=m_s, other=LEAST_BASE).to(tl.int32),)
    return b_bases


@triton.jit
def _load_aimed(p_aimed, i_m, M: tl.constexpr):
    """What the products of row ``i_m`` with directions are, as ``_store_aimed`` left it."""
    b_words = ()
    for i_w in tl.static_range(DIRECTIONS // 4):
        b_words = b_words + (tl.load(p_aimed + (1 + i_w) * M + i_m),)
    return tl.load(p_aimed + i_m), b_words


@triton.jit
def _find_keys(
    p_found, p_picked, p_residuals, p_aimed, p_bases, num_picked, num_aimed,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Notes the keys that tokens of a tile chose, in their order: each lane takes one of PARTS parts at a time.

    Args:
        num_aimed: tokens that choose keys for themselves; none where they take all of clusters.

    Returns:
        How many keys it noted; and these, counted once for each token that chose them.
    """
    M: tl.constexpr = ROWS * GP
    o_part = tl.arange(0, PARTS)
    num_found, b_pairs = tl.zeros([], tl.int32), tl.zeros([PARTS], tl.int32)
    b_part, b_next_part = _load_parts(p_picked, o_part, num_picked), _load_parts(p_picked, o_part + PARTS, num_picked)
    b_residuals = _load_residuals(p_residuals, b_part, num_aimed)
    for i_p in range(0, num_picked, PARTS):
        # on their way meanwhile
        b_next_residuals = _load_residuals(p_residuals, b_next_part, num_aimed)
        b_after_next = _load_parts(p_picked, i_p + o_part + 2 * PARTS, num_picked)
        b_cluster, b_member, b_size, b_bits = b_part
        # all keys, where none is chosen for itself
        b_whole_size, b_aimed_bits = tl.where(num_aimed > 0, 0, b_size), tl.where(num_aimed > 0, b_bits, 0)
        b_chosen = ()
        for i_k in tl.static_range(PART):
            b_chosen = b_chosen + (tl.where(i_k < b_whole_size, b_bits, 0),)
        p_base = p_bases + b_cluster * M
        b_bases = _load_bases(p_base, b_aimed_bits, 0, GROUP, GP)
        for i_r in range(0, num_aimed):
            # on their way meanwhile
            b_next_bases = _load_bases(p_base, b_aimed_bits, tl.minimum(i_r + 1, num_aimed - 1), GROUP, GP)
            aimed = _load_aimed(p_aimed, i_r * GP, M)
            for i_g in tl.static_range(GROUP):
                start, b_words = aimed
                if i_g + 1 < GROUP:
                    # on its way meanwhile
                    aimed = _load_aimed(p_aimed, i_r * GP + i_g + 1, M)
                b_next = ()
                # a thread has all elements of its keys: nothing is moved, as it would be for a product of matrices
                for i_k in tl.static_range(PART):
                    b_sum = b_bases[i_g] + start
                    for i_w in tl.static_range(DIRECTIONS // 4):
                        b_four = (b_residuals[2 * i_k + i_w // 2] >> (i_w % 2 * 4)) & 0x0F0F0F0F
                        b_sum = _sum_of_products(b_four, b_words[i_w], b_sum)
                    m_chosen = (b_sum > 0) & (i_k < b_size)
                    b_next = b_next + (b_chosen[i_k] | (m_chosen.to(tl.int32) << i_r),)
                b_chosen = b_next
            b_bases = b_next_bases
        b_found = tl.zeros([PARTS], tl.int32)
        for i_k in tl.static_range(PART):
            b_found += (b_chosen[i_k] != 0).to(tl.int32)
            b_pairs += _num_bits(b_chosen[i_k])
        b_at = num_found + tl.cumsum(b_found, 0) - b_found
        for i_k in tl.static_range(PART):
            m_found = b_chosen[i_k] != 0
            tl.store(p_found + b_at, _word_of(b_member + i_k, b_chosen[i_k]), mask=m_found)
            b_at += m_found.to(tl.int32)
        num_found += tl.sum(b_found, 0)
        b_part, b_residuals, b_next_part = b_next_part, b_next_residuals, b_after_next
    return num_found, tl.sum(b_pairs, 0)


@triton.jit
def _say(p_words, b_word, turn):
    """Tells other programs 32 bits each, together with the turn."""
    tl.atomic_xchg(p_words, _word_of(b_word, turn), sem="relaxed")


@triton.jit
def _hear(p_words, m_words, turn):
    """What other programs say in this turn, once all have; 0 where masked."""
    b_word = tl.load(p_words, mask=m_words, other=0, volatile=True)
    while tl.max((m_words & (_halves_of(b_word)[1] != turn)).to(tl.int32)) > 0:
        b_word = tl.load(p_words, mask=m_words, other=0, volatile=True)
    return _halves_of(b_word)[0]


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
    logits, row_facts, chosen, bases, picked, found, list_places, list_bits, listed, turns, masses, kept, kept_pairs,
    first_tile, scale, soft_cap,
    stride_query_token, stride_query_head, stride_centroid_head, stride_centroid, stride_size_head, stride_group_head,
    stride_group_size_head, stride_frame_head, stride_member_head, stride_residual_head, stride_direction_head,
    stride_row, stride_always, max_centroids, max_parts, max_keys,
    GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, SP: tl.constexpr, MASSES: tl.constexpr, MP: tl.constexpr, MASS_ROWS: tl.constexpr,
    SCORED: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr, S: tl.constexpr,
    SOFT_CAP: tl.constexpr, PDL: tl.constexpr,
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
    p_picked = picked + 2 * (i_th * max_parts + before)

    m_m = (o_m // GP < num_tokens) & (o_m % GP < GROUP)
    b_square = tl.sum(b_q.to(tl.float32) * b_q.to(tl.float32), 1) * (scale * scale * LOG2_E / 2)
    p_all = row_facts + (i_th * SPLITS + i_s) * ROW_FACTS * M
    p_squares, p_units, p_aimed = p_all + M, p_all + 2 * M, (p_all + 3 * M).to(tl.pointer_type(tl.int32))
    if rule == KEYS:
        b_aimed, b_units = _aim(b_q, b_directions, scale)
        _store_aimed(p_aimed, b_aimed, o_m)
        tl.store(p_units + o_m, b_units)
    tl.store(p_squares + o_m, b_square)
    p_logits = logits + i_th * M * max_centroids
    p_bases = bases + i_th * max_centroids * M
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
    end_based = tl.where(rule == KEYS, end, 0)
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
                p_bases, p_logits, p_all, p_squares, p_units, b_wanted, b_variance, o_row, end, end_based, num_tokens,
                max_centroids, GROUP, GP, M, True,
            )  # fmt: skip
        else:
            b_bits = _choose(
                p_bases, p_logits, p_all, p_squares, p_units, b_wanted, b_variance, o_row, end, end_based, num_tokens,
                max_centroids, GROUP, GP, M, False,
            )  # fmt: skip
        tl.store(p_chosen + o_row, b_bits, mask=m_c)
        b_parts = tl.where(b_bits != 0, tl.cdiv(b_size, PART), 0)
        p_part = p_picked + 2 * (num_picked + tl.cumsum(b_parts, 0) - b_parts)[:, None] + tl.arange(0, 2)[None, :]
        for i_part in range(0, tl.max(b_parts, 0)):
            m_part = i_part < b_parts
            done = i_part * PART
            b_part = tl.join(_word_of(o_row, b_start + done), _word_of(tl.minimum(b_size - done, PART), b_bits))
            tl.store(p_part + 2 * i_part, b_part, mask=m_part[:, None])
        num_picked += tl.sum(b_parts, 0)

    # what other threads stored above is read below
    tl.debug_barrier()
    p_residuals = residuals.to(tl.pointer_type(tl.int64)) + i_h.to(tl.int64) * (
        stride_residual_head // (DIRECTIONS // 8)
    )
    # room for all members of the splits before
    p_found = found + i_th * max_keys + tl.load(p_starts + begin) - tl.load(p_starts)
    num_aimed = tl.where(rule == KEYS, num_tokens, 0)
    num_kept, num_pairs = _find_keys(
        p_found, p_picked, p_residuals, p_aimed, p_bases, num_picked, num_aimed, GROUP, GP, ROWS
    )  # fmt: skip
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
    first = -1
    for i_k in range(0, num_kept, LISTED * BLOCK):
        # Loads keep their order, so those that wait for none come first.
        b_found, b_position, b_block = (), (), ()
        for i_l in tl.static_range(LISTED):
            m_k = i_k + i_l * BLOCK + o_c < num_kept
            b_found = b_found + (_halves_of(tl.load(p_found + i_k + i_l * BLOCK + o_c, mask=m_k, other=0)),)
        for i_l in tl.static_range(LISTED):
            m_k = i_k + i_l * BLOCK + o_c < num_kept
            b_position = b_position + (tl.load(p_members + b_found[i_l][0], mask=m_k, other=0),)
        for i_l in tl.static_range(LISTED):
            m_k = i_k + i_l * BLOCK + o_c < num_kept
            b_block = b_block + (tl.load(p_blocks + b_position[i_l] // S, mask=m_k, other=0),)
        if first < 0:
            # while these loads are under way
            first = num_always + _kept_before(p_kept, i_s, turn, SP)
        for i_l in tl.static_range(LISTED):
            o_key = first + i_k + i_l * BLOCK + o_c
            m_k = i_k + i_l * BLOCK + o_c < num_kept
            tl.store(p_places + o_key, b_block[i_l] * S + b_position[i_l] % S, mask=m_k)
            tl.store(p_bits + o_key, b_found[i_l][1], mask=m_k)
    if end == count:
        tl.store(listed + i_th, num_always + _kept_before(p_kept, i_s, turn, SP) + num_kept)
        # which all others know by now, as they have said something in it
        tl.store(turns + i_th, turn)
