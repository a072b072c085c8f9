"""The benchmark of index making, whose check of our K-means is against scikit-learn's."""

import json
import sys

import pytest

from benchmarks import indexing


@pytest.mark.parametrize("head_size", [64, 128])
def test_clusters_are_as_close_as_a_reference_makes_them(head_size, tmp_path, monkeypatch, capsys):
    out = tmp_path / "indexing.json"
    shape = ["--prefixes", "4", "--layers", "1", "--heads", "2", "3", "--head-size", str(head_size), "--queries", "8"]
    arguments = ["indexing.py", *shape, "--device", "cpu", "--reference", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)

    indexing.main()

    (row,) = json.loads(out.read_text())["rows"]
    assert row["ours"] > 0.99 * row["reference"]
    assert 0.5 < row["reference"] < 1
    assert row["clusters"] >= 0.05 * (4096 - 116)
    assert row["seconds"] > 0 and row["peak_gib"] is None
    assert "4096" in capsys.readouterr().out


def test_share_of_the_device_counts_members_clusters_and_groups(monkeypatch, tmp_path):
    out = tmp_path / "indexing.json"
    shape = ["--prefixes", "4", "--layers", "1", "--heads", "1", "2", "--head-size", "128", "--queries", "8"]
    monkeypatch.setattr(sys, "argv", ["indexing.py", *shape, "--device", "cpu", "--out", str(out)])

    indexing.main()

    # 12 bytes for each member; for each of 5% of the tokens two vectors of 4 bits, their scales and five facts; for each
    # four of these a vector, its scale and a size; and a frame and directions
    expected = (12 + 0.05 * (64 + 4 + 64 + 4 + 20 + (64 + 8) / 4) + (8 + 64) * 128 / 4096) / 512
    assert json.loads(out.read_text())["rows"][0]["device_share"] == pytest.approx(expected, rel=0.02)
