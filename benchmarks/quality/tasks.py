"""RULER's synthetic tasks (Hsieh et al., 2024), re-made so that one prefix serves many questions.

RULER asks one question of each haystack. Here every question's needles are planted in one prefix, and each question
asks for others of them: ``niah_single`` has as many keys as questions, each the others' distractor. Instruction and
haystack are the prefix; what follows is the question. Further differences, for which scores are not comparable with
published ones:

- Essays are whatever text is given, repeated where it is too short.
- Needles lie at depths evenly spread over the prefix, so that questions ask at all depths.
- Keys are of the word lists below; all numbers of a prefix are distinct.
- Answers are not begun for the model, and ``vt`` has no worked example.

Left out: ``cwe`` and ``fwe``, which have but one question a prefix; needles in repeated noise; UUIDs; and QA.
"""

import functools
import itertools
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

ADJECTIVES = (
    "able amber ancient bold brave brisk calm clever cold cosy curious damp dear eager early fair famous fierce fond "
    "gentle giant glad grand happy hollow honest humble icy idle jolly keen kind large lazy light little lively lonely "
    "loud lucky mellow merry modest narrow neat noble odd pale plain polite proud quick quiet rapid rare rough royal "
    "shy silent simple sleepy smooth solemn steady stern sturdy sweet tall tender thirsty tidy tiny vague vivid warm "
    "weary wild wise witty young zealous"
)
NOUNS = (
    "acorn anchor apple arrow badger barrel basket beacon blanket bottle bridge bucket button cabin candle canyon "
    "carpet castle cellar chapel cherry chimney cliff clock cloud comet compass copper cottage cradle cricket curtain "
    "dagger daisy desk dolphin donkey dragon drum eagle falcon feather fiddle forest fountain garden glove goose "
    "hammer harbor harp hazel helmet heron hill island jacket jewel kettle kitten ladder lantern lemon lily lizard "
    "magnet maple marble meadow mirror mitten moth needle nettle oyster paddle palace parrot pebble pepper pigeon "
    "pillow planet pocket pony puzzle quilt rabbit ribbon river robin saddle salmon scarf shovel sparrow spider "
    "spoon stable teapot temple thimble thistle ticket tower trumpet tulip tunnel turtle valley violin wagon walnut "
    "whistle willow window zebra"
)
KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]

NEEDLE = "One of the special magic numbers for {key} is: {value}."
NIAH = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n"
)
ONE_VALUE = "What is the special magic number for {query} mentioned in the provided text?"
MANY_VALUES = "What are all the special magic numbers for {query} mentioned in the provided text?"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
VT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_QUESTION = "Question: Find all variables that are assigned the value {value} in the text above."

VALUES_PER_KEY = 4  # of niah_multivalue
QUERIES = 4  # keys asked for together in niah_multiquery
HOPS = 4  # of a chain, which has one variable more
METRICS = ("all", "part")


@dataclass(frozen=True)
class Question:
    """A question on a prefix.

    Attributes:
        text: what is asked.
        references: what the answer should have in it.
        metric: "all": the score is the share of references found; "part": 1 if any is found, else 0.
    """

    text: str
    references: tuple[str, ...]
    metric: str = "all"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}; must be one of {', '.join(METRICS)}")
        if not self.references or not all(self.references):
            raise ValueError(f"references is {self.references!r}; must be strings that are not empty, one at least")

    def score(self, answer: str) -> float:
        """How good an answer is, from 0 to 1, by the references that it contains in upper or lower case."""
        found = [reference.lower() in answer.lower() for reference in self.references]
        return sum(found) / len(found) if self.metric == "all" else float(any(found))


