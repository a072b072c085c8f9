"""Two minutes at most of ``benchmarks/soak.py``, which may run for hours: random requests while indexes come and go."""

import shutil
from types import SimpleNamespace

import pytest

from benchmarks.soak import soak
from tests.engine.conftest import ENGINE_ARGS, tokens


@pytest.mark.long
def test_no_answer_is_wrong_while_indexes_come_and_go(models, indexes, tmp_path):
    model = models("llama")
    exact = {3: True}
    for seed in (1, 2, 3):
        index = indexes(model, tokens(seed, count=600), exact=exact.get(seed, False))
        shutil.copytree(index, tmp_path / index.name)
    arguments = SimpleNamespace(
        model=str(model), indexes=tmp_path, seconds=110.0, answers=2000, tokens=8, tie=0.0, steps_per_event=12, seed=0,
        mode="squeezed", prefill="dense", aborted=0.1, at_once=10, room=3, memory_limit_gib=0.0003, engine_args=ENGINE_ARGS,
    )  # fmt: skip
    happened = soak(arguments)
    assert happened["wrong answers"] == 0 and 2100 > happened["answered"] > 200
    assert happened["rows squeezed"] > 0 and happened["indexes added"] > 10 and happened["squeeze index loads"] > 10
    assert happened["requests"] == happened["answered"] + happened["aborted"]
