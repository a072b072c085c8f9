"""How distributions are compared."""

import math

import pytest
import torch

from vllm_squeeze.offline_tools.fidelity import divergence, first_difference, mean_and_error


def test_divergence_of_known_distributions():
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]).log() + 7  # logits, not yet log probabilities
    kl, same = divergence(dense, other)
    assert kl == pytest.approx([0.25 * math.log(2), 0], abs=1e-6)
    assert same == [False, True]


def test_divergence_is_from_dense_to_other():
    dense, other = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.125, 0.625, 0.25]]).log()
    kl, _ = divergence(dense, other)
    assert kl == pytest.approx([0.5 * math.log(4) + 0.25 * math.log(0.4)])


def test_the_error_is_that_of_a_mean_where_answers_are_equally_long():
    mean, error = mean_and_error([[1, 3], [5, 7], [0, 2]])
    assert mean == 3
    assert error == pytest.approx(torch.tensor([2.0, 6.0, 1.0]).std().item() / math.sqrt(3))


def test_longer_answers_weigh_more():
    assert mean_and_error([[1, 1, 1], [5]])[0] == 2
    assert mean_and_error([[1.0, 2.0], [3.0]])[0] == 2
    assert math.isnan(mean_and_error([[1, 2]])[1])


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2
