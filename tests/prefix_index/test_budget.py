import dataclasses
import re

import pytest

from tests.prefix_index.small_index import COST
from vllm_squeeze.prefix_index.budget import KeyCost


def test_bytes_counted_by_hand():
    assert COST.dense_bytes == 1000 * (128 + 128)
    assert COST.keys == KeyCost(128 + 128 + 4, 4 * 8, 884 * 8)
    of_clusters = 50 * (32 + 32 + 4 + 4 + 4 + 4 + 4 + 4 + 4) + 13 * (32 + 4 + 4)
    assert COST.fixed_bytes == 116 * (128 + 128) + of_clusters + (2 + 16) * 64 * 4
    assert COST.read_bytes(0) == COST.fixed_bytes
    assert COST.read_bytes(10.5) == COST.fixed_bytes + 10.5 * 292
    assert COST.budget_used(100) == (39_424 + 29_200) / 256_000


def test_keys_in_8_bits():
    halved = dataclasses.replace(COST, element_size=1)
    assert halved.dense_bytes == 1000 * (64 + 64)
    assert halved.keys == KeyCost(64 + 64 + 4, 4 * 8, 884 * 8)
    assert halved.fixed_bytes == COST.fixed_bytes - 116 * (64 + 64)
    assert halved.kept_share(0.5) < COST.kept_share(0.5)


def test_value_centroids_are_not_read_without_the_rest():
    dropped = dataclasses.replace(COST, rest=False)
    assert dropped.fixed_bytes == COST.fixed_bytes - 50 * 36
    assert dropped.kept_share(0.5) > COST.kept_share(0.5)


def test_residuals_are_not_read_where_clusters_are_chosen_whole():
    whole = dataclasses.replace(COST, by_key=False)
    assert whole.keys == KeyCost(128 + 128 + 4, 0, 0)
    assert whole.fixed_bytes == COST.fixed_bytes, "an index holds them all the same"
    assert whole.kept_share(0.3) == pytest.approx(COST.kept_share(0.3) * 292 / 260)


@pytest.mark.parametrize("rest", [True, False], ids=["rest", "drop"])
@pytest.mark.parametrize("by_key", [True, False], ids=["keys", "clusters"])
@pytest.mark.parametrize("element_size", [1, 2, 4])
@pytest.mark.parametrize("budget", [0.25, 0.33, 0.5, 0.9])
def test_kept_share_meets_the_budget(budget, element_size, rest, by_key):
    cost = dataclasses.replace(COST, element_size=element_size, rest=rest, by_key=by_key)
    share = cost.kept_share(budget)
    assert 0 < share < 1
    assert cost.budget_used(share * cost.num_clustered) == pytest.approx(budget, rel=1e-12)


def test_whole_budget_keeps_everything():
    """With centroids on top, keeping everything reads more than a dense pass; a budget of 1 allows for it."""
    assert COST.budget_used(COST.num_clustered) > 1
    assert COST.kept_share(1.0) == COST.kept_share(2.0) == 1.0
    assert COST.kept_share(0.999) < 1


def test_share_is_at_most_one():
    uncovered = dataclasses.replace(COST, num_clustered=100)
    assert uncovered.kept_share(0.9) == 1.0


@pytest.mark.parametrize("budget", [0.04, 0.001, 0.153])
def test_budget_below_the_fixed_bytes(budget):
    with pytest.raises(ValueError, match=rf"^budget: {budget} is less than the 0\.154 that centroids and always"):
        COST.kept_share(budget)


@pytest.mark.parametrize("num_centroids", range(1, 100, 7))
def test_least_budget_named_is_possible(num_centroids):
    cost = dataclasses.replace(COST, num_centroids=num_centroids)
    with pytest.raises(ValueError) as refusal:
        cost.kept_share(0.01)
    least = float(re.search(r"than the ([\d.]+)", str(refusal.value))[1])
    assert 0 <= cost.kept_share(least) < 0.01


def test_no_more_residuals_are_read_than_there_are():
    kept = COST.num_clustered
    assert COST.read_bytes(kept) == COST.fixed_bytes + kept * (260 + 8)
    assert COST.read_bytes(3 * kept + 6, 4) == 4 * COST.fixed_bytes + (3 * kept + 6) * 260 + 4 * kept * 8
    share = COST.kept_share(0.9)
    assert COST.budget_used(share * kept) == pytest.approx(0.9, rel=1e-12)
