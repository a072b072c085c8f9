"""An index that is extended, as its text has grown, by the command."""

import json

import pytest
import torch

from tests.engine.conftest import ENGINE_ARGS, check_answers_are_dense, tokens
from vllm_squeeze.cli import main
from vllm_squeeze.prefix_index.index_folder import LayerClusters, PrefixIndex, find_indexes

PREFIX = tokens(seed=1, count=600)
GROWN = tokens(seed=1, count=800)


@pytest.fixture
def extend(models, tmp_path):
    """Runs the command on token ids, with more arguments; returns its exit code."""

    def run(ids: list[int], *arguments) -> int:
        (tmp_path / "ids.json").write_text(json.dumps(ids))
        given = ["--model", models("llama"), "--token-ids", tmp_path / "ids.json", "--out", tmp_path / "store"]
        return main(["index", *map(str, [*given, *arguments]), "--engine-args", json.dumps(ENGINE_ARGS)])

    return run


def centroid_by_members(clusters: LayerClusters, head: int) -> dict[tuple[int, ...], torch.Tensor]:
    """The clusters of a head that have any keys: the centroid of each and its steps, by the positions of its keys."""
    members = clusters.members[head].split(clusters.sizes[head].tolist())
    centroids = clusters.mean_keys()[head]
    steps = clusters.centroid_scales[head, :, None] * clusters.frame[head, 1]
    each = zip(members, torch.stack([centroids, steps], 1), strict=True)
    return {tuple(keys.tolist()): centroid for keys, centroid in each if len(keys)}


def test_a_text_that_grew(models, indexes, extend, tmp_path, capsys):
    former = PrefixIndex.open(indexes(models("llama"), PREFIX))
    assert extend(GROWN, "--extend", former.folder) == 0
    assert "484 tokens keep their clusters, 200 are clustered." in capsys.readouterr().err
    (folder,) = find_indexes(tmp_path / "store")
    assert main(["inspect", str(folder)]) == 0
    index = PrefixIndex.open(folder)
    assert index.token_ids.tolist() == GROWN and index.manifest.num_members == 684
    for i in range(len(index.manifest.layers)):
        before, after = former.layer(i), index.layer(i)
        for head in range(len(before.sizes)):
            kept, grown = (centroid_by_members(clusters, head) for clusters in (before, after))
            assert kept.keys() < grown.keys()
            assert all(min(members) >= 500 for members in grown.keys() - kept.keys())
            # the same keys, in steps of other sizes
            for members, (centroid, step) in kept.items():
                now, other_step = grown[members]
                assert ((centroid - now).abs() <= 0.501 * (step + other_step)).all()
    check_answers_are_dense(models("llama"), folder, GROWN)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([*GROWN[:300], 5, *GROWN[301:]], [], "token 300 is"),
        (GROWN, ["--window", "100"], "window: it has 8192, the new index would have 100"),
        (GROWN, ["--num-sinks", "4"], "num_sinks: it has 16, the new index would have 4"),
    ],
    ids=["differs", "window", "sinks"],
)
def test_what_does_not_continue_an_index(models, indexes, extend, tmp_path, capsys, ids, options, message):
    former = indexes(models("llama"), PREFIX)
    assert extend(ids, "--extend", former, *options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"vllm-squeeze index: error: --extend: {former}: {message}")
    assert not (tmp_path / "store").exists()


def test_no_index_to_extend(extend, tmp_path, capsys):
    assert extend(GROWN, "--extend", tmp_path) == 1
    assert f"--extend: {tmp_path}: {tmp_path}/manifest.json: No such file" in capsys.readouterr().err
