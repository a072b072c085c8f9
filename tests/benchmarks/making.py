"""Tasks as tests make them, with a tokenizer that needs no model."""

import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.questions import Task
from benchmarks.quality.tasks import make_task

ESSAY = (Path(__file__).parents[2] / "examples" / "data" / "persuasion.txt").read_text(encoding="utf-8")
# Words and single marks: about what tokenizers make of English.
PIECE = re.compile(r"\w+|[^\w\s]")


def count_tokens(text: str) -> int:
    return len(PIECE.findall(text))


def make(name: str, num_questions: int = 5, length: int = 2000, seed: int = 0) -> Task:
    return make_task(name, num_questions, length, count_tokens, ESSAY, seed)


def any_size(test):
    """Runs a test for some numbers of questions, lengths that have room for them, and seeds."""
    sizes = given(num_questions=st.integers(1, 12), length=st.integers(2500, 9000), seed=st.integers(0, 2**32))
    return settings(max_examples=10, deadline=None)(sizes(test))
