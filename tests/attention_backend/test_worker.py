"""What a worker makes of a step that the scheduler's side told it of."""

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.conftest import ON_GPU
from vllm_squeeze.attention_backend.matching import DENSE_SLOT, LiveBlock, Step
from vllm_squeeze.attention_backend.variants import VariantSlot
from vllm_squeeze.attention_backend.worker import CounterReader, Kind, SqueezeWorker

ROOM = 100


@pytest.fixture
def worker():
    """One that has loaded prefix 0, but not 1, and has room for suffixes of 100 tokens."""
    worker = object.__new__(SqueezeWorker)
    worker._residency = SimpleNamespace(active={0: None}, room=SimpleNamespace(num_slots=2))
    worker.paused = False
    rows = SimpleNamespace(
        can_be_alone=lambda num_tokens, longest_suffix: longest_suffix <= ROOM,
        can_be_shared=lambda num_tokens: num_tokens > 16,
    )
    worker._groups = {0: rows}
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
    worker.expect(Step([LiveBlock(slot, 0, 3, 7, 64, 64) for slot in slots], 1, longest_suffix))
    assert (worker.squeezing, worker.kind.alone) == (squeezing, alone)
    worker.paused = True
    worker.expect(Step([LiveBlock(slot, 0, 3, 7, 64, 64) for slot in slots], 1, longest_suffix))
    assert (worker.squeezing, worker.kind.alone) == (False, False)


def test_steps_with_more_settings_than_prefixes_are_crowded(worker):
    """Settings on a prefix that has not been loaded are none."""
    live = [LiveBlock(slot, 0, 3, 7, 64, 64) for slot in (0, 2, 3)]
    variants = (VariantSlot(2, 0, -5.0), VariantSlot(3, 0, -6.0), VariantSlot(4, 1, -6.0))
    worker.expect(Step(live, 3, ROOM, variants))
    assert worker.squeezing and worker.kind == Kind(alone=False, crowded=True)
    worker.expect(Step(live[1:], 2, ROOM, variants))
    assert worker.squeezing and worker.kind == Kind(alone=True, crowded=False)
    worker.expect(Step([live[1]._replace(slot=4)], 2, ROOM, variants))
    assert not worker.squeezing


def test_which_steps_share_prefixes(worker):
    """Whatever the settings, but not those of few tokens, whose graphs are of other steps; nor of no rows of ours."""
    live = [LiveBlock(slot, 0, 3, 7, 64, 64, exact=True) for slot in (0, 2, 3)]
    variants = (VariantSlot(2, 0, 0.0), VariantSlot(3, 0, 0.0))
    worker.expect(Step(live, 17, ROOM, variants, shared=True))
    assert worker.squeezing and worker.kind == Kind(shared=True)
    worker.expect(Step(live, 16, ROOM, variants, shared=True))
    assert worker.kind == Kind(crowded=True)
    worker.expect(Step(live[:1], 16, ROOM, shared=True))
    assert worker.kind == Kind(alone=True)
    worker.expect(Step([live[0]._replace(slot=1)], 17, ROOM, shared=True))
    assert not worker.squeezing and worker.kind == Kind()
    worker._residency.room.num_variants = 0
    assert worker.kinds_of_steps(16) == [Kind(), Kind(alone=True)]
    assert worker.kinds_of_steps(17) == [Kind(), Kind(alone=True), Kind(shared=True)]


def test_a_step_without_squeezed_rows_is_not_taken_for_the_one_before(worker):
    worker.expect(Step([LiveBlock(0, 0, 3, 7, 64, 64)], 1, ROOM))
    assert worker.squeezing and worker.kind.alone
    worker.expect(Step([], 0, None))
    assert not worker.squeezing and not worker.kind.alone


def test_counters_are_read_when_they_may_have_changed():
    """Steps that leave all rows to vLLM copy nothing; what was counted is told once."""
    counters = torch.zeros(2, 6, dtype=torch.int64, device="cuda" if ON_GPU else "cpu")
    reader = CounterReader(counters)

    def take_all():
        grown = torch.zeros(2, 6, dtype=torch.int64)
        for _ in range(3):
            if ON_GPU:
                torch.cuda.synchronize()
            if taken := reader.take():
                grown += torch.tensor(taken)
        return grown[1].tolist()

    assert reader.take() == []
    for added in (3, 4):
        counters[1] += added
        reader.expect_change()
        assert take_all() == [added] * 6
        assert reader.take() == []
    counters[1] += 5
    assert take_all() == [0] * 6, "nothing was expected to count"