@dataclass(frozen=True)
class Task:
    """Questions on one prefix.

    Attributes:
        name: of the task.
        prefix: instruction and haystack.
        questions: to be asked one after the other, each of the prefix alone.
        answer_tokens: most tokens of an answer, as in RULER.
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


def make_task(
    name: str, num_questions: int, length: int, count_tokens: Callable[[str], int], essay: str, seed: int = 0
) -> Task:
    """Makes a task; equal arguments make equal tasks.

    Args:
        name: one of ``TASKS``.
        num_questions: on the prefix.
        length: most tokens of the prefix, which is as long as whole sentences or lines allow.
        count_tokens: of a text.
        essay: text to plant needles in; tasks with another haystack do not use it.
        seed: of keys, values and their order.

    Raises:
        ValueError: an argument that cannot be used.
    """
    if name not in TASKS:
        raise ValueError(f"name is {name!r}; must be one of {', '.join(TASKS)}")
    if num_questions < 1:
        raise ValueError(f"num_questions is {num_questions}; must be at least 1")
    if not essay.strip():
        raise ValueError(f"essay is {essay!r}; must have words in it")
    return TASKS[name](name, num_questions, length, count_tokens, essay, random.Random(f"{name} {seed}"))


def niah(
    name: str,
    num_questions: int,
    length: int,
    count_tokens: Callable[[str], int],
    essay: str,
    rng: random.Random,
    values_per_key: int = 1,
    queries: int = 1,
    among_needles: bool = False,
) -> Task:
    """Needles in a haystack: an essay, or lines that are needles themselves."""
    num_keys = num_questions * queries
    if num_keys >= len(KEYS):
        raise ValueError(f"num_questions is {num_questions}; must be at most {(len(KEYS) - 1) // queries} for {name}")
    keys = rng.sample(KEYS, num_keys)
    numbers = distinct_numbers(rng)
    values = {key: tuple(itertools.islice(numbers, values_per_key)) for key in keys}
    needles = [NEEDLE.format(key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    depths = [i / max(len(needles) - 1, 1) for i in range(len(needles))]
    if among_needles:
        others = sorted(set(KEYS) - set(keys))
        haystack = (NEEDLE.format(key=rng.choice(others), value=value) for value in numbers)
    else:
        haystack = itertools.cycle(sentences(essay))
    prefix = fill(NIAH, list(zip(depths, needles)), haystack, "\n" if among_needles else " ", length, count_tokens)
    question = ONE_VALUE if values_per_key == queries == 1 else MANY_VALUES
    asked = [keys[first : first + queries] for first in range(0, num_keys, queries)]
    questions = (
        Question(question.format(query=enumerated(some)), tuple(value for key in some for value in values[key]))
        for some in asked
    )
    return Task(name, prefix, tuple(questions), answer_tokens=128)


def variable_tracking(
    name: str, num_questions: int, length: int, count_tokens: Callable[[str], int], essay: str, rng: random.Random
) -> Task:
    """Chains of assignments in noise: which variables have a value?"""
    most = 10000
    if num_questions > most:
        raise ValueError(f"num_questions is {num_questions}; must be at most {most} for {name}")
    names = distinct_names(rng)
    needles, questions = [], []
    for value in rng.sample(range(10000, 99999), num_questions):
        variables = tuple(itertools.islice(names, HOPS + 1))
        sources = (str(value), *(f"VAR {variable}" for variable in variables))
        links = [f"VAR {variable} = {source}" for variable, source in zip(variables, sources)]
        needles += zip(sorted(rng.random() for _ in links), links)
        questions.append(Question(VT_QUESTION.format(value=value), variables))
    prefix = fill(VT, needles, itertools.repeat(NOISE), "\n", length, count_tokens)
    return Task(name, prefix, tuple(questions), answer_tokens=30)


def fill(
    instruction: str,
    needles: Sequence[tuple[float, str]],
    haystack: Iterator[str],
    joint: str,
    length: int,
    count_tokens: Callable[[str], int],
) -> str:
    """The instruction, and needles in as much of a haystack as fits.

    Args:
        instruction: that the text begins with.
        needles: each with its depth, from 0 to 1.
        haystack: endless.
        joint: between the parts.
        length: most tokens.
        count_tokens: of a text.

    Raises:
        ValueError: not even the needles fit.
    """
    drawn: list[str] = []

    def text(size: int) -> str:
        drawn.extend(itertools.islice(haystack, max(size - len(drawn), 0)))
        return instruction + joint.join(plant(needles, drawn[:size]))

    least = count_tokens(text(0))
    if least > length:
        raise ValueError(f"length is {length}; must be at least {least}, which needles and instruction take")
    low, high = 0, 1
    while count_tokens(text(high)) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_tokens(text(middle)) <= length else (low, middle)
    return text(low)


def plant(needles: Sequence[tuple[float, str]], haystack: Sequence[str]) -> list[str]:
    """Puts needles into a haystack, each at its depth, in their order where depths are equal."""
    planted, placed = [], 0
    for depth, needle in sorted(needles, key=lambda pair: pair[0]):
        end = int(depth * len(haystack))
        planted += [*haystack[placed:end], needle]
        placed = end
    return [*planted, *haystack[placed:]]


def sentences(text: str) -> list[str]:
    """A text's sentences, their words joined by single spaces."""
    return re.split(r"(?<=[.;?!]) ", " ".join(text.split()))


def enumerated(words: Sequence[str]) -> str:
    """Words as a list in a sentence: a, b, and c."""
    return ", ".join([*words[:-1], f"and {words[-1]}"] if len(words) > 1 else words)


def distinct_numbers(rng: random.Random) -> Iterator[str]:
    """Numbers of 7 digits, each once."""
    drawn: set[str] = set()
    while True:
        number = str(rng.randrange(10**6, 10**7))
        if number not in drawn:
            drawn.add(number)
            yield number


def distinct_names(rng: random.Random) -> Iterator[str]:
    """Names of 5 capitals, each once, and none that the noise or the instruction has in it."""
    drawn: set[str] = set()
    while True:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in drawn and name.lower() not in (NOISE + VT + VT_QUESTION).lower():
            drawn.add(name)
            yield name


TASKS: dict[str, Callable[..., Task]] = {
    "niah_single": niah,
    "niah_multikey": functools.partial(niah, among_needles=True),
    "niah_multivalue": functools.partial(niah, values_per_key=VALUES_PER_KEY),
    "niah_multiquery": functools.partial(niah, queries=QUERIES),
    "vt": variable_tracking,
}
