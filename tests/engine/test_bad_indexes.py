"""An index that cannot be used costs one warning, which says why; its prefix is served densely, all else goes on."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from vllm.engine.arg_utils import EngineArgs

from tests.engine.conftest import ENGINE_ARGS, engine, generate, outcomes, tokens
from tests.logs import warnings_of_squeeze
from vllm_squeeze.attention_backend.model_identity import model_identity
from vllm_squeeze.prefix_index.index_folder import IndexWriter, PrefixIndex
from vllm_squeeze.prefix_index.manifest import FORMAT_VERSION

GOOD, BAD, LONG = tokens(seed=1, count=600), tokens(seed=2, count=300), tokens(seed=3, count=1030)
# vLLM's own length limit of these engines.
MAX_MODEL_LEN = 1024


def identity(model: Path, **arguments):
    """The identity that vLLM gives a model when it is started with these arguments."""
    return model_identity(EngineArgs(str(model), **{**ENGINE_ARGS, **arguments}).create_engine_config())


def rewritten(folder: Path, name: str, **identity_changes) -> Path:
    """A whole index of the same tokens whose manifest names another model."""
    index = PrefixIndex.open(folder)
    model = dataclasses.replace(index.manifest.model, **identity_changes)
    with IndexWriter(folder.parent, name) as writer:
        writer.write_tokens(index.token_ids)
        for i, entry in enumerate(index.manifest.layers):
            writer.write_layer(i, entry.name, index.layer(i))
        return writer.publish(dataclasses.replace(index.manifest, model=model))


def copied(folder: Path, name: str) -> Path:
    return shutil.copytree(folder, folder.parent / name)


def truncated(folder: Path, name: str, models, indexes) -> Path:
    bad = copied(folder, name)
    os.truncate(bad / "layer-0001.safetensors", 1000)
    return bad


def flipped(folder: Path, name: str, models, indexes) -> Path:
    bad = copied(folder, name)
    content = bytearray((bad / "layer-0002.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (bad / "layer-0002.safetensors").write_bytes(content)
    return bad


def tokens_flipped(folder: Path, name: str, models, indexes) -> Path:
    bad = copied(folder, name)
    content = bytearray((bad / "tokens.safetensors").read_bytes())
    content[-5] ^= 1
    (bad / "tokens.safetensors").write_bytes(content)
    return bad


def of_a_newer_format(folder: Path, name: str, models, indexes) -> Path:
    bad = copied(folder, name)
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["format_version"] = FORMAT_VERSION + 1
    (bad / "manifest.json").write_text(json.dumps({**manifest, "new_field": 1}))
    return bad


def of_another_model(folder: Path, name: str, models, indexes) -> Path:
    theirs = identity(models("gemma3"))
    return rewritten(folder, name, weights=theirs.weights, architecture=theirs.architecture, rope=theirs.rope)


def of_other_weights(folder: Path, name: str, models, indexes) -> Path:
    """One number of the model is another."""
    model = shutil.copytree(models("llama"), folder.parent.parent / "other-weights")
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1e-3
    safetensors.torch.save_file(weights, model / "model.safetensors", {"format": "pt"})
    return rewritten(folder, name, weights=identity(model).weights)


def of_another_dtype(folder: Path, name: str, models, indexes) -> Path:
    return rewritten(folder, name, dtype=identity(models("llama"), dtype="bfloat16").dtype)


def of_another_rope(folder: Path, name: str, models, indexes) -> Path:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    return rewritten(folder, name, rope=identity(models("llama"), hf_overrides={"rope_parameters": rope}).rope)


def of_a_long_prefix(folder: Path, name: str, models, indexes) -> Path:
    return copied(indexes(models("llama"), LONG), f"../store/{name}")


def too_fine_for_the_budget(folder: Path, name: str, models, indexes) -> Path:
    return copied(indexes(models("llama"), BAD, centroids=1.0), f"../store/{name}")


BAD_INDEXES = {
    truncated: "layer-0001.safetensors: the file has 1000 bytes",
    flipped: "layer-0002.safetensors: damaged",
    tokens_flipped: "tokens.safetensors: damaged",
    of_a_newer_format: "made by a newer vllm-squeeze",
    of_another_model: "architecture: the index has Gemma3ForCausalLM, this server LlamaForCausalLM",
    of_other_weights: "weights: the index has",
    of_another_dtype: "dtype: the index has bfloat16, this server float32",
    of_another_rope: "rope: the index has",
    of_a_long_prefix: f"this server's max_model_len, {MAX_MODEL_LEN}",
    too_fine_for_the_budget: "squeeze.budget: 0.5 is less than",
}


@pytest.fixture(scope="module")
def dense(models):
    """Prompts and vLLM's own answers to them, which the tests share."""
    prompts = [BAD + tokens(seed, 5 + seed) for seed in range(10, 16)]
    with engine(models("llama")) as llm:
        return prompts, generate(llm, prompts, num_tokens=6)


