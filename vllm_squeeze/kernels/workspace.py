"""Memory that the kernels work in, allocated once, so that a step allocates nothing and a CUDA graph can replay it."""

import dataclasses
from dataclasses import dataclass

import torch

PROGRAMS_PER_MULTIPROCESSOR = 8
"""How many programs to aim at: several at a time hide each other's waits, and many small ones even out the work."""

MAX_SPLITS = 64
"""The merge of the partial outputs holds this many rows at once."""

INTERPRETED_MULTIPROCESSORS = 1
"""Stands for the device's number under Triton's interpreter, which runs one program after the other."""


def num_splits(num_programs: int, num_multiprocessors: int) -> int:
    """Into how many shares to split each of ``num_programs`` pieces of work to fill the device: a power of two."""
    wanted = max(1, num_multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // num_programs)
    return min(MAX_SPLITS, 1 << (wanted - 1).bit_length())


@dataclass(frozen=True)
class Workspace:
    """What the kernels hand to each other. All layers may share one, as they run one after the other.

    L counts the largest number of splits of all work items together.

    Attributes:
        num_multiprocessors: of the device.
        scores: [max_work, H, G, C] float32, s q.c_i.
        offsets: [max_work, H, C] int32, how many kept keys of the same split come before those of a cluster.
        masses: [L, G] float32, log-sum-exp of the scores of one split's clusters, each counted by its size.
        kept: [L] int32, how many keys one split's chosen clusters have.
        partial_output: [L, G, D] float32, attention over one split's share.
        partial_lse: [L, G] float32, and its log-sum-exp; minus infinity where the share is empty.
    """

    num_multiprocessors: int
    scores: torch.Tensor
    offsets: torch.Tensor
    masses: torch.Tensor
    kept: torch.Tensor
    partial_output: torch.Tensor
    partial_lse: torch.Tensor

    @classmethod
    def allocate(
        cls,
        max_work: int,
        num_kv_heads: int,
        group: int,
        head_size: int,
        max_centroids: int,
        device: torch.device | str,
    ) -> "Workspace":
        """Allocates for given limits.

        Args:
            max_work: work items handled at once; longer lists are handled in chunks of this length.
            num_kv_heads: KV heads of this rank, H.
            group: query heads per KV head, G.
            head_size: D.
            max_centroids: the most clusters of any one prefix, C.
            device: where the kernels run.

        Raises:
            ValueError: if a size is not positive.
        """
        sizes = dict(max_work=max_work, num_kv_heads=num_kv_heads, group=group, head_size=head_size)
        for name, size in (sizes | {"max_centroids": max_centroids}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        device = torch.device(device)
        num_multiprocessors = INTERPRETED_MULTIPROCESSORS
        if device.type == "cuda":
            num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        # whole rows of 64 bytes, so that Triton compiles one variant of the kernels for all of them
        max_centroids += -max_centroids % 16
        items = range(num_kv_heads, max_work * num_kv_heads + 1, num_kv_heads)
        max_parts = max(item * num_splits(item, num_multiprocessors) for item in items)
        return cls(
            num_multiprocessors=num_multiprocessors,
            scores=torch.empty(max_work, num_kv_heads, group, max_centroids, dtype=torch.float32, device=device),
            offsets=torch.empty(max_work, num_kv_heads, max_centroids, dtype=torch.int32, device=device),
            masses=torch.empty(max_parts, group, dtype=torch.float32, device=device),
            kept=torch.empty(max_parts, dtype=torch.int32, device=device),
            partial_output=torch.empty(max_parts, group, head_size, dtype=torch.float32, device=device),
            partial_lse=torch.empty(max_parts, group, dtype=torch.float32, device=device),
        )

    @property
    def max_work(self) -> int:
        """How many work items are handled at once."""
        return len(self.scores)

    @property
    def max_centroids(self) -> int:
        """The most clusters that a prefix may have: at least what was asked for."""
        return self.scores.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    def num_splits(self, num_work: int) -> int:
        """Into how many shares to split the work of each (work item, KV head) when there are ``num_work`` items."""
        return num_splits(num_work * self.scores.shape[1], self.num_multiprocessors)
