"""What an index keeps of layers that are indexed together."""

import torch

from vllm_squeeze.prefix_index.indexing import ComputedLayer, index_layers
from vllm_squeeze.prefix_index.manifest import IndexParameters

HEADS, GROUP, SIZE, TOKENS = 2, 3, 16, 700


def layer(seed: int, held_back: int = 7) -> ComputedLayer:
    random = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, HEADS, TOKENS, SIZE, generator=random)
    queries = torch.randn(HEADS, 5 + held_back, GROUP, SIZE, generator=random) * 2
    return ComputedLayer(keys, values, queries[:, :5], queries[:, 5:], SIZE**-0.5 * (1 + seed), 5.0 * seed)


def test_a_layer_does_not_depend_on_those_beside_it():
    layers = [layer(0), layer(1)]
    together = list(index_layers(layers, IndexParameters(window=300)))
    for of_both, one in zip(together, layers, strict=True):
        (alone,) = index_layers([one], IndexParameters(window=300))
        assert (of_both.mean_cosine, of_both.num_queries) == (alone.mean_cosine, alone.num_queries)
        assert alone.num_queries == 5 and of_both.tensors.keys() == alone.tensors.keys()
        for name in ("members", "scores", "attention"):
            assert torch.equal(of_both.tensors[name], alone.tensors[name]), name


def test_without_questions_held_back_there_is_no_attention():
    (indexed,) = index_layers([layer(0, held_back=0)], IndexParameters())
    assert "attention" not in indexed.tensors
    assert indexed.tensors["scores"].sum() == 5 * HEADS * (TOKENS - 116)


def test_keys_are_seen_along_the_queries_that_calibrate():
    """Where none of these goes, they have no variance, whatever those held back do."""
    one = layer(0)
    along = torch.zeros(SIZE)
    along[3] = 1
    (indexed,) = index_layers([one._replace(queries=one.queries * along)], IndexParameters())
    (flat,) = index_layers([one._replace(queries=one.queries * along, keys=one.keys * (1 - along))], IndexParameters())
    assert (indexed.tensors["variances"][indexed.tensors["sizes"] > 1] > 0.01).all()
    assert not flat.tensors["variances"].any()
