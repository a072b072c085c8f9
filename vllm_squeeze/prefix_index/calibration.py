"""Finds the threshold on weighted predicted attention probabilities: one for all layers and heads of a prefix.

The queries that answers to questions on the prefix came from score the clusters. A histogram counts the clustered keys
by the joined log p of their cluster, with its raise and its log weight (``log_ranks`` in
``kernels/reference.py``). Its counts are integers: histograms of layers, heads and tensor-parallel ranks add up
exactly, in any order. Each layer is moved to one level, which its weights take up. The curve read off the sum gives a
threshold for each share of clustered keys to keep. A second histogram, over the same bins, weighs keys by the attention
that other queries paid to them: it says how much of it a threshold keeps.
"""

import math

import numpy as np
import torch

from vllm_squeeze.kernels.reference import capped, log_ranks, scores_of
from vllm_squeeze.kernels.tables import group_means, unpacked_keys

NUM_BINS = 4096
LOWEST, HIGHEST = -34.0, 14.0
BIN_WIDTH = (HIGHEST - LOWEST) / NUM_BINS
LEVEL, LEVEL_SHARE = -12.0, 0.1
"""Every layer's weights are such that this threshold keeps this share of its clustered keys."""
LEAST_SHARE = 0.002
# log-spaced in the odds, which is log-spaced in the share where it is small, and close to 1 log-spaced in what is left
SHARES = np.append(1.0, 1 / (1 + np.geomspace(0.01, 1 / LEAST_SHARE - 1, 63)))

Curve = tuple[tuple[float, float], ...]
"""Pairs of the share of clustered keys kept, decreasing from 1, and the log threshold that keeps it."""


