"""Paired statistics of answers."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.paired import compare, share_before_difference


def of_scores(dense: list[float], scores: list[float], seed: int = 0):
    return compare(dense, scores, [[1]] * len(dense), [[1]] * len(dense), seed)


def test_equal_answers_differ_in_nothing():
    tokens = [[1, 2], [3], []]
    found = compare([1, 0.5, 0], [1, 0.5, 0], tokens, tokens)
    assert (found.difference, found.low, found.high, found.same, found.before_difference) == (0, 0, 0, 1, 1)


def test_a_constant_difference_is_certain():
    found = of_scores([0.5, 1, 0.75], [0.25, 0.75, 0.5])
    assert (found.difference, found.low, found.high) == (-0.25, -0.25, -0.25)


def test_the_interval_is_that_of_a_coin():
    """100 questions, half of which lose their point: the mean is normal with a standard deviation of 0.05."""
    found = of_scores([1] * 100, [0, 1] * 50)
    assert found.difference == -0.5
    assert (found.low, found.high) == pytest.approx((-0.5 - 1.96 * 0.05, -0.5 + 1.96 * 0.05), abs=0.011)
    assert of_scores([1] * 100, [0, 1] * 50) == found


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.25, 1]), st.sampled_from([0, 0.5, 1])), min_size=1, max_size=20))
def test_order_and_sign(pairs: list[tuple[float, float]]):
    dense, scores = map(list, zip(*pairs))
    found = of_scores(dense, scores)
    assert found.low - 1e-9 <= found.difference <= found.high + 1e-9
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert of_scores(*map(list, zip(*shuffled))) == found
    assert of_scores(scores, dense).difference == pytest.approx(-found.difference)


@pytest.mark.parametrize(
    "dense, other, share",
    [([1, 2, 3, 4], [1, 2, 5, 4], 0.5), ([1, 2], [1, 2, 3, 4], 0.5), ([1, 2], [1, 2], 1), ([1], [2], 0), ([], [], 1)],
)
def test_tokens_before_the_first_difference(dense: list[int], other: list[int], share: float):
    assert share_before_difference(dense, other) == share_before_difference(other, dense) == share


def test_shares_are_means_over_answers():
    found = compare([0, 0], [0, 0], [[1, 2], [3, 4]], [[1, 2], [3, 5]])
    assert (found.same, found.before_difference) == (0.5, 0.75)


@pytest.mark.parametrize("scores, tokens, name", [([1], [[1], [2]], "scores"), ([1, 1], [[1]], "tokens")])
def test_all_must_be_of_the_same_questions(scores: list[float], tokens: list[list[int]], name: str):
    with pytest.raises(ValueError, match=f"^{name} has 1 questions; must have as many as dense_scores, 2"):
        compare([1, 1], scores, [[1], [2]], tokens)


def test_no_questions():
    with pytest.raises(ValueError, match="one at least"):
        compare([], [], [], [])
