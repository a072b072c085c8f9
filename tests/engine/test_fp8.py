"""A KV cache in 8-bit floats: at a budget of 1, answers are those of vLLM's own backend with the same cache."""

import pytest
import torch

from tests.engine.conftest import engine, generate, outcomes, tokens

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU backend needs AVX-512 for 8-bit floats"
)

PREFIX = tokens(seed=1, count=600)


@pytest.mark.parametrize("cache", ["fp8_e4m3", "fp8_e5m2"])
def test_answers_are_the_dense_ones(models, indexes, cache):
    model, arguments = models("llama"), {"kv_cache_dtype": cache}
    prompts = [PREFIX + tokens(seed, 3 + seed) for seed in range(20)]
    with engine(model, **arguments) as llm:
        dense = generate(llm, prompts)
    with engine(model, indexes(model, PREFIX, **arguments), **arguments) as llm:
        generate(llm, prompts[:1], num_tokens=1)  # brings the prefix into the KV cache
        squeezed = generate(llm, prompts)
        rows = outcomes(llm)
    assert squeezed == dense
    assert len(set(dense)) > 10, "the model answers alike whatever it is asked"
    assert rows == {"squeezed": 20 * 8, "dense: prefix not in the KV cache yet": 1}
