"""How answers are scored, and questions and tasks as they are kept."""

import json
from dataclasses import asdict

import pytest

from benchmarks.quality.questions import Question, Task


@pytest.mark.parametrize(
    "metric, answer, score",
    [
        ("all", "ABCDE, and then 12.", 0.5),
        ("all", "abcde or FGHIJ", 1),
        ("all", "none", 0),
        ("part", "xfghijx", 1),
        ("part", "", 0),
    ],
)
def test_scores_count_references_found_in_any_case(metric: str, answer: str, score: float):
    assert Question("?", ("ABCDE", "fghij"), metric).score(answer) == score


@pytest.mark.parametrize(
    "answer, f1",
    [
        ("the 10th century.", 1),
        ("Century", 2 / 3),
        ("10th 10th century", 4 / 5),
        ("In the 10th century", 4 / 5),
        ("about 1000", 1),
        ("the", 0),
        ("", 0),
    ],
)
def test_f1_is_of_words_shared_with_the_reference_that_is_most_like_the_answer(answer: str, f1: float):
    assert Question("?", ("10th century", "about 1000"), "part").f1(answer) == pytest.approx(f1)


def test_tasks_are_kept_as_json():
    questions = (Question("?", ("a",)), Question("??", ("b", "c"), "part", (("before?", "yes"), ("and?", "no"))))
    task = Task("chat", "text", questions, 30)
    assert Task.from_dict(json.loads(json.dumps(asdict(task)))) == task


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: Question("?", (), "all"), "references is"),
        (lambda: Question("?", ("a", "")), "references is"),
        (lambda: Question("?", ("a",), "any"), "metric is 'any'; must be one of all, part"),
        (lambda: Task("vt", "text", (), 30), "questions is"),
        (lambda: Task("vt", "text", (Question("?", ("a",)),), 0), "answer_tokens is 0; must be at least 1"),
    ],
)
def test_fields_that_cannot_be_used(make_it, message: str):
    with pytest.raises(ValueError, match=message):
        make_it()
