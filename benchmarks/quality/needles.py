"""RULER's needles in a haystack: sentences that each give a magic value for a key, asked for by their keys."""

import itertools
import random
import re
import uuid
from collections.abc import Iterator, Sequence

from benchmarks.quality.haystack import Plan, at_even_depths, distinct, fill
from benchmarks.quality.questions import Question, Task

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

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type} for {key} is: {value}."
INSTRUCTION = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {type} afterwards.\n"
)
ONE_VALUE = "What is the special magic {type} for {query} mentioned in the provided text?"
MANY_VALUES = "What are all the special magic {type} for {query} mentioned in the provided text?"


def niah(
    plan: Plan,
    type_haystack: str = "essay",
    type_needle_k: str = "words",
    type_needle_v: str = "numbers",
    num_needle_k: int = 1,
    num_needle_v: int = 1,
    num_needle_q: int = 1,
) -> Task:
    """Needles in a haystack.

    Args:
        plan: of the task.
        type_haystack: "essay", "repeat" (noise), or "needle" (lines that are needles themselves).
        type_needle_k: of keys, "words" or "uuids".
        type_needle_v: of values, "numbers" or "uuids".
        num_needle_k: keys planted for each question.
        num_needle_v: values of a key.
        num_needle_q: keys that a question asks for.
    """
    rng = plan.rng
    numbers, uuids = distinct(lambda: number(rng)), distinct(lambda: uuid4(rng))
    num_keys = plan.num_questions * num_needle_k
    if type_needle_k == "words":
        plan.check_questions((len(KEYS) - 1) // num_needle_k)
        shuffled = rng.sample(KEYS, len(KEYS))
        keys, others = shuffled[:num_keys], shuffled[num_keys:]
        other_keys: Iterator[str] = (rng.choice(others) for _ in itertools.count())
    else:
        keys, other_keys = list(itertools.islice(uuids, num_keys)), uuids
    some_values = uuids if type_needle_v == "uuids" else numbers

    def needle(key: str, value: str) -> str:
        return NEEDLE.format(type=type_needle_v, key=key, value=value)

    values = {key: tuple(itertools.islice(some_values, num_needle_v)) for key in keys}
    needles = [needle(key, value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    haystack = {
        "essay": itertools.cycle(sentences(plan.essay)),
        "repeat": itertools.repeat(NOISE),
        "needle": map(needle, other_keys, some_values),
    }[type_haystack]
    instruction, joint = INSTRUCTION.format(type=type_needle_v), " " if type_haystack == "essay" else "\n"
    prefix = fill(plan, at_even_depths(needles), haystack, lambda parts: instruction + joint.join(parts))
    if num_needle_v == num_needle_q == 1:
        question, asked_type = ONE_VALUE, type_needle_v.removesuffix("s")
    else:
        question, asked_type = MANY_VALUES, type_needle_v
    asked = [keys[first : first + num_needle_q] for first in range(0, num_keys, num_needle_k)]
    questions = (
        Question(
            question.format(type=asked_type, query=enumerated(some)),
            tuple(value for key in some for value in values[key]),
        )
        for some in asked
    )
    return Task(plan.name, prefix, tuple(questions), answer_tokens=128)


def sentences(text: str) -> list[str]:
    """A text's sentences, their words joined by single spaces."""
    return re.split(r"(?<=[.;?!]) ", " ".join(text.split()))


def enumerated(words: Sequence[str]) -> str:
    """Words as a list in a sentence: a, b, and c."""
    return ", ".join([*words[:-1], f"and {words[-1]}"] if len(words) > 1 else words)


def number(rng: random.Random) -> str:
    """A number of 7 digits."""
    return str(rng.randrange(10**6, 10**7))


def uuid4(rng: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
