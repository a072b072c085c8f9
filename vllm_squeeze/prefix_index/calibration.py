"""Finds the threshold on weighted predicted attention probabilities: one for all layers and heads of a prefix.

The queries that answers to questions on the prefix came from score the clusters and their keys. A histogram counts keys
by the log threshold up to which they are chosen, as ``kernels/reference.py`` says. Its counts are integers: histograms
of layers, heads and tensor-parallel ranks add up exactly, in any order. Each layer is moved to one level, which its
weights take up. The curve read off the sum gives a threshold for each share of clustered keys to keep. A second
histogram, over the same bins, weighs keys by the attention that other queries paid to them: it says how much of it a
threshold keeps.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from vllm_squeeze.kernels.reference import capped, evenly, joined, log_mass, log_ranks, residual_scores, scores_of
from vllm_squeeze.kernels.tables import MARGIN, group_means, unpacked_keys

NUM_BINS = 4096
LOWEST, HIGHEST = -34.0, 14.0
BIN_WIDTH = (HIGHEST - LOWEST) / NUM_BINS
COUNTED_KEYS = 2048
"""Of a KV head, at most: all heads together have many times as many."""
ATTENDING_TOKENS = 128
"""Whose attention to all keys is weighed, at most."""
LEVEL, LEVEL_SHARE = -12.0, 0.1
"""Every layer's weights are such that this threshold keeps this share of its clustered keys."""
LEAST_SHARE = 0.002
# log-spaced in the odds, which is log-spaced in the share where it is small, and close to 1 log-spaced in what is left
SHARES = np.append(1.0, 1 / (1 + np.geomspace(0.01, 1 / LEAST_SHARE - 1, 63)))

Curve = tuple[tuple[float, float], ...]
"""Pairs of the share of clustered keys kept, decreasing from 1, and the log threshold that keeps it."""


@dataclass(frozen=True)
class Choosable:
    """The clusters of B KV heads as a server reads them, each of one layer, and their keys.

    Attributes:
        centroids: [B, C, D] float32.
        frame, log_weights, variances, sizes, residuals, directions: as in ``LayerClusters``, B heads for H.
        scale: softmax scale.
        soft_cap: bound on the logits; 0 for none.
        rule: one of RULES.
    """

    centroids: torch.Tensor
    frame: torch.Tensor
    log_weights: torch.Tensor
    variances: torch.Tensor
    sizes: torch.Tensor
    residuals: torch.Tensor
    directions: torch.Tensor
    scale: float
    soft_cap: float = 0.0
    rule: str = "keys"

    def bins(self, row: int, query: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """The bin of the log threshold up to which keys are chosen.

        Args:
            row: of B.
            query: [W, G, D] float32.
            members: [n] int64, numbers of the keys, in the order of clusters.

        Returns:
            [W, n] int64.
        """
        this = slice(row, row + 1)
        query, centroids, sizes = query[:, None], self.centroids[this].float(), self.sizes[this]
        *vectors, group_sizes = group_means(centroids, sizes, self.frame[this])
        groups = unpacked_keys(*vectors, self.frame[this])
        scores = scores_of(query, centroids, self.scale, self.soft_cap)  # [W, 1, G, C]
        by_group = self.rule != "paper"
        held_against = scores_of(query, groups, self.scale, self.soft_cap) if by_group else scores
        mass = log_mass(held_against, group_sizes if by_group else sizes)
        weights = self.log_weights[this]
        ranks = log_ranks(query, scores, mass, weights, self.variances[this], sizes, self.scale, self.rule)
        cluster = torch.searchsorted(self.sizes[row].cumsum(0), members, right=True)
        ranks = ranks[:, 0, cluster]
        if self.rule == "keys":
            residuals = self.residuals[this, members]
            log_p = (scores - mass)[..., cluster]
            log_p = log_p + residual_scores(query, self.directions[this], residuals, self.scale)
            ranks = torch.minimum(ranks + MARGIN, (joined(log_p, self.rule) + weights[:, cluster])[:, 0])
        return ((ranks - LOWEST) / BIN_WIDTH).clamp(0, NUM_BINS - 1).long()

    def bytes_per_query(self, num_keys: int) -> int:
        """Temporary memory that ``bins`` of so many keys takes for each query token of a group."""
        return 16 * self.sizes.shape[1] + 12 * num_keys


def score_histogram(query: torch.Tensor, clusters: Choosable, memory_bytes: int = 1 << 28) -> torch.Tensor:
    """Counts clustered keys by the log threshold up to which they are chosen.

    Args:
        query: [B, W, G, D], the queries of W tokens, after the rotary embedding.
        clusters: of the KV heads that these belong to.
        memory_bytes: bound on temporary memory, as far as one token fits into it.

    Returns:
        [NUM_BINS] int64 on the device of the query. Bins divide [LOWEST, HIGHEST] equally; what is lower counts in
        the first, what is higher in the last. Of a head with more than COUNTED_KEYS keys so many at equal distances
        count, in the order of clusters; of W queries each.
    """
    group, num_members = query.shape[2], clusters.residuals.shape[1]
    histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=query.device)
    counted = evenly(num_members, COUNTED_KEYS, query.device)
    tokens = max(memory_bytes // (group * clusters.bytes_per_query(len(counted))), 1)
    for row, of_row in enumerate(query):
        for some in of_row.float().split(tokens):
            histogram += torch.bincount(clusters.bins(row, some, counted).flatten(), minlength=NUM_BINS)
    return histogram


def attention_histogram(
    query: torch.Tensor,
    keys: torch.Tensor,
    members: torch.Tensor,
    clusters: Choosable,
    memory_bytes: int = 1 << 29,
) -> torch.Tensor:
    """The attention probability of clustered keys, over a prefix alone, by the log threshold up to which they are chosen.

    Args:
        query: [B, W, G, D], of tokens that ask about the prefix. Of more than ATTENDING_TOKENS so many at equal distances
            count.
        keys: [B, T, D], all of the prefix.
        members: [B, M], positions of clustered keys, ordered by cluster.
        clusters: of these.
        memory_bytes: bound on temporary memory, as far as one query token fits into it.

    Returns:
        [B, NUM_BINS] float32, mean over tokens and query heads, in the bins of ``score_histogram``. What is missing to
        a sum of 1 fell on keys that are always attended to.
    """
    query = query[:, evenly(query.shape[1], ATTENDING_TOKENS, query.device)]
    num_rows, num_queries, group, _ = query.shape
    histogram = torch.zeros(num_rows, NUM_BINS, dtype=torch.float32, device=query.device)
    everything = torch.arange(members.shape[1], device=query.device)
    tokens = max(memory_bytes // (group * (clusters.bytes_per_query(len(everything)) + 8 * keys.shape[1])), 1)
    for row in range(num_rows):
        for some in query[row].float().split(tokens):
            logits = capped(torch.einsum("wgd,td->wgt", some * clusters.scale, keys[row].float()), clusters.soft_cap)
            of_members = logits.softmax(-1).sum(1)[:, members[row].long()]
            bins = clusters.bins(row, some, everything)
            histogram[row].scatter_add_(0, bins.flatten(), of_members.flatten())
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
