"""Answers on disk, runs that go on where they were stopped, and which arms have figures."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.answers import go_on, read, summarise
from benchmarks.quality.questions import Question, Task

TASK = Task("vt", "prefix", (Question("1?", ("a",)), Question("2?", ("b", "c"))), answer_tokens=2)
ROWS = {"vllm:squeeze_rowssqueezed": 3, "vllm:squeeze_rowsdense: prefill": 1}
SQUEEZED = {**ROWS, "vllm:squeeze_prefix_bytes_alone": 1, "vllm:squeeze_prefix_bytes_dense": 4}


def row(number: int, text: str, tokens: list[int], counters: dict[str, float]) -> dict[str, Any]:
    return {"question": number, "text": text, "tokens": tokens, "counters": counters}


DENSE_ROWS = [row(0, "a", [1, 2], {}), row(1, "b", [3, 4], {})]


@pytest.mark.parametrize("broken", ["", '{"question": 2, "te'], ids=["whole", "broken off"])
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, broken: str):
    path, asked = tmp_path / "dense.jsonl", []

    def answer(number: int) -> dict[str, Any]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        assert len(read(path)) == number, "answers before were not written yet"
        asked.append(number)
        return {"text": f"answer {number}"}

    with pytest.raises(KeyboardInterrupt):
        go_on(path, 4, answer)
    with path.open("a") as file:
        file.write(broken)
    assert [row["question"] for row in read(path)] == [0, 1]
    asked.clear()
    go_on(path, 4, answer)
    assert asked == [2, 3]
    assert read(path) == [{"question": number, "text": f"answer {number}"} for number in range(4)]
    go_on(path, 4, answer)
    assert asked == [2, 3]


def test_no_answers_yet(tmp_path: Path):
    assert read(tmp_path / "dense.jsonl") == []


def test_figures_of_arms():
    squeezed = [row(1, "nothing", [5, 4], SQUEEZED), row(0, "A", [1, 2], SQUEEZED)]
    dense, other = summarise(TASK, {"dense": DENSE_ROWS, "0.25": squeezed})
    assert dense == {"task": "vt", "arm": "dense", "budget_used": None, "score": 0.75}
    assert other.pop("low") == -0.5 and other.pop("high") == 0
    figures = {"budget_used": 0.25, "score": 0.5, "difference": -0.25, "same": 0.5, "before_difference": 0.5}
    assert other == {"task": "vt", "arm": "0.25"} | figures


def test_questions_on_documents_have_f1_too():
    questions = (Question("1?", ("a red fox", "fox"), "part"), Question("2?", ("green",), "part"))
    rows = [row(0, "The fox runs.", [1], {}), row(1, "blue", [2], {})]
    (dense,) = summarise(Task("qa_1", "prefix", questions, answer_tokens=2), {"dense": rows})
    assert dense["score"] == 0.5 and dense["f1"] == pytest.approx(0.5 * 2 / 3)


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([row(0, "a", [1], SQUEEZED)], "1 of 2 questions"),
        ([row(0, "a", [1], SQUEEZED), row(1, "b", [1], SQUEEZED | {"vllm:squeeze_rowsdense: faster": 1})], "faster"),
        ([row(0, "a", [1], {}), row(1, "b", [1], {})], "rows are {}"),
        ([row(n, "a", [1], ROWS) for n in range(2)], "nothing of the prefix was read"),
    ],
    ids=["missing", "dense rows", "no rows", "no bytes"],
)
def test_an_arm_that_was_not_all_squeezed_has_no_figures(rows: list[dict[str, Any]], problem: str):
    _, other = summarise(TASK, {"dense": DENSE_ROWS, "0.25": rows})
    assert problem in other.pop("problem") and other == {"task": "vt", "arm": "0.25"}


def test_a_dense_arm_that_was_squeezed_has_no_figures():
    read_by_kernels = {name: value for name, value in SQUEEZED.items() if "rows" not in name}
    (dense,) = summarise(TASK, {"dense": [DENSE_ROWS[0], row(1, "b", [3], read_by_kernels)]})
    assert dense == {"task": "vt", "arm": "dense", "problem": "some of the prefix was read by what squeezes"}


def test_an_arm_that_cannot_answer_says_why():
    _, other = summarise(TASK, {"dense": DENSE_ROWS, "0.01": []}, {"0.01": "budget: 0.01 is too little"})
    assert other == {"task": "vt", "arm": "0.01", "problem": "budget: 0.01 is too little"}


def test_without_a_dense_arm_there_is_no_change():
    squeezed = [row(0, "a", [1], SQUEEZED), row(1, "b", [1], SQUEEZED)]
    dense, other = summarise(TASK, {"dense": squeezed, "0.25": squeezed})
    assert "problem" in dense and "score" not in dense
    assert other["score"] == 0.75 and "difference" not in other
