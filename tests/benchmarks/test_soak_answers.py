"""When the soak calls an answer wrong."""

from random import Random
from types import SimpleNamespace

import pytest

from benchmarks.soak import Answer, Soak

DENSE = Answer([5, 6, 7], [2.0, 0.1, 3.0])


@pytest.mark.parametrize(
    ("answer", "ties", "wrong"),
    [([5, 6, 7], 0, 0), ([5, 9, 1], 1, 0), ([9, 6, 7], 0, 1), ([5, 6, 8], 0, 1)],
    ids=["the same", "parts at a tie", "parts elsewhere", "parts after a tie"],
)
def test_answers_may_part_only_at_ties(answer, ties, wrong):
    soak = Soak(SimpleNamespace(llm_engine=None), None, [[1]], [DENSE], 0.2, 12, Random(0), 10, 0.1)
    soak._compare(0, answer)
    assert soak.counts["ties"] == ties and len(soak.wrong) == wrong and soak.counts["answered"] == 1
    lead = {(5, 6, 7): 0.0, (5, 9, 1): 0.1, (9, 6, 7): 2.0, (5, 6, 8): 3.0}[tuple(answer)]
    assert soak.largest_lead == lead


def test_leads_are_those_of_the_best_over_the_second():
    places = [{3: SimpleNamespace(logprob=-2.0), 5: SimpleNamespace(logprob=-0.5)}]
    output = SimpleNamespace(token_ids=(5,), logprobs=places)
    assert Answer.of(output) == Answer([5], [1.5])
