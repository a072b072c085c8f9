"""The questions that a prefix is asked while it is indexed: their answers' queries calibrate thresholds.

By others, which are held back, it is measured what budgets cost.
"""

import json
from collections.abc import Sequence
from pathlib import Path

ANSWER_TOKENS = 32
"""Tokens of each answer, at most."""
MOST_QUESTIONS = 64
"""Bounds the memory that queries take, and the time."""

GENERAL = (
    "What is this text about?",
    "Who wrote this, and for whom?",
    "Summarise the most important points.",
    "Which names of people, places or things appear, and what is said about them?",
    "Which numbers, dates or amounts are given?",
    "What does the beginning say?",
    "What happens in the middle of the text?",
    "How does the text end?",
    "Explain in simple words what this means.",
    "Quote a sentence that matters, and say why it does.",
    "What should somebody who has no time know of this?",
    "Which rules, conditions or exceptions are there?",
    "What are the causes and the consequences of what is described?",
    "Is anything here unclear or contradictory?",
    "List five facts from the text.",
    "Write a title and a subtitle for this text.",
)

GENERAL_HELD_BACK = (
    "What is the main point of this text?",
    "Which person or thing is mentioned most, and in what connection?",
    "What comes right after the first paragraph?",
    "Name something that the text compares or contrasts.",
    "What does the last part of the text deal with?",
    "Which detail would a careful reader notice that others would miss?",
    "Repeat the longest sentence that you can find.",
    "Which questions does this text leave open?",
)

FEWEST_TO_SPLIT = 8
"""Questions given of which some are held back; of fewer, all calibrate."""


def general_questions(chat: bool, questions: Sequence[str] = GENERAL) -> list[str]:
    """Questions about any text: user messages where it is a system message, else what follows it."""
    return list(questions) if chat else [f"\n\nQuestion: {question}\nAnswer:" for question in questions]


def hold_back(questions: list[str]) -> tuple[list[str], list[str]]:
    """Every fourth of the questions given, of few none, is held back; returns the others first."""
    if len(questions) < FEWEST_TO_SPLIT:
        return questions, []
    held_back = questions[3::4]
    return [question for number, question in enumerate(questions) if number % 4 != 3], held_back


def read_questions(path: Path) -> list[str]:
    """Questions from a file: one a line, or JSON lines with {"question": ...}. Blank lines are skipped.

    Raises:
        ValueError: the file cannot be read or has no question, or a line of JSON lines is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--questions: {path}: {error}") from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--questions: {path}: empty")
    if not numbered[0][1].lstrip().startswith("{"):
        return [line for _, line in numbered]
    return [question_of(line, f"--questions: {path}, line {number}") for number, line in numbered]


def question_of(line: str, where: str) -> str:
    """The question in a line of JSON lines.

    Args:
        line: a JSON object with a "question".
        where: of the line, for error messages.

    Raises:
        ValueError: it is something else.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    question = value.get("question") if isinstance(value, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'{where}: must be a JSON object with a text "question"')
    return question


def spread(questions: list[str]) -> list[str]:
    """All questions, or MOST_QUESTIONS of them, evenly spread."""
    count = min(len(questions), MOST_QUESTIONS)
    return [questions[i * len(questions) // count] for i in range(count)]
