"""RULER's questions on documents: SQuAD's on whole articles, alone or in a conversation, and HotpotQA's on paragraphs.

The data is in ``data/``, with how it was made.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.haystack import Plan, at_even_depths, fill, largest
from benchmarks.quality.questions import Question, Task

DATA = Path(__file__).parent / "data"
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
PREFIX = INSTRUCTION + "\n\nThe following are given documents.\n\n{documents}"
QUESTION = INSTRUCTION + "\n\nQuestion: {question}"
ANSWER_TOKENS = 32
TURNS = 4  # of a conversation


def squad(plan: Plan) -> Task:
    """SQuAD's questions on its articles, evenly spread over the prefix and in its order."""
    prefix, entries = articles(plan)
    questions = (
        Question(QUESTION.format(question=entry["text"]), tuple(entry["answers"]), "part")
        for entry in spread(plan, entries)
    )
    return Task(plan.name, prefix, tuple(questions), ANSWER_TOKENS)


def chat(plan: Plan) -> Task:
    """The last turns of conversations about SQuAD's articles; those before ask about anything in the prefix."""
    prefix, entries = articles(plan)
    questions = []
    for entry in spread(plan, entries):
        others = [other for other in entries if other is not entry and not reveals(other, entry["answers"])]
        if len(others) < TURNS - 1:
            raise ValueError(f"length is {plan.length}; must be more for {plan.name}, for want of earlier questions")
        earlier = tuple((other["text"], other["answers"][0]) for other in plan.rng.sample(others, TURNS - 1))
        questions.append(Question(entry["text"], tuple(entry["answers"]), "part", earlier))
    return Task(plan.name, prefix, tuple(questions), ANSWER_TOKENS)


def reveals(entry: dict[str, Any], answers: Sequence[str]) -> bool:
    """Whether a question or its answer has any of some answers in it."""
    turn = f"{entry['text']} {entry['answers'][0]}".lower()
    return any(answer.lower() in turn for answer in answers)


def articles(plan: Plan) -> tuple[str, list[dict[str, Any]]]:
    """A prefix of whole articles, of which the last ends with the last paragraph that fits.

    Returns:
        the prefix, and the questions on its paragraphs in the order of their answers.
    """
    shuffled = load("squad.json")
    plan.rng.shuffle(shuffled)
    paragraphs = [(article["title"], paragraph) for article in shuffled for paragraph in article["paragraphs"]]

    def text(size: int) -> str:
        grouped = itertools.groupby(paragraphs[:size], key=lambda pair: pair[0])
        return numbered("\n".join([title, *(paragraph["text"] for _, paragraph in group)]) for title, group in grouped)

    size = largest(plan, text, least=1, most=len(paragraphs))
    entries = [
        entry
        for _, paragraph in paragraphs[:size]
        for entry in sorted(paragraph["questions"], key=lambda entry: entry["start"])
    ]
    return text(size), entries


def spread(plan: Plan, entries: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Draws a plan's questions, one of each of as many equal runs of those that there are."""
    if plan.num_questions > len(entries):
        raise ValueError(
            f"num_questions is {plan.num_questions}; must be at most {len(entries)} "
            f"for {plan.name} of {plan.length} tokens"
        )
    ends = [i * len(entries) // plan.num_questions for i in range(plan.num_questions + 1)]
    return (plan.rng.choice(entries[first:end]) for first, end in itertools.pairwise(ends))


def hotpot(plan: Plan) -> Task:
    """HotpotQA's questions, the two paragraphs that each needs apart from each other, between other paragraphs."""
    rows = load("hotpotqa.json")
    plan.check_questions(len(rows))
    rng = plan.rng
    rng.shuffle(rows)
    asked, others = rows[: plan.num_questions], rows[plan.num_questions :]
    supporting = [document for row in asked for document in row["supporting"]]
    rng.shuffle(supporting)
    # Those that were chosen to distract from the questions asked come first.
    distractors = [document for row in asked for document in row["distractors"]]
    rng.shuffle(distractors)
    rest = [document for row in others for document in (*row["supporting"], *row["distractors"])]
    rng.shuffle(rest)
    haystack = distractors + rest
    prefix = fill(plan, at_even_depths(supporting), iter(haystack), numbered, most=len(haystack))

    def depth(row: dict[str, Any]) -> int:
        return min(prefix.index(document) for document in row["supporting"] if row["answer"] in document)

    questions = (
        Question(QUESTION.format(question=row["text"]), (row["answer"],), "part") for row in sorted(asked, key=depth)
    )
    return Task(plan.name, prefix, tuple(questions), ANSWER_TOKENS)


def numbered(documents: Iterable[str]) -> str:
    """The prefix of documents."""
    named = (f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
    return PREFIX.format(documents="\n\n".join(named))


def load(name: str) -> list[dict[str, Any]]:
    return json.loads((DATA / name).read_text(encoding="utf-8"))
