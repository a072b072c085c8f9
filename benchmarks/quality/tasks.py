"""RULER's thirteen tasks (Hsieh et al., 2024), re-made so that one prefix serves many questions, and ``chat``.

RULER asks one question of each haystack. Here the haystacks of all questions are one, whose questions distract from
each other. Instruction and haystack are the prefix; what follows is the question. The tasks have RULER's names:

    niah_single_*    a key's value, in noise (1) or an essay (2, 3), a number or a UUID (3)
    niah_multikey_*  with three more keys for each question (1), among needles (2, 3), all UUIDs (3)
    niah_multivalue  a key's four values
    niah_multiquery  four keys' values
    vt               the five variables of a chain of assignments
    cwe, fwe         the most common words of a list, and of a coded text
    qa_1, qa_2       questions of SQuAD, and of HotpotQA
    chat             a question of SQuAD's after three others with their answers; not RULER's

Differences from RULER, for which scores are not comparable with published ones:

- Answers are not begun for the model: questions say what is to be in them, and those of ``vt`` may have 60 tokens, not
  30. ``vt`` and ``cwe`` have no worked example.
- Essays are whatever text is given, repeated where it is too short.
- Needles lie at depths evenly spread over the prefix, so that questions ask at all depths; ``niah_single_*`` have as
  many keys as questions. Keys are of the word lists in ``needles.py``; all values of a prefix are distinct.
- ``cwe`` and ``fwe`` have a list and a text for each question in the prefix, each with a name, so that a question is
  about its share of the prefix. A list is RULER's (10 words 30 times, others 3 times) if all fit, else RULER's below
  4,096 tokens (6 times, others once), else that with 3 words.
- ``qa_1`` has whole articles, not single paragraphs in disorder; ``qa_2`` has as many of a question's eight distracting
  paragraphs as fit. Answers of one or two letters, and yes and no, are left out: they are found in too much.
"""

import functools
import random
from collections.abc import Callable

from benchmarks.quality.documents import chat, hotpot, squad
from benchmarks.quality.frequent_words import coded_words, common_words
from benchmarks.quality.haystack import Plan
from benchmarks.quality.needles import niah
from benchmarks.quality.questions import Task
from benchmarks.quality.variables import variable_tracking

TASKS: dict[str, Callable[[Plan], Task]] = {
    "niah_single_1": functools.partial(niah, type_haystack="repeat"),
    "niah_single_2": niah,
    "niah_single_3": functools.partial(niah, type_needle_v="uuids"),
    "niah_multikey_1": functools.partial(niah, num_needle_k=4),
    "niah_multikey_2": functools.partial(niah, type_haystack="needle"),
    "niah_multikey_3": functools.partial(niah, type_haystack="needle", type_needle_k="uuids", type_needle_v="uuids"),
    "niah_multivalue": functools.partial(niah, num_needle_v=4),
    "niah_multiquery": functools.partial(niah, num_needle_k=4, num_needle_q=4),
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": coded_words,
    "qa_1": squad,
    "qa_2": hotpot,
    "chat": chat,
}


def make_task(
    name: str, num_questions: int, length: int, count_tokens: Callable[[str], int], essay: str, seed: int = 0
) -> Task:
    """Makes a task; equal arguments make equal tasks.

    Args:
        name: one of ``TASKS``.
        num_questions: on the prefix.
        length: most tokens of the prefix, which is as long as whole sentences, lines or paragraphs allow.
        count_tokens: of a text.
        essay: text to plant needles in; tasks with another haystack do not use it.
        seed: of all that is drawn at random.

    Raises:
        ValueError: an argument that cannot be used.
    """
    if name not in TASKS:
        raise ValueError(f"name is {name!r}; must be one of {', '.join(TASKS)}")
    return TASKS[name](Plan(name, num_questions, length, count_tokens, essay, random.Random(f"{name} {seed}")))
