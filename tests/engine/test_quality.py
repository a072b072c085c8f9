"""What budgets cost is measured when an index is made, and ``budget: auto`` goes by it."""

import re

import pytest

from tests.engine.conftest import ENGINE_ARGS, engine, generate, outcomes, tokens
from tests.logs import warnings_of_squeeze
from vllm_squeeze.cli import main
from vllm_squeeze.offline_tools.index import index
from vllm_squeeze.offline_tools.questions import ANSWER_TOKENS
from vllm_squeeze.prefix_index.index_folder import QUALITY_FILE, PrefixIndex
from vllm_squeeze.prefix_index.manifest import Calibration, IndexParameters

PREFIX = tokens(seed=1, count=1400)
QUESTIONS = [tokens(seed, count=3 + seed) for seed in range(20, 32)]


@pytest.fixture(scope="module")
def model(models):
    return models("llama")


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory) -> PrefixIndex:
    folder = tmp_path_factory.mktemp("measured")
    (folder / "ids.json").write_text(str(PREFIX))
    (folder / "questions.txt").write_text("\n".join(" ".join(f"t{id}" for id in ids) for ids in QUESTIONS))
    prefix, questions = folder / "ids.json", folder / "questions.txt"
    made = index(
        str(model), None, prefix, None, folder / "store", IndexParameters(), ENGINE_ARGS, questions, measured=True
    )
    return PrefixIndex.open(made)


def test_what_is_measured(measured):
    quality = measured.quality()
    # every fourth question is held back
    assert quality.own_questions and quality.num_questions == 3
    assert measured.manifest.calibration.num_questions == 9
    assert 3 <= quality.num_places <= 3 * ANSWER_TOKENS
    assert [round(budget.budget, 4) for budget in quality.budgets] == [0.5, 0.3333, 0.2, 0.125]  # all that can be met
    for budget in quality.budgets:
        assert budget.bytes_read == pytest.approx(budget.budget, rel=0.15)
        assert budget.kl > 1e-4 and 0 < budget.kl_error < budget.kl
        assert all(0.02 < share < 1 for layer in budget.recall for share in layer)
    recalls = [budget.mean_recall for budget in quality.budgets]
    assert recalls == sorted(recalls, reverse=True) and recalls[0] > recalls[-1] + 0.1


def test_figures_are_those_of_a_server(model, measured):
    """A budget that keeps everything costs nothing; what is measured at less is what a server's answers lose."""
    from vllm_squeeze.offline_tools.measure import measure
    from vllm_squeeze.offline_tools.prefix_engine import PrefixEngine

    prompts = [PREFIX + question for question in QUESTIONS[3::4]]
    served = PrefixEngine(str(model), measured.folder, prompts, ANSWER_TOKENS, {**ENGINE_ARGS, "enforce_eager": True})
    try:
        (exact, half), _ = measure(served, prompts, ANSWER_TOKENS, (1, 0.5, 0.01))
    finally:
        served.shut_down()
    assert abs(exact.kl) < 1e-6 and exact.same_top == 1 and exact.bytes_read > 1
    before = measured.quality().budgets[0]
    assert half.kl == pytest.approx(before.kl, rel=1e-3) and half.bytes_read == pytest.approx(before.bytes_read)


def serving(model, index: PrefixIndex, budget, **settings):
    return engine(model, index.folder, budget, squeeze={"prefill": "dense", **settings}, max_model_len=2048)


def budget_served(model, index: PrefixIndex, **settings) -> tuple[float | None, dict[str, int], list[str]]:
    """The budget that an engine with a budget of "auto" serves an index at, its rows and its warnings."""
    with warnings_of_squeeze() as warnings, serving(model, index, "auto", **settings) as llm:
        generate(llm, [PREFIX], num_tokens=1)  # brings the prefix into the KV cache
        generate(llm, [PREFIX + question for question in QUESTIONS[:2]], num_tokens=2)
        from vllm_squeeze.attention_backend.worker import residency_of

        residency = residency_of(llm.llm_engine.vllm_config)
        budget = residency.active[0].budget if residency.active else None
        return budget, outcomes(llm), warnings


def test_auto_takes_the_least_budget_that_is_good_enough(model, measured, tmp_path):
    quality = measured.quality()
    middle = quality.budgets[1]
    budget, rows, _ = budget_served(model, measured, max_kl=middle.kl * 1.0001)
    assert quality.budgets[2].budget < budget <= round(middle.budget + 0.0005, 3)
    assert rows["squeezed"] == rows["dense: prefill"] == 2


def test_auto_without_one_that_is_good_enough_is_dense(model, measured):
    budget, rows, warnings = budget_served(model, measured, max_kl=1e-5)
    assert budget is None and "squeezed" not in rows
    (warning,) = warnings
    assert "squeeze.max_kl is 1e-05, but a budget of 0.5 already costs a KL of" in warning


def test_auto_without_figures_is_dense(model, indexes):
    unmeasured = PrefixIndex.open(indexes(model, PREFIX))
    budget, rows, warnings = budget_served(model, unmeasured)
    assert budget is None and "squeezed" not in rows
    (warning,) = warnings
    assert "squeeze.budget is auto, but what budgets cost was not measured" in warning


def test_a_number_needs_no_figures_but_damage_is_refused(model, measured, tmp_path):
    """An index whose figures were changed is not trusted with anything."""
    path = measured.folder / QUALITY_FILE
    whole = path.read_text()
    path.write_text(whole.replace('"num_questions": 3', '"num_questions": 4'))
    try:
        with warnings_of_squeeze() as warnings, serving(model, measured, 0.5) as llm:
            generate(llm, [PREFIX + QUESTIONS[0]], num_tokens=2)
        assert "changed after it was written" in warnings[0]
    finally:
        path.write_text(whole)


def test_the_commands_say_what_budgets_cost(measured, capsys):
    assert main(["inspect", str(measured.folder)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"measured on +3 questions given that were held back, \d+ tokens of answers", printed)
    assert re.search(r"  budget( +0\.\d{3}){3,}\n", printed)
    assert re.search(r"same best token +\d", printed) and re.search(r"suggested budget +(NONE: |0\.)", printed)


def test_few_questions_all_calibrate(model, tmp_path, monkeypatch, capsys):
    """Then general ones are measured on. Where the engine cannot serve the index, the index stays, and it is said."""
    from vllm_squeeze.offline_tools import measure as measuring

    def fails(engine, prompts, *_):
        assert len(prompts) == 8 and all(prompt[: len(PREFIX)] == PREFIX for prompt in prompts)
        raise RuntimeError("rows are ['dense: no index'], not only squeezed")

    monkeypatch.setattr(measuring, "measure", fails)
    (tmp_path / "ids.json").write_text(str(PREFIX))
    (tmp_path / "questions.txt").write_text("t20 t21\nt22 t23 t24\n")
    arguments = (IndexParameters(window=256), ENGINE_ARGS, tmp_path / "questions.txt")
    made = index(str(model), None, tmp_path / "ids.json", None, tmp_path / "store", *arguments, measured=True)
    kept = PrefixIndex.open(made)
    kept.verify()
    assert kept.quality() is None
    assert kept.manifest.calibration == Calibration("questions", 2, kept.manifest.calibration.num_tokens)
    assert "What budgets cost was not measured: RuntimeError: rows are" in capsys.readouterr().err
