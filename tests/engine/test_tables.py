"""What lies on the device of two prefixes is what their indexes hold."""

import torch

from benchmarks.quality.arms import residency_in, squeezed_impls
from tests.engine.conftest import engine, tokens
from vllm_squeeze.kernels.tables import NEIGHBOURS, group_means
from vllm_squeeze.prefix_index.index_folder import PrefixIndex


def test_tables_of_two_prefixes(models, indexes):
    model = models("llama")
    folders = [indexes(model, tokens(seed, count)) for seed, count in ((1, 600), (2, 410))]
    with engine(model, folders, 0.5) as llm:
        spans, impls = residency_in(llm)._spans, squeezed_impls(llm)
        assert len(spans) == 2
        for slot, place in residency_in(llm).active.items():
            index = PrefixIndex.open(next(folder for folder in folders if folder.name == place.name))
            for number, impl in enumerate(impls.values()):
                check_layer(impl.table, spans[slot], index.layer(number), place.covered)


def test_clusters_of_a_group_are_alike(models, indexes):
    """Of keys of random weights, more than clusters of different groups are."""
    index = PrefixIndex.open(indexes(models("llama"), tokens(1, 600)))
    for number in range(len(index.manifest.layers)):
        held = index.layer(number)
        whole = held.sizes.shape[1] // NEIGHBOURS * NEIGHBOURS
        centroids = held.mean_keys()[:, :whole]
        directions = torch.nn.functional.normalize(centroids - centroids.mean(1, keepdim=True), dim=-1)
        likeness = directions @ directions.mT
        of_group = torch.arange(whole) // NEIGHBOURS
        same = (of_group == of_group[:, None]) & ~torch.eye(whole, dtype=torch.bool)
        assert likeness[:, same].mean() > likeness[:, of_group != of_group[:, None]].mean() + 0.1


def check_layer(table, span, held, covered):
    count = held.sizes.shape[1]
    assert span.first_centroid % NEIGHBOURS == 0 and count <= span.num_centroids < count + NEIGHBOURS
    of_prefix = table.prefix(span.first_centroid, span.num_centroids, span.slot)
    for name in ("centroids", "centroid_scales", "value_centroids", "value_scales", "log_weights", "variances"):
        assert torch.equal(getattr(of_prefix, name)[:, :count], getattr(held, name)), name
    assert not of_prefix.sizes[:, count:].any()
    assert torch.equal(of_prefix.log_sizes, of_prefix.sizes.log())
    assert torch.equal(of_prefix.frames[:, 0], held.frame)
    for head, sizes in enumerate(held.sizes.tolist()):
        for cluster, members in enumerate(held.members[head].split(sizes)):
            start, size = of_prefix.starts[head, cluster], of_prefix.sizes[head, cluster]
            assert torch.equal(table.members[head, start : start + size], members[members < covered])
    groups = group_means(of_prefix.mean_keys(), of_prefix.sizes, held.frame)
    for name, means in zip(("group_centroids", "group_scales", "group_sizes"), groups, strict=True):
        assert torch.equal(getattr(of_prefix, name), means), name
