"""Attention over a small prefix of random keys, computed in two ways that have to agree. Needs no vLLM."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_squeeze.kernels.reference import (
    attend_prefix,
    attend_seen,
    choose_clusters,
    merge,
    squeezed_attention_reference,
)
from vllm_squeeze.kernels.tables import (
    LEAST_PACKED,
    NUM_DIRECTIONS,
    RULES,
    ClusterTable,
    Prefixes,
    frame_of,
    group_means,
    packed,
    packed_keys,
    words_of,
)

KV_HEADS, GROUP, HEAD_SIZE, PAGE_SIZE = 2, 4, 128, 16
NUM_CENTROIDS, LARGEST_CLUSTER, NUM_SINKS, NUM_ROWS = 24, 50, 16, 2
SCALE = HEAD_SIZE**-0.5
LEAST_GAP = 2e-3
"""Between the threshold and what is compared with it: more than rounding can make of it."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
"""Of the relative error, by the dtype of queries and keys."""


class Difference(NamedTuple):
    """Between two outputs.

    Attributes:
        greatest: of the absolute differences.
        relative: root mean square of the differences, over that of the output that is right.
    """

    greatest: float
    relative: float

    @classmethod
    def of(cls, output: torch.Tensor, right: torch.Tensor) -> "Difference":
        error = output.double() - right.double()
        relative = (error.square().mean() / right.double().square().mean()).sqrt()
        return cls(error.abs().amax().item(), relative.item())


