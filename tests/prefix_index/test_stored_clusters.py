"""What an index keeps of clusters, and what weights they have in the choice."""

import pytest
import torch

from vllm_squeeze.kernels.tables import unpacked
from vllm_squeeze.prefix_index.clustering import Clusters, cluster_keys
from vllm_squeeze.prefix_index.index_folder import LayerClusters
from vllm_squeeze.prefix_index.manifest import IndexParameters
from vllm_squeeze.prefix_index.stored_clusters import LEAST_WEIGHT, stored


@pytest.fixture(scope="module")
def prefix() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [2, 600, 16]; the keys of the first head lie together by twos."""
    keys, values = torch.randn(2, 2, 600, 16, generator=torch.Generator().manual_seed(0))
    keys[0] = keys[0, ::2].repeat_interleave(2, 0) * 3
    return keys, values * torch.linspace(0.1, 4, 600)[:, None]


def clusters_of(prefix: tuple[torch.Tensor, torch.Tensor], **parameters: float) -> Clusters:
    return cluster_keys(*prefix, IndexParameters(**parameters))


def kept_of(prefix: tuple[torch.Tensor, torch.Tensor], rule: str = "error", **parameters: float) -> LayerClusters:
    """With queries along each axis."""
    queries = torch.eye(16).expand(2, 1, -1, -1)
    return stored(clusters_of(prefix, **parameters), rule, prefix[0], queries)


def test_centroids_are_within_half_a_step(prefix):
    clusters, kept = clusters_of(prefix), kept_of(prefix)
    assert torch.equal(kept.sizes, clusters.sizes) and torch.equal(kept.members, clusters.members)
    assert kept.centroids.dtype == kept.value_centroids.dtype == torch.int32
    middle, spread = kept.frame.split(1, 1)
    for means, as_read, scales, middle, spread in (
        (clusters.centroids, kept.mean_keys(), kept.centroid_scales, middle, spread),
        (clusters.value_centroids, unpacked(kept.value_centroids, kept.value_scales), kept.value_scales, 0.0, 1.0),
    ):
        assert torch.allclose(((as_read - middle) / spread).abs().amax(-1), 7 * scales)
        assert ((as_read - means).abs() <= 0.501 * scales[..., None] * spread).all()


def test_weights_are_errors_of_lumping_keys_together(prefix):
    keys, values = prefix
    kept = kept_of(prefix)
    weights = kept.log_weights.double().exp()
    for head in range(2):
        errors = []
        for cluster, members in enumerate(kept.members[head].long().split(kept.sizes[head].tolist())):
            centroid = kept.mean_keys()[head, cluster].double()
            apart = (keys[head, members] - centroid).square().sum(-1).mean().sqrt()
            errors.append(apart * values[head, members].double().square().sum(-1).mean().sqrt())
        errors = torch.stack(errors)
        torch.testing.assert_close(weights[head], errors / errors.mean(), rtol=1e-3, atol=0)


def test_variances_are_of_the_logits_around_their_centroids(prefix):
    """Over the squared length of the query, in the directions that queries have."""
    keys, _ = prefix
    queries = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 4, 16)
    kept = stored(clusters_of(prefix), "error", keys, queries)
    for head in range(2):
        for cluster, members in enumerate(kept.members[head].long().split(kept.sizes[head].tolist())):
            centroid = kept.mean_keys()[head, cluster].double()
            logits = queries[head].double() @ (keys[head, members] - centroid).mT
            expected = logits.square().mean() / queries[head].double().square().sum(-1).mean()
            assert float(kept.variances[head, cluster]) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_variances_are_those_of_all_directions_for_queries_that_go_everywhere(prefix):
    kept = kept_of(prefix)
    for head in range(2):
        for cluster, members in enumerate(kept.members[head].long().split(kept.sizes[head].tolist())):
            centroid = kept.mean_keys()[head, cluster].double()
            expected = (prefix[0][head, members] - centroid).square().mean()
            assert float(kept.variances[head, cluster]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_queries_of_no_length_see_no_variances(prefix):
    kept = stored(clusters_of(prefix), "error", prefix[0], torch.zeros(2, 1, 1, 16))
    assert not kept.variances.any()


@pytest.mark.parametrize("rule", ["error", "paper"])
def test_clusters_of_one_key_have_a_weight(prefix, rule: str):
    """Nothing is lost where they are lumped together, but with a threshold of minus infinity they have to be chosen."""
    keys, values = prefix
    weights = kept_of((keys, values * 0), rule, centroids=1.0).log_weights.exp()
    assert weights.isfinite().all() and (weights >= 0.99 * LEAST_WEIGHT).all()


def test_the_papers_rule_has_no_weights_and_no_raises(prefix):
    kept = kept_of(prefix, "paper")
    assert not kept.log_weights.any() and not kept.variances.any()
