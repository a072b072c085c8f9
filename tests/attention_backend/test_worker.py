"""What a worker makes of a step that the scheduler's side told it of."""

from types import SimpleNamespace

import pytest

from vllm_squeeze.attention_backend.matching import DENSE_SLOT, LiveBlock, Step
from vllm_squeeze.attention_backend.worker import SqueezeWorker

ROOM = 100


@pytest.fixture
def worker():
    """One that has loaded prefix 0, but not 1, and has room for suffixes of 100 tokens."""
    worker = object.__new__(SqueezeWorker)
    worker._residency = SimpleNamespace(active={0: None})
    worker._groups = {0: SimpleNamespace(can_be_alone=lambda num_tokens, longest_suffix: longest_suffix <= ROOM)}
    return worker


@pytest.mark.parametrize(
    ("slots", "longest_suffix", "squeezing", "alone"),
    [
        ([], None, False, False),
        ([0], None, True, False),
        ([0], ROOM, True, True),
        ([0], ROOM + 1, True, False),
        ([0, 1], ROOM, True, False),
        ([1], ROOM, False, False),
        ([0, DENSE_SLOT], None, True, False),
    ],
    ids=[
        "no-rows",
        "other-rows",
        "alone",
        "no-room",
        "one-not-loaded",
        "none-loaded",
        "a-row-of-a-prefix-not-computed",
    ],
)
def test_which_steps_are_squeezed_and_which_alone(worker, slots, longest_suffix, squeezing, alone):
    worker.expect(Step([LiveBlock(slot, 0, 3, 7, 64) for slot in slots], 1, longest_suffix))
    assert (worker.squeezing, worker.alone) == (squeezing, alone)
