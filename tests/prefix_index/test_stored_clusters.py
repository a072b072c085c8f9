"""What an index keeps of clusters, and what weights they have in the choice."""

import pytest
import torch

from vllm_squeeze.kernels.reference import residual_scores
from vllm_squeeze.kernels.tables import LEAST_PACKED, NUM_DIRECTIONS, elements_of, unpacked
from vllm_squeeze.prefix_index.clustering import Clusters, cluster_keys
from vllm_squeeze.prefix_index.index_folder import LARGEST_DIRECTION, LayerClusters
from vllm_squeeze.prefix_index.manifest import RULES, IndexParameters
from vllm_squeeze.prefix_index.stored_clusters import LEAST_WEIGHT, stored


@pytest.fixture(scope="module")
def prefix() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [2, 600, 16]; the keys of the first head lie together by twos."""
    keys, values = torch.randn(2, 2, 600, 16, generator=torch.Generator().manual_seed(0))
    keys[0] = keys[0, ::2].repeat_interleave(2, 0) * 3
    return keys, values * torch.linspace(0.1, 4, 600)[:, None]


def clusters_of(prefix: tuple[torch.Tensor, torch.Tensor], **parameters: float) -> Clusters:
    return cluster_keys(*prefix, IndexParameters(**parameters))


def kept_of(prefix: tuple[torch.Tensor, torch.Tensor], rule: str = "keys", **parameters: float) -> LayerClusters:
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
    kept = stored(clusters_of(prefix), "keys", keys, queries)
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
    kept = stored(clusters_of(prefix), "keys", prefix[0], torch.zeros(2, 1, 1, 16))
    assert not kept.variances.any()


@pytest.mark.parametrize("rule", RULES)
def test_clusters_of_one_key_have_a_weight(prefix, rule: str):
    """Nothing is lost where they are lumped together, but with a threshold of minus infinity they have to be chosen."""
    keys, values = prefix
    weights = kept_of((keys, values * 0), rule, centroids=1.0).log_weights.exp()
    assert weights.isfinite().all() and (weights >= 0.99 * LEAST_WEIGHT).all()


def test_the_papers_rule_has_no_weights_and_no_raises(prefix):
    kept = kept_of(prefix, "paper")
    assert not kept.log_weights.any() and not kept.variances.any()


def scores_beside(kept: LayerClusters, queries: torch.Tensor) -> torch.Tensor:
    """Products of queries [B, W, G, D] with members less their mean keys, as residuals tell: [B, W * G, M]."""
    return residual_scores(queries.flatten(1, 2), kept.directions, kept.residuals, 1.0)


def true_scores_beside(kept: LayerClusters, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The same of the keys themselves."""
    found = []
    for head, members in enumerate(kept.members.long()):
        mean_keys = kept.mean_keys()[head].repeat_interleave(kept.sizes[head].long(), 0)
        found.append(queries[head].flatten(0, 1).double() @ (keys[head, members] - mean_keys).double().mT)
    return torch.stack(found)