@pytest.fixture(scope="module")
def served(models, indexes, dense):
    """Serves a good index among all bad ones: the bad ones' folders, what was warned, answers, and rows."""
    good, bad = indexes(models("llama"), GOOD), indexes(models("llama"), BAD)
    # The folders' names, in which warnings are looked up, do not give the reason away.
    folders = {make: make(bad, f"index{number}-0", models, indexes) for number, make in enumerate(BAD_INDEXES)}
    prompts, _ = dense
    first, *others = folders.values()
    # The one engine here that finds out itself how much memory it has, after running the model once.
    with (
        warnings_of_squeeze() as warnings,
        engine(models("llama"), [first, good, *others], budget=0.5, kv_cache_memory_bytes=None) as llm,
    ):
        answers = generate(llm, prompts, num_tokens=6)
        dense_rows = outcomes(llm)
        generate(llm, [GOOD + [11]], num_tokens=1)
        generate(llm, [GOOD + [12, 13], GOOD + [14]], num_tokens=6)
        rows = outcomes(llm)
    return folders, warnings, answers, dense_rows, rows


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=make.__name__) for make in BAD_INDEXES],
)
def test_a_bad_index_is_warned_of_once(served, make):
    _, warnings, *_ = served
    (warning,) = [text for text in warnings if BAD_INDEXES[make] in text]
    assert warning.startswith("squeeze: ") and "served densely" in warning and "\n" not in warning


def test_nothing_else_is_warned_of(served):
    folders, warnings, *_ = served
    assert len(set(warnings)) == len(folders), warnings


def test_prefixes_of_bad_indexes_are_served_densely(served, dense):
    _, _, answers, dense_rows, _ = served
    assert answers == dense[1]
    assert dense_rows == {"dense: no index": 6 * 6}


def test_a_good_index_among_bad_ones_is_served(served):
    *_, rows = served
    assert rows["squeezed"] == 2 * 6


@pytest.mark.parametrize(
    ("squeeze", "reason"),
    [
        ({"memory_limit_gib": 0}, "squeeze.memory_limit_gib is 0; this index needs "),
        ({"budget": 0.01}, "squeeze.budget: 0.01 is less than"),
    ],
    ids=["no-memory", "unreachable-budget"],
)
def test_settings_that_no_index_fits(models, indexes, dense, squeeze, reason):
    prompts, answers = dense
    index = indexes(models("llama"), BAD)
    with warnings_of_squeeze() as warnings, engine(models("llama"), index, squeeze=squeeze) as llm:
        assert generate(llm, prompts, num_tokens=6) == answers
        assert outcomes(llm) == {"dense: no index": 6 * 6}
    assert len(warnings) == 1 and reason in warnings[0] and index.name in warnings[0]


def test_both_sides_of_the_connector_admit_the_same_indexes(models, indexes):
    """What the scheduler's side counts as squeezed is squeezed, also where memory is short beside a damaged index."""
    good, bad = indexes(models("llama"), GOOD), copied(indexes(models("llama"), BAD), "damaged")
    os.truncate(bad / "layer-0000.safetensors", 1000)
    # Room for the larger, which is the good one, but not for both.
    needed = sum(file.stat().st_size for file in good.iterdir()) * 1.1 / 2**30
    with engine(models("llama"), [bad, good], budget=0.5, squeeze={"memory_limit_gib": needed}) as llm:
        generate(llm, [GOOD + [11]], num_tokens=1)
        generate(llm, [GOOD + [12]], num_tokens=6)
        squeezed = outcomes(llm).get("squeezed", 0)
        read = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:squeeze_prefix_bytes_dense")
    assert (squeezed > 0) == (read > 0)
