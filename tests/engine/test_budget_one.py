"""At a budget of 1 every key is attended to exactly: answers must be those of vLLM's own backend, token for token."""

import pytest

from tests.engine.conftest import check_answers_are_dense, engine, generate, tokens
from vllm_squeeze.prefix_index.index_folder import PrefixIndex

PREFIX = tokens(seed=1, count=600)


@pytest.mark.parametrize(
    ("family", "group", "head_size"),
    [("llama", 7, 64), ("llama", 1, 128), ("gemma3", 4, 64), ("gemma2", 3, 64)],
    ids=["llama-G7", "llama-G1-D128", "gemma3-hybrid", "gemma2-soft-cap"],
)
def test_answers_are_the_dense_ones(models, indexes, family, group, head_size):
    model = models(family, group=group, head_size=head_size)
    check_answers_are_dense(model, indexes(model, PREFIX), PREFIX)


@pytest.mark.parametrize(("num_sinks", "observation_window"), [(0, 1), (37, 251)])
def test_other_numbers_of_tokens_are_always_attended_to(models, indexes, num_sinks, observation_window):
    """None but the last, which no block of the KV cache may end with, and some that end within blocks."""
    model = models("llama")
    index = indexes(model, PREFIX, num_sinks=num_sinks, observation_window=observation_window)
    assert PrefixIndex.open(index).manifest.num_members == len(PREFIX) - num_sinks - observation_window
    check_answers_are_dense(model, index, PREFIX)


@pytest.mark.parametrize(
    ("family", "rule"), [("llama", "keys"), ("gemma2", "keys"), ("llama", "clusters"), ("llama", "paper")]
)
def test_a_budget_is_about_what_is_read(models, indexes, family, rule):
    """The threshold is calibrated on the very scores that choose clusters, also where a soft cap bounds them."""
    model = models(family)
    with engine(model, indexes(model, PREFIX, rule=rule), budget=0.5) as llm:
        generate(llm, [PREFIX + [5]], num_tokens=1)
        generate(llm, [PREFIX + tokens(seed, 3 + seed) for seed in range(8)])
        counted = {metric.name: metric.value for metric in llm.get_metrics() if "prefix_bytes" in metric.name}
    used = counted["vllm:squeeze_prefix_bytes_alone"] / counted["vllm:squeeze_prefix_bytes_dense"]
    assert used == pytest.approx(0.5, abs=0.1)
