"""What the kernels read: the clusters of indexed prefixes in one layer, and the list of prefixes they belong to."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

JOINS = ("max", "mean")
"""How the predicted attention probabilities of a cluster are joined over the query heads of a KV head. With their mean,
the paper's way, they are held against what all clusters attract, else against what groups of them do."""

NEIGHBOURS = 4
"""Clusters of a group, side by side from a prefix's first on. It counts as one cluster of all their keys where it is
summed up what all attract."""

MAX_GROUP = 16
"""Query heads of a KV head that the kernels take, at most."""

MOST_RAISE = 6.0
"""Nats that the spread of a cluster's keys may add to its predicted log probability in the choice, at most."""

MOST_REST_RAISE = 1.0
"""Nats that it may add to what a cluster contributes that was not chosen, at most."""

LEAST_PACKED = -8
"""Of elements of 4 bits."""

DENSE_SLOT = -1
"""In a slot's place: of a row that attends to no indexed prefix."""

STOCK_SLOT = -2
"""In a slot's place: of a row on an indexed prefix that vLLM's own attention serves in this step."""


def quantised(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [..., D] as int8 [..., D], and what to multiply each with, [...] float32."""
    elements, scales = _scaled(vectors, 127)
    return elements.to(torch.int8), scales


def unquantised(vectors: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What ``quantised`` made of vectors, as they are read: float32 [..., D]."""
    return vectors.float() * scales[..., None]


def packed(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [..., D] in 4 bits an element, and what to multiply each with, [...] float32.

    Returns:
        int32 [..., D / 8], 8 elements in each word, by how much they exceed LEAST_PACKED: those with even numbers in
        its lower half, the others above, from the lowest bits on; and the scales.
    """
    elements, scales = _scaled(vectors, 7)
    elements = (elements - LEAST_PACKED).int().unflatten(-1, (-1, 8))
    return (elements << _places(vectors.device)).sum(-1).int(), scales


def unpacked(vectors: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What ``packed`` made of vectors, as they are read: float32 [..., D]."""
    elements = vectors[..., None] >> _places(vectors.device) & 15
    return unquantised(elements.flatten(-2) + LEAST_PACKED, scales)


def _places(device: torch.device) -> torch.Tensor:
    """Where the 8 elements of a word begin in its bits."""
    return torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32, device=device)


def _scaled(vectors: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [..., D] whose elements are whole numbers up to ``most`` either way, and what to multiply each with."""
    vectors = vectors.float()
    scales = vectors.abs().amax(-1) / most
    return (vectors / scales.where(scales > 0, 1)[..., None]).round(), scales


def num_groups(num_centroids: int) -> int:
    """Of so many clusters; the last may have fewer than NEIGHBOURS."""
    return -(-num_centroids // NEIGHBOURS)


def group_means(centroids: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean keys of groups of NEIGHBOURS clusters, in 8 bits.

    Args:
        centroids: [..., C, D] float32.
        sizes: [..., C] integer.

    Returns:
        int8 [..., G, D], what to multiply each with [..., G] float32, and keys of each group [..., G] int32; of G =
        num_groups(C) groups. Zero where a group has no keys.
    """
    padding = -centroids.shape[-2] % NEIGHBOURS
    sums = pad(centroids * sizes[..., None], (0, 0, 0, padding)).unflatten(-2, (-1, NEIGHBOURS)).sum(-2)
    together = pad(sizes, (0, padding)).unflatten(-1, (-1, NEIGHBOURS)).sum(-1)
    return *quantised(sums / together.clamp(min=1)[..., None]), together.int()


@dataclass(frozen=True)
class ClusterTable:
    """Clusters of prefix keys in one layer, of one prefix or of several laid one after the other.

    H counts the KV heads of this rank, C clusters, M members, D the head size, G groups of NEIGHBOURS clusters. A
    prefix's first cluster is the first of a group.

    Attributes:
        centroids: [H, C, D] int8, the mean key of each cluster, over its scale.
        centroid_scales: [H, C] float32.
        value_centroids: [H, C, D / 8] int32, the mean value of each cluster, over its scale, as ``packed``.
        value_scales: [H, C] float32.
        log_weights: [H, C] float32, natural log of what the predicted probability is multiplied by in the choice.
        variances: [H, C] float32, of the logits of a cluster's keys, over the squared length of the scaled query.
        starts: [H, C] int32, where the members of a cluster begin in ``members``; never decreasing along C.
        sizes: [H, C] int32, how many members a cluster has. 0 marks an empty cluster, which is
            never chosen; its scales, weight and variance must be finite all the same.
        log_sizes: [H, C] float32, natural log of sizes; minus infinity of 0.
        members: [H, M] int32, positions of tokens in the prefix, ascending inside a cluster.
        group_centroids: [H, G, D] int8, the mean key of each group, over its scale.
        group_scales: [H, G] float32.
        group_sizes: [H, G] int32, keys of each group. 0 marks one without any; its scale must be finite all the same.
    """

    centroids: torch.Tensor
    centroid_scales: torch.Tensor
    value_centroids: torch.Tensor
    value_scales: torch.Tensor
    log_weights: torch.Tensor
    variances: torch.Tensor
    starts: torch.Tensor
    sizes: torch.Tensor
    log_sizes: torch.Tensor
    members: torch.Tensor
    group_centroids: torch.Tensor
    group_scales: torch.Tensor
    group_sizes: torch.Tensor

    def prefix(self, first_centroid: int, num_centroids: int) -> "ClusterTable":
        """The table of the one prefix whose clusters begin at ``first_centroid``, as views."""
        clusters = slice(first_centroid, first_centroid + num_centroids)
        groups = slice(num_groups(first_centroid), num_groups(clusters.stop))
        return ClusterTable(
            self.centroids[:, clusters],
            self.centroid_scales[:, clusters],
            self.value_centroids[:, clusters],
            self.value_scales[:, clusters],
            self.log_weights[:, clusters],
            self.variances[:, clusters],
            self.starts[:, clusters],
            self.sizes[:, clusters],
            self.log_sizes[:, clusters],
            self.members if num_centroids else self.members[:, :0],
            self.group_centroids[:, groups],
            self.group_scales[:, groups],
            self.group_sizes[:, groups],
        )


@dataclass(frozen=True)
class Prefixes:
    """The prefixes that a server holds, the same for all layers. A slot is an index into the tensors below.

    Attributes:
        slots: [P, 4] int32, per slot: first centroid, number of centroids, number of always attended first tokens,
            and how the query heads of a KV head are joined, by its place in JOINS. Without centroids, and with all
            tokens always attended to, attention over the prefix is exact.
        lens: [P] int32, tokens of the prefix.
        log_threshold: [P] float32. A cluster is chosen if the log of its predicted attention probability per key, its
            raise and its log weight together exceed it; minus infinity chooses every cluster.
        counters: [P, 6] int64, added to by the kernels. Of prefixes with clusters: look-ups, one for each tile of
            tokens and KV head; members that those loaded; (query token, KV head) pairs served; and members that those
            attended to exactly. Of prefixes without: passes, one for each tile and KV head, and pairs served.
    """

    slots: torch.Tensor
    lens: torch.Tensor
    log_threshold: torch.Tensor
    counters: torch.Tensor
