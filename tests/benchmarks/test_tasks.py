"""RULER's tasks: what they plant, what they ask, and how answers are scored."""

import itertools
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.tasks import (
    HOPS,
    NIAH,
    NOISE,
    QUERIES,
    TASKS,
    VALUES_PER_KEY,
    VT,
    Question,
    Task,
    distinct_names,
    distinct_numbers,
    make_task,
)

ESSAY = (Path(__file__).parents[2] / "examples" / "data" / "persuasion.txt").read_text(encoding="utf-8")
NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")
# Words and single marks: about what tokenizers make of English.
PIECE = re.compile(r"\w+|[^\w\s]")
TASK_NAMES = pytest.mark.parametrize("name", TASKS)


def count_tokens(text: str) -> int:
    return len(PIECE.findall(text))


def make(name: str, num_questions: int = 5, length: int = 2000, seed: int = 0) -> Task:
    return make_task(name, num_questions, length, count_tokens, ESSAY, seed)


def longest_step(name: str) -> int:
    """Tokens of the longest part that could have been added to a prefix."""
    parts = [NOISE, "One of the special magic numbers for a-b is: 1."]
    if name not in ("vt", "niah_multikey"):
        parts += re.split(r"(?<=[.;?!])\s+", ESSAY)
    return max(map(count_tokens, parts))


@TASK_NAMES
def test_a_seed_says_it_all(name: str):
    assert make(name, seed=3) == make(name, seed=3)
    assert make(name, seed=3) != make(name, seed=4)


@TASK_NAMES
@settings(max_examples=15, deadline=None)
@given(num_questions=st.integers(1, 12), length=st.integers(1200, 9000), seed=st.integers(0, 2**32))
def test_prefixes_are_as_long_as_parts_allow(name: str, num_questions: int, length: int, seed: int):
    task = make(name, num_questions, length, seed)
    assert task.name == name and len(task.questions) == num_questions
    assert length - longest_step(name) < count_tokens(task.prefix) <= length


@pytest.mark.parametrize("name", [name for name in TASKS if name != "vt"])
@settings(max_examples=15, deadline=None)
@given(num_questions=st.integers(1, 12), length=st.integers(1200, 9000), seed=st.integers(0, 2**32))
def test_needles_answer_their_question_alone(name: str, num_questions: int, length: int, seed: int):
    task = make(name, num_questions, length, seed)
    assert task.prefix.startswith(NIAH)
    needles = NEEDLE.findall(task.prefix)
    numbers = [value for _, value in needles]
    assert len(set(numbers)) == len(numbers) == len(re.findall(r"\d{7}", task.prefix))
    asked = [set(re.findall("[a-z]+-[a-z]+", question.text)) for question in task.questions]
    assert len(set.union(*asked)) == sum(map(len, asked)), "two questions ask for one key"
    for question, keys in zip(task.questions, asked):
        assert sorted(question.references) == sorted(value for key, value in needles if key in keys)
        assert len(keys) == (QUERIES if name == "niah_multiquery" else 1)
        assert len(question.references) == len(keys) * (VALUES_PER_KEY if name == "niah_multivalue" else 1)
    distractors = len(needles) - sum(len(question.references) for question in task.questions)
    assert distractors > 10 if name == "niah_multikey" else distractors == 0


@settings(max_examples=15, deadline=None)
@given(num_questions=st.integers(1, 12), length=st.integers(1200, 9000), seed=st.integers(0, 2**32))
def test_variables_have_their_value_through_their_chain(num_questions: int, length: int, seed: int):
    task = make("vt", num_questions, length, seed)
    assert task.prefix.startswith(VT)
    values: dict[str, str] = {}
    lines = task.prefix.removeprefix(VT).split("\n")
    for variable, source in (re.fullmatch(r"VAR (\w+) = (.*)", line).groups() for line in lines if line != NOISE):
        assert variable not in values
        # a KeyError: the chain's links are not in order
        values[variable] = values[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
    assert len(values) == num_questions * (HOPS + 1)
    for question in task.questions:
        (value,) = re.findall(r"\d{5}", question.text)
        assert set(question.references) == {variable for variable, its in values.items() if its == value}
        counts = [task.prefix.lower().count(reference.lower()) for reference in question.references]
        assert counts == [2] * HOPS + [1], "all but the last are assigned once and read once"


@pytest.mark.parametrize("name", [name for name in TASKS if name != "niah_multikey"])
def test_without_its_needles_a_haystack_is_the_text_from_its_start(name: str):
    task = make(name, length=9000)
    if name == "vt":
        assert set(re.sub(r"VAR .*\n?", "", task.prefix.removeprefix(VT)).strip().split("\n")) == {NOISE}
        return
    rest = " ".join(NEEDLE.sub("", task.prefix.removeprefix(NIAH)).split())
    repeated = " ".join((ESSAY + " " + ESSAY + " " + ESSAY).split())
    assert len(rest) > len(ESSAY) and repeated.startswith(rest)


class Scripted(random.Random):
    """Draws what it is told."""

    def __init__(self, *draws):
        super().__init__()
        self.draws = iter(draws)

    def randrange(self, *_, **__):
        return next(self.draws)

    choices = randrange


def test_what_was_drawn_before_is_drawn_anew():
    numbers = distinct_numbers(Scripted(1000000, 1000000, 1000001))
    assert list(itertools.islice(numbers, 2)) == ["1000000", "1000001"]
    names = distinct_names(Scripted("ABCDE", "GRASS", "ABCDE", "FGHIJ"))
    assert list(itertools.islice(names, 2)) == ["ABCDE", "FGHIJ"]


def test_questions_ask_at_all_depths():
    task = make("niah_single", num_questions=5, length=9000)
    depths = sorted(task.prefix.index(question.references[0]) / len(task.prefix) for question in task.questions)
    assert depths == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.03)
    assert depths != [task.prefix.index(question.references[0]) / len(task.prefix) for question in task.questions]


def test_questions_are_worded_for_one_value_or_many():
    assert make("niah_single").questions[0].text.startswith("What is the special magic number for ")
    text = make("niah_multiquery").questions[0].text
    assert re.fullmatch(r"What are all the special magic numbers for (\S+, ){3}and \S+ mentioned in .*", text)


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
    "arguments, message",
    [
        ({"name": "niah"}, "name is 'niah'; must be one of niah_single, "),
        ({"name": "vt", "num_questions": 0}, "num_questions is 0; must be at least 1"),
        ({"name": "vt", "num_questions": 10001}, "num_questions is 10001; must be at most 10000"),
        ({"name": "niah_multiquery", "num_questions": 5000}, "num_questions is 5000; must be at most "),
        ({"name": "niah_single", "length": 50}, r"length is 50; must be at least \d+, which needles"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_an_essay_must_have_words():
    with pytest.raises(ValueError, match="essay is ' '"):
        make_task("niah_single", 1, 1000, count_tokens, " ")


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
