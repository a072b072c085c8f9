"""What the kernels read: the clusters of indexed prefixes in one layer, and the list of prefixes they belong to."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

RULES = ("keys", "clusters", "paper")
"""By which keys are chosen. ``clusters``: all keys of clusters that it would be an error to lump together, for the query
head of a KV head to which it matters most. ``keys``: of clusters that are, or nearly, those keys to which that applies,
each for itself. ``paper``: all keys of clusters by their predicted attention probability, mean over the query heads and
held against what all clusters attract, where the others hold it against what groups of them do."""

NEIGHBOURS = 4
"""Clusters of a group, side by side from a prefix's first on. It counts as one cluster of all their keys where it is
summed up what all attract."""

MAX_GROUP = 16
"""Query heads of a KV head that the kernels take, at most."""

MOST_RAISE = 6.0
"""Nats that the spread of a cluster's keys may add to its predicted log probability in the choice, at most."""

MOST_REST_RAISE = 1.0
"""Nats that it may add to what a cluster contributes that was not chosen, at most."""

NUM_DIRECTIONS = 16
"""Along which it is told how a key lies beside the mean key of its cluster, with an element of 4 bits for each."""

MOST_PRODUCT = 127
"""Of a query with one of these directions, in 8 bits, of which the largest is that."""

NUM_ROW_FACTS = 4 + NUM_DIRECTIONS // 4
"""That the look-up notes of each query row."""

MARGIN = 1.0
"""Nats by which a cluster may fall short of the threshold and its keys are looked at all the same, each for itself."""

LEAST_PACKED = -8
"""Of elements of 4 bits."""

LEAST_SPREAD = 1e-3
"""Of mean keys along one direction, over that along the one where it is largest: less counts as so much."""

DENSE_SLOT = -1
"""In a slot's place: of a row that attends to no indexed prefix."""

STOCK_SLOT = -2
"""In a slot's place: of a row on an indexed prefix that vLLM's own attention serves in this step."""


PROMPT_SLOTS = 1 << 16
"""What is added to the slot of a row whose tokens are a prompt's, which choose together, by tiles."""

PROMPT_ROWS, PROMPT_WIDTH = 128, 128
"""Query rows of a tile of a prompt, tokens times padded query heads, as many as FlashAttention takes at once; half of them
where a head has more elements than this."""

SAMPLE = 4096
"""Clusters, at equal distances, that tell where a tile's choice of a share of the keys ends; all if there are fewer."""


def prompt_tile_tokens(group: int, head_size: int) -> int:
    """Tokens of a prompt that choose together, of ``group`` query heads for each KV head."""
    rows = PROMPT_ROWS if head_size <= PROMPT_WIDTH else PROMPT_ROWS // 2
    return rows >> (group - 1).bit_length()


def packed(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [..., D] in 4 bits an element, and what to multiply each with, [...] float32.

    Returns:
        int32 [..., D / 8], 8 elements in each word, by how much they exceed LEAST_PACKED: those with even numbers in
        its lower half, the others above, from the lowest bits on; and the scales.
    """
    vectors = vectors.float()
    scales = vectors.abs().amax(-1) / 7
    elements = (vectors / scales.where(scales > 0, 1)[..., None]).round()
    return words_of(elements), scales


def words_of(elements: torch.Tensor) -> torch.Tensor:
    """Whole numbers [..., D] from LEAST_PACKED to 7 as int32 [..., D / 8], in the order of ``packed``."""
    elements = (elements - LEAST_PACKED).int().unflatten(-1, (-1, 8))
    return (elements << _places(elements.device)).sum(-1).int()


def elements_of(words: torch.Tensor) -> torch.Tensor:
    """What ``words_of`` made words of, float32."""
    elements = words[..., None] >> _places(words.device) & 15
    return (elements.flatten(-2) + LEAST_PACKED).float()


def unpacked(words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What ``packed`` made of vectors, as they are read: float32 [..., D]."""
    return elements_of(words) * scales[..., None]


def _places(device: torch.device) -> torch.Tensor:
    """Where the 8 elements of a word begin in its bits."""
    return torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32, device=device)


