"""What a byte budget means: the bytes that attention over a prefix reads, divided by those that a dense pass reads.

Read are the keys and values of kept and of always attended tokens, the centroids with their scales and frame, the place,
size, its logarithm, weight and variance of their clusters, those of groups of clusters, the places of kept keys, and the
residuals of all keys that are looked at to find these.
"""

import functools
import math
from dataclasses import dataclass

from vllm_squeeze.kernels.tables import NUM_DIRECTIONS, num_groups

BYTES_PER_SCALE = 4
"""What a mean key's or value's elements, of 4 bits each, are multiplied by: float32."""
BYTES_PER_WEIGHT = 4
"""A cluster's weight in the choice, float32."""
BYTES_PER_VARIANCE = 4
"""How a cluster's keys are spread, float32."""
BYTES_PER_PLACE = 4
"""Where the members of a cluster start, int32."""
BYTES_PER_SIZE = 4
"""How many members a cluster has, int32."""
BYTES_PER_LOG_SIZE = 4
"""Its logarithm, float32."""
BYTES_PER_MEMBER = 4
"""Position of a member in the prefix, int32."""

BYTES_PER_RESIDUAL = NUM_DIRECTIONS // 2
"""How a member's key lies beside the mean key of its cluster, 4 bits for each direction."""
BYTES_HELD_OF_MEMBER = BYTES_PER_MEMBER + BYTES_PER_RESIDUAL
"""Of each member, on the device and on disk."""
LOOKED_AT = 4
"""Keys that are looked at for one that is kept, about: three to six were seen, the fewer the more are kept."""


def packed_bytes(head_size: int) -> int:
    """Bytes of a mean key or value, with its scale."""
    return head_size // 2 + BYTES_PER_SCALE


def bytes_per_cluster(head_size: int, rest: bool) -> int:
    """Bytes that are read of each cluster, or held of it; ``rest`` says whether those of its mean value are."""
    vectors = (1 + rest) * packed_bytes(head_size)
    return vectors + BYTES_PER_PLACE + BYTES_PER_SIZE + BYTES_PER_LOG_SIZE + BYTES_PER_WEIGHT + BYTES_PER_VARIANCE


def bytes_of_groups(num_centroids: int, head_size: int) -> int:
    """Bytes that are read of the groups of so many clusters, or held of them: mean keys with their scales, and sizes."""
    return num_groups(num_centroids) * (packed_bytes(head_size) + BYTES_PER_SIZE)


def bytes_of_clusters(num_centroids: int, head_size: int, rest: bool) -> int:
    """Bytes that are read of so many clusters and of their groups, or held of them; but for members and frame."""
    return num_centroids * bytes_per_cluster(head_size, rest) + bytes_of_groups(num_centroids, head_size)


def bytes_of_prefix(head_size: int) -> int:
    """Bytes of what the clusters of a prefix have in common: their frame and the directions of residuals, float32."""
    return 4 * (2 + NUM_DIRECTIONS) * head_size


@dataclass(frozen=True)
class KeyCost:
    """Bytes that one KV head reads for the keys that are kept.

    Attributes:
        per_key: of each.
        looking: of residuals, for each kept key, while there are more of them to look at.
        looking_most: of all residuals there are.
    """

    per_key: int
    looking: int
    looking_most: int

    def read_bytes(self, kept_keys: float, times: int = 1) -> float:
        """Bytes read in so many look-ups that keep ``kept_keys`` together."""
        return kept_keys * self.per_key + min(kept_keys * self.looking, times * self.looking_most)

    def most_keys(self, read_bytes: float) -> float:
        """How many keys so many bytes are read for, in one look-up."""
        return max(read_bytes / (self.per_key + self.looking), (read_bytes - self.looking_most) / self.per_key)


@dataclass(frozen=True)
class ReadCost:
    """Bytes that one KV head reads over one prefix for one query token.

    Attributes:
        num_tokens: tokens of the prefix.
        num_always: tokens attended to whatever the choice: attention sinks, and those after the last clustered token.
        num_clustered: tokens in clusters.
        num_centroids: clusters.
        head_size: elements of a key, and of a value.
        element_size: bytes of an element of the KV cache.
        rest: whether the values' centroids are read, for the clusters that were not chosen.
        by_key: whether keys of clusters are chosen for themselves, by their residuals.
    """

    num_tokens: int
    num_always: int
    num_clustered: int
    num_centroids: int
    head_size: int
    element_size: int
    rest: bool
    by_key: bool = True

    @functools.cached_property
    def dense_bytes(self) -> int:
        """Bytes of a dense pass."""
        return self.num_tokens * 2 * self._vector_bytes

    @functools.cached_property
    def fixed_bytes(self) -> int:
        """Bytes read even if no cluster is kept."""
        clusters = bytes_of_clusters(self.num_centroids, self.head_size, self.rest)
        of_prefix = bytes_of_prefix(self.head_size) if self.num_centroids else 0
        return self.num_always * 2 * self._vector_bytes + clusters + of_prefix

    @functools.cached_property
    def keys(self) -> "KeyCost":
        """What is read for kept keys: each with its value and its position."""
        residual = self.by_key * BYTES_PER_RESIDUAL
        return KeyCost(2 * self._vector_bytes + BYTES_PER_MEMBER, LOOKED_AT * residual, self.num_clustered * residual)

    @property
    def _vector_bytes(self) -> int:
        return self.head_size * self.element_size

    def read_bytes(self, kept_keys: float, times: int = 1) -> float:
        """Bytes read in so many look-ups that keep ``kept_keys`` members of clusters together, which may be a mean."""
        return times * self.fixed_bytes + self.keys.read_bytes(kept_keys, times)

    def budget_used(self, kept_keys: float) -> float:
        """The budget that ``kept_keys`` members come to."""
        return self.read_bytes(kept_keys) / self.dense_bytes

    def kept_share(self, budget: float) -> float:
        """The share of clustered keys to keep so that the bytes read meet the budget.

        Args:
            budget: bytes read over the bytes of a dense pass, above 0. From 1 on everything is kept, although the
                centroids then make it a little more than a dense pass.

        Returns:
            The share, between 0 and 1.

        Raises:
            ValueError: the centroids and the always attended tokens alone read more than the budget.
        """
        if budget >= 1:
            return 1.0
        spare_bytes = budget * self.dense_bytes - self.fixed_bytes
        if spare_bytes < 0:
            # rounded up, so that the number shown is one that works
            least = math.ceil(self.budget_used(0) * 1000) / 1000
            raise ValueError(
                f"budget: {budget} is less than the {least:.3f} that centroids and always attended tokens read alone"
            )
        return min(self.keys.most_keys(spare_bytes) / self.num_clustered, 1.0)
