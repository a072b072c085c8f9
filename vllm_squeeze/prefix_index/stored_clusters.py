"""Clusters as an index stores them: mean keys and values in 4 bits, their weights in the choice, and how keys differ."""

import torch

from vllm_squeeze.kernels.tables import frame_of, packed, packed_keys, unpacked_keys
from vllm_squeeze.prefix_index.clustering import Clusters, logit_residuals, logit_variances
from vllm_squeeze.prefix_index.index_folder import LayerClusters

LEAST_WEIGHT = 1e-3
"""Times the mean weight of a head: a cluster of one key has next to none, but must be chosen where everything is."""


def stored(clusters: Clusters, rule: str, keys: torch.Tensor, queries: torch.Tensor) -> LayerClusters:
    """The clusters of one layer, B its KV heads.

    Args:
        clusters: of the keys.
        rule: one of RULES.
        keys: [B, T, D] float32.
        queries: [B, W, G, D], along which it is seen how keys differ.
    """
    frame = frame_of(clusters.centroids, clusters.sizes)
    centroids, centroid_scales = packed_keys(clusters.centroids, frame)
    value_centroids, value_scales = packed(clusters.value_centroids)
    as_read = unpacked_keys(centroids, centroid_scales, frame)
    if rule != "paper":
        weights = error_weights(clusters, squared_distances(clusters, as_read))
        variances = logit_variances(keys, clusters, as_read, queries)
    else:
        weights, variances = torch.ones_like(clusters.key_squares), torch.zeros_like(clusters.key_squares)
    residuals, directions = logit_residuals(keys, clusters, as_read, queries)
    vectors = centroids, centroid_scales, value_centroids, value_scales
    facts = weights.log(), variances, clusters.sizes, clusters.members
    return LayerClusters(*vectors, *facts, residuals, frame, directions)


def squared_distances(clusters: Clusters, centroids: torch.Tensor) -> torch.Tensor:
    """The mean squared distance of a cluster's keys to its centroid [B, C, D], as it is read: [B, C] float32."""
    cross = (clusters.centroids * centroids).sum(-1)
    return (clusters.key_squares - 2 * cross + centroids.square().sum(-1)).clamp(min=0)


def error_weights(clusters: Clusters, squares: torch.Tensor) -> torch.Tensor:
    """In proportion to the error that lumping a key together with its cluster makes, per attention probability.

    That grows with how far logits of the cluster's keys lie from its centroid's, as their distances do, and with how
    large its values are.

    Args:
        clusters: of B KV heads.
        squares: [B, C] float32, from ``squared_distances``.

    Returns:
        [B, C] float32, positive, with a mean of about 1 over the clusters of a KV head that are not empty.
    """
    weights = (squares * clusters.value_squares).sqrt()
    occupied = clusters.sizes > 0
    mean = (weights * occupied).sum(-1, keepdim=True) / occupied.sum(-1, keepdim=True).clamp(min=1)
    return (weights / mean.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=LEAST_WEIGHT)
