"""``vllm-squeeze bench``: what it counts is what was served, and nothing is called faster that was not squeezed."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.conftest import ENGINE_ARGS, tokens
from tests.offline_tools.test_report import Page
from vllm_squeeze.cli import main
from vllm_squeeze.config import CONFIG_VARIABLE
from vllm_squeeze.offline_tools.bench import part as process
from vllm_squeeze.offline_tools.bench.command import as_lines, bench
from vllm_squeeze.offline_tools.bench.comparison import compare, wrong_rows
from vllm_squeeze.offline_tools.bench.part import run_part
from vllm_squeeze.offline_tools.bench.plan import AGREEMENT, DENSE, EXACT, Asked, make_plan

PREFIX = tokens(seed=1, count=1000)
QUESTIONS = [tokens(seed, count=5 + seed) for seed in range(4)]
BUDGET, TOKENS, REPEATS = "0.4", 6, 2
ARGUMENTS = {**ENGINE_ARGS, "enforce_eager": True}
ASKED = Asked(
    model="",
    index=Path(),
    prefix=None,
    token_ids=None,
    chat=None,
    questions=None,
    budgets=None,
    mode="squeezed",
    batches=[3, 1],
    tokens=TOKENS,
    repeats=REPEATS,
    engine_args=ARGUMENTS,
)


@pytest.fixture(scope="module")
def model(models):
    return models("llama")


@pytest.fixture(scope="module")
def index(indexes, model):
    return indexes(model, PREFIX)


@pytest.fixture(scope="module")
def plan(model, index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    (folder / "ids.json").write_text(str(PREFIX))
    (folder / "questions.txt").write_text("\n".join(" ".join(f"t{id}" for id in ids) for ids in QUESTIONS))
    ids, questions = folder / "ids.json", folder / "questions.txt"
    changes = {"model": str(model), "index": index.parent, "token_ids": ids, "questions": questions}
    return make_plan(replace(ASKED, **changes, budgets=[0.4]))


@pytest.fixture(scope="module")
def results(plan):
    return {part: run_part(plan, part) for part in plan.parts}


def test_the_plan(plan, index):
    assert plan.parts == [DENSE, BUDGET, AGREEMENT] and plan.batches == [1, 3] and plan.index == str(index)
    assert plan.prompts == [PREFIX + question for question in QUESTIONS]


def test_counts_are_those_of_the_requests(plan, results):
    found = compare(plan, results)
    assert found.refusals == []
    for speed, requests in zip(found.speeds[BUDGET], plan.batches, strict=True):
        asked = REPEATS * requests
        assert speed.rows == {"dense: prefill": asked, "squeezed": asked * (TOKENS - 1)}
        assert speed.budget_used == pytest.approx(0.4, rel=0.2)
    assert all(speed.rows == {} and speed.budget_used is None for speed in found.speeds[DENSE])
    for batch in range(2):
        dense, ours = (found.speeds[arm][batch].medians for arm in (DENSE, BUDGET))
        assert found.ratio(BUDGET, batch, "tpot_ms") == dense["tpot_ms"] / ours["tpot_ms"]
        assert found.ratio(BUDGET, batch, "tokens_per_s") == ours["tokens_per_s"] / dense["tokens_per_s"]


def test_agreement(plan, results):
    found = compare(plan, results).agreements[BUDGET]
    assert found.kl > 1e-4 and 0 < found.kl_error < found.kl and 0 < found.same_top <= 1
    dense, ours = ([answer["tokens"] for answer in results[arm]["answers"]] for arm in (DENSE, BUDGET))
    assert found.same == sum(a == b for a, b in zip(dense, ours, strict=True))
    # The prompt is dense, so no answer differs at its first token.
    assert all(place is None or place > 0 for place in found.first_differences)
    assert all(a[:place] == b[:place] for a, b, place in zip(dense, ours, found.first_differences, strict=True))


def test_what_is_printed_and_written(plan, results, tmp_path):
    out, page, figures = io.StringIO(), tmp_path / "bench.html", tmp_path / "bench.json"
    assert bench(plan, page, figures, out, lambda plan, part: results[part]) == 0
    printed = out.getvalue()
    assert "1 request at a time" in printed and "3 requests at a time" in printed and "refused" not in printed
    assert printed.count("tokens come") == 2 and "NO SPEED-UP" not in printed
    texts = Page(page).texts
    assert len(texts["svg"]) == 1 and texts["h1"] == ["Dense against squeezed: tokens.json"]
    cells = texts["td"]
    assert [cell for cell in cells if cell.startswith("rows ")] == ["rows squeezed", "rows dense: prefill"] * 2
    assert cells[cells.index("rows squeezed") + 2] == str(REPEATS * (TOKENS - 1))
    written = json.loads(figures.read_text())
    assert written["ratios"][BUDGET][1]["tpot_ms"] == pytest.approx(compare(plan, results).ratio(BUDGET, 1, "tpot_ms"))


def test_a_broken_index_has_no_speed_up(plan, results, tmp_path):
    """It is damaged after it was checked, as a server finds it that leaves it out."""
    broken = shutil.copytree(plan.index, tmp_path / "broken")
    path = broken / "layer-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    served = run_part(replace(plan, index=str(broken)), BUDGET)
    assert "squeezed" not in served["batches"][0]["rows"]
    out = io.StringIO()
    parts = {**results, BUDGET: served}
    assert bench(plan, tmp_path / "bench.html", None, out, lambda plan, part: parts[part]) == 1
    printed = out.getvalue()
    assert "NO SPEED-UP IS STATED: budget 0.4, 1 together: NOTHING WAS SQUEEZED" in printed
    assert "times faster than" not in printed and "SLOWER" not in printed and printed.count("refused") == 2 * 3
    assert "No speed-up is stated." in (tmp_path / "bench.html").read_text()


@pytest.mark.parametrize("part", [DENSE, BUDGET, AGREEMENT])
def test_a_part_that_fails_leaves_no_speed_up(plan, results, part):
    found = compare(plan, {**results, part: {"error": "out of memory"}})
    assert f"{part}: out of memory" in found.refusals
    assert found.ratio(BUDGET, 0, "tpot_ms") is None
    assert "tokens come" not in as_lines(found)


def test_rows_that_were_not_squeezed():
    assert wrong_rows({"squeezed": 5, "dense: prefill": 1, "dense: faster": 2}) == []
    assert "NOTHING WAS SQUEEZED (rows: none was counted)" in wrong_rows({})[0]
    assert "--mode squeezed" in wrong_rows({"dense: faster": 3})[0]
    assert "some rows were dense: no index" in wrong_rows({"squeezed": 5, "dense: no index": 1})[0]


def test_a_process_that_fails_says_why(plan, tmp_path, monkeypatch):
    def fails(plan, part):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(process, "run_part", fails)
    (tmp_path / "plan.json").write_text(json.dumps(vars(plan)))
    monkeypatch.setattr(sys, "argv", ["part", str(tmp_path / "plan.json"), DENSE, str(tmp_path / "result.json")])
    process.main()
    assert json.loads((tmp_path / "result.json").read_text()) == {"error": "RuntimeError: out of memory"}
    monkeypatch.setattr(sys, "executable", "false")
    assert process.run_in_fresh_process(plan, DENSE) == {"error": "its process ended with exit code 1"}


def text(ids) -> str:
    return str(list(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--index": "no-such-folder"}, "no-such-folder: No such file"),
        ({"--token-ids": text(PREFIX[:50] + [7] + PREFIX[51:])}, "no index is of it; 50 leading tokens agree"),
        ({"--budgets": "0.01"}, "squeeze.budget: 0.01 is less than the"),
        ({"--budgets": "1.5"}, "squeeze.budget: 1.5 is not a number in (0, 1]"),
        ({"--batch": "0"}, "--batch: 0 is less than 1"),
        ({"--tokens": "2000"}, "--tokens: a prompt and its answer of 2000 take"),
        ({"--engine-args": '{"dtype": "bfloat16"}'}, "made for another model: dtype"),
        ({"--engine-args": '{"max_num_seqs": 2}'}, "'max_num_seqs' is set by bench itself"),
        ({"--engine-args": '{"nonsense": 2}'}, "'nonsense' is not an argument of vLLM's engine"),
    ],
)
def test_what_does_not_fit_is_said_before_an_engine_starts(model, index, tmp_path, capsys, changes, message):
    options = {
        "--model": str(model),
        "--index": str(index),
        "--token-ids": text(PREFIX),
        "--engine-args": json.dumps(ARGUMENTS),
    }
    options |= changes
    (tmp_path / "ids.json").write_text(options["--token-ids"])
    options["--token-ids"] = str(tmp_path / "ids.json")
    assert main(["bench", *(word for pair in options.items() for word in pair)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-squeeze bench: error: ")]
    assert message in line


def test_an_index_of_another_model(models, index, plan, tmp_path):
    (tmp_path / "ids.json").write_text(text(PREFIX))
    other = str(models("llama", seed=1))
    with pytest.raises(ValueError, match="made for another model: weights"):
        make_plan(replace(ASKED, model=other, index=index, token_ids=tmp_path / "ids.json"))


def test_a_server_that_is_off_cannot_be_compared(model, index, tmp_path, monkeypatch):
    (tmp_path / "ids.json").write_text(text(PREFIX))
    (tmp_path / "settings.yaml").write_text("squeeze: {mode: off}")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "settings.yaml"))
    asked = replace(ASKED, model=str(model), index=index, token_ids=tmp_path / "ids.json")
    with pytest.raises(ValueError, match="^squeeze.mode: off, by the server's settings; --mode says how"):
        make_plan(replace(asked, mode=None))
    assert make_plan(replace(asked, budgets=[0.4])).mode == "squeezed"


def test_an_exact_index_has_no_budgets(model, indexes, tmp_path):
    (tmp_path / "ids.json").write_text(text(PREFIX))
    exact = replace(ASKED, model=str(model), index=indexes(model, PREFIX, exact=True), token_ids=tmp_path / "ids.json")
    assert make_plan(exact).parts == [DENSE, EXACT]
    with pytest.raises(ValueError, match="--budgets: not together with an exact index"):
        make_plan(replace(exact, budgets=[0.5]))
