"""How far answers are from dense ones, and next-token distributions on the same text."""

import math
from collections.abc import Sequence

import torch


def divergence(dense: torch.Tensor, other: torch.Tensor) -> tuple[list[float], list[bool]]:
    """Compares distributions place by place.

    Args:
        dense, other: logits [places, V], any float dtype.

    Returns:
        KL(dense || other) in nats, and whether both have the same most likely token, of each place.
    """
    log_p, log_q = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl.tolist(), (log_p.argmax(-1) == log_q.argmax(-1)).tolist()


def mean_and_error(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of figures that questions have for each place of their answers, and its standard error.

    Places of one question are alike, questions are drawn independently: the error is that of a ratio of two sums over
    questions. NaN with a single question.
    """
    count = sum(map(len, values))
    mean = sum(map(sum, values)) / count
    if len(values) < 2:
        return mean, math.nan
    squares = sum((sum(one) - mean * len(one)) ** 2 for one in values)
    return mean, math.sqrt(squares * len(values) / (len(values) - 1)) / count


def first_difference(dense: Sequence[int], ours: Sequence[int]) -> int | None:
    """Tokens before the first that differs; None if there is none."""
    if list(dense) == list(ours):
        return None
    differing = (i for i, pair in enumerate(zip(dense, ours)) if pair[0] != pair[1])
    return next(differing, min(len(dense), len(ours)))
