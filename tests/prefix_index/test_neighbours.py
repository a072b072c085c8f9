"""Clusters in an order in which those of a group are alike."""

import pytest
import torch
from torch.nn import functional

from vllm_squeeze.kernels.tables import NEIGHBOURS
from vllm_squeeze.prefix_index import neighbours
from vllm_squeeze.prefix_index.clustering import Clusters, cluster_keys, mean_cosine
from vllm_squeeze.prefix_index.manifest import IndexParameters
from vllm_squeeze.prefix_index.neighbours import alike, in_groups

ROWS, SIZE = 3, 32


def directions(count: int, seed: int = 0) -> torch.Tensor:
    """Vectors [ROWS, NEIGHBOURS * count, SIZE] about ``count`` directions for each row, mixed."""
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(ROWS, count, SIZE, generator=random).repeat_interleave(NEIGHBOURS, 1)
    points = points + 0.05 * torch.randn(points.shape, generator=random)
    return points[:, torch.randperm(points.shape[1], generator=random)]


def likeness(points: torch.Tensor) -> torch.Tensor:
    """Mean cosine [ROWS] of vectors to others of their group."""
    groups = functional.normalize(points, dim=-1).unflatten(1, (-1, NEIGHBOURS))
    return (groups @ groups.mT).mean((1, 2, 3))


@pytest.mark.parametrize(("count", "at_once"), [(7, 64), (16, 64), (16, 512), (32, 64), (50, 512)])
def test_neighbours_are_alike(monkeypatch, count: int, at_once: int):
    monkeypatch.setattr(neighbours, "CLUSTERS_AT_ONCE", at_once)
    points = directions(count)
    order = alike(points, torch.ones(points.shape[:2]))
    assert torch.equal(order.sort(1).values, torch.arange(points.shape[1]).expand(ROWS, -1))
    # only those of one part are put together
    assert torch.equal(order[:, :at_once].sort(1).values, torch.arange(points.shape[1])[:at_once].expand(ROWS, -1))
    moved = points.gather(1, order[..., None].expand_as(points))
    assert (likeness(moved) > likeness(points) + 0.2).all()


def test_a_row_does_not_depend_on_others():
    points, sizes = directions(30), torch.ones(ROWS, NEIGHBOURS * 30)
    together = alike(points, sizes)
    for row in range(ROWS):
        assert torch.equal(alike(points[row : row + 1], sizes[row : row + 1])[0], together[row])


@pytest.mark.parametrize("num_empty", [1, 6, 117])
def test_empty_clusters_stay_at_the_end(num_empty: int):
    points, sizes = directions(30), torch.ones(ROWS, NEIGHBOURS * 30)
    sizes[1, -num_empty:] = 0
    points[1, -num_empty:] = 0
    order = alike(points, sizes)
    last = torch.arange(NEIGHBOURS * 30)[-num_empty:]
    assert torch.equal(order[1, -num_empty:], last)
    assert order.isfinite().all() and torch.equal(order[0], alike(points[:1], sizes[:1])[0])


def test_large_clusters_count_for_the_mean_that_is_taken_off():
    """As it is in K-means: what all keys have in common tells none of them apart."""
    points, sizes = directions(8), torch.randint(1, 50, (ROWS, NEIGHBOURS * 8))
    moved = alike(points + 100, sizes)
    assert torch.equal(moved, alike(points, sizes))


@pytest.fixture(scope="module")
def clustered() -> tuple[torch.Tensor, Clusters]:
    random = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, ROWS, 700, SIZE, generator=random)
    keys[1, 300:] = keys[1, :400].clone()  # so that a row has fewer clusters than others
    return keys, cluster_keys(keys, values, IndexParameters(num_sinks=4, window=200, max_cluster=30))


def test_clusters_keep_their_keys(clustered):
    keys, before = clustered
    after = in_groups(before)
    assert not torch.equal(after.centroids, before.centroids)

    def described(clusters: Clusters, row: int) -> list[tuple]:
        facts = clusters.centroids, clusters.value_centroids, clusters.key_squares, clusters.value_squares
        members = clusters.members[row].split(clusters.sizes[row].tolist())
        each = zip(*(of_clusters[row].tolist() for of_clusters in facts), members, strict=True)
        return [(*facts, members.tolist()) for *facts, members in each]

    for row in range(ROWS):
        assert sorted(map(str, described(after, row))) == sorted(map(str, described(before, row)))
        assert all(members == sorted(members) for *_, members in described(after, row))
    assert mean_cosine(keys, after) == pytest.approx(mean_cosine(keys, before))