def score_histogram(
    query: torch.Tensor,
    centroids: torch.Tensor,
    frame: torch.Tensor,
    log_weights: torch.Tensor,
    variances: torch.Tensor,
    sizes: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    join: str = "max",
    memory_bytes: int = 1 << 28,
) -> torch.Tensor:
    """Counts clustered keys by the raised and weighted log p of their cluster, joined over a KV head's query heads.

    Args:
        query: [B, W, G, D], the queries of W tokens, after the rotary embedding. Row b belongs to one KV head of
            one layer.
        centroids: [B, C, D].
        frame: [B, 2, D], as in ``ClusterTable``.
        log_weights, variances: [B, C].
        sizes: [B, C], keys of each cluster.
        scale: softmax scale.
        soft_cap: bound on the logits; 0 for none.
        join: one of JOINS.
        memory_bytes: bound on temporary memory, as far as one row fits into it.

    Returns:
        [NUM_BINS] int64 on the device of the query. Bins divide [LOWEST, HIGHEST] equally; what is lower counts in
        the first, what is higher in the last. The counts sum up to W times the clustered keys of all rows.
    """
    num_rows, num_queries, group, _ = query.shape
    num_centroids = sizes.shape[1]
    groups = _groups(centroids, sizes, frame)
    histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=query.device)
    bytes_per_row = num_queries * num_centroids * (16 * group + 32)
    for rows in torch.arange(num_rows, device=query.device).split(max(memory_bytes // max(bytes_per_row, 1), 1)):
        weights = sizes[rows].long()[:, None].expand(-1, num_queries, -1)
        clusters = tuple(of_rows[rows] for of_rows in (centroids, log_weights, variances, sizes, *groups))
        bins = _bins(query[rows], clusters, scale, soft_cap, join)
        histogram.scatter_add_(0, bins.flatten(), weights.flatten())
    return histogram


def _groups(centroids: torch.Tensor, sizes: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean keys of groups of clusters, as the server will read them, and their sizes: [B, G, D] and [B, G]."""
    *vectors, group_sizes = group_means(centroids.float(), sizes, frame)
    return unpacked_keys(*vectors, frame), group_sizes


def _bins(
    query: torch.Tensor, clusters: tuple[torch.Tensor, ...], scale: float, soft_cap: float, join: str
) -> torch.Tensor:
    """The bin of each cluster for each query token, [B, W, C].

    Args:
        query, scale, soft_cap, join: as in ``score_histogram``.
        clusters: their centroids, and what ``log_ranks`` takes of them and of their groups.
    """
    centroids, *of_clusters, groups, group_sizes = clusters
    query = query.transpose(0, 1).float()  # [W, B, G, D]
    scores, group_scores = (scores_of(query, keys.float(), scale, soft_cap) for keys in (centroids, groups))
    ranks = log_ranks(query, scores, *of_clusters, group_scores, group_sizes, scale, join)  # [W, B, C]
    return ((ranks.transpose(0, 1) - LOWEST) / BIN_WIDTH).clamp(0, NUM_BINS - 1).long()


def attention_histogram(
    query: torch.Tensor,
    keys: torch.Tensor,
    centroids: torch.Tensor,
    frame: torch.Tensor,
    log_weights: torch.Tensor,
    variances: torch.Tensor,
    sizes: torch.Tensor,
    members: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    join: str = "max",
    memory_bytes: int = 1 << 29,
) -> torch.Tensor:
    """The attention probability of clustered keys, over a prefix alone, by the weighted log p of their cluster.

    Args:
        query: [B, W, G, D], of tokens that ask about the prefix.
        keys: [B, T, D], all of the prefix.
        centroids, frame, log_weights, variances, sizes, scale, soft_cap, join: as in ``score_histogram``.
        members: [B, M], positions of clustered keys, ordered by cluster.
        memory_bytes: bound on temporary memory, as far as one query token fits into it.

    Returns:
        [B, NUM_BINS] float32, mean over tokens and query heads, in the bins of ``score_histogram``. What is missing to
        a sum of 1 fell on keys that are always attended to.
    """
    num_rows, num_queries, group, _ = query.shape
    num_centroids = sizes.shape[1]
    groups = _groups(centroids, sizes, frame)
    histogram = torch.zeros(num_rows, NUM_BINS, dtype=torch.float32, device=query.device)
    bytes_per_token = 4 * ((2 * group + 2) * keys.shape[1] + (4 * group + 8) * num_centroids)
    for row in range(num_rows):
        clusters = tuple(of_rows[row : row + 1] for of_rows in (centroids, log_weights, variances, sizes, *groups))
        # what is always attended to counts as one more cluster
        cluster_of = members.new_full((keys.shape[1],), num_centroids)
        numbers = torch.arange(num_centroids, device=query.device, dtype=members.dtype)
        cluster_of[members[row].long()] = numbers.repeat_interleave(sizes[row].long())
        for some in query[row].float().split(max(memory_bytes // bytes_per_token, 1)):
            logits = capped(torch.einsum("wgd,td->wgt", some * scale, keys[row].float()), soft_cap)
            of_keys = logits.softmax(-1).sum(1)
            of_clusters = of_keys.new_zeros(len(some), num_centroids + 1).index_add_(1, cluster_of, of_keys)
            bins = _bins(some[None], clusters, scale, soft_cap, join)
            histogram[row].scatter_add_(0, bins.flatten(), of_clusters[:, :-1].flatten())
    return histogram / (num_queries * group)


def level(histogram: torch.Tensor) -> int:
    """The bins to move the histogram [NUM_BINS] of a layer by, so that LEVEL keeps LEVEL_SHARE of its keys.

    Else what is left over by layers whose probabilities are even would go to those where they are not, though such a
    layer may need its keys as much.
    """
    return round((LEVEL - log_threshold(threshold_curve(histogram), LEVEL_SHARE)) / BIN_WIDTH)


def moved(histogram: torch.Tensor, bins: int) -> torch.Tensor:
    """A histogram [..., NUM_BINS] where all log p are so many bins higher; what leaves it counts in its last bin."""
    places = (torch.arange(NUM_BINS, device=histogram.device) + bins).clamp(0, NUM_BINS - 1)
    return torch.zeros_like(histogram).index_add_(-1, places, histogram)


def recall(histogram: torch.Tensor, log_threshold: float) -> torch.Tensor:
    """The attention probability that falls on keys which a threshold keeps, or which are always attended to.

    Args:
        histogram: [..., NUM_BINS], from ``attention_histogram``.
        log_threshold: of the choice.

    Returns:
        [...] from 0 to 1.
    """
    place = min(max((log_threshold - LOWEST) / BIN_WIDTH, 0.0), float(NUM_BINS))
    whole = math.floor(place)
    lost = histogram[..., :whole].sum(-1)
    if whole < NUM_BINS:
        lost = lost + (place - whole) * histogram[..., whole]
    return (1 - lost).clamp(0, 1)


def threshold_curve(histogram: torch.Tensor) -> Curve:
    """Reads thresholds off a histogram [NUM_BINS] that counts at least one key.

    Returns:
        Pairs for SHARES, from 1 to LEAST_SHARE. The log thresholds are finite and do not decrease.
    """
    counts = histogram.cpu().numpy()
    occupied = counts.nonzero()[0]
    assert len(occupied), "the histogram is empty"
    counts = counts[occupied[0] : occupied[-1] + 1]
    edges = LOWEST + np.arange(occupied[0], occupied[-1] + 2) * BIN_WIDTH
    kept = np.append(counts[::-1].cumsum()[::-1], 0) / counts.sum()  # above each edge
    return tuple(zip(SHARES.tolist(), np.interp(SHARES, kept[::-1], edges[::-1]).tolist(), strict=True))


def log_threshold(curve: Curve, share: float) -> float:
    """The log threshold that keeps a share of the clustered keys, linear in the log of the share between points.

    Args:
        curve: from ``threshold_curve``.
        share: from 1 on everything is kept, up to 0 nothing; a positive share below the last point's counts as
            that.

    Returns:
        A log threshold; minus infinity keeps all clusters, infinity none.
    """
    if share >= 1:
        return -math.inf
    if share <= 0:
        return math.inf
    shares, thresholds = np.array(curve)[::-1].T
    return float(np.interp(math.log(share), np.log(shares), thresholds))