@dataclass(frozen=True)
class RandomPrefix:
    """A prefix of T tokens, some always attended to and the others in clusters, with H KV heads of G query heads.

    Attributes:
        query: [R, H * G, D].
        keys: [H, T, D].
        values: [H, T, D].
        table: its clusters.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: ClusterTable

    @classmethod
    def make(cls, dtype: torch.dtype, device: torch.device | str) -> "RandomPrefix":
        """Always the same one. Centroids have nothing to do with the keys, which attention does not mind."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        sizes = torch.randint(1, LARGEST_CLUSTER + 1, (NUM_CENTROIDS,), generator=generator)
        cluster = torch.arange(NUM_CENTROIDS).repeat_interleave(sizes)
        shuffled = [torch.randperm(len(cluster), generator=generator) for _ in range(KV_HEADS)]
        # by cluster, and ascending inside a cluster
        members = torch.stack([order[(cluster * len(cluster) + order).argsort()] for order in shuffled]) + NUM_SINKS
        sizes = sizes.int().expand(KV_HEADS, -1).contiguous()
        means = randn(KV_HEADS, NUM_CENTROIDS, HEAD_SIZE)
        frame = frame_of(means, sizes)
        centroids, centroid_scales = packed_keys(means, frame)
        group_centroids, group_scales, group_sizes = group_means(means, sizes, frame)
        value_centroids, value_scales = packed(randn(KV_HEADS, NUM_CENTROIDS, HEAD_SIZE))
        table = ClusterTable(
            centroids=centroids,
            centroid_scales=centroid_scales,
            value_centroids=value_centroids,
            value_scales=value_scales,
            log_weights=randn(KV_HEADS, NUM_CENTROIDS),
            variances=randn(KV_HEADS, NUM_CENTROIDS).square(),
            starts=sizes.cumsum(1, dtype=torch.int32) - sizes,
            sizes=sizes,
            log_sizes=sizes.log(),
            members=members.int(),
            residuals=words_of(
                torch.randint(LEAST_PACKED, -LEAST_PACKED, (*members.shape, NUM_DIRECTIONS), generator=generator)
            ),
            group_centroids=group_centroids,
            group_scales=group_scales,
            group_sizes=group_sizes,
            frames=frame[:, None],
            directions=randn(KV_HEADS, 1, NUM_DIRECTIONS, HEAD_SIZE) / 16,
        )
        keys, values = randn(2, KV_HEADS, NUM_SINKS + len(cluster), HEAD_SIZE).to(device, dtype)
        query = randn(NUM_ROWS, KV_HEADS * GROUP, HEAD_SIZE).to(device, dtype)
        return cls(query, keys, values, ClusterTable(*(tensor.to(device) for tensor in vars(table).values())))

    def grouped(self) -> torch.Tensor:
        """The queries as [R, H, G, D]."""
        return self.query.unflatten(1, (KV_HEADS, GROUP))

    def attend_to_all(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention of queries [R, H * G, D] to all keys: output [R, H * G, D] and log-sum-exp [R, H * G]."""
        everything = torch.ones(len(query), self.keys.shape[1], dtype=torch.bool, device=query.device)
        output, lse = attend_seen(query.unflatten(1, (KV_HEADS, GROUP)), self.keys, self.values, everything, SCALE)
        return output.flatten(1, 2), lse.flatten(1)

    def read_tokens(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at positions [H, M], [H, M, D] each."""
        heads = torch.arange(KV_HEADS, device=positions.device)[:, None]
        return self.keys[heads, positions], self.values[heads, positions]

    def log_threshold(self) -> float:
        """One that some clusters and keys exceed and others do not, none of them nearly."""

        def chosen(log_threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
            of_prefix = self.grouped(), self.table
            clusters = choose_clusters(*of_prefix, log_threshold, SCALE).clusters
            _, _, kept, _ = attend_prefix(*of_prefix, self.read_tokens, log_threshold, NUM_SINKS, SCALE, rest=True)
            return clusters, kept

        def is_the_same(log_threshold: float) -> bool:
            # the higher the threshold the fewer keys are kept: where they are as many, they are the same
            near = chosen(log_threshold - LEAST_GAP), chosen(log_threshold + LEAST_GAP)
            return all(map(torch.equal, *near))

        return next(filter(is_the_same, torch.linspace(-5, -3, 1000).tolist()))


def difference_of_kernels(dtype: torch.dtype, device: torch.device | str) -> Difference:
    """Runs the Triton kernels and their oracle over a paged cache, for rows that are squeezed and rows that are exact.

    Then for the same rows if they share all keys, which torch attends to here, not FlashAttention. What follows the
    prefix is random too: an output and a log-sum-exp that the prefix's are joined to.

    Args:
        dtype: of queries, keys and values.
        device: a GPU, or the CPU under Triton's interpreter.
    """
    from vllm_squeeze.kernels.shared_prefix import gather_queries, join_shared
    from vllm_squeeze.kernels.squeezed_attention import squeezed_attention
    from vllm_squeeze.kernels.tiles import QueryTiles
    from vllm_squeeze.kernels.workspace import Workspace

    prefix = RandomPrefix.make(dtype, device)
    num_tokens = prefix.keys.shape[1]
    num_pages = -(-num_tokens // PAGE_SIZE)
    pages = torch.arange(num_pages, device=device).flip(0)
    cache = torch.full((num_pages, PAGE_SIZE, KV_HEADS, 2 * HEAD_SIZE), torch.nan, dtype=dtype, device=device)
    token = torch.arange(num_tokens, device=device)
    in_pages = torch.cat([prefix.keys, prefix.values], -1).transpose(0, 1)
    cache[pages[token // PAGE_SIZE], token % PAGE_SIZE] = in_pages

    squeezed, exact = (0, NUM_CENTROIDS, NUM_SINKS, RULES.index("keys")), (0, 0, num_tokens, 0)
    prefixes = Prefixes(
        slots=torch.tensor([squeezed, exact], dtype=torch.int32, device=device),
        lens=torch.full((2,), num_tokens, dtype=torch.int32, device=device),
        frames=torch.zeros(2, dtype=torch.int32, device=device),
        log_threshold=torch.tensor([prefix.log_threshold(), torch.inf], device=device),
        kept_shares=torch.ones(2, device=device),
        counters=torch.zeros(2, 6, dtype=torch.int64, device=device),
    )
    query = torch.cat([prefix.query, prefix.query])  # of each slot
    block_table = pages.int().expand(len(query), -1).contiguous()
    row_slot = torch.arange(2, device=device).repeat_interleave(NUM_ROWS).int()
    queries = QueryTiles.allocate(len(query), 2, num_tokens, GROUP, device)
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=device)
    queries.fill(row_slot, starts, block_table, prefixes, len(query), GROUP, PAGE_SIZE)

    # about as much attention as to the prefix
    suffix_lse = torch.full(query.shape[1::-1], math.log(num_tokens), device=device)
    after_prefix = suffix_lse, *cache.split(HEAD_SIZE, -1), block_table, queries, prefix.table, prefixes, SCALE, True
    output, right = query.clone(), query.clone()
    workspace = Workspace.allocate(2, KV_HEADS, HEAD_SIZE, NUM_CENTROIDS, num_tokens, device)
    squeezed_attention(query, output, *after_prefix, workspace)
    squeezed_attention_reference(query, right, *after_prefix)

    shared_output, lse = prefix.attend_to_all(gather_queries(query, queries, GROUP))
    shared = query.clone()
    join_shared(shared, suffix_lse, shared_output.to(dtype), lse.T.contiguous(), queries, prefixes, KV_HEADS)
    right_shared = merge(query.float(), suffix_lse.T, *prefix.attend_to_all(query))
    return Difference.of(torch.cat([output, shared]), torch.cat([right, right_shared.to(dtype)]))


def difference_of_reference() -> Difference:
    """Runs the torch path with all clusters chosen, and dense attention to the same keys, on the CPU in float32."""
    prefix = RandomPrefix.make(torch.float32, "cpu")

    of_prefix = prefix.grouped(), prefix.table, prefix.read_tokens
    output, *_ = attend_prefix(*of_prefix, -torch.inf, NUM_SINKS, SCALE, rest=True)
    right, _ = prefix.attend_to_all(prefix.query)
    return Difference.of(output.flatten(1, 2), right)
