"""What an index keeps of clusters, and what weights they have in the choice."""

import pytest
import torch

from vllm_squeeze.kernels.tables import unquantised
from vllm_squeeze.prefix_index.clustering import cluster_keys
from vllm_squeeze.prefix_index.manifest import IndexParameters
from vllm_squeeze.prefix_index.stored_clusters import LEAST_WEIGHT, stored


@pytest.fixture(scope="module")
def prefix() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [2, 600, 16]; the keys of the first head lie together by twos."""
    keys, values = torch.randn(2, 2, 600, 16, generator=torch.Generator().manual_seed(0))
    keys[0] = keys[0, ::2].repeat_interleave(2, 0) * 3
    return keys, values * torch.linspace(0.1, 4, 600)[:, None]


def test_centroids_are_within_half_a_step(prefix):
    clusters = cluster_keys(*prefix, IndexParameters())
    kept = stored(clusters, "error")
    assert torch.equal(kept.sizes, clusters.sizes) and torch.equal(kept.members, clusters.members)
    for means, in_8_bits, scales in (
        (clusters.centroids, kept.centroids, kept.centroid_scales),
        (clusters.value_centroids, kept.value_centroids, kept.value_scales),
    ):
        assert in_8_bits.dtype == torch.int8 and (in_8_bits.abs().amax(-1) == 127).all()
        assert ((unquantised(in_8_bits, scales) - means).abs() <= 0.501 * scales[..., None]).all()


def test_weights_are_errors_of_lumping_keys_together(prefix):
    keys, values = prefix
    kept = stored(cluster_keys(keys, values, IndexParameters()), "error")
    weights = kept.log_weights.double().exp()
    for head in range(2):
        errors = []
        for cluster, members in enumerate(kept.members[head].long().split(kept.sizes[head].tolist())):
            centroid = kept.centroids[head, cluster].double() * kept.centroid_scales[head, cluster]
            apart = (keys[head, members] - centroid).square().sum(-1).mean().sqrt()
            errors.append(apart * values[head, members].double().square().sum(-1).mean().sqrt())
        errors = torch.stack(errors)
        torch.testing.assert_close(weights[head], errors / errors.mean(), rtol=1e-3, atol=0)


def test_variances_are_of_the_keys_around_their_centroid(prefix):
    keys, values = prefix
    kept = stored(cluster_keys(keys, values, IndexParameters()), "error")
    for head in range(2):
        for cluster, members in enumerate(kept.members[head].long().split(kept.sizes[head].tolist())):
            centroid = kept.centroids[head, cluster].double() * kept.centroid_scales[head, cluster]
            expected = (keys[head, members] - centroid).square().mean()
            assert float(kept.variances[head, cluster]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("rule", ["error", "paper"])
def test_clusters_of_one_key_have_a_weight(prefix, rule: str):
    """Nothing is lost where they are lumped together, but with a threshold of minus infinity they have to be chosen."""
    keys, values = prefix
    weights = stored(cluster_keys(keys, values * 0, IndexParameters(centroids=1.0)), rule).log_weights.exp()
    assert weights.isfinite().all() and (weights >= 0.99 * LEAST_WEIGHT).all()


def test_the_papers_rule_has_no_weights_and_no_raises(prefix):
    kept = stored(cluster_keys(*prefix, IndexParameters()), "paper")
    assert not kept.log_weights.any() and not kept.variances.any()
