"""Needles and variables in haystacks: what is planted, and what is asked."""

import itertools
import random
import re

import pytest

from benchmarks.quality.haystack import distinct
from benchmarks.quality.needles import NOISE
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.variables import HOPS, INSTRUCTION, variable
from tests.benchmarks.making import ESSAY, any_size, make

WORDS, NUMBER = r"[a-z]+-[a-z]+", r"\d{7}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
# Of each task: keys, values, their name, keys asked for in a question, values of each, keys planted for a question.
NEEDLES = {
    "niah_single_1": (WORDS, NUMBER, "numbers", 1, 1, 1),
    "niah_single_2": (WORDS, NUMBER, "numbers", 1, 1, 1),
    "niah_single_3": (WORDS, UUID, "uuids", 1, 1, 1),
    "niah_multikey_1": (WORDS, NUMBER, "numbers", 1, 1, 4),
    "niah_multikey_2": (WORDS, NUMBER, "numbers", 1, 1, None),
    "niah_multikey_3": (UUID, UUID, "uuids", 1, 1, None),
    "niah_multivalue": (WORDS, NUMBER, "numbers", 1, 4, 1),
    "niah_multiquery": (WORDS, NUMBER, "numbers", 4, 1, 4),
}
AMONG_NEEDLES = [name for name, (*_, planted) in NEEDLES.items() if planted is None]


def needle_of(name: str) -> re.Pattern:
    key, value, kind, *_ = NEEDLES[name]
    return re.compile(rf"One of the special magic {kind} for ({key}) is: ({value})\.")


def test_all_needles_are_tested():
    assert list(NEEDLES) == [name for name in TASKS if name.startswith("niah")]


@pytest.mark.parametrize("name", NEEDLES)
@any_size
def test_needles_answer_their_question_alone(name: str, num_questions: int, length: int, seed: int):
    key, _, kind, num_asked, num_values, num_planted = NEEDLES[name]
    task = make(name, num_questions, length, seed)
    instruction, _ = task.prefix.split("\n", 1)
    assert instruction.startswith(f"Some special magic {kind} are hidden")
    needles = needle_of(name).findall(task.prefix)
    values = [value for _, value in needles]
    assert len(set(values)) == len(values) == task.prefix.count("special magic") - 1
    asked = [set(re.findall(key, question.text)) for question in task.questions]
    assert len(set.union(*asked)) == sum(map(len, asked)), "two questions ask for one key"
    for question, keys in zip(task.questions, asked):
        assert sorted(question.references) == sorted(value for key, value in needles if key in keys)
        assert len(keys) == num_asked and len(question.references) == num_asked * num_values
        assert all(task.prefix.count(reference) == 1 for reference in question.references)
    if num_planted is None:
        assert len(needles) > 5 * num_questions
    else:
        assert len(needles) == num_questions * num_planted * num_values


@any_size
def test_variables_have_their_value_through_their_chain(num_questions: int, length: int, seed: int):
    task = make("vt", num_questions, length, seed)
    assert task.prefix.startswith(INSTRUCTION)
    values: dict[str, str] = {}
    lines = task.prefix.removeprefix(INSTRUCTION).split("\n")
    for name, source in (re.fullmatch(r"VAR (\w+) = (.*)", line).groups() for line in lines if line != NOISE):
        assert name not in values
        # a KeyError: the chain's links are not in order
        values[name] = values[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
    assert len(values) == num_questions * (HOPS + 1)
    for question in task.questions:
        (value,) = re.findall(r"\d{5}", question.text)
        assert set(question.references) == {name for name, its in values.items() if its == value}
        counts = [task.prefix.lower().count(reference.lower()) for reference in question.references]
        assert counts == [2] * HOPS + [1], "all but the last are assigned once and read once"


def rest_of(name: str) -> str:
    """What a long prefix has beside its instruction and needles."""
    needle = re.compile(r"VAR \w+ = .*") if name == "vt" else needle_of(name)
    instruction = INSTRUCTION if name == "vt" else make(name).prefix.split("\n", 1)[0]
    return " ".join(needle.sub("", make(name, length=9000).prefix.removeprefix(instruction)).split())


@pytest.mark.parametrize("name", [*NEEDLES, "vt"])
def test_without_its_needles_a_haystack_is_the_text_from_its_start(name: str):
    text = NOISE if name in ("vt", "niah_single_1") else ESSAY
    if name in AMONG_NEEDLES:
        assert rest_of(name) == ""
    else:
        assert len(rest_of(name)) > len(text)
        assert " ".join([text] * 400).replace("\n", " ").split()[: len(rest_of(name).split())] == rest_of(name).split()


@pytest.mark.parametrize("name", [name for name in NEEDLES if name != "niah_multikey_1"])
def test_questions_ask_at_all_depths(name: str):
    task = make(name, num_questions=5, length=9000)
    depths = [
        task.prefix.index(value) / len(task.prefix) for question in task.questions for value in question.references
    ]
    assert sorted(depths) == pytest.approx([i / (len(depths) - 1) for i in range(len(depths))], abs=0.03)
    assert depths != sorted(depths)


def test_questions_are_worded_for_one_value_or_many():
    assert make("niah_single_1").questions[0].text.startswith("What is the special magic number for ")
    assert make("niah_single_3").questions[0].text.startswith("What is the special magic uuid for ")
    text = make("niah_multiquery").questions[0].text
    assert re.fullmatch(r"What are all the special magic numbers for (\S+, ){3}and \S+ mentioned in .*", text)


def test_what_was_drawn_before_is_drawn_anew():
    draws = iter(["a", "a", "b", "a", "c"])
    assert list(itertools.islice(distinct(lambda: next(draws)), 3)) == ["a", "b", "c"]


class Scripted(random.Random):
    """Draws what it is told."""

    def __init__(self, *draws: str) -> None:
        super().__init__()
        self.draws = iter(draws)

    def choices(self, *_, **__) -> str:
        return next(self.draws)


def test_names_of_variables_are_not_in_the_noise():
    assert variable(Scripted("GRASS", "ABCDE")) == "ABCDE"
