"""Indexes that come and go while an engine serves; and more of them than the devices have room for."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from tests.engine.conftest import engine, generate, grown, outcomes, tokens
from tests.logs import warnings_of_squeeze
from vllm_squeeze.offline_tools.server import Server
from vllm_squeeze.prefix_index.index_folder import IndexWriter, PrefixIndex, pin_file, remove_index

CONTRACT, MANUAL, NOTES = (tokens(seed, count=600) for seed in (1, 2, 3))
COMPUTING, LOADING, GONE = (
    f"dense: {why}"
    for why in ("prefix not in the KV cache yet", "index not on the device yet", "index no longer served")
)


def publish(index: Path, store: Path) -> Path:
    """Has an index appear in a store at once, as ``vllm-squeeze add`` does."""
    hidden = shutil.copytree(index, store / f".{index.name}")
    remove_index(store / index.name)
    return hidden.rename(store / index.name)


def made_at_another_time(folder: Path) -> Path:
    """The same index of another day, in another store."""
    index = PrefixIndex.open(folder)
    with IndexWriter(folder.parent.parent / "another", folder.name) as writer:
        writer.write_tokens(index.token_ids)
        for i, entry in enumerate(index.manifest.layers):
            writer.write_layer(i, entry.name, index.layer(i))
        return writer.publish(dataclasses.replace(index.manifest, created="2026-01-01T00:00:00+00:00"))


def until(llm, happened, seconds: float = 60) -> None:
    """Has the engine take steps until something has happened."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        generate(llm, [[9, 8, 7]], num_tokens=1)
        time.sleep(0.02)


def states(llm) -> dict[str, str]:
    """The state of each index, from vLLM's own metrics."""
    shown = (metric for metric in llm.get_metrics() if metric.name == "vllm:squeeze_index" and metric.value)
    return {metric.labels["index"]: metric.labels["state"] for metric in shown}


def value(llm, name: str, **labels: str) -> float:
    found = (metric for metric in llm.get_metrics() if metric.name == name)
    return sum(metric.value for metric in found if labels.items() <= metric.labels.items())


def rows_of(llm, prompts: list[list[int]], num_tokens: int = 4) -> dict[str, int]:
    before = outcomes(llm)
    generate(llm, prompts, num_tokens)
    return grown(llm, before)


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def test_an_index_is_added_replaced_and_removed(models, indexes, dense_answers, store, monkeypatch):
    """From an empty folder; at a budget of 1 answers are the dense ones in each state."""
    model = models("llama")
    first = indexes(model, CONTRACT)
    second = made_at_another_time(first)
    prompts = [CONTRACT + tokens(seed, 20) for seed in range(4)]
    dense = dense_answers(model, prompts)
    with engine(model, store, squeeze={"watch": 0.02, "memory_limit_gib": 0.02}) as llm:
        generate(llm, [CONTRACT + [5]], num_tokens=1)
        assert rows_of(llm, prompts) == {"dense: no index": 16} and states(llm) == {}
        folder = publish(first, store)
        until(llm, lambda: states(llm) == {first.name: "on the devices"})
        assert generate(llm, prompts) == dense
        assert rows_of(llm, prompts) == {"squeezed": 16}
        monkeypatch.setattr(Server, "_ask", lambda self, route: generate_latest())
        assert Server("http://this-process").index_states() == states(llm)
        loads = value(llm, "vllm:squeeze_index_loads")
        publish(second, store)
        until(llm, lambda: value(llm, "vllm:squeeze_index_loads") > loads)
        until(llm, lambda: states(llm) == {first.name: "on the devices"})
        assert generate(llm, prompts) == dense
        assert rows_of(llm, prompts) == {"squeezed": 16}
        with warnings_of_squeeze() as warnings:
            layer = folder / "layer-0001.safetensors"
            layer.write_bytes(layer.read_bytes()[:-1])
            os.utime(folder / "manifest.json")
            until(llm, lambda: states(llm) == {})
        assert len(warnings) == 1 and f"{layer}: the file has" in warnings[0]
        assert rows_of(llm, prompts) == {"dense: no index": 16}
        publish(first, store)
        until(llm, lambda: states(llm) == {first.name: "on the devices"})
        assert rows_of(llm, prompts) == {"squeezed": 16}
        remove_index(folder)
        until(llm, lambda: states(llm) == {})
        assert generate(llm, prompts) == dense
        assert rows_of(llm, prompts) == {"dense: no index": 16}


