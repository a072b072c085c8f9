"""RULER's most frequent words, of lists (``cwe``) and of coded texts (``fwe``), as many of them as questions."""

import itertools
import math
import random
import string
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.quality.haystack import Plan, distinct, largest
from benchmarks.quality.questions import Question, Task

WORDS = (Path(__file__).parent / "data" / "words.txt").read_text(encoding="utf-8").split()
# Of lists and texts; numbers would be taken for those of words.
NAMES = (
    "Adam Alice Anna Ben Carl Clara Daniel David Diana Edith Emma Eric Felix Frank Grace Hannah Harry Helen Ida Jacob "
    "Julia Kate Laura Leo Lucy Maria Mark Nina Oliver Oscar Paul Peter Rosa Ruth Sarah Simon Thomas Vera Victor Walter"
)

LISTS = (
    "Below are numbered lists of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often in each list.\n\n"
)
LISTS_QUESTION = (
    "Question: What are the {asked} most common words in the list of {name} above? Answer with the {asked} words only."
)
# Words asked for in a list, copies of each, and of each other word: RULER's, its own below 4,096 tokens, and fewer.
KINDS = ((10, 30, 3), (10, 6, 1), (3, 6, 1))
OTHERS = 2  # other words, at least, for each word asked for

TEXTS = (
    "Read the following coded texts and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words of each text.\n\n"
)
TEXTS_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '...'. What are the three most frequently "
    "appeared words in the coded text of {name} above? Answer with the three words only."
)
DOTS = "..."
CODED_ASKED = 3
# Words of a text from which on the last word asked for is more frequent than the next.
LEAST_TEXT = 53
ZETA_2 = 1.6449340668482264


def common_words(plan: Plan) -> Task:
    """Lists in which some words have ten or six times as many copies as others."""
    names = names_of(plan)
    rng = plan.rng
    most_asked = KINDS[0][0]
    drawn = iter(rng.sample(WORDS, most_asked * len(names)))
    common = {name: tuple(itertools.islice(drawn, most_asked)) for name in names}
    rest = sorted(set(WORDS).difference(*common.values()))
    others = {name: rng.sample(rest, len(rest)) for name in names}
    order = rng.random()

    def text(size: int, kind: tuple[int, int, int]) -> str:
        asked, copies, other_copies = kind
        shuffler = random.Random(order)
        lists = []
        for name, num_others in zip(names, shares(size, len(names))):
            words = [*common[name][:asked] * copies, *others[name][:num_others] * other_copies]
            shuffler.shuffle(words)
            lists.append(f"List of {name}:\n" + " ".join(f"{number}. {word}" for number, word in enumerate(words, 1)))
        return LISTS + "\n\n".join(lists)

    def least(kind: tuple[int, int, int]) -> int:
        return OTHERS * kind[0] * len(names)

    kind = next((kind for kind in KINDS if plan.fits(text(least(kind), kind))), KINDS[-1])
    prefix = text(largest(plan, partial(text, kind=kind), least(kind), len(rest) * len(names)), kind)
    asked = kind[0]
    questions = (Question(LISTS_QUESTION.format(asked=asked, name=name), common[name][:asked]) for name in names)
    return Task(plan.name, prefix, tuple(questions), answer_tokens=120)


def coded_words(plan: Plan) -> Task:
    """Texts whose words are as frequent as Zipf's law has it, the most frequent one dots."""
    names = names_of(plan)
    rng = plan.rng
    drawn = distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)))
    # As many as there can be ranks in as many words as tokens.
    most = math.isqrt(plan.length) + CODED_ASKED
    vocabulary = {name: tuple(itertools.islice(drawn, most)) for name in names}
    order = rng.random()

    def text(size: int) -> str:
        shuffler = random.Random(order)
        texts = []
        for name, num_words in zip(names, shares(size, len(names))):
            copies = zip([DOTS, *vocabulary[name]], zipf(num_words))
            words = [word for word, count in copies for _ in range(count)]
            shuffler.shuffle(words)
            texts.append(f"Coded text of {name}:\n" + " ".join(words))
        return TEXTS + "\n\n".join(texts)

    prefix = text(largest(plan, text, LEAST_TEXT * len(names)))
    questions = (Question(TEXTS_QUESTION.format(name=name), vocabulary[name][:CODED_ASKED]) for name in names)
    return Task(plan.name, prefix, tuple(questions), answer_tokens=50)


def names_of(plan: Plan) -> list[str]:
    """Draws a name for each question."""
    names = NAMES.split()
    plan.check_questions(len(names))
    return plan.rng.sample(names, plan.num_questions)


def shares(size: int, count: int) -> Sequence[int]:
    """Numbers that sum up to a size and differ by one at most."""
    return [(size + i) // count for i in range(count)]


def zipf(size: int) -> list[int]:
    """How often the words of each rank are among about ``size`` words, by Zipf's law with an exponent of 2."""
    first = size / ZETA_2
    return [int(first / rank**2) for rank in range(1, math.isqrt(int(first)) + 1)]
