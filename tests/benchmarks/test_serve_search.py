"""The search for a threshold that keeps a wanted share, with random weights."""

import itertools

import pytest

from benchmarks.serve import KEPT_TOLERANCE, SEARCH_TOLERANCE, search


def kept(log_threshold: float, middle: float, width: float) -> float:
    """The share of keys above a threshold, if their log p are spread evenly."""
    return min(max(0.5 - (log_threshold - middle) / width, 0.0), 1.0)


@pytest.mark.parametrize("middle", [-31.0, -12.0, -11.97, -3.3])
@pytest.mark.parametrize("width", [0.2, 3.0])
def test_finds_the_threshold(middle, width):
    found = search(lambda log_threshold: kept(log_threshold, middle, width), 0.1)
    assert kept(found, middle, width) == pytest.approx(0.1, rel=SEARCH_TOLERANCE)


def test_follows_what_changes_meanwhile():
    """The first measurements are of another state, which a bisection would never leave behind."""
    rounds = itertools.count()
    found = search(lambda log_threshold: kept(log_threshold, -9.5 if next(rounds) > 5 else -9.0, 0.3), 0.1)
    assert kept(found, -9.5, 0.3) == pytest.approx(0.1, rel=KEPT_TOLERANCE)


def test_says_that_there_is_none():
    with pytest.raises(RuntimeError, match=r"no threshold keeps 0.1 of the keys; .* keeps 0.5000"):
        search(lambda log_threshold: 0.5, 0.1)
