"""Plots."""

from pathlib import Path

import pytest

from benchmarks.quality import plots
from benchmarks.quality.plots import plot


def test_a_plot_names_its_lines_and_figures(tmp_path: Path):
    path = tmp_path / "plot.svg"
    plot(path, {"score": {"ours": [(0.5, 3), (0.1, 2)]}, "KL": {"oracle": [(0.1, 1), (1, 0)]}}, frozenset({"KL"}))
    drawn = path.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("score", "KL", "ours", "oracle"))


def test_matplotlib_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    plots.check()
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--plot needs matplotlib, which is not installed: pip install matplotlib$"):
        plots.check()
