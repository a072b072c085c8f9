"""An index whose prefix has grown: what is known keeps its clusters, and what is new gets some."""

import re
from dataclasses import replace

import pytest
import torch

from tests.prefix_index.small_index import (
    LAYER_NAMES,
    NUM_HEADS,
    NUM_MEMBERS,
    NUM_TOKENS,
    PARAMETERS,
    make_clusters,
    make_identity,
    make_tokens,
    write_exact_index,
    write_index,
)
from tests.prefix_index.test_clustering import OBSERVED, SINKS, assert_consistent, random_prefix, spans
from vllm_squeeze.prefix_index.clustering import cluster_keys
from vllm_squeeze.prefix_index.extension import check_extends, known_labels, labels_by_token
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import IndexParameters, InvalidIndex
from vllm_squeeze.prefix_index.stored_clusters import stored

NUM_NEEDED = PARAMETERS.num_sinks + NUM_MEMBERS
GROWN = [*make_tokens().tolist(), 5, 6, 7]


@pytest.fixture
def former(tmp_path) -> PrefixIndex:
    return PrefixIndex.open(write_index(tmp_path))


def test_labels_are_those_of_the_members(former):
    """Also where a cluster between others is empty."""
    for i, name in enumerate(LAYER_NAMES):
        clusters = make_clusters(i)
        labels = known_labels(former, name, slice(NUM_HEADS))
        for head in range(NUM_HEADS):
            filled = [part for part in clusters.members[head].split(clusters.sizes[head].tolist()) if len(part)]
            for number, part in enumerate(filled):
                assert torch.equal((labels[head] == number).nonzero()[:, 0] + PARAMETERS.num_sinks, part.long())
        assert torch.equal(known_labels(former, name, slice(1, 2)), labels[1:])


def test_a_layer_that_is_missing(former):
    with pytest.raises(InvalidIndex, match="the layer model.layers.9 is missing"):
        known_labels(former, "model.layers.9", slice(1))


@pytest.mark.parametrize(("num_former", "num_tokens"), [(900, 1000), (900, 901), (117, 2000), (1500, 2900)])
def test_only_what_is_new_is_clustered(num_former, num_tokens):
    """Twice, as a text may go on growing."""
    keys, values = random_prefix(3, num_tokens + 50)
    parameters = IndexParameters(window=400, max_cluster=40)
    clusters = cluster_keys(keys[:, :num_former], values[:, :num_former], parameters)
    for length in (num_tokens, num_tokens + 50):
        known = labels_by_token(stored(clusters, parameters.rule, keys, keys[:, :1, None]), SINKS)
        grown = cluster_keys(keys[:, :length], values[:, :length], parameters, known=known)
        assert_consistent(grown, keys[:, :length], values[:, :length])
        for row in range(len(keys)):
            before = [part for part in spans(clusters, row) if len(part)]
            after = spans(grown, row)
            assert all(map(torch.equal, before, after))
            begins = torch.stack([part[0] for part in after[len(before) :] if len(part)])
            ends = torch.stack([part[-1] for part in after[len(before) :] if len(part)])
            assert begins.min() == known.shape[1] + SINKS and ends.max() == length - OBSERVED - 1
            assert (ends - begins).max() < parameters.window
        clusters = grown


def test_new_tokens_have_their_share_of_centroids():
    keys, values = random_prefix(2, 1400)
    parameters = IndexParameters(window=250)
    known = torch.zeros(2, 284, dtype=torch.int32)
    assert (cluster_keys(keys, values, parameters, known=known).sizes.shape[1] - 1) == 4 * round(0.05 * 250)


def test_what_continues_an_index(former):
    check_extends(former, GROWN, make_identity(model="another name"), PARAMETERS)
    # the end of a chat template, which is not clustered
    check_extends(former, [*GROWN[:NUM_NEEDED], *range(20)], make_identity(), PARAMETERS)


@pytest.mark.parametrize(
    ("ids", "identity", "parameters", "message"),
    [
        (GROWN, {"weights": "00fe"}, {}, "weights: it has 00ff, the new index would have 00fe"),
        (GROWN, {}, {"seed": 3}, "seed: it has 0, the new index would have 3"),
        (GROWN[:-3], {}, {}, f"it has {NUM_TOKENS} tokens, and the prefix no more than that: {NUM_TOKENS}"),
        (GROWN[:20], {}, {}, f"it has {NUM_TOKENS} tokens, and the prefix no more than that: 20"),
        (
            [*GROWN[: NUM_NEEDED - 1], 3, *GROWN[NUM_NEEDED:]],
            {},
            {},
            f"token {NUM_NEEDED - 1} is {GROWN[NUM_NEEDED - 1]} in it and 3 in the prefix; "
            f"the first {NUM_NEEDED} must agree",
        ),
    ],
    ids=["model", "parameters", "same", "shorter", "differs"],
)
def test_what_does_not(former, ids, identity, parameters, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_extends(former, ids, make_identity(**identity), replace(PARAMETERS, **parameters))


def test_an_exact_index_has_nothing_to_keep(tmp_path):
    former = PrefixIndex.open(write_exact_index(tmp_path))
    with pytest.raises(ValueError, match="exact"):
        check_extends(former, GROWN, make_identity(), PARAMETERS)
