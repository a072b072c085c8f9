"""Squeezed attention in Triton. The formulas are those of ``reference``.

    score    grid (W, H, splits)  scores of one share of the prefix's clusters, and their log-sum-exp
    choose   grid (W, H, splits)  which clusters of that share are chosen, and attention over the rest of them
    attend   grid (W, H, splits)  exact attention over one share of the kept keys, joined to the above
    merge    grid (W, H * G)      the splits and the suffix, into the output

The kept keys form a list: the first tokens, then the members of the chosen clusters in the clusters' order. It is
shared out evenly, whichever clusters it comes from, and is never written down: ``choose`` stores how many kept keys
come before each cluster, and ``attend`` finds the cluster of the n-th key by binary search.

W counts work items, S the page size; GP and DP are G and D padded to what ``tl.dot`` takes. Reductions have a fixed
order, so equal inputs give equal bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_squeeze.kernels.tables import ClusterTable, Prefixes
from vllm_squeeze.kernels.workspace import Workspace

PADDED_GROUP = tl.constexpr(16)


@dataclass(frozen=True)
class Tiles:
    """Rows per tile and warps per program.

    Attributes:
        clusters: clusters scored or chosen at once.
        cluster_warps: warps of the programs that do so.
        keys: kept keys attended to at once. At least one for each thread: Triton repeats the search for a smaller
            tile in every thread that loads a part of a key.
        key_warps: warps of the programs that do so.
    """

    clusters: int
    cluster_warps: int
    keys: int
    key_warps: int


def choose_tiles(head_size: int, element_size: int) -> Tiles:
    """Tiles for D = ``head_size`` and ``element_size`` bytes: as many clusters as 16 KiB hold, 16 to 64."""
    clusters = 16384 // (triton.next_power_of_2(head_size) * element_size)
    return Tiles(clusters=min(max(clusters, 16), 64), cluster_warps=4, keys=32, key_warps=1)


@triton.jit
def _share(total, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The length of one split's share of ``total`` rows, in whole tiles."""
    return tl.cdiv(tl.cdiv(total, BLOCK), SPLITS) * BLOCK


@triton.jit
def _finite_or_zero(b_max):
    """What to subtract from logits whose maximum is ``b_max``: minus infinity less itself would be NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def _log_of_size(b_size):
    """log N_i [N], minus infinity for empty clusters."""
    return tl.where(b_size > 0, tl.log(tl.maximum(b_size, 1).to(tl.float32)), float("-inf"))


@triton.jit
def _accumulate(b_logits, b_v, b_max, b_sum, b_o):
    """Online softmax: takes logits [GP, N], minus infinity where masked, and values [N, DP] into the running state."""
    b_next = tl.maximum(b_max, tl.max(b_logits, 1))
    b_shift = _finite_or_zero(b_next)
    b_p = tl.exp(b_logits - b_shift[:, None])
    b_decay = tl.exp(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_o = b_o * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_next, b_sum, b_o


@triton.jit
def _store_partial(
    partial_output, partial_lse, i_part, b_max, b_sum, b_o, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Stores a split's output and log-sum-exp. An empty split has no output to store, only a log-sum-exp."""
    o_g, o_d = tl.arange(0, PADDED_GROUP), tl.arange(0, DP)
    m_g = o_g < GROUP
    o_row = i_part * GROUP + o_g
    b_some = b_sum > 0
    b_sum = tl.where(b_some, b_sum, 1.0)
    b_lse = tl.where(b_some, b_max + tl.log(b_sum), float("-inf"))
    tl.store(partial_lse + o_row, b_lse, mask=m_g)
    m_o = (m_g & b_some)[:, None] & (o_d < D)[None, :]
    tl.store(partial_output + o_row[:, None] * D + o_d[None, :], b_o / b_sum[:, None], mask=m_o)