def test_requests_that_were_there_before(models, indexes, store):
    """None is taken for one on an index that appears in the middle of its answer, nor left on one that disappears."""
    from vllm import SamplingParams, TokensPrompt

    model = models("llama")
    index = indexes(model, CONTRACT)
    with engine(model, store, squeeze={"watch": 0.02, "memory_limit_gib": 0.02}) as llm:

        def step_until(happened):
            end = time.monotonic() + 60
            while not happened():
                assert time.monotonic() < end, "it never happened"
                llm.llm_engine.step()

        def add(name, max_tokens):
            sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
            llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=CONTRACT + [5]), sampling)

        add("before", 200)
        step_until(lambda: outcomes(llm).get("dense: no index", 0) > 3)
        publish(index, store)
        step_until(lambda: states(llm).get(index.name) == "loading")
        add("after", 400)
        step_until(lambda: llm.llm_engine.get_num_unfinished_requests() == 1)
        rows = outcomes(llm)
        assert rows["dense: no index"] >= 200 and "squeezed" not in rows
        assert rows[LOADING] > 0
        step_until(lambda: outcomes(llm).get("squeezed", 0) > 3)
        assert states(llm) == {index.name: "on the devices"}
        remove_index(store / index.name)
        step_until(lambda: not llm.llm_engine.has_unfinished_requests())
        assert outcomes(llm)[GONE] > 0


def test_more_than_there_is_room_for(models, indexes):
    """Two of three take turns, the one that was not wanted for longest goes; one that requests are on stays."""
    model = models("llama")
    three = [indexes(model, prefix) for prefix in (CONTRACT, MANUAL, NOTES)]
    with engine(model, three, 0.5, {"memory_limit_gib": 1e-9}) as llm:
        assert states(llm) == {}
    needed = max(sum(file.stat().st_size for file in index.glob("layer-*")) for index in three) / 2**30
    with engine(model, three, 0.5, {"memory_limit_gib": 2.5 * needed}) as llm:
        for prefix in (CONTRACT, MANUAL, NOTES):
            generate(llm, [prefix + [5]], num_tokens=1)
        until(llm, lambda: sorted(states(llm).values()) == ["on the devices", "on the devices", "waiting"])
        assert rows_of(llm, [CONTRACT + [6]])
        assert rows_of(llm, [NOTES + [6]])
        until(llm, lambda: states(llm)[three[1].name] == "waiting")
        until(llm, lambda: states(llm)[three[2].name] == "on the devices")
        assert rows_of(llm, [CONTRACT + [7], NOTES + [7]]) == {"squeezed": 8}
        generate(llm, [MANUAL + [7]], num_tokens=1)
        until(llm, lambda: states(llm)[three[1].name] == "on the devices")
        assert states(llm)[three[0].name] == "waiting"
        assert rows_of(llm, [MANUAL + [8], NOTES + [8]]) == {"squeezed": 8}


def test_pinned_prefixes_stay_in_the_kv_cache(models, indexes, store):
    """While others come and go; until the pin is taken out."""
    model = models("llama")
    folder = publish(indexes(model, CONTRACT), store)
    pin_file(folder).touch()
    blocks = 700 // 32 * 3 + 40
    settings = {"watch": 0.02, "memory_limit_gib": 0.02}
    with engine(model, store, squeeze=settings, num_gpu_blocks_override=blocks, max_model_len=700) as llm:
        others = [[tokens(seed, 650)] for seed in range(20, 26)]

        def computed_of_contract_after_others() -> int:
            for prompt in others:
                generate(llm, prompt, num_tokens=1)
            return rows_of(llm, [CONTRACT + [7]], num_tokens=2).get(COMPUTING, 0)

        assert rows_of(llm, [CONTRACT + [5]], num_tokens=2)[COMPUTING] == 1
        generate(llm, [CONTRACT + [6]], num_tokens=2)
        assert value(llm, "vllm:squeeze_pinned_blocks", index=folder.name) > 0
        assert computed_of_contract_after_others() == 0
        assert llm.reset_prefix_cache(), "pins kept the cache from being reset"
        assert rows_of(llm, [CONTRACT + [5]], num_tokens=2)[COMPUTING] == 1
        pin_file(folder).unlink()
        until(llm, lambda: value(llm, "vllm:squeeze_pinned_blocks", index=folder.name) == 0)
        assert computed_of_contract_after_others() == 1
