"""The nearest centroids, against the oracle."""

import pytest
import torch
from torch.nn import functional

from tests.kernels.conftest import ON_GPU
from vllm_squeeze.kernels.nearest import nearest
from vllm_squeeze.kernels.reference import nearest_reference

DEVICE = "cuda" if ON_GPU else "cpu"
# What rounding vectors of unit length to 16-bit floats adds to half a squared distance, at most.
ROUNDING = 2e-3


def make(num_items: int, num_points: int, num_centroids: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_points)
    points = functional.normalize(torch.randn(num_items, num_points, head_size, generator=generator), dim=-1)
    lengths = torch.rand(num_items, num_centroids, 1, generator=generator)
    directions = torch.randn(num_items, num_centroids, head_size, generator=generator)
    return points.to(DEVICE), (functional.normalize(directions, dim=-1) * lengths).to(DEVICE)


@pytest.mark.parametrize(
    ("num_items", "num_points", "num_centroids", "head_size"),
    [(1, 1, 1, 64), (3, 129, 1, 128), (2, 300, 65, 80), (1, 40, 40, 256), (2, 257, 31, 64), (1, 64, 200, 128)],
)
def test_labels_are_those_of_the_oracle(num_items, num_points, num_centroids, head_size):
    points, centroids = make(num_items, num_points, num_centroids, head_size)
    labels, expected = nearest(points, centroids), nearest_reference(points, centroids)
    assert labels.shape == expected.shape and labels.dtype == expected.dtype
    assert 0 <= labels.min() and labels.max() < num_centroids
    half_distances = torch.cdist(points.double(), centroids.double()).square() / 2
    found, least = (half_distances.gather(2, which[..., None]) for which in (labels, expected))
    assert (found - least).max() < ROUNDING
    assert (labels == expected).double().mean() > 0.97


def test_of_equally_near_centroids_the_first_counts():
    # of so few digits that sums are exact, in whatever order a processor makes them
    points, centroids = ((vectors * 64).round() / 64 for vectors in make(2, 50, 5, 64))
    repeated = torch.cat([centroids] * 30, 1)  # in several blocks of centroids, and within one
    assert torch.equal(nearest(points, repeated), nearest(points, centroids))


def test_reads_where_points_lie():
    """Points and centroids that are slices of larger tensors."""
    points, centroids = make(4, 100, 20, 64)
    wide, wider = torch.full((4, 100, 96), torch.nan, device=DEVICE), torch.full((4, 40, 64), torch.nan, device=DEVICE)
    wide[..., :64], wider[:, ::2] = points, centroids
    assert torch.equal(nearest(wide[..., :64], wider[:, ::2]), nearest(points, centroids))


def test_an_item_does_not_depend_on_others():
    points, centroids = make(3, 70, 12, 128)
    alone = [nearest(points[i : i + 1], centroids[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(alone), nearest(points, centroids))