@triton.jit(do_not_specialize=["work"])
def _score_kernel(
    query, centroids, sizes, work, slots,
    scores, masses,
    scale, stride_query_token, stride_query_head, stride_centroid_head, stride_centroid, stride_size_head,
    max_centroids,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_w, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_slot = tl.load(work + i_w * 3 + 2)
    if i_slot < 0:
        return
    i_token = tl.load(work + i_w * 3).to(tl.int64)
    first = tl.load(slots + i_slot * 3).to(tl.int64)
    count = tl.load(slots + i_slot * 3 + 1)
    i_wh = (i_w * tl.num_programs(1) + i_h).to(tl.int64)

    o_g, o_c, o_d = tl.arange(0, PADDED_GROUP), tl.arange(0, BLOCK), tl.arange(0, DP)
    m_g, m_d = o_g < GROUP, o_d < D
    p_q = query + i_token * stride_query_token + (i_h * GROUP + o_g[:, None]) * stride_query_head + o_d[None, :]
    b_q = tl.load(p_q, mask=m_g[:, None] & m_d[None, :], other=0.0)  # [GP, DP]
    p_centroids = centroids + i_h.to(tl.int64) * stride_centroid_head + first * stride_centroid
    p_sizes = sizes + i_h.to(tl.int64) * stride_size_head + first
    p_scores = scores + (i_wh * GROUP + o_g[:, None]) * max_centroids

    b_max = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    b_sum = tl.zeros([PADDED_GROUP], tl.float32)
    share = _share(count, SPLITS, BLOCK)
    begin = i_s * share
    end = tl.minimum(begin + share, count)
    for i_c in range(begin, end, BLOCK):
        o_row = i_c + o_c
        m_c = o_row < end
        p_c = p_centroids + o_row[:, None].to(tl.int64) * stride_centroid + o_d[None, :]
        b_c = tl.load(p_c, mask=m_c[:, None] & m_d[None, :], other=0.0)  # [BLOCK, DP]
        b_size = tl.load(p_sizes + o_row, mask=m_c, other=0)
        b_s = tl.dot(b_q, tl.trans(b_c), input_precision="ieee") * scale  # [GP, BLOCK]
        tl.store(p_scores + o_row[None, :], b_s, mask=m_g[:, None] & m_c[None, :])

        b_logits = b_s + _log_of_size(b_size)[None, :]
        b_next = tl.maximum(b_max, tl.max(b_logits, 1))
        b_shift = _finite_or_zero(b_next)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_logits - b_shift[:, None]), 1)
        b_max = b_next
    b_mass = tl.where(b_sum > 0, b_max + tl.log(tl.where(b_sum > 0, b_sum, 1.0)), float("-inf"))
    tl.store(masses + (i_wh * SPLITS + i_s) * GROUP + o_g, b_mass, mask=m_g)


