"""The self-test agrees where all is well, and says so where it is not."""

import pytest
import torch

from vllm_squeeze.kernels import shared_prefix
from vllm_squeeze.kernels import squeezed_attention as kernels
from vllm_squeeze.offline_tools import self_test
from vllm_squeeze.offline_tools.self_test import (
    TOLERANCE,
    Difference,
    RandomPrefix,
    difference_of_kernels,
    difference_of_reference,
)

HEADS = torch.arange(self_test.KV_HEADS)[:, None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_kernels_agree_with_the_oracle(dtype):
    found = difference_of_kernels(dtype, DEVICE)
    assert found.relative < TOLERANCE[dtype] and found.greatest < 10 * TOLERANCE[dtype]


def test_a_kernel_that_is_wrong_is_noticed(monkeypatch):
    """By one token of one slot."""
    right = kernels.squeezed_attention

    def wrong(query, output, *operands):
        right(query, output, *operands)
        output[-1] = output[0]

    monkeypatch.setattr(kernels, "squeezed_attention", wrong)
    assert difference_of_kernels(torch.float32, DEVICE).relative > 10 * TOLERANCE[torch.float32]


def test_a_shared_prefix_that_is_joined_wrongly_is_noticed(monkeypatch):
    monkeypatch.setattr(shared_prefix, "join_shared", lambda *operands: None)
    assert difference_of_kernels(torch.float32, DEVICE).relative > 10 * TOLERANCE[torch.float32]


def test_a_kernel_that_writes_nothing_finite_is_noticed(monkeypatch):
    monkeypatch.setattr(kernels, "squeezed_attention", lambda query, output, *operands: output.fill_(torch.nan))
    assert not difference_of_kernels(torch.float32, DEVICE).relative <= TOLERANCE[torch.float32]


def test_the_torch_path_agrees_with_dense_attention():
    assert difference_of_reference().relative < TOLERANCE[torch.float32]


def test_a_torch_path_that_leaves_clusters_out_is_noticed(monkeypatch):
    right = self_test.attend_prefix

    def leaves_out(query, table, read_tokens, log_threshold, *others, **options):
        return right(query, table, read_tokens, -6.0, *others, **options)

    monkeypatch.setattr(self_test, "attend_prefix", leaves_out)
    assert difference_of_reference().relative > 10 * TOLERANCE[torch.float32]


def test_both_kinds_of_clusters_are_met():
    """Else the self-test would not show how the kernels choose, or what they make of the rest."""
    prefix = RandomPrefix.make(torch.float32, "cpu")
    chosen = self_test.choose_clusters(prefix.grouped(), prefix.table, prefix.log_threshold(), self_test.SCALE).clusters
    assert 0.1 < chosen.float().mean() < 0.9


def test_both_kinds_of_keys_are_met():
    """In clusters that are looked at; and none so near the threshold that rounding could choose another."""
    prefix = RandomPrefix.make(torch.float32, "cpu")

    def kept(log_threshold: float) -> torch.Tensor:
        return self_test.attend_prefix(
            prefix.grouped(),
            prefix.table,
            lambda positions: (prefix.keys[HEADS, positions], prefix.values[HEADS, positions]),
            log_threshold,
            self_test.NUM_SINKS,
            self_test.SCALE,
            rest=True,
        )[2]

    threshold = prefix.log_threshold()
    chosen = self_test.choose_clusters(prefix.grouped(), prefix.table, threshold, self_test.SCALE).clusters
    assert 0.1 < kept(threshold).sum() / (chosen * prefix.table.sizes).sum() < 0.9
    # the higher the threshold the fewer they are, so as many are the same
    assert torch.equal(kept(threshold - self_test.LEAST_GAP), kept(threshold + self_test.LEAST_GAP))


def test_a_difference_is_that_of_the_worst_place_and_of_all():
    found = Difference.of(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    assert found.greatest == pytest.approx(0.5) and found.relative == pytest.approx((0.25 / 5) ** 0.5)
