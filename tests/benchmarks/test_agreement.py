"""How answers are told apart: the same, another at a tie, and wrong."""

import pytest

from benchmarks.agreement import compare, is_tie

CLEAR, TIED = [20.0, 15.0], [20.0, 19.9]


@pytest.mark.parametrize(
    ("ours", "outcome", "agreed"),
    [
        ([5, 6, 7, 8], "same", 1.0),
        ([5, 9, 7, 8], "ties", 0.25),
        ([5, 6, 9, 8], "errors", 0.5),
        ([5, 6], "errors", 0.5),
        ([5, 6, 7, 8, 9], "errors", 1.0),
    ],
    ids=["same", "at a tie", "wrong", "ends early", "goes on"],
)
def test_an_answer_counts_once(ours: list[int], outcome: str, agreed: float):
    dense = {"tokens": [[5, 6, 7, 8]], "best": [[CLEAR, TIED, CLEAR, CLEAR]], "dtype": "bfloat16"}
    found = compare(dense, {"tokens": [ours], "counters": {}})
    assert {name: found[name] for name in ("same", "ties", "errors")} == {"same": 0, "ties": 0, "errors": 0} | {
        outcome: 1
    }
    assert found["tokens_before_first_difference"] == agreed


def test_a_tie_is_a_step_of_the_dtype():
    assert is_tie(16.0, 15.875, "bfloat16") and not is_tie(16.0, 15.8, "bfloat16")
    assert is_tie(-0.5, -0.5, "float32") and not is_tie(16.0, 15.875, "float16")
