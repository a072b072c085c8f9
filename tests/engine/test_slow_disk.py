"""A disk that takes seconds for each layer of an index: no step waits for it, nor does the end of the engine."""

import threading
import time

import pytest

from tests.engine.conftest import engine, generate, grown, outcomes, tokens
from tests.engine.test_live_indexes import LOADING, publish, states, until
from vllm_squeeze.prefix_index import index_folder

CONTRACT, MANUAL = (tokens(seed, count=600) for seed in (1, 2))
SECONDS = 1.5
NUM_LAYERS = 3


@pytest.fixture
def slow_disk(monkeypatch):
    """Has whoever reads a layer wait, from when it is called on."""
    read = index_folder.read_plain_file

    def slow(path, *sizes):
        time.sleep(SECONDS * path.name.startswith("layer"))
        return read(path, *sizes)

    return lambda: monkeypatch.setattr(index_folder, "read_plain_file", slow)


def test_neither_steps_nor_the_end_wait_for_it(models, indexes, dense_answers, tmp_path, slow_disk):
    """Requests are dense until an index is loaded. An engine that ends leaves another at the next layer."""
    model = models("llama")
    index, another = (indexes(model, prefix) for prefix in (CONTRACT, MANUAL))
    prompts = [CONTRACT + tokens(seed, 20) for seed in range(4)]
    dense = dense_answers(model, prompts)
    store = tmp_path / "store"
    store.mkdir()
    with engine(model, store, squeeze={"watch": 0.02, "memory_limit_gib": 0.02}) as llm:
        generate(llm, prompts, num_tokens=2)
        slow_disk()
        publish(index, store)
        started, longest, before = time.monotonic(), 0.0, outcomes(llm)
        while states(llm) != {index.name: "on the devices"}:
            asked = time.monotonic()
            assert asked - started < 20 * SECONDS, "it was never loaded"
            assert generate(llm, prompts) == dense
            longest = max(longest, time.monotonic() - asked)
        assert time.monotonic() - started > 2 * NUM_LAYERS * SECONDS, "the disk was not slow"
        assert longest < SECONDS, "steps waited"
        rows = grown(llm, before)
        assert rows.pop("squeezed", 0) <= 32 and rows.keys() == {"dense: no index", LOADING}
        before = outcomes(llm)
        assert generate(llm, prompts) == dense
        assert grown(llm, before) == {"squeezed": 32}
        publish(another, store)
        until(llm, lambda: states(llm).get(another.name) == "loading")
    loaders = [thread for thread in threading.enumerate() if thread.name.startswith("squeeze-loader")]
    for thread in loaders:
        thread.join(1.25 * SECONDS)
    assert loaders and not any(thread.is_alive() for thread in loaders)