def relative_error(kept: LayerClusters, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Of these products, over their root mean square, for each KV head: 1 if residuals told nothing."""
    right = true_scores_beside(kept, keys, queries)
    errors = (scores_beside(kept, queries) - right).square().mean((1, 2))
    return (errors / right.square().mean((1, 2))).sqrt()


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [8, NUM_DIRECTIONS])
def test_residuals_tell_how_keys_lie_beside_their_mean_key(prefix, size: int, rule: str):
    """Where there are no more elements than directions, but for rounding to 4 bits; to queries not seen as well."""
    prefix = tuple(tensor[..., :size] for tensor in prefix)
    queries = random(2, 40, 3, size) * torch.linspace(0.3, 3, size)
    kept = stored(clusters_of(prefix), rule, prefix[0], queries[:, :20])
    assert (
        kept.residuals.shape == (2, kept.members.shape[1], NUM_DIRECTIONS // 8) and kept.residuals.dtype == torch.int32
    )
    assert kept.directions.shape == (2, NUM_DIRECTIONS, size) and kept.directions.dtype == torch.float32
    assert (relative_error(kept, prefix[0], queries[:, :20]) < 0.2).all()
    assert (relative_error(kept, prefix[0], queries[:, 20:]) < 0.2).all()


def test_all_of_the_4_bits_are_used(prefix):
    """Elements of each direction are spread alike, whatever its share in the logits, and few are cut off."""
    kept = stored(clusters_of(prefix), "keys", prefix[0], random(2, 20, 3, 16) * torch.linspace(0.03, 3, 16))
    elements = elements_of(kept.residuals)
    assert elements.amin() == LEAST_PACKED and elements.amax() == 7
    assert ((elements == LEAST_PACKED) | (elements == 7)).float().mean() < 0.05
    spreads = elements.square().mean(1).sqrt()
    assert (spreads > 2).all() and (spreads < 4).all()


def test_residuals_follow_where_queries_go():
    """Of many more elements than directions, those count along which queries differ."""
    keys, values = random(2, 2, 600, 64, seed=0)
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(2, 64, 64, generator=generator)).Q
    of_length = torch.full((64,), 0.05)
    of_length[:5] = 3
    queries = random(2, 60, 3, 64) * of_length @ basis[:, None]
    clusters = clusters_of((keys, values))
    kept = stored(clusters, "error", keys, queries[:, :30])
    assert (relative_error(kept, keys, queries[:, 30:]) < 0.25).all()
    elsewhere = stored(clusters, "error", keys, queries[:, :30].flip(0))
    assert (relative_error(elsewhere, keys, queries[:, 30:]) > 2 * relative_error(kept, keys, queries[:, 30:])).all()
    everywhere = random(2, 60, 3, 64)
    kept = stored(clusters, "error", keys, everywhere[:, :30])
    assert (relative_error(kept, keys, everywhere[:, 30:]) < 0.9).all(), "a quarter of the directions tells something"


def test_directions_are_never_longer_than_an_index_may_hold(prefix):
    """Even where keys lie further apart than those of any model; others are as they come."""
    queries = random(2, 20, 3, 16)
    largest = [
        stored(clusters_of((keys, prefix[1])), "error", keys, queries).directions.abs().amax()
        for keys in (prefix[0], prefix[0] * 1e5)
    ]
    assert 0 < largest[0] < 10 and largest[1] == LARGEST_DIRECTION


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e4])
def test_residuals_are_finite_whatever_length_queries_have(prefix, length: float):
    """Where they have none, keys are seen as if they went everywhere."""
    kept = stored(clusters_of(prefix), "keys", prefix[0], torch.eye(16).expand(2, 1, -1, -1) * length)
    assert kept.directions.isfinite().all()
    assert (relative_error(kept, prefix[0], random(2, 20, 3, 16)) < 0.2).all()


def test_queries_along_one_axis_leave_something_for_others(prefix):
    """Those that were not known may go elsewhere."""
    along = torch.zeros(2, 5, 3, 16)
    along[..., 3] = random(2, 5, 3)
    kept = stored(clusters_of(prefix), "keys", prefix[0], along)
    assert kept.directions.isfinite().all()
    assert (relative_error(kept, prefix[0], along) < 0.2).all()
    assert (relative_error(kept, prefix[0], random(2, 20, 3, 16)) < 0.2).all()


def test_keys_that_are_their_mean_key_have_no_residuals(prefix):
    """Nothing is beside it, and nothing is divided by that."""
    keys = torch.zeros_like(prefix[0])
    kept = stored(clusters_of((keys, prefix[1])), "error", keys, random(2, 5, 3, 16))
    assert not elements_of(kept.residuals).any() and not kept.directions.any()


def test_a_heads_residuals_do_not_depend_on_the_heads_beside_it(prefix):
    queries = random(2, 20, 3, 16)
    clusters = clusters_of(prefix)
    together = stored(clusters, "error", prefix[0], queries)
    for head in range(2):
        this = slice(head, head + 1)
        of_head = Clusters(**{name: tensor[this] for name, tensor in vars(clusters).items()})
        alone = stored(of_head, "error", prefix[0][this], queries[this])
        assert torch.equal(alone.residuals, together.residuals[this])
        assert torch.equal(alone.directions, together.directions[this])
