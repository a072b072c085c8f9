"""Prefixes without clusters: answers are vLLM's own at any budget, beside clustered prefixes and nested with them."""

import pytest

from tests.engine.conftest import engine, generate, outcomes, tokens
from tests.logs import warnings_of_squeeze

CONTRACT, MANUAL = tokens(seed=1, count=600), tokens(seed=2, count=500)
# Begins with the whole contract.
APPENDIX = CONTRACT + tokens(seed=3, count=300)
# No clustered prefix could meet it.
NO_BUDGET = 0.001


def bytes_of_prefixes(llm) -> tuple[float, float]:
    """Bytes read of squeezed rows' prefixes so far, and bytes that a dense pass would have read."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if "prefix_bytes" in metric.name}
    return found.get("vllm:squeeze_prefix_bytes_read", 0), found.get("vllm:squeeze_prefix_bytes_dense", 0)


def dense_bytes(num_tokens: int, prefix: list[int]) -> int:
    """Bytes that queries read of a prefix in a dense pass of the llama: 3 layers, 2 heads, keys and values of 64."""
    return num_tokens * 3 * 2 * len(prefix) * 2 * 64 * 4


@pytest.mark.parametrize(
    ("family", "rest", "clustered"),
    [
        ("llama", "value_centroids", False),
        ("llama", "drop", True),
        ("gemma3", "drop", False),
        ("gemma3", "value_centroids", True),
    ],
    ids=lambda value: {False: "exact index", True: "exact mode"}.get(value, value),
)
def test_answers_are_the_dense_ones(models, indexes, dense_answers, family, rest, clustered):
    model, squeeze = models(family), {"rest": rest} | ({"mode": "exact"} if clustered else {})
    prompts = [CONTRACT + tokens(seed, 3 + seed) for seed in range(10)]
    dense = dense_answers(model, prompts)
    index = indexes(model, CONTRACT) if clustered else indexes(model, CONTRACT, exact=True)
    with engine(model, index, budget=NO_BUDGET, squeeze=squeeze) as llm:
        generate(llm, prompts[:1], num_tokens=1)  # brings the prefix into the KV cache
        exact = generate(llm, prompts)
        rows, (read, of) = outcomes(llm), bytes_of_prefixes(llm)
    assert exact == dense
    assert len(set(dense)) > 5, "the model answers alike whatever it is asked"
    assert rows == {"exact": 10 * 8, "dense: prefix not in the KV cache yet": 1}
    assert read > 0 and of > 0


def test_beside_a_clustered_prefix(models, indexes):
    """Each is served as if it were alone."""
    model = models("llama")
    prompts = [prefix + tokens(seed, 3 + seed) for seed in range(4) for prefix in (CONTRACT, MANUAL, [7])]
    clustered, exact = indexes(model, MANUAL), indexes(model, CONTRACT, exact=True)

    def logprobs(folders):
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False, logprobs=1)
        with engine(model, folders, budget=0.4) as llm:
            generate(llm, [CONTRACT + [5], MANUAL + [5]], num_tokens=1)
            before = outcomes(llm)
            results = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
            steps = [[p.logprob for step in r.outputs[0].logprobs for p in step.values()] for r in results]
            after = outcomes(llm)
            rows = [after.get(outcome, 0) - before.get(outcome, 0) for outcome in ("exact", "squeezed")]
            return steps[0::3], steps[1::3], steps[2::3], rows

    dense, together = logprobs(None), logprobs([clustered, exact])
    alone = logprobs([clustered])
    assert together[3] == [4 * 6, 4 * 6] and alone[3] == [0, 4 * 6]
    for ours, vllms in zip(together[0], dense[0], strict=True):
        assert ours == pytest.approx(vllms, abs=1e-4) and ours != vllms, "the exact prefix"
    assert together[1] == alone[1] != dense[1], "the clustered prefix"
    assert together[2] == dense[2], "no prefix"


@pytest.mark.parametrize("exact", ["contract", "appendix"])
def test_the_longest_match_wins(models, indexes, exact):
    model = models("llama")
    folders = [indexes(model, CONTRACT, exact=exact == "contract"), indexes(model, APPENDIX, exact=exact == "appendix")]
    # Prompt, the prefix that it is on, and how many of its tokens are not in whole blocks of the KV cache. On a clustered
    # index, from the 480 tokens on that it covers of the contract, only those of requests on it are.
    clustered = exact == "appendix"
    cases = [
        (CONTRACT + tokens(11, 9), CONTRACT, 609 - (480 if clustered else 576)),
        (APPENDIX + tokens(12, 9), APPENDIX, 909 - 896),
        (APPENDIX[:750] + tokens(13, 9), CONTRACT, 759 - (576 if clustered else 736)),
    ]
    with engine(model) as llm:
        dense = generate(llm, [prompt for prompt, *_ in cases])
    with engine(model, folders) as llm:
        generate(llm, [APPENDIX + [5]], num_tokens=1)
        for (prompt, prefix, num_uncached), answer in zip(cases, dense, strict=True):
            before = bytes_of_prefixes(llm)[1]
            assert generate(llm, [prompt]) == [answer]
            assert bytes_of_prefixes(llm)[1] - before == dense_bytes(num_uncached + 7, prefix)
        assert outcomes(llm)["exact"] + outcomes(llm)["squeezed"] == 3 * 8


def test_an_exact_prefix_shorter_than_a_block(models, indexes):
    model = models("llama")
    short, prompts = indexes(model, CONTRACT[:31], exact=True), [CONTRACT[:31] + tokens(11, 40)] * 2
    with engine(model) as llm:
        dense = generate(llm, prompts)
    with warnings_of_squeeze() as warnings, engine(model, short) as llm:
        assert generate(llm, prompts) == dense
        assert outcomes(llm) == {"dense: no index": 2 * 8}
    (warning,) = warnings
    assert f"{short.name}: the prefix has 31 tokens, too few to squeeze: blocks hold [32] tokens" in warning
