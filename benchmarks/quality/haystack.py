"""What tasks are made from: a plan, needles planted in a haystack, and as much text as fits."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a task is to be.

    Attributes:
        name: of the task.
        num_questions: on the prefix.
        length: most tokens of the prefix, which is as long as whole parts allow.
        count_tokens: of a text.
        essay: text to plant needles in.
        rng: what is drawn at random comes from it.
    """

    name: str
    num_questions: int
    length: int
    count_tokens: Callable[[str], int]
    essay: str
    rng: random.Random

    def __post_init__(self) -> None:
        if self.num_questions < 1:
            raise ValueError(f"num_questions is {self.num_questions}; must be at least 1")
        if not self.essay.strip():
            raise ValueError(f"essay is {self.essay!r}; must have words in it")

    def check_questions(self, most: int) -> None:
        """
        Raises:
            ValueError: more questions are wanted than there can be.
        """
        if self.num_questions > most:
            raise ValueError(f"num_questions is {self.num_questions}; must be at most {most} for {self.name}")

    def fits(self, text: str) -> bool:
        return self.count_tokens(text) <= self.length


def largest(plan: Plan, text: Callable[[int], str], least: int = 0, most: float = math.inf) -> int:
    """The largest size at which a text fits.

    Args:
        plan: with the length.
        text: of a size; the larger, the longer.
        least: size, from which the text is good for the task.
        most: size that there is.

    Raises:
        ValueError: not even the least fits, or the most leaves room.
    """

    def fits(size: int) -> bool:
        return size <= most and plan.fits(text(size))

    if not plan.fits(text(least)):
        needed = plan.count_tokens(text(least))
        raise ValueError(f"length is {plan.length}; must be at least {needed} for {plan.name} of these questions")
    low, high = least, least + 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == most and (there := plan.count_tokens(text(low))) < plan.length:
        raise ValueError(f"length is {plan.length}; must be at most {there} for {plan.name}, which has no more text")
    return low


def fill(
    plan: Plan,
    needles: Sequence[tuple[float, str]],
    haystack: Iterator[str],
    text: Callable[[Sequence[str]], str],
    most: float = math.inf,
) -> str:
    """The text of needles in as much of a haystack as fits.

    Args:
        plan: with the length.
        needles: each with its depth, from 0 to 1.
        haystack: parts to plant them between.
        text: of parts.
        most: parts that the haystack has.
    """
    drawn: list[str] = []

    def planted(size: int) -> str:
        drawn.extend(itertools.islice(haystack, max(size - len(drawn), 0)))
        return text(plant(needles, drawn[:size]))

    return planted(largest(plan, planted, most=most))


def plant(needles: Sequence[tuple[float, str]], haystack: Sequence[str]) -> list[str]:
    """Puts needles into a haystack, each at its depth, in their order where depths are equal."""
    planted, placed = [], 0
    for depth, needle in sorted(needles, key=lambda pair: pair[0]):
        end = int(depth * len(haystack))
        planted += [*haystack[placed:end], needle]
        placed = end
    return [*planted, *haystack[placed:]]


def at_even_depths(needles: Sequence[str]) -> list[tuple[float, str]]:
    """Needles with depths from the start to the end, in their order."""
    return [(i / max(len(needles) - 1, 1), needle) for i, needle in enumerate(needles)]


def distinct(draw: Callable[[], str]) -> Iterator[str]:
    """What is drawn, each once."""
    drawn: set[str] = set()
    while True:
        found = draw()
        if found not in drawn:
            drawn.add(found)
            yield found