def frame_of(centroids: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """What the mean keys of a prefix have in common: without it they need but 4 bits an element.

    Elements of keys are often large in a few directions, and hardly differ there.

    Args:
        centroids: [..., C, D] float32.
        sizes: [..., C] integer, keys of each cluster; those without any do not count.

    Returns:
        [..., 2, D] float32: their mean, and how far they lie from it along each direction at most, over that along the
        one where it is largest; LEAST_SPREAD at least.
    """
    counted = (sizes > 0).float()[..., None]
    mean = (centroids * counted).sum(-2, keepdim=True) / counted.sum(-2, keepdim=True).clamp(min=1)
    # one row more, as there may be no clusters
    spread = pad((centroids - mean) * counted, (0, 0, 0, 1)).abs().amax(-2, keepdim=True)
    largest = spread.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([mean, (spread / largest).clamp(min=LEAST_SPREAD)], -2)


def packed_keys(keys: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean keys [..., C, D] as ``packed``, by how they differ from the mean of a ``frame_of`` all, over its spreads."""
    mean, spread = frame.split(1, -2)
    return packed((keys - mean) / spread)


def unpacked_keys(words: torch.Tensor, scales: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """What ``packed_keys`` made of mean keys, as they are read: float32 [..., C, D]."""
    mean, spread = frame.split(1, -2)
    return unpacked(words, scales) * spread + mean


def num_groups(num_centroids: int) -> int:
    """Of so many clusters; the last may have fewer than NEIGHBOURS."""
    return -(-num_centroids // NEIGHBOURS)


def group_means(
    centroids: torch.Tensor, sizes: torch.Tensor, frame: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean keys of groups of NEIGHBOURS clusters.

    Args:
        centroids: [..., C, D] float32.
        sizes: [..., C] integer.
        frame: [..., 2, D], of all mean keys.

    Returns:
        those of G = num_groups(C) groups as ``packed_keys``, int32 [..., G, D / 8] and float32 [..., G], and keys of
        each group [..., G] int32. Of a group without keys anything.
    """
    padding = -centroids.shape[-2] % NEIGHBOURS
    sums = pad(centroids * sizes[..., None], (0, 0, 0, padding)).unflatten(-2, (-1, NEIGHBOURS)).sum(-2)
    together = pad(sizes, (0, padding)).unflatten(-1, (-1, NEIGHBOURS)).sum(-1)
    return *packed_keys(sums / together.clamp(min=1)[..., None], frame), together.int()


@dataclass(frozen=True)
class ClusterTable:
    """Clusters of prefix keys in one layer, of one prefix or of several laid one after the other.

    H counts the KV heads of this rank, C clusters, M members, D the head size, G groups of NEIGHBOURS clusters, P
    prefixes. A prefix's first cluster is the first of a group.

    Attributes:
        centroids: [H, C, D / 8] int32, the mean key of each cluster, as ``packed_keys``.
        centroid_scales: [H, C] float32.
        value_centroids: [H, C, D / 8] int32, the mean value of each cluster, as ``packed``.
        value_scales: [H, C] float32.
        log_weights: [H, C] float32, natural log of what the predicted probability is multiplied by in the choice.
        variances: [H, C] float32, of the logits of a cluster's keys, over the squared length of the scaled query.
        starts: [H, C] int32, where the members of a cluster begin in ``members``; never decreasing along C.
        sizes: [H, C] int32, how many members a cluster has. 0 marks an empty cluster, which is
            never chosen; its scales, weight and variance must be finite all the same.
        log_sizes: [H, C] float32, natural log of sizes; minus infinity of 0.
        members: [H, M] int32, positions of tokens in the prefix, ascending inside a cluster.
        residuals: [H, M, NUM_DIRECTIONS / 8] int32, how the key of each member lies beside its cluster's mean key, an
            element for each direction, as ``words_of``.
        group_centroids: [H, G, D / 8] int32, the mean key of each group, as ``packed_keys``.
        group_scales: [H, G] float32.
        group_sizes: [H, G] int32, keys of each group. 0 marks one without any; its scale must be finite all the same.
        frames: [H, P, 2, D] float32, the ``frame_of`` the mean keys of each prefix.
        directions: [H, P, NUM_DIRECTIONS, D] float32, those of each prefix. A query's products with them, times the
            elements of a residual, sum up to its product with the key less the cluster's mean key.
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
    residuals: torch.Tensor
    group_centroids: torch.Tensor
    group_scales: torch.Tensor
    group_sizes: torch.Tensor
    frames: torch.Tensor
    directions: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in their order."""
        return tuple(vars(self).values())

    def mean_keys(self) -> torch.Tensor:
        """The mean key of each cluster, of a table of one prefix: [H, C, D] float32."""
        return unpacked_keys(self.centroids, self.centroid_scales, self.frames[:, 0])

    def mean_values(self) -> torch.Tensor:
        """The mean value of each cluster, [H, C, D] float32."""
        return unpacked(self.value_centroids, self.value_scales)

    def group_keys(self) -> torch.Tensor:
        """The mean key of each group, of a table of one prefix: [H, G, D] float32."""
        return unpacked_keys(self.group_centroids, self.group_scales, self.frames[:, 0])

    def prefix(self, first_centroid: int, num_centroids: int, frame: int) -> "ClusterTable":
        """The table of the one prefix whose clusters begin at ``first_centroid``, as views; ``frame`` is its own."""
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
            self.residuals if num_centroids else self.residuals[:, :0],
            self.group_centroids[:, groups],
            self.group_scales[:, groups],
            self.group_sizes[:, groups],
            self.frames[:, frame : frame + 1],
            self.directions[:, frame : frame + 1],
        )


@dataclass(frozen=True)
class Prefixes:
    """The prefixes that a server holds, the same for all layers. A slot is an index into the tensors below.

    Attributes:
        slots: [P, 4] int32, per slot: first centroid, number of centroids, number of always attended first tokens,
            and by which rule keys are chosen, its place in RULES. Without centroids, and with all tokens always
            attended to, attention over the prefix is exact.
        lens: [P] int32, tokens of the prefix.
        frames: [P] int32, which of ClusterTable.frames is that of its mean keys.
        log_threshold: [P] float32. A cluster is chosen if the log of its predicted attention probability, raised, and its
            log weight together exceed it; by the rule ``keys``, if they fall short of it by no more than MARGIN, and of its
            keys those whose own with this weight exceed it. Minus infinity chooses every key.
        kept_shares: [P] float32, the share of the keys in clusters that each tile of a prompt's tokens chooses.
        counters: [P, 6] int64, added to by the kernels. Of prefixes with clusters: look-ups, one for each tile of
            tokens and KV head; members that those loaded; (query token, KV head) pairs served; and members that those
            attended to exactly. Of prefixes without: passes, one for each tile and KV head, and pairs served.
    """

    slots: torch.Tensor
    lens: torch.Tensor
    frames: torch.Tensor
    log_threshold: torch.Tensor
    kept_shares: torch.Tensor
    counters: torch.Tensor