@triton.jit(do_not_specialize=["work"])
def _choose_kernel(
    value_centroids, sizes, work, slots, log_threshold,
    scores, masses, offsets, kept, partial_output, partial_lse,
    stride_centroid_head, stride_centroid, stride_size_head, max_centroids,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    i_w, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_slot = tl.load(work + i_w * 3 + 2)
    if i_slot < 0:
        return
    first = tl.load(slots + i_slot * 3).to(tl.int64)
    count = tl.load(slots + i_slot * 3 + 1)
    threshold = tl.load(log_threshold + i_slot)
    i_wh = (i_w * tl.num_programs(1) + i_h).to(tl.int64)
    i_part = i_wh * SPLITS + i_s

    o_g, o_c, o_d, o_s = tl.arange(0, PADDED_GROUP), tl.arange(0, BLOCK), tl.arange(0, DP), tl.arange(0, SPLITS)
    m_g, m_d = o_g < GROUP, o_d < D
    p_masses = masses + (i_wh * SPLITS + o_s[:, None]) * GROUP + o_g[None, :]
    b_masses = tl.load(p_masses, mask=m_g[None, :], other=0.0)  # [SPLITS, GP]
    b_shift = _finite_or_zero(tl.max(b_masses, 0))
    b_sum = tl.sum(tl.exp(b_masses - b_shift[None, :]), 0)
    # if all clusters are empty the sum is 0, and any number will do
    b_mass = b_shift + tl.log(tl.where(b_sum > 0, b_sum, 1.0))  # [GP]

    p_values = value_centroids + i_h.to(tl.int64) * stride_centroid_head + first * stride_centroid
    p_sizes = sizes + i_h.to(tl.int64) * stride_size_head + first
    p_scores = scores + (i_wh * GROUP + o_g[:, None]) * max_centroids
    p_offsets = offsets + i_wh * max_centroids

    b_max = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    b_sum = tl.zeros([PADDED_GROUP], tl.float32)
    b_o = tl.zeros([PADDED_GROUP, DP], tl.float32)
    num_kept = 0
    share = _share(count, SPLITS, BLOCK)
    begin = i_s * share
    end = tl.minimum(begin + share, count)
    for i_c in range(begin, end, BLOCK):
        o_row = i_c + o_c
        m_c = o_row < end
        m_s = m_g[:, None] & m_c[None, :]
        b_s = tl.load(p_scores + o_row[None, :], mask=m_s, other=0.0)  # [GP, BLOCK]
        b_size = tl.load(p_sizes + o_row, mask=m_c, other=0)
        b_log_p = tl.max(tl.where(m_s, b_s - b_mass[:, None], float("-inf")), 0)
        # an empty cluster adds nothing on either side
        b_chosen = b_log_p > threshold
        b_kept = tl.where(b_chosen, b_size, 0)
        tl.store(p_offsets + o_row, num_kept + tl.cumsum(b_kept, 0) - b_kept, mask=m_c)
        num_kept += tl.sum(b_kept, 0)
        if REST:
            p_v = p_values + o_row[:, None].to(tl.int64) * stride_centroid + o_d[None, :]
            b_v = tl.load(p_v, mask=m_c[:, None] & m_d[None, :], other=0.0)  # [BLOCK, DP]
            b_rest = tl.where(b_chosen, float("-inf"), _log_of_size(b_size))
            b_max, b_sum, b_o = _accumulate(b_s + b_rest[None, :], b_v, b_max, b_sum, b_o)
    tl.store(kept + i_part, num_kept)
    if REST:
        _store_partial(partial_output, partial_lse, i_part, b_max, b_sum, b_o, GROUP, D, DP)


@triton.jit
def _locate(
    o_n, end, num_sinks, count, share, b_before, p_offsets, p_starts, p_members, p_blocks,
    stride_block, stride_token,
    SEARCH_STEPS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Where in the KV cache the keys ``o_n`` [N] of the list lie, in elements; 0 from ``end`` on."""
    m_n = o_n < end
    o_kept = o_n - num_sinks
    m_kept = m_n & (o_kept >= 0)
    # the split of `choose` that kept the key, then the last of its clusters that begins at or before the key
    b_reached = b_before[None, :] <= o_kept[:, None]  # [N, SPLITS]
    b_low = tl.maximum(tl.sum(b_reached.to(tl.int32), 1) - 1, 0) * share
    o_kept -= tl.max(tl.where(b_reached, b_before[None, :], 0), 1)
    b_high = tl.minimum(b_low + share, count)
    for _ in tl.static_range(SEARCH_STEPS):
        b_middle = (b_low + b_high) // 2
        b_reached = tl.load(p_offsets + b_middle, mask=m_kept, other=0) <= o_kept
        b_low = tl.where(b_reached, b_middle, b_low)
        b_high = tl.where(b_reached, b_high, b_middle)
    o_member = tl.load(p_starts + b_low, mask=m_kept, other=0) + o_kept
    o_member -= tl.load(p_offsets + b_low, mask=m_kept, other=0)
    o_position = tl.load(p_members + o_member, mask=m_kept, other=0)
    o_position = tl.where(m_kept, o_position, o_n)
    b_block = tl.load(p_blocks + o_position // S, mask=m_n, other=0).to(tl.int64)
    return tl.where(m_n, b_block * stride_block + (o_position % S) * stride_token, 0)


@triton.jit(do_not_specialize=["work"])
def _attend_kernel(
    query, key_cache, value_cache, block_table, starts, members, work, slots, counters,
    offsets, kept, partial_output, partial_lse,
    scale, stride_query_token, stride_query_head, stride_block, stride_token, stride_head, stride_row,
    stride_size_head, stride_member_head, max_centroids,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    CLUSTER_BLOCK: tl.constexpr, SEARCH_STEPS: tl.constexpr, S: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    i_w, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_slot = tl.load(work + i_w * 3 + 2)
    if i_slot < 0:
        return
    i_token = tl.load(work + i_w * 3).to(tl.int64)
    i_row = tl.load(work + i_w * 3 + 1).to(tl.int64)
    first = tl.load(slots + i_slot * 3).to(tl.int64)
    count = tl.load(slots + i_slot * 3 + 1)
    num_sinks = tl.load(slots + i_slot * 3 + 2)
    i_wh = (i_w * tl.num_programs(1) + i_h).to(tl.int64)
    i_part = i_wh * SPLITS + i_s

    o_g, o_n, o_d, o_s = tl.arange(0, PADDED_GROUP), tl.arange(0, BLOCK), tl.arange(0, DP), tl.arange(0, SPLITS)
    m_g, m_d = o_g < GROUP, o_d < D
    b_kept = tl.load(kept + i_wh * SPLITS + o_s)
    b_before = tl.cumsum(b_kept, 0) - b_kept
    num_kept = tl.sum(b_kept, 0)
    if i_s == 0:
        tl.atomic_add(counters + i_slot * 2, tl.full([], 1, tl.int64), sem="relaxed")
        tl.atomic_add(counters + i_slot * 2 + 1, num_kept.to(tl.int64), sem="relaxed")

    share = _share(num_sinks + num_kept, SPLITS, BLOCK)
    begin = i_s * share
    end = tl.minimum(begin + share, num_sinks + num_kept)
    if REST:
        # the rest's partial is there already
        if begin >= end:
            return
    p_q = query + i_token * stride_query_token + (i_h * GROUP + o_g[:, None]) * stride_query_head + o_d[None, :]
    b_q = tl.load(p_q, mask=m_g[:, None] & m_d[None, :], other=0.0)  # [GP, DP]
    b_max = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    b_sum = tl.zeros([PADDED_GROUP], tl.float32)
    b_o = tl.zeros([PADDED_GROUP, DP], tl.float32)
    if REST:
        o_part = i_part * GROUP + o_g
        b_max = tl.load(partial_lse + o_part, mask=m_g, other=float("-inf"))
        m_some = b_max > float("-inf")
        b_sum = tl.where(m_some, 1.0, 0.0)
        p_o = partial_output + o_part[:, None] * D + o_d[None, :]
        b_o = tl.load(p_o, mask=m_some[:, None] & m_d[None, :], other=0.0)

    p_keys = key_cache + i_h.to(tl.int64) * stride_head + o_d[None, :]
    p_values = value_cache + i_h.to(tl.int64) * stride_head + o_d[None, :]
    p_offsets = offsets + i_wh * max_centroids
    p_starts = starts + i_h.to(tl.int64) * stride_size_head + first
    p_members = members + i_h.to(tl.int64) * stride_member_head
    p_blocks = block_table + i_row * stride_row
    cluster_share = _share(count, SPLITS, CLUSTER_BLOCK)
    b_place = _locate(
        begin + o_n, end, num_sinks, count, cluster_share, b_before, p_offsets, p_starts, p_members, p_blocks,
        stride_block, stride_token, SEARCH_STEPS, S,
    )  # fmt: skip
    for i_n in range(begin, end, BLOCK):
        m_n = i_n + o_n < end
        m_kv = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_keys + b_place[:, None], mask=m_kv, other=0.0)  # [BLOCK, DP]
        b_v = tl.load(p_values + b_place[:, None], mask=m_kv, other=0.0)  # [BLOCK, DP]
        # here, so that the search for the next tile's keys goes on while this tile's keys arrive
        b_place = _locate(
            i_n + BLOCK + o_n, end, num_sinks, count, cluster_share, b_before, p_offsets, p_starts, p_members,
            p_blocks, stride_block, stride_token, SEARCH_STEPS, S,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [GP, BLOCK]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_max, b_sum, b_o = _accumulate(b_s, b_v, b_max, b_sum, b_o)
    _store_partial(partial_output, partial_lse, i_part, b_max, b_sum, b_o, GROUP, D, DP)


@triton.jit(do_not_specialize=["work", "suffix_lse", "stride_lse_head", "stride_lse_token"])
def _merge_kernel(
    output, suffix_lse, work,
    partial_output, partial_lse,
    stride_output_token, stride_output_head, stride_lse_head, stride_lse_token,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    i_w, i_head = tl.program_id(0), tl.program_id(1)
    if tl.load(work + i_w * 3 + 2) < 0:
        return
    i_token = tl.load(work + i_w * 3).to(tl.int64)
    i_wh = (i_w * (tl.num_programs(1) // GROUP) + i_head // GROUP).to(tl.int64)

    o_s, o_d = tl.arange(0, SPLITS), tl.arange(0, DP)
    m_d = o_d < D
    o_part = (i_wh * SPLITS + o_s) * GROUP + i_head % GROUP
    b_lse = tl.load(partial_lse + o_part)  # [SPLITS]
    suffix = tl.load(suffix_lse + i_head.to(tl.int64) * stride_lse_head + i_token * stride_lse_token)
    largest = tl.maximum(tl.max(b_lse, 0), suffix)
    b_weight = tl.exp(b_lse - largest)
    suffix_weight = tl.exp(suffix - largest)

    # an empty split's output was never written
    m_o = (b_lse > float("-inf"))[:, None] & m_d[None, :]
    b_o = tl.load(partial_output + o_part[:, None] * D + o_d[None, :], mask=m_o, other=0.0)  # [SPLITS, DP]
    p_suffix = output + i_token * stride_output_token + i_head * stride_output_head + o_d
    b_suffix = tl.load(p_suffix, mask=m_d, other=0.0).to(tl.float32)
    b_merged = tl.sum(b_o * b_weight[:, None], 0) + b_suffix * suffix_weight
    b_merged /= tl.sum(b_weight, 0) + suffix_weight
    tl.store(p_suffix, b_merged.to(output.dtype.element_ty), mask=m_d)


def squeezed_attention(
    query: torch.Tensor,
    output: torch.Tensor,
    suffix_lse: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: torch.Tensor,
    table: ClusterTable,
    prefixes: Prefixes,
    scale: float,
    rest: bool,
    workspace: Workspace,
) -> None:
    """Joins attention over indexed prefixes to the dense attention over what follows them, in place.

    Neither allocates nor waits for the device, so a CUDA graph may capture it and replay it over new contents.

    Args:
        query: [N, H * G, D].
        output: [N, H * G, D], attention over the suffix; merged for the tokens in ``work``, untouched for others.
        suffix_lse: [H * G, N] float32, natural log-sum-exp of the attention over the suffix.
        key_cache: [num_blocks, S, H, D], a view of the paged cache.
        value_cache: the same, with the same strides.
        block_table: [B, max_blocks] int32.
        work: [W, 3] int32: token, row of the block table, slot of the prefix. A slot of -1 marks padding.
        table: the clusters of all prefixes, in the dtype of ``query``.
        prefixes: none with more clusters than the workspace's ``max_centroids``.
        scale: softmax scale.
        rest: whether clusters that were not chosen contribute through their mean value.
        workspace: of the same H, G and D.
    """
    num_kv_heads, _, head_size = table.centroids.shape
    group = query.shape[1] // num_kv_heads
    page_size = key_cache.shape[1]
    assert workspace.scores.shape[1:3] == (num_kv_heads, group) and workspace.partial_output.shape[2] == head_size
    assert query.shape == output.shape and query.shape[1:] == (num_kv_heads * group, head_size)
    assert group <= PADDED_GROUP.value and page_size & (page_size - 1) == 0
    assert key_cache.dtype == value_cache.dtype == table.centroids.dtype == table.value_centroids.dtype == query.dtype
    assert key_cache.stride() == value_cache.stride() and table.starts.stride() == table.sizes.stride()
    assert table.centroids.stride() == table.value_centroids.stride()
    assert all(tensor.is_contiguous() for tensor in (work, prefixes.slots, prefixes.log_threshold, prefixes.counters))
    rows = (query, output, key_cache, block_table, table.centroids, table.sizes, table.members)
    assert all(tensor.stride(-1) == 1 for tensor in rows)

    tiles = choose_tiles(head_size, query.element_size())
    max_centroids = workspace.max_centroids
    for begin in range(0, len(work), workspace.max_work):
        chunk = work[begin : begin + workspace.max_work]
        splits = workspace.num_splits(len(chunk))
        grid = (len(chunk), num_kv_heads, splits)
        sizes = dict(GROUP=group, D=head_size, DP=max(16, triton.next_power_of_2(head_size)), SPLITS=splits)
        _score_kernel[grid](
            query, table.centroids, table.sizes, chunk, prefixes.slots,
            workspace.scores, workspace.masses,
            scale, *query.stride()[:2], *table.centroids.stride()[:2], table.sizes.stride(0), max_centroids,
            BLOCK=tiles.clusters, num_warps=tiles.cluster_warps, **sizes,
        )  # fmt: skip
        _choose_kernel[grid](
            table.value_centroids, table.sizes, chunk, prefixes.slots, prefixes.log_threshold,
            workspace.scores, workspace.masses, workspace.offsets, workspace.kept,
            workspace.partial_output, workspace.partial_lse,
            *table.centroids.stride()[:2], table.sizes.stride(0), max_centroids,
            BLOCK=tiles.clusters, REST=rest, num_warps=tiles.cluster_warps, **sizes,
        )  # fmt: skip
        longest_share = triton.cdiv(triton.cdiv(max_centroids, tiles.clusters), splits) * tiles.clusters
        _attend_kernel[grid](
            query, key_cache, value_cache, block_table, table.starts, table.members, chunk, prefixes.slots,
            prefixes.counters,
            workspace.offsets, workspace.kept, workspace.partial_output, workspace.partial_lse,
            scale, *query.stride()[:2], *key_cache.stride()[:3], block_table.stride(0),
            table.sizes.stride(0), table.members.stride(0), max_centroids,
            BLOCK=tiles.keys, CLUSTER_BLOCK=tiles.clusters, SEARCH_STEPS=(longest_share - 1).bit_length(),
            S=page_size, REST=rest, num_warps=tiles.key_warps, **sizes,
        )  # fmt: skip
        _merge_kernel[(len(chunk), num_kv_heads * group)](
            output, suffix_lse, chunk,
            workspace.partial_output, workspace.partial_lse,
            *output.stride()[:2], suffix_lse.stride(0), suffix_lse.stride(1),
            num_warps=tiles.cluster_warps, **sizes,
        )  # fmt: skip
