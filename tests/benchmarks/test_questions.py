"""How answers are scored, and fields of questions and tasks."""

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
