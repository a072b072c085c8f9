"""Orders clusters so that NEIGHBOURS side by side, from the first on, are alike.

They are halved along their main direction again and again, some hundreds at a time, until so many are left. B counts
rows, C clusters of each, D the head size.
"""

from dataclasses import replace

import torch
from torch.nn import functional

from vllm_squeeze.kernels.tables import NEIGHBOURS
from vllm_squeeze.prefix_index.clustering import POWER_ITERATIONS, Clusters

CLUSTERS_AT_ONCE = 512
"""Clusters that are halved at first: NEIGHBOURS times a power of two, about as many as a window has."""


def in_groups(clusters: Clusters) -> Clusters:
    """The same clusters in another order, by groups that are alike."""
    order = alike(clusters.centroids, clusters.sizes)
    num_rows, num_members = clusters.members.shape
    place = torch.arange(num_members, device=order.device, dtype=torch.int32).expand(num_rows, -1).contiguous()
    cluster = torch.searchsorted(clusters.starts, place, right=True) - 1
    moved_to = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).to(order).expand_as(order))
    members = clusters.members.gather(1, moved_to.gather(1, cluster).argsort(dim=1, stable=True))
    of_clusters = {name: getattr(clusters, name) for name in vars(clusters) if name != "members"}
    index = {2: order, 3: order[..., None]}
    moved = {name: tensor.gather(1, index[tensor.dim()].expand_as(tensor)) for name, tensor in of_clusters.items()}
    return replace(clusters, **moved, members=members)


def alike(centroids: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """An order [B, C] int64 of clusters in which those of a group have like directions, and empty ones come last.

    Args:
        centroids: [B, C, D] float32.
        sizes: [B, C]; in each row the empty clusters come last.
    """
    num_rows, num_clusters, head_size = centroids.shape
    weights = (sizes / sizes.sum(1, keepdim=True))[..., None]
    points = functional.normalize(centroids - (centroids * weights).sum(1, keepdim=True), dim=-1)
    padding = -num_clusters % CLUSTERS_AT_ONCE
    points = functional.pad(points, (0, 0, 0, padding)).view(-1, CLUSTERS_AT_ONCE, head_size)
    there = functional.pad(sizes > 0, (0, padding)).view(-1, CLUSTERS_AT_ONCE)
    order = torch.arange(CLUSTERS_AT_ONCE, device=points.device).expand(len(points), -1)
    length = CLUSTERS_AT_ONCE
    while length > NEIGHBOURS:
        position = _main_position(points.view(-1, length, head_size), there.view(-1, length))
        within = position.argsort(dim=1, stable=True)
        order = order.reshape(-1, length).gather(1, within).view_as(order)
        points = points.view(-1, length, head_size).gather(1, within[..., None].expand(-1, -1, head_size))
        there = there.view(-1, length).gather(1, within)
        length //= 2
    order = order.view(num_rows, -1, CLUSTERS_AT_ONCE)
    firsts = torch.arange(order.shape[1], device=order.device) * CLUSTERS_AT_ONCE
    return (order + firsts[:, None]).flatten(1)[:, :num_clusters]


def _main_position(points: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Where points [I, n, D] lie on the first principal axis of those that are ``there`` [I, n], others at infinity."""
    there = there[..., None]
    points = (points - (points * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)) * there
    # from the point that lies farthest out
    farthest = points.square().sum(-1).argmax(1)
    axis = points[torch.arange(len(points), device=points.device), farthest]
    for _ in range(POWER_ITERATIONS):
        axis = functional.normalize(
            torch.einsum("ind,in->id", points, torch.einsum("ind,id->in", points, axis)), dim=-1
        )
    return torch.einsum("ind,id->in", points, axis).masked_fill(~there[..., 0], torch.inf)
