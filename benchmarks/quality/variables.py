"""RULER's variable tracking: chains of assignments in noise, and which variables have a value."""

import itertools
import random
import string

from benchmarks.quality.haystack import Plan, distinct, fill
from benchmarks.quality.needles import NOISE
from benchmarks.quality.questions import Question, Task

INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer with the names of the {count} variables only."
)
HOPS = 4  # of a chain, which has one variable more
VALUES = range(10000, 99999)
MOST_QUESTIONS = 10000


def variable_tracking(plan: Plan) -> Task:
    """A chain for each question: a variable with a value, and variables that are assigned the one before."""
    plan.check_questions(MOST_QUESTIONS)
    rng = plan.rng
    names = distinct(lambda: variable(rng))
    needles, questions = [], []
    for value in rng.sample(VALUES, plan.num_questions):
        variables = tuple(itertools.islice(names, HOPS + 1))
        sources = (str(value), *(f"VAR {name}" for name in variables))
        links = [f"VAR {name} = {source}" for name, source in zip(variables, sources)]
        needles += zip(sorted(rng.random() for _ in links), links)
        questions.append(Question(QUESTION.format(value=value, count=HOPS + 1), variables))
    prefix = fill(plan, needles, itertools.repeat(NOISE), lambda parts: INSTRUCTION + "\n".join(parts))
    return Task(plan.name, prefix, tuple(questions), answer_tokens=60)


def variable(rng: random.Random) -> str:
    """A name of 5 capitals that the noise, the instruction and the question do not have in them."""
    while True:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name.lower() not in (NOISE + INSTRUCTION + QUESTION).lower():
            return name
