"""Questions on a prefix, and how answers to them are scored."""

import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

METRICS = ("all", "part")


@dataclass(frozen=True)
class Question:
    """A question on a prefix.

    Attributes:
        text: what is asked.
        references: what the answer should have in it.
        metric: "all": the score is the share of references found; "part": 1 if any is found, else 0.
        earlier: the conversation before, each question with its answer.
    """

    text: str
    references: tuple[str, ...]
    metric: str = "all"
    earlier: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}; must be one of {', '.join(METRICS)}")
        if not self.references or not all(self.references):
            raise ValueError(f"references is {self.references!r}; must be strings that are not empty, one at least")

    def score(self, answer: str) -> float:
        """How good an answer is, from 0 to 1, by the references that it contains in upper or lower case."""
        found = [reference.lower() in answer.lower() for reference in self.references]
        return sum(found) / len(found) if self.metric == "all" else float(any(found))

    def f1(self, answer: str) -> float:
        """SQuAD's F1: of the words that an answer shares with the reference that is most like it, from 0 to 1."""
        return max(f1_of_words(words(answer), words(reference)) for reference in self.references)


@dataclass(frozen=True)
class Task:
    """Questions on one prefix.

    Attributes:
        name: of the task.
        prefix: instruction and haystack.
        questions: to be asked one after the other, each of the prefix and its own earlier conversation alone.
        answer_tokens: most tokens of an answer.
    """

    name: str
    prefix: str
    questions: tuple[Question, ...]
    answer_tokens: int

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("questions is (); a task must have one at least")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens is {self.answer_tokens}; must be at least 1")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Task":
        """A task from its fields as JSON has them, tuples turned into lists."""
        questions = (
            Question(
                **question
                | {"references": tuple(question["references"]), "earlier": tuple(map(tuple, question["earlier"]))}
            )
            for question in fields["questions"]
        )
        return cls(**fields | {"questions": tuple(questions)})


def words(text: str) -> list[str]:
    """A text's words as SQuAD compares them: in lower case, without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1_of_words(answer: list[str], reference: list[str]) -> float:
    """The harmonic mean of precision and recall of an answer's words."""
    shared = (Counter(answer) & Counter(reference)).total()
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0
