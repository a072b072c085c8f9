"""Real vLLM engines, in this process, with tiny random models; prompts are token ids."""

import functools
import gc
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tiny_models import VOCABULARY, make_model

# vLLM freezes what lives when an engine has started, thaws it at its end, and collects garbage again and again on the
# way, which takes half a second each time among all that has been imported. Here what was there before an engine stays
# frozen.
freeze = gc.freeze
gc.freeze = gc.unfreeze = lambda: None


@functools.cache
def register_overrides() -> None:
    """Has vLLM look for kernels to override in all modules once, and not whenever an engine starts."""
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()
    current_platform.register_triton_kernel_overrides = lambda: None


def before_an_engine() -> None:
    """Makes starts and ends of engines in this process quick."""
    register_overrides()
    freeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a tiny model once: models("llama", group=3) -> its folder."""
    made: dict[tuple, Path] = {}

    def model(family: str = "llama", **shape: Any) -> Path:
        known = (family, *sorted(shape.items()))
        if known not in made:
            made[known] = make_model(tmp_path_factory.mktemp(family), family, **shape)
        return made[known]

    return model


@pytest.fixture(scope="session")
def indexes(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Indexes token ids once for a model: indexes(model, ids) -> the folder of the index; exact=True clusters nothing.

    ``kv_cache_dtype`` is vLLM's argument, other keywords are the index's parameters.
    """
    from vllm_squeeze.offline_tools.index import index
    from vllm_squeeze.prefix_index.manifest import IndexParameters

    made: dict[tuple, Path] = {}

    def make(model: Path, ids: list[int], exact: bool = False, kv_cache_dtype: str = "auto", **parameters: Any) -> Path:
        known = (model, tuple(ids), exact, kv_cache_dtype, *sorted(parameters.items()))
        if known not in made:
            folder = tmp_path_factory.mktemp("index")
            tokens = folder / "tokens.json"
            tokens.write_text(str(list(ids)))
            chosen = None if exact else IndexParameters(**parameters)
            arguments = {**ENGINE_ARGS, "kv_cache_dtype": kv_cache_dtype}
            before_an_engine()
            made[known] = index(str(model), None, tokens, None, folder / "store", chosen, arguments, measured=False)
        return made[known]

    return make


@pytest.fixture(scope="session")
def dense_answers() -> Any:
    """Asks vLLM's own backend once: dense_answers(model, prompts, num_tokens) -> what ``generate`` gives."""
    answered: dict[tuple, list[tuple[int, ...]]] = {}

    def answers(model: Path, prompts: list[list[int]], num_tokens: int = 8) -> list[tuple[int, ...]]:
        known = (model, *map(tuple, prompts), num_tokens)
        if known not in answered:
            with engine(model) as llm:
                answered[known] = generate(llm, prompts, num_tokens)
        return answered[known]

    return answers


ENGINE_ARGS = {
    "dtype": "float32",
    "block_size": 32,
    "gpu_memory_utilization": 0.1,
    # Room for all tokens of any test. On the CPU vLLM would else zero a tenth of the machine's memory at each start; on
    # a GPU measure the memory, which others may use at the same time.
    "kv_cache_memory_bytes": 2**26,
}


@contextmanager
def engine(model: Path, index: Any = None, budget: float = 1.0, squeeze: Any = None, **arguments: Any) -> Iterator[Any]:
    """An ``LLM`` with our backend and this index, or with vLLM's own backend where there is none.

    It squeezes prompts too, so that rows of any number of tokens are.
    """
    from vllm import LLM

    if index is not None:
        index = [str(index)] if isinstance(index, Path) else [str(folder) for folder in index]
        arguments["attention_backend"] = "squeeze"
        arguments["additional_config"] = {
            "squeeze": {"index": index, "budget": budget, "prefill": "squeezed", **(squeeze or {})}
        }
    settings = {"enforce_eager": True, "max_model_len": 1024, "skip_tokenizer_init": True, "disable_log_stats": False}
    before_an_engine()
    llm = LLM(str(model), **{**ENGINE_ARGS, **settings, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generate(llm: Any, prompts: list[list[int]], num_tokens: int = 8, **sampling: Any) -> list[tuple[int, ...]]:
    """Greedy answers to prompts, as token ids."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(
        **{"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, "detokenize": False, **sampling}
    )
    results = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=False)
    return [tuple(completion.token_ids) for result in results for completion in result.outputs]


def check_answers_are_dense(model: Path, index: Path, prefix: list[int], **arguments: Any) -> None:
    """Fails unless, at a budget of 1, answers to 20 prompts on the indexed prefix are those of vLLM's own backend."""
    prompts = [prefix + tokens(seed, 3 + seed) for seed in range(20)]
    with engine(model, **arguments) as llm:
        dense = generate(llm, prompts)
    with engine(model, index, **arguments) as llm:
        generate(llm, prompts[:1], num_tokens=1)  # brings the prefix into the KV cache
        squeezed = generate(llm, prompts)
        rows = outcomes(llm)
    assert squeezed == dense
    assert len(set(dense)) > 10, "the model answers alike whatever it is asked"
    # One row per request and answered token; the first request of all computes the prefix.
    assert rows == {"squeezed": 20 * 8, "dense: prefix not in the KV cache yet": 1}


def outcomes(llm: Any) -> dict[str, int]:
    """Rows so far, by what became of them, from vLLM's own metrics."""
    counts: dict[str, int] = {}
    for metric in llm.get_metrics():
        if metric.name == "vllm:squeeze_rows":
            counts[metric.labels["outcome"]] = counts.get(metric.labels["outcome"], 0) + metric.value
    return counts


def grown(llm: Any, before: dict[str, int]) -> dict[str, int]:
    """Rows since ``before``, which ``outcomes`` gave, by what became of them; without those that none became."""
    return {outcome: n - before.get(outcome, 0) for outcome, n in outcomes(llm).items() if n != before.get(outcome, 0)}


def bytes_of_prefixes(llm: Any) -> list[float]:
    """Bytes of prefixes so far: read, if each row were alone, and of a dense pass."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if "prefix_bytes" in metric.name}
    return [found.get(f"vllm:squeeze_prefix_bytes_{kind}", 0) for kind in ("read", "alone", "dense")]


def tokens(seed: int, count: int) -> list[int]:
    """Random token ids; ids of one seed begin alike whatever their count."""
    import numpy as np

    return np.random.default_rng(seed).integers(10, VOCABULARY, 4096)[:count].tolist()
