"""Questions on documents: where their answers are, and what was said before."""

import itertools
import re

import pytest

from benchmarks.quality import documents
from benchmarks.quality.documents import load
from benchmarks.quality.questions import Task
from tests.benchmarks.making import any_size, make

SQUAD = {
    entry["text"]: (entry, paragraph["text"])
    for article in load("squad.json")
    for paragraph in article["paragraphs"]
    for entry in paragraph["questions"]
}
HOTPOT = {row["text"]: row for row in load("hotpotqa.json")}


def asked(text: str) -> str:
    return text.split("Question: ")[-1]


def depths_of(task: Task) -> list[float]:
    """Where each question of SQuAD's has its answer in the prefix."""
    places = []
    for question in task.questions:
        entry, paragraph = SQUAD[asked(question.text)]
        assert task.prefix.count(paragraph) == 1
        places.append(task.prefix.index(paragraph) + entry["start"])
    return [place / len(task.prefix) for place in places]


@pytest.mark.parametrize("name", ["qa_1", "chat"])
@any_size
def test_answers_are_in_the_prefix_in_the_order_of_their_questions(
    name: str, num_questions: int, length: int, seed: int
):
    task = make(name, num_questions, length, seed)
    depths = depths_of(task)
    assert depths == sorted(depths)
    for question in task.questions:
        entry, paragraph = SQUAD[asked(question.text)]
        assert question.references == tuple(entry["answers"])
        assert paragraph[entry["start"] :].startswith(entry["answers"][0])
        assert question.metric == "part"


@pytest.mark.parametrize("name", ["qa_1", "chat"])
def test_questions_ask_at_all_depths(name: str):
    depths = depths_of(make(name, num_questions=10, length=9000))
    assert depths == pytest.approx([(i + 0.5) / 10 for i in range(10)], abs=0.12)


@any_size
def test_articles_are_whole_but_the_last(num_questions: int, length: int, seed: int):
    text = make("qa_1", num_questions, length, seed).prefix.split("documents.\n\n")[1]
    articles = {article["title"]: article["paragraphs"] for article in load("squad.json")}
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", text)[1:]
    assert parts[::2] == [str(number) for number in range(1, len(parts) // 2 + 1)]
    for text in parts[1::2]:
        title, *_ = text.split("\n")
        whole = "\n".join([title, *(paragraph["text"] for paragraph in articles[title])])
        assert text == whole or (text == parts[-1] and whole.startswith(text + "\n"))


@any_size
def test_conversations_do_not_reveal_their_last_answer(num_questions: int, length: int, seed: int):
    task = make("chat", num_questions, length, seed)
    for question in task.questions:
        assert len({text for text, _ in question.earlier} - {question.text}) == 3
        for text, answer in question.earlier:
            entry, paragraph = SQUAD[text]
            assert answer == entry["answers"][0] and paragraph in task.prefix
            assert not any(reference.lower() in f"{text} {answer}".lower() for reference in question.references)


def test_conversations_need_earlier_questions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "TURNS", 1000)
    with pytest.raises(ValueError, match="length is 2000; must be more for chat, for want of earlier questions"):
        make("chat")


@any_size
def test_both_paragraphs_that_a_question_needs_are_in_the_prefix(num_questions: int, length: int, seed: int):
    task = make("qa_2", num_questions, length, seed)
    parts = re.split(r"\n\nDocument \d+:\n", task.prefix)[1:]
    assert len(set(parts)) == len(parts)
    places = []
    for question in task.questions:
        row = HOTPOT[asked(question.text)]
        assert question.references == (row["answer"],) and question.metric == "part"
        assert all(parts.count(document) == 1 for document in row["supporting"])
        places.append(min(parts.index(document) for document in row["supporting"] if row["answer"] in document))
    assert places == sorted(places)


def test_what_a_question_needs_lies_at_all_depths_and_apart():
    task = make("qa_2", num_questions=5, length=6000)
    rows = [HOTPOT[asked(question.text)] for question in task.questions]
    places = [[task.prefix.index(document) / len(task.prefix) for document in row["supporting"]] for row in rows]
    assert sorted(itertools.chain(*places)) == pytest.approx([i / 9 for i in range(10)], abs=0.06)
    assert any(abs(first - second) > 0.2 for first, second in places)


def test_a_questions_own_distractors_come_first():
    task = make("qa_2", num_questions=3, length=1500)
    rows = [HOTPOT[asked(question.text)] for question in task.questions]
    own = {document for row in rows for document in (*row["supporting"], *row["distractors"])}
    parts = re.split(r"\n\nDocument \d+:\n", task.prefix)[1:]
    assert len(parts) > 6 and set(parts) <= own


def test_answers_are_long_enough_not_to_be_found_by_chance():
    answers = [answer for entry, _ in SQUAD.values() for answer in entry["answers"]]
    answers += [row["answer"] for row in HOTPOT.values()]
    assert min(map(len, answers)) == 3
    assert not {"yes", "no"} & {answer.lower() for answer in answers}
