"""What all tasks have in common."""

import re

import pytest

from benchmarks.quality.documents import DATA, load
from benchmarks.quality.needles import NOISE
from benchmarks.quality.tasks import TASKS, make_task
from tests.benchmarks.making import ESSAY, any_size, count_tokens, make

RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
NEEDLE = (
    "One of the special magic uuids for 01234567-89ab-cdef-0123-456789abcdef is: 01234567-89ab-cdef-0123-456789abcdef."
)


def test_all_of_ruler_is_there():
    assert tuple(TASKS) == (*RULER, "chat")


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_says_it_all(name: str):
    assert make(name, seed=3) == make(name, seed=3)
    tasks = [make(name, seed=seed) for seed in range(4)]
    assert len({task.questions for task in tasks}) == 4
    # Few articles come first in a prefix.
    assert len({task.prefix for task in tasks}) > (1 if name in ("qa_1", "chat") else 3)


@pytest.mark.parametrize("name", TASKS)
@any_size
def test_questions_are_as_many_as_asked_for_and_all_different(name: str, num_questions: int, length: int, seed: int):
    task = make(name, num_questions, length, seed)
    assert task.name == name
    assert len({question.text for question in task.questions}) == len(task.questions) == num_questions


def longest_step(name: str) -> int:
    """Tokens of the longest part that could have been added to a prefix."""
    if name in ("qa_1", "chat"):
        parts = [paragraph["text"] for article in load("squad.json") for paragraph in article["paragraphs"]]
    elif name == "qa_2":
        parts = [text for row in load("hotpotqa.json") for text in (*row["supporting"], *row["distractors"])]
    else:
        parts = [NOISE, NEEDLE, *re.split(r"(?<=[.;?!])\s+", ESSAY)]
    return max(map(count_tokens, parts)) + 10


@pytest.mark.parametrize("name", TASKS)
@any_size
def test_prefixes_are_as_long_as_parts_allow(name: str, num_questions: int, length: int, seed: int):
    task = make(name, num_questions, length, seed)
    assert length - longest_step(name) < count_tokens(task.prefix) <= length


@pytest.mark.parametrize("name", ["qa_1", "qa_2", "chat"])
def test_there_are_documents_for_the_longest_prefixes(name: str):
    """Tokenizers make more of a text than words and marks: 28k tokens are about 24k of these."""
    task = make(name, num_questions=20, length=26_000)
    assert count_tokens(task.prefix) > 26_000 - longest_step(name)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "niah"}, "name is 'niah'; must be one of niah_single_1, "),
        ({"name": "vt", "num_questions": 0}, "num_questions is 0; must be at least 1"),
        ({"name": "vt", "num_questions": 10001}, "num_questions is 10001; must be at most 10000 for vt"),
        ({"name": "niah_multiquery", "num_questions": 5000}, r"must be at most \d+ for niah_multiquery"),
        ({"name": "cwe", "num_questions": 41}, "num_questions is 41; must be at most 40 for cwe"),
        ({"name": "fwe", "num_questions": 41}, "num_questions is 41; must be at most 40 for fwe"),
        ({"name": "qa_2", "num_questions": 41}, "num_questions is 41; must be at most 40 for qa_2"),
        ({"name": "qa_1", "num_questions": 500}, r"must be at most \d+ for qa_1 of 2000 tokens"),
        ({"name": "chat", "num_questions": 500}, r"must be at most \d+ for chat of 2000 tokens"),
        ({"name": "qa_1", "length": 10**5}, r"length is 100000; must be at most \d+ for qa_1, which has no more text"),
        ({"name": "qa_2", "length": 10**5}, r"length is 100000; must be at most \d+ for qa_2, which has no more text"),
        (
            {"name": "cwe", "num_questions": 1, "length": 10**5},
            r"length is 100000; must be at most \d+ for cwe, which has no more text",
        ),
        *(({"name": name, "length": 50}, rf"length is 50; must be at least \d+ for {name}") for name in TASKS),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("name", TASKS)
def test_the_length_that_is_asked_for_is_enough(name: str):
    with pytest.raises(ValueError) as refused:
        make(name, length=50)
    length = int(re.search(r"at least (\d+)", str(refused.value))[1])
    num_questions = 1 if name in ("qa_1", "chat") else 5
    assert count_tokens(make(name, num_questions, length).prefix) == length
    with pytest.raises(ValueError, match=f"at least {length}"):
        make(name, length=length - 1)


def test_an_essay_must_have_words():
    with pytest.raises(ValueError, match="essay is ' '"):
        make_task("niah_single_2", 1, 1000, count_tokens, " ")


def test_data_says_where_it_is_from():
    notice = (DATA / "README.md").read_text(encoding="utf-8")
    assert all(path.name in notice for path in DATA.iterdir() if path.name != "README.md")
