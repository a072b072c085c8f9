"""Ranks index a part of the heads each; an index has all of them."""

import pytest
import torch

from tests.prefix_index.small_index import NUM_CENTROIDS, NUM_HEADS, make_clusters
from vllm_squeeze.offline_tools.index import join
from vllm_squeeze.prefix_index.index_folder import LayerClusters

OF_CLUSTERS = {"centroids", "centroid_scales", "value_centroids", "value_scales", "log_weights", "variances", "sizes"}


def of_head(clusters: LayerClusters, head: int, count: int) -> LayerClusters:
    """One head's first clusters, and all that it has of members."""
    tensors = {name: tensor[head : head + 1] for name, tensor in vars(clusters).items()}
    return LayerClusters(
        **{name: tensors[name][:, :count] if name in OF_CLUSTERS else tensors[name] for name in tensors}
    )


@pytest.mark.parametrize("counts", [(NUM_CENTROIDS, NUM_CENTROIDS), (NUM_CENTROIDS, NUM_CENTROIDS - 1)], ids=str)
def test_heads_of_ranks_are_joined(counts):
    """Where one has fewer clusters than another, as many empty ones follow; of members all have as many."""
    clusters = make_clusters()
    joined = join([of_head(clusters, head, counts[head]) for head in range(NUM_HEADS)])
    for name, tensor in vars(clusters).items():
        found = getattr(joined, name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and found.is_contiguous(), name
        for head, count in enumerate(counts):
            given = slice(None, count if name in OF_CLUSTERS else None)
            assert torch.equal(found[head, given], tensor[head, given]), name
    assert not any(joined.sizes[head, count:].any() for head, count in enumerate(counts))
