"""What an index keeps of layers that are indexed together."""

import pytest
import torch

from vllm_squeeze.kernels.reference import attend_prefix
from vllm_squeeze.kernels.tables import RULES, ClusterTable, group_means
from vllm_squeeze.prefix_index.calibration import COUNTED_KEYS, log_threshold, threshold_curve
from vllm_squeeze.prefix_index.index_folder import LayerClusters
from vllm_squeeze.prefix_index.indexing import ComputedLayer, index_layers
from vllm_squeeze.prefix_index.manifest import IndexParameters

HEADS, GROUP, SIZE, TOKENS = 2, 3, 16, 700
GROUPS = "group_centroids", "group_scales", "group_sizes"


def layer(seed: int, held_back: int = 7, tokens: int = TOKENS, calibrating: int = 5) -> ComputedLayer:
    random = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, HEADS, tokens, SIZE, generator=random)
    queries = torch.randn(HEADS, calibrating + held_back, GROUP, SIZE, generator=random) * 2
    queries = queries.split([calibrating, held_back], 1)
    return ComputedLayer(keys, values, *queries, SIZE**-0.5 * (1 + seed), 5.0 * seed)


def test_a_layer_does_not_depend_on_those_beside_it():
    layers = [layer(0), layer(1)]
    together = list(index_layers(layers, IndexParameters(window=300)))
    for of_both, one in zip(together, layers, strict=True):
        (alone,) = index_layers([one], IndexParameters(window=300))
        assert (of_both.mean_cosine, of_both.num_queries) == (alone.mean_cosine, alone.num_queries)
        assert alone.num_queries == 5 and of_both.tensors.keys() == alone.tensors.keys()
        for name in ("members", "residuals", "directions", "scores", "attention"):
            assert torch.equal(of_both.tensors[name], alone.tensors[name]), name


def test_without_questions_held_back_there_is_no_attention():
    (indexed,) = index_layers([layer(0, held_back=0)], IndexParameters())
    assert "attention" not in indexed.tensors
    assert indexed.tensors["scores"].sum() == 2 * HEADS * (TOKENS - 116)


def test_what_is_fitted_to_queries_does_not_see_those_that_thresholds_are_read_off():
    """Every second token's each; of a single one there are no others."""
    one = layer(0, calibrating=6)
    odd, even = one.queries.clone(), one.queries.clone()
    odd[:, 1::2] *= 3
    even[:, ::2] = even[:, ::2].flip(-1) * 3
    of_all, of_odd, of_even = (
        next(index_layers([one._replace(queries=queries)], IndexParameters())).tensors
        for queries in (one.queries, odd, even)
    )
    for name in ("variances", "residuals", "directions"):
        assert torch.equal(of_all[name], of_odd[name]) and not torch.equal(of_all[name], of_even[name]), name
    assert not torch.equal(of_all["scores"], of_odd["scores"])
    (alone,) = index_layers([one._replace(queries=one.queries[:, :1])], IndexParameters())
    assert torch.equal(alone.tensors["scores"].sum(), torch.tensor(HEADS * (TOKENS - 116))) and alone.num_queries == 1


def test_keys_are_seen_along_the_queries_that_calibrate():
    """Where none of these goes, they have no variance, whatever those held back do."""
    one = layer(0)
    along = torch.zeros(SIZE)
    along[3] = 1
    (indexed,) = index_layers([one._replace(queries=one.queries * along)], IndexParameters())
    (flat,) = index_layers([one._replace(queries=one.queries * along, keys=one.keys * (1 - along))], IndexParameters())
    assert (indexed.tensors["variances"][indexed.tensors["sizes"] > 1] > 0.01).all()
    assert not flat.tensors["variances"].any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [TOKENS, 116 + COUNTED_KEYS + 300], ids=["few keys", "many"])
def test_a_threshold_keeps_its_share_of_the_keys_of_an_index(tokens, rule):
    """As the server attends to them, with the tensors that it reads: for queries that nothing was fitted to either."""
    one = layer(1, tokens=tokens, calibrating=600, held_back=300)
    (indexed,) = index_layers([one], IndexParameters(window=1000, rule=rule))
    assert indexed.tensors["scores"].sum() == 300 * HEADS * min(tokens - 116, COUNTED_KEYS)
    tensors = dict(indexed.tensors)
    curve = threshold_curve(tensors.pop("scores"))
    del tensors["attention"]
    clusters = LayerClusters(**tensors)
    frame, sizes = clusters.frame, clusters.sizes
    table = ClusterTable(
        **{name: tensor for name, tensor in tensors.items() if name not in ("frame", "directions")},
        starts=sizes.cumsum(1, dtype=torch.int32) - sizes,
        log_sizes=sizes.log(),
        **dict(zip(GROUPS, group_means(clusters.mean_keys(), sizes, frame), strict=True)),
        frames=frame[:, None],
        directions=clusters.directions[:, None],
    )

    def read_tokens(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = torch.arange(HEADS)[:, None]
        return one.keys[heads, positions], one.values[heads, positions]

    for share in (0.5, 0.2, 0.05):
        for queries in (one.queries[:, 1::2], one.held_back):
            softmax = one.scale, True, one.soft_cap, rule
            output, _, kept, loaded = attend_prefix(
                queries.transpose(0, 1), table, read_tokens, log_threshold(curve, share), 16, *softmax
            )
            assert output.isfinite().all() and (kept <= loaded).all()
            assert kept.sum() / (queries.shape[1] * HEADS * (tokens - 116)) == pytest.approx(share, rel=0.05)
