"""Compares answers to the same questions in pairs: a dense one, and another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_squeeze.offline_tools.fidelity import first_difference

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """What another way to answer changes.

    Attributes:
        difference: of mean scores, the other's less the dense one's.
        low, high: the interval that holds ``LEVEL`` of such differences if questions are drawn anew from those asked.
        same: share of answers that are the same token for token.
        before_difference: share of an answer's tokens before the first that differs, mean over answers.
    """

    difference: float
    low: float
    high: float
    same: float
    before_difference: float


def compare(
    dense_scores: Sequence[float],
    scores: Sequence[float],
    dense_tokens: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    seed: int = 0,
) -> Comparison:
    """Compares answers with dense ones; the order of the questions does not matter.

    Args:
        dense_scores: of the dense answer to each question.
        scores: of the other answer to each.
        dense_tokens: each dense answer's.
        tokens: each other answer's.
        seed: of the bootstrap.

    Raises:
        ValueError: there are no questions, or not as many of one as of another.
    """
    given = {"dense_scores": dense_scores, "scores": scores, "dense_tokens": dense_tokens, "tokens": tokens}
    for name, values in given.items():
        if len(values) != len(dense_scores) or not len(values):
            raise ValueError(
                f"{name} has {len(values)} questions; must have as many as dense_scores, {len(dense_scores)}, "
                "and one at least"
            )
    # Sorted, since a resample of the same seed takes the same places.
    differences = np.sort(np.subtract(scores, dense_scores, dtype=float))
    low, high = interval(differences, seed)
    pairs = list(zip(dense_tokens, tokens))
    return Comparison(
        difference=float(differences.mean()),
        low=low,
        high=high,
        same=float(np.mean([list(theirs) == list(ours) for theirs, ours in pairs])),
        before_difference=float(np.mean([share_before_difference(*pair) for pair in pairs])),
    )


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """The percentile interval of the mean, by the bootstrap."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def share_before_difference(dense: Sequence[int], other: Sequence[int]) -> float:
    """Tokens before the first that differs, as a share of the longer answer; 1 if there is none."""
    first = first_difference(dense, other)
    return 1.0 if first is None else first / max(len(dense), len(other))
