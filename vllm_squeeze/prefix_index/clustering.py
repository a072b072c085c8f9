"""Clusters the keys of a prefix, for all layers and KV heads at once.

The first tokens (attention sinks) and the last ones (observation window) stay out. The others are cut into near-equal
windows, but for those whose clusters are known (``extension``). K-means runs in each window on keys less their mean,
which softmax does not see, L2-normalised, from seeds that lie far apart; then clusters above the size limit are split
along their main direction. B counts rows, a row being one KV head of one layer; M counts clustered tokens; I counts
(row, window) pairs, n the tokens of a window and k its centroids.

The result depends on the seed only: segment sums are reduced in the order of tokens, and no atomics take part. A row's
result does not depend on the rows beside it, so that every tensor-parallel rank may cluster its own heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from vllm_squeeze.kernels.reference import nearest_reference
from vllm_squeeze.kernels.tables import LEAST_PACKED, NUM_DIRECTIONS, words_of
from vllm_squeeze.prefix_index.index_folder import LARGEST_DIRECTION
from vllm_squeeze.prefix_index.manifest import IndexParameters

SEED_POWER, SEED_ROUNDS = 4, 4
"""By which power of its distance from those before a point becomes a seed of K-means, and in how many rounds."""
POWER_ITERATIONS = 8
STEP = 0.335
"""Between the elements of a residual, over their root mean square: of 16 the best for normally distributed ones."""
LEAST_MOMENT = 1e-3
"""That queries are taken to have along each direction, over their mean: others than those known may look there."""
CPU_MEMORY_BYTES = 1 << 25


@dataclass(frozen=True)
class Clusters:
    """Clusters of prefix keys, window after window.

    Attributes:
        centroids: [B, C, D] float32, the mean key of each cluster. Zero where the cluster is empty.
        value_centroids: [B, C, D] float32, the mean value of each cluster. Zero where the cluster is empty.
        key_squares: [B, C] float32, the mean squared length of a cluster's keys.
        value_squares: [B, C] float32, that of its values.
        sizes: [B, C] int32. Rows that have fewer clusters than the largest row end in empty ones.
        members: [B, M] int32, positions of tokens in the prefix, ordered by cluster, ascending inside a cluster.
    """

    centroids: torch.Tensor
    value_centroids: torch.Tensor
    key_squares: torch.Tensor
    value_squares: torch.Tensor
    sizes: torch.Tensor
    members: torch.Tensor

    @property
    def starts(self) -> torch.Tensor:
        """[B, C] int32, where the members of a cluster begin in ``members``."""
        return self.sizes.cumsum(1, dtype=torch.int32) - self.sizes


def cluster_keys(
    keys: torch.Tensor,
    values: torch.Tensor,
    parameters: IndexParameters,
    memory_bytes: int = 1 << 30,
    known: torch.Tensor | None = None,
) -> Clusters:
    """Clusters the keys of one prefix.

    Args:
        keys: [B, T, D], any float dtype, after the rotary embedding.
        values: [B, T, D].
        parameters: how to cluster.
        memory_bytes: bound on temporary memory, as far as one window of one row and one row's keys fit into it.
        known: [B, K] int32, clusters that the first K tokens after the sinks belong to already, those of a row numbered
            from 0 without gaps. They keep their members, and only the tokens after them are cut into windows.

    Returns:
        The clusters, on the device of the keys.

    Raises:
        ValueError: no token is left between the attention sinks and the observation window.
    """
    num_rows, num_tokens, head_size = keys.shape
    assert values.shape == keys.shape
    first, last = parameters.num_sinks, num_tokens - parameters.observation_window
    if known is None:
        known = torch.empty(num_rows, 0, dtype=torch.int32, device=keys.device)
    num_known = known.shape[1]
    begin = first + num_known
    if begin >= last:
        raise ValueError(
            f"a prefix of {num_tokens} tokens is too short to cluster: {parameters.num_sinks} attention sinks and an "
            f"observation window of {parameters.observation_window} tokens leave none; the shortest has "
            f"{parameters.num_sinks + parameters.observation_window + 1}"
        )
    if keys.device.type == "cpu":
        # batches that stay in the cache run twice as fast
        memory_bytes = min(memory_bytes, CPU_MEMORY_BYTES)
    num_new = last - begin
    # those that are always attended to count where the prefix is clustered from its first token on
    num_counted = num_new if num_known else num_tokens
    labels = keys.new_empty(num_rows, num_new, dtype=torch.int32)
    lengths, counts = [], []
    generator = torch.Generator().manual_seed(parameters.seed)
    for start, num_windows, length in _equal_windows(num_new, parameters.window):
        tokens = slice(start, start + num_windows * length)
        windows = keys[:, begin:last][:, tokens].unflatten(1, (num_windows, length))
        window_labels = labels[:, tokens].unflatten(1, (num_windows, length))
        window_counts = labels.new_empty(num_rows, num_windows)
        num_centroids = round(parameters.centroids * num_counted * length / num_new)
        num_centroids = min(max(num_centroids, 1), length)
        # the same lots in every row and window: what a row gets must not depend on how rows are batched
        lots = torch.rand(1 + SEED_ROUNDS, length, generator=generator).to(keys.device)
        direction = torch.randn(head_size, generator=generator).to(keys.device)
        bytes_per_window = 4 * length * (num_centroids + 7 * head_size)
        for batch in _batches(num_rows * num_windows, bytes_per_window, memory_bytes, keys.device):
            row, window = batch // num_windows, batch % num_windows
            batch_keys = windows[row, window].float()
            points = functional.normalize(batch_keys - batch_keys.mean(1, keepdim=True), dim=-1)
            seeds = _seeds(points, num_centroids, lots, memory_bytes)
            found = _k_means(points, seeds, parameters.iterations, memory_bytes)
            found, count = _split_large(batch_keys, found, num_centroids, parameters.max_cluster, direction)
            window_labels[row, window] = found.int()
            window_counts[row, window] = count.int()
        lengths += [length] * num_windows
        counts.append(window_counts)

    if num_known:
        labels = torch.cat([known, labels], 1)
        lengths, counts = [num_known, *lengths], [known.amax(1, keepdim=True) + 1, *counts]
    counts = torch.cat(counts, 1)
    labels += (counts.cumsum(1, dtype=torch.int32) - counts).repeat_interleave(torch.tensor(lengths).to(labels), 1)
    return _summarise(keys, values, labels, int(counts.sum(1).max()), first, memory_bytes)


def mean_cosine(keys: torch.Tensor, clusters: Clusters) -> float:
    """Mean cosine of the clustered keys [B, T, D] to the centroids of their clusters, in [-1, 1]; higher is better."""
    total = keys.new_zeros((), dtype=torch.float64)
    for row in range(len(keys)):
        one = slice(row, row + 1)
        unit_keys = functional.normalize(keys[one].float(), dim=-1)
        means = _segment_means(unit_keys, clusters.members[one].long(), clusters.starts[one].long())
        cosine = (means * functional.normalize(clusters.centroids[one], dim=-1)).sum(-1)
        total += (cosine * clusters.sizes[one]).sum()
    return float(total) / clusters.members.numel()


def logit_variances(
    keys: torch.Tensor, clusters: Clusters, centroids: torch.Tensor, queries: torch.Tensor
) -> torch.Tensor:
    """How logits of a cluster's keys spread around its centroid's, for queries that go where given ones do.

    Args:
        keys: [B, T, D] float32.
        clusters: of the keys.
        centroids: [B, C, D] float32, those that are read.
        queries: [B, W, G, D].

    Returns:
        [B, C] float32, not negative, 0 for empty clusters: the mean square over keys and queries of the query times
        the key less the centroid, over the mean squared length of the queries.
    """
    starts, variances = clusters.starts.long(), torch.empty_like(clusters.key_squares)
    for row, sizes in enumerate(clusters.sizes.long()):
        query = queries[row].flatten(0, 1).float()
        moments = query.T @ query / query.square().sum().clamp(min=torch.finfo(torch.float32).tiny)  # [D, D]
        members = clusters.members[row].long()
        apart = keys[row, members] - centroids[row].repeat_interleave(sizes, 0, output_size=len(members))
        squares = torch.linalg.vecdot(apart @ moments, apart)[None, :, None]
        in_order = torch.arange(len(members), device=keys.device)[None]
        variances[row] = _segment_means(squares, in_order, starts[row : row + 1])[0, :, 0]
    return variances.clamp(min=0)


def logit_residuals(
    keys: torch.Tensor, clusters: Clusters, centroids: torch.Tensor, queries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How keys lie beside their centroids, in the few directions that tell most of how their logits differ.

    These are the principal components of the differences, measured by the products that queries have with them.

    Args:
        keys: [B, T, D] float32.
        clusters: of the keys.
        centroids: [B, C, D] float32, those that are read.
        queries: [B, W, G, D], which say where queries go.

    Returns:
        elements for each of the ``members``, as ``words_of``, int32 [B, M, NUM_DIRECTIONS / 8]; and what products of a
        query with them mean, [B, NUM_DIRECTIONS, D] float32, no element beyond
        ``LARGEST_DIRECTION``.
    """
    num_rows, num_members = clusters.members.shape
    size = keys.shape[-1]
    residuals = clusters.members.new_empty(num_rows, num_members, NUM_DIRECTIONS // 8)
    directions = torch.zeros(num_rows, NUM_DIRECTIONS, size)

    def apart_in(row: int) -> torch.Tensor:
        of_member = centroids[row].repeat_interleave(clusters.sizes[row].long(), 0, output_size=num_members)
        return keys[row, clusters.members[row].long()] - of_member

    def moments_of(vectors: torch.Tensor) -> torch.Tensor:
        return (vectors.T @ vectors / len(vectors)).double().cpu()

    of_queries = torch.stack([moments_of(query.flatten(0, 1).float()) for query in queries])
    of_residuals = torch.stack([moments_of(apart_in(row)) for row in range(num_rows)])
    mean_square = of_queries.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    of_queries = of_queries + torch.eye(size) * (LEAST_MOMENT * mean_square).clamp(min=torch.finfo(torch.float32).tiny)
    squares, axes = torch.linalg.eigh(of_queries)
    root, inverse = ((axes * squares[:, None] ** power) @ axes.mT for power in (0.5, -0.5))
    spreads, components = (
        found.flip(-1)[..., :NUM_DIRECTIONS] for found in torch.linalg.eigh(root @ of_residuals @ root)
    )
    steps = STEP * spreads.clamp(min=0).sqrt()[:, None]
    directions[:, : spreads.shape[-1]] = (inverse @ components * steps).mT
    across = root @ components / steps.where(steps > 0, torch.inf)
    for row in range(num_rows):
        elements = (apart_in(row) @ across[row].to(keys)).round().clamp(LEAST_PACKED, -LEAST_PACKED - 1)
        residuals[row] = words_of(functional.pad(elements, (0, NUM_DIRECTIONS - elements.shape[-1])))
    return residuals, directions.clamp(-LARGEST_DIRECTION, LARGEST_DIRECTION).to(keys.device)


def _equal_windows(num_clustered: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Yields the first token, the number of windows and their length, for the longer windows, then the shorter."""
    num_windows = -(-num_clustered // window)
    length, num_longer = divmod(num_clustered, num_windows)
    if num_longer:
        yield 0, num_longer, length + 1
    yield num_longer * (length + 1), num_windows - num_longer, length


def _batches(count: int, bytes_each: int, memory_bytes: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Indices 0..count - 1 in pieces that fit into the memory, of one index at least."""
    return torch.arange(count, device=device).split(max(memory_bytes // bytes_each, 1))


def _seeds(points: torch.Tensor, count: int, lots: torch.Tensor, memory_bytes: int) -> torch.Tensor:
    """Draws the points that K-means starts from: some evenly, then more in rounds, rather those far from all so far.

    Lloyd's algorithm moves centroids, but hardly from where keys are many and alike to where they are few and differ,
    and a mean key there says little of its own.

    Args:
        points: [I, n, D].
        count: k, how many to draw.
        lots: [1 + SEED_ROUNDS, n] numbers from 0 to 1, for each draw.
        memory_bytes: bound on temporary memory.

    Returns:
        [I, k, D].
    """
    per_round = count // len(lots)
    seeds, log_weights = points[:, :0], torch.zeros_like(points[..., 0])
    for lot, size in zip(lots, [count - SEED_ROUNDS * per_round, *[per_round] * SEED_ROUNDS], strict=True):
        if seeds.shape[1]:
            nearest = torch.take_along_dim(seeds, _nearest(points, seeds, memory_bytes)[..., None], 1)
            log_weights = (points - nearest).square().sum(-1).log() * (SEED_POWER / 2)
        # the highest of these are a draw without replacement, by weight
        ranks = log_weights - (-lot.clamp(min=torch.finfo(lot.dtype).tiny).log()).log()
        drawn = ranks.argsort(dim=1, descending=True, stable=True)[:, :size]
        seeds = torch.cat([seeds, torch.take_along_dim(points, drawn[..., None], 1)], 1)
    return seeds


def _k_means(points: torch.Tensor, centroids: torch.Tensor, iterations: int, memory_bytes: int) -> torch.Tensor:
    """Lloyd's algorithm on points [I, n, D] from centroids [I, k, D]: labels [I, n]. Empty clusters stay in place."""
    num_clusters = centroids.shape[1]
    for _ in range(iterations):
        order, starts, sizes = _group(_nearest(points, centroids, memory_bytes), num_clusters)
        centroids = torch.where(sizes[..., None] > 0, _segment_means(points, order, starts), centroids)
    return _nearest(points, centroids, memory_bytes)


def _nearest(points: torch.Tensor, centroids: torch.Tensor, memory_bytes: int) -> torch.Tensor:
    """The centroid [I, k, D] of least Euclidean distance to each point [I, n, D]: labels [I, n]."""
    if points.is_cuda:
        from vllm_squeeze.kernels.nearest import nearest

        return nearest(points, centroids)
    return nearest_reference(points, centroids, memory_bytes)


def _group(labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orders points by their labels [I, n]: order [I, n], starts [I, k] in it, and sizes [I, k], all int64."""
    ordered, order = labels.sort(dim=-1, stable=True)
    clusters = torch.arange(num_clusters, device=labels.device, dtype=labels.dtype).expand(len(labels), -1)
    starts = torch.searchsorted(ordered, clusters.contiguous())
    end = starts.new_full((len(labels), 1), labels.shape[1])
    return order, starts, starts.diff(dim=-1, append=end)


def _segment_means(points: torch.Tensor, order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Means of the points [I, n, D] over segments of ``order`` [I, m] that begin at ``starts`` [I, k]: [I, k, D]."""
    item = torch.arange(len(points), device=points.device)[:, None]
    # an embedding bag sums in order without atomics, and reads each point where it lies
    return functional.embedding_bag(
        (order + item * points.shape[1]).flatten(),
        points.flatten(0, 1),
        (starts + item * order.shape[1]).flatten(),
        mode="mean",
    ).unflatten(0, starts.shape)


def _split_large(
    keys: torch.Tensor, labels: torch.Tensor, num_clusters: int, max_cluster: int, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits clusters above the limit into near-equal parts along their main direction, and drops empty ones.

    Args:
        keys: [I, n, D] float32.
        labels: [I, n] int64, below ``num_clusters``.
        num_clusters: k.
        max_cluster: the limit.
        direction: [D], where the power iteration starts.

    Returns:
        new labels [I, n] int64, and how many there are, [I] int64.
    """
    order, starts, sizes = _group(labels, num_clusters)
    parts = -(-sizes // max_cluster)
    new_labels = (parts.cumsum(1) - parts).gather(1, labels)
    large = parts > 1
    sizes = sizes[large]  # [L], L large clusters
    if len(sizes):
        cluster = torch.arange(len(sizes), device=keys.device).repeat_interleave(sizes)  # [N], their N members
        first = sizes.cumsum(0) - sizes
        rank = torch.arange(len(cluster), device=keys.device) - first[cluster]
        item = large.nonzero()[:, 0][cluster]
        token = order[item, starts[large][cluster] + rank]
        position = _main_position(keys[item, token], cluster, first, direction)
        along = position.argsort(stable=True)
        along = along[cluster[along].argsort(stable=True)]
        new_labels[item[along], token[along]] += rank * parts[large][cluster] // sizes[cluster]
    return new_labels, parts.sum(1)


def _main_position(
    points: torch.Tensor, cluster: torch.Tensor, first: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    """Where points [N, D], ordered by ``cluster`` [N], lie on the first principal axis of their cluster: [N].

    Args:
        points: [N, D].
        cluster: [N] int64, never decreasing.
        first: [L] int64, the first point of each cluster.
        direction: [D], where the power iteration starts.
    """
    here = torch.arange(len(points), device=points.device)
    points = points - functional.embedding_bag(here, points, first, mode="mean")[cluster]
    position = points @ direction
    for _ in range(POWER_ITERATIONS):
        axis = functional.embedding_bag(here, points, first, mode="sum", per_sample_weights=position)
        position = torch.linalg.vecdot(points, functional.normalize(axis, dim=-1)[cluster])
    return position


def _summarise(
    keys: torch.Tensor, values: torch.Tensor, labels: torch.Tensor, num_clusters: int, first: int, memory_bytes: int
) -> Clusters:
    """Means, sizes and members of the clusters that ``labels`` [B, M] assigns to the tokens from ``first`` on."""
    num_rows, num_tokens, head_size = keys.shape
    centroids = keys.new_empty(num_rows, num_clusters, head_size, dtype=torch.float32)
    clusters = Clusters(
        centroids,
        torch.empty_like(centroids),
        torch.empty_like(centroids[..., 0]),
        torch.empty_like(centroids[..., 0]),
        labels.new_empty(num_rows, num_clusters),
        torch.empty_like(labels),
    )
    for rows in _batches(num_rows, num_tokens * (4 * head_size + 32), memory_bytes, keys.device):
        order, starts, sizes = _group(labels[rows], num_clusters)
        members = order + first
        for vectors, means, squares in (
            (keys, clusters.centroids, clusters.key_squares),
            (values, clusters.value_centroids, clusters.value_squares),
        ):
            points = vectors[rows].float()
            means[rows] = _segment_means(points, members, starts)
            squares[rows] = _segment_means(torch.linalg.vecdot(points, points)[..., None], members, starts)[..., 0]
        clusters.sizes[rows] = sizes.int()
        clusters.members[rows] = members.int()
    return clusters
