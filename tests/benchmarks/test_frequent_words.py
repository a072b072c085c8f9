"""Lists and coded texts: how often words are in them, and what is asked."""

import re
from collections import Counter

import pytest

from benchmarks.quality.frequent_words import LEAST_TEXT, NAMES, WORDS, shares, zipf
from benchmarks.quality.questions import Task
from tests.benchmarks.making import any_size, make


def texts_of(task: Task) -> dict[str, list[str]]:
    """The words of each list, whose numbers are checked, or of each coded text, by its name."""
    _, *parts = re.split(r"\n\n(?:List|Coded text) of (\w+):\n", task.prefix)
    texts = dict(zip(parts[::2], (text.split(" ") for text in parts[1::2]), strict=True))
    if task.name == "fwe":
        return texts
    for entries in texts.values():
        assert entries[::2] == [f"{number}." for number in range(1, len(entries) // 2 + 1)]
    return {name: entries[1::2] for name, entries in texts.items()}


def name_of(text: str) -> str:
    return re.search(r"(?:list|text) of (\w+)", text)[1]


@pytest.mark.parametrize("name, asked", [("cwe", (3, 10)), ("fwe", (3,))])
@any_size
def test_references_are_the_most_frequent_words(
    name: str, asked: tuple[int, ...], num_questions: int, length: int, seed: int
):
    task = make(name, num_questions, length, seed)
    texts = texts_of(task)
    assert [name_of(question.text) for question in task.questions] == list(texts)
    for question, words in zip(task.questions, texts.values()):
        counts = Counter(word for word in words if word != "...")
        assert len(question.references) in asked
        *first, next_count = [count for _, count in counts.most_common(len(question.references) + 1)]
        assert {word for word, count in counts.items() if count > next_count} == set(question.references)
        assert min(first) > next_count > 0


@pytest.mark.parametrize("name", ["cwe", "fwe"])
@any_size
def test_answers_are_told_apart(name: str, num_questions: int, length: int, seed: int):
    """No word asked for is in another text, or within another word."""
    task = make(name, num_questions, length, seed)
    texts = texts_of(task)
    for question, words in zip(task.questions, texts.values()):
        for word in question.references:
            assert task.prefix.count(word) == words.count(word)


@pytest.mark.parametrize(
    "num_questions, length, asked, copies, others", [(2, 9000, 10, 30, 3), (5, 2000, 10, 6, 1), (12, 2000, 3, 6, 1)]
)
def test_a_list_is_as_much_like_rulers_as_fits(num_questions: int, length: int, asked: int, copies: int, others: int):
    task = make("cwe", num_questions, length)
    for question, words in zip(task.questions, texts_of(task).values()):
        counts = Counter(Counter(words).values())
        assert counts[copies] == asked == len(question.references) and set(counts) == {copies, others}
        assert counts[others] >= 2 * asked
        assert f"the {asked} most common words" in question.text


@pytest.mark.parametrize("name", ["cwe", "fwe"])
def test_texts_are_of_one_size(name: str):
    sizes = [len(words) for words in texts_of(make(name, num_questions=7, length=5000)).values()]
    assert max(sizes) - min(sizes) <= (1 if name == "cwe" else 3)


def test_words_asked_for_are_spread_over_their_list():
    for question, words in zip((task := make("cwe", 2, 9000)).questions, texts_of(task).values()):
        places = [5 * place // len(words) for place, word in enumerate(words) if word in question.references]
        assert min(Counter(places)[fifth] for fifth in range(5)) > 30


def test_a_coded_text_is_mostly_dots():
    for words in texts_of(make("fwe", length=9000)).values():
        assert words.count("...") / len(words) == pytest.approx(0.62, abs=0.03)
        assert all(re.fullmatch("[a-z]{6}", word) for word in words if word != "...")


def test_zipf():
    """A thousand words: 1000 / zeta(2) = 607.9 of rank 1, a quarter of these of rank 2, a ninth of rank 3."""
    assert zipf(1000)[:4] == [607, 151, 67, 37]
    assert zipf(1000)[-1] == 1 and len(zipf(1000)) == 24


def test_from_the_least_text_on_ranks_are_told_apart():
    for size in range(LEAST_TEXT, 2000):
        _, _, _, fourth, fifth, *_ = zipf(size)
        assert fourth > fifth
    _, _, _, *rest = zipf(LEAST_TEXT - 1)
    assert rest[0] == rest[1]


@pytest.mark.parametrize("size, count", [(0, 3), (7, 3), (9, 3), (2, 5)])
def test_shares(size: int, count: int):
    assert sum(shares(size, count)) == size and len(shares(size, count)) == count
    assert max(shares(size, count)) - min(shares(size, count)) <= 1


def test_words_are_not_within_each_other():
    assert all(re.fullmatch("[a-z]+", word) for word in WORDS)
    text = "\n".join(WORDS)
    assert [word for word in WORDS if text.count(word) > 1] == []
    assert len(set(NAMES.split())) == len(NAMES.split())
