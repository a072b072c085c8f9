"""Arms of the benchmark of answers, on one real engine, where none has anything of another, and on a real server."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.agreement import budget_used
from benchmarks.quality.answers import answers_path, problem_of, problem_path, read, same_tokens, total
from benchmarks.quality.asking import Asker
from benchmarks.quality.questions import Question, Task
from benchmarks.quality.served import ServedAsker
from tests.engine.conftest import ENGINE_ARGS, tokens

PREFIX = tokens(seed=1, count=600)
# Longer than a block of the KV cache, so that vLLM keeps some of each.
QUESTIONS = [tokens(seed, 70 + seed) for seed in range(3)]
# As "Answer:", which raw prompts end with.
UNKNOWN = 3
PROMPTS = [[*PREFIX, *question, UNKNOWN] for question in QUESTIONS]
NUM_TOKENS = 6
BESIDE = "oracle:1", "oracle:0.35", "pages:0.35", "random:0.35"


def ask(folder: Path, model: Path, *arms: str) -> dict[str, list[dict[str, Any]]]:
    asker = Asker(folder, str(model), PROMPTS, NUM_TOKENS, {**ENGINE_ARGS, "enforce_eager": True})
    try:
        asker.ask(arms)
    finally:
        asker.engine.llm.llm_engine.engine_core.shutdown()
    return {arm: read(answers_path(folder, arm)) for arm in arms}


@pytest.fixture(scope="module")
def folder(models, indexes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    shutil.copytree(indexes(models("llama"), PREFIX), folder / "index")
    return folder


@pytest.fixture(scope="module")
def answered(models, folder) -> dict[str, list[dict[str, Any]]]:
    return ask(folder, models("llama"), "dense", "1", "0.01", "0.6", "0.35", *BESIDE)


def test_the_dense_arm_is_vllms_own_attention(models, answered, dense_answers):
    own = dense_answers(models("llama"), PROMPTS, NUM_TOKENS)
    for row, whole in zip(answered["dense"], own, strict=True):
        # Those of the fixture go on where an answer ends.
        assert row["tokens"] == list(whole[: len(row["tokens"])])
    assert problem_of("dense", answered["dense"], len(PROMPTS)) is None


def test_at_a_budget_of_one_answers_are_dense(answered):
    for dense, one in zip(answered["dense"], answered["1"], strict=True):
        assert one["tokens"] == dense["tokens"]
        assert max(map(abs, one["kl"])) < 1e-6 and all(one["same_top"])


def test_each_arm_has_its_own_budget(answered):
    arms = ("1", "0.6", "0.35")
    assert [problem_of(arm, answered[arm], len(PROMPTS)) for arm in arms] == [None] * 3
    # Centroids and residuals come on top.
    assert 1 < budget_used(total(answered["1"])) < 1.05
    for arm in arms[1:]:
        # Budgets were calibrated on other questions.
        assert budget_used(total(answered[arm])) == pytest.approx(float(arm), abs=0.03)


def test_other_rules_answer_at_the_same_budgets(answered):
    assert [problem_of(arm, answered[arm], len(PROMPTS)) for arm in BESIDE] == [None] * len(BESIDE)
    for whole, dense in zip(answered["oracle:1"], answered["dense"], strict=True):
        assert whole["tokens"] == dense["tokens"] and max(map(abs, whole["kl"])) < 1e-6
    for arm in BESIDE[1:]:
        assert budget_used(total(answered[arm])) == pytest.approx(0.35, abs=0.02)
    kl = {arm: max(max(row["kl"]) for row in answered[arm]) for arm in ("0.35", *BESIDE)}
    assert 0 < kl["oracle:0.35"] < min(kl[arm] for arm in ("0.35", "pages:0.35", "random:0.35"))


def test_a_budget_that_cannot_be_met(folder, answered):
    assert answered["0.01"] == []
    assert "0.01 is less than" in problem_path(folder, "0.01").read_text()


def test_a_stopped_run_goes_on_and_has_nothing_of_other_arms(models, folder, answered):
    """Another engine, that has run no other arm, gives what the first gave after four others."""
    path = answers_path(folder, "0.35")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:20])
    again = ask(folder, models("llama"), "0.35")["0.35"]
    assert [row["question"] for row in again] == [0, 1, 2]
    for first, second in zip(answered["0.35"], again, strict=True):
        assert max(first["kl"]) > 1e-4
        assert second["kl"] == pytest.approx(first["kl"], rel=1e-5)
        assert (second["tokens"], second["counters"]) == (first["tokens"], first["counters"])


def test_a_server_answers_the_same(models, folder, answered):
    def text(ids: list[int]) -> str:
        return " ".join(f"t{id}" for id in ids)

    questions = tuple(Question(text(question), ("t1",)) for question in QUESTIONS)
    task = Task("vt", text(PREFIX), questions, NUM_TOKENS)
    engine_args = {**ENGINE_ARGS, "enforce_eager": True}
    ServedAsker(folder, task, str(models("llama")), PROMPTS, False, engine_args).ask(["0.6"])
    served = read(answers_path(folder, "served-0.6"))
    assert problem_of("0.6", served, len(PROMPTS)) is None
    assert same_tokens(served, answered["0.6"]) == 1
    assert budget_used(total(served)) == pytest.approx(budget_used(total(answered["0.6"])), rel=1e-3)
