"""Arms in a real engine: fidelity to dense answers, on a tiny random model."""

import pytest

from benchmarks.quality.sweep import Sweep
from tests.engine.conftest import ENGINE_ARGS, tokens
from vllm_squeeze.prefix_index.calibration import LEVEL, LEVEL_SHARE

PREFIX = tokens(seed=1, count=600)
# Below it, next-token distributions of float32 runs count as the same.
NOTHING = 1e-6


@pytest.fixture(scope="module")
def sweep(models, indexes):
    model = models("llama")
    prompts = [PREFIX + tokens(seed, 3 + seed) for seed in range(8)]
    sweep = Sweep(str(model), indexes(model, PREFIX), prompts, 6, ENGINE_ARGS, prefill="squeezed")
    yield sweep
    sweep.llm.llm_engine.engine_core.shutdown()


def test_at_a_budget_of_one_nothing_is_lost(sweep):
    ours, served = sweep.run("ours", 1), sweep.run_served(1)
    assert ours["recall"] == pytest.approx(1)
    for figures in (ours, served):
        assert abs(figures["kl"]) < NOTHING
        assert figures["top1"] == 1


@pytest.mark.parametrize("budget", [0.6, 0.35])
def test_the_built_in_rule_in_torch_is_what_is_served(sweep, budget):
    served = sweep.run_served(budget)
    ours, _ = sweep.measure("ours", served["threshold"])
    assert served["kl"] > 100 * NOTHING
    assert ours["bytes"] == pytest.approx(served["bytes"], abs=1e-6)
    for theirs, mine in zip(served["kl_of_questions"], ours["kl_of_questions"], strict=True):
        # sums in float32, which each processor makes in another order
        assert mine == pytest.approx(theirs, rel=1e-4, abs=NOTHING)


def test_arms_meet_their_budget_and_the_oracle_is_ahead(sweep):
    arms = {name: sweep.run(name, 0.45) for name in ("oracle", "ours", "random")}
    for figures in arms.values():
        assert figures["bytes"] == pytest.approx(0.45, rel=0.02)
    # Measured: 0.028, 2.39 and 3.07. Keys of random weights hardly cluster.
    assert arms["oracle"]["kl"] < 0.05 and arms["ours"]["kl"] < 2.7
    assert 0 < arms["oracle"]["kl"] < arms["ours"]["kl"] < arms["random"]["kl"]
    assert arms["oracle"]["recall"] > arms["ours"]["recall"] > arms["random"]["recall"]


def test_layers_keep_about_as_much(sweep):
    """Each has weights on one level; questions other than those that it was found on differ a little."""
    ours, _ = sweep.measure("ours", LEVEL)
    kept = ours["kept_of_layers"]
    assert ours["kept"] == pytest.approx(LEVEL_SHARE, rel=0.2)
    assert max(kept) < 1.5 * min(kept), kept


def test_a_budget_that_cannot_be_met(sweep):
    with pytest.raises(ValueError, match=r"^budget: 0.01 is less than"):
        sweep.run("ours", 0.01)
