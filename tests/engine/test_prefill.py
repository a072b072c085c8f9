"""What prompts attend to: by default all of their prefix, so that answers begin as vLLM's own do, and only then are
squeezed; or with a budget of their own what some of their tokens choose together."""

import pytest

from benchmarks.quality.arms import residency_in
from benchmarks.running import count
from tests.engine.conftest import engine, grown, outcomes, tokens
from vllm_squeeze.attention_backend.placement import FEWEST_PROMPT_TOKENS

PREFIX = tokens(seed=1, count=600)
QUESTIONS = [tokens(seed, 20 + 30 * seed) for seed in range(2, 7)]


def first_tokens(llm, prompts, count: int = 3) -> list[list[dict[int, float]]]:
    """Log probabilities of the likeliest tokens at the places of each answer, whose tokens are the same in any case."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=count, logprobs=5, detokenize=False, allowed_token_ids=[7])
    results = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    return [
        [{token: logprob.logprob for token, logprob in place.items()} for place in result.outputs[0].logprobs]
        for result in results
    ]


@pytest.mark.parametrize(("family", "chunk"), [("llama", None), ("gemma3", 64)], ids=["one-step", "chunks"])
def test_the_first_token_is_dense_and_the_others_are_squeezed(models, indexes, family, chunk):
    """All at once: prompts, in chunks or not, beside rows that are squeezed."""
    model, arguments = models(family), {"max_num_batched_tokens": chunk} if chunk else {}
    prompts = [PREFIX + question for question in QUESTIONS]
    longer = [prompt + [7] for prompt in prompts]
    with engine(model, **arguments) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        dense, dense_again = first_tokens(llm, prompts), first_tokens(llm, longer, 1)
    with engine(model, indexes(model, PREFIX), 0.4, {"prefill": "dense"}, **arguments) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        before = outcomes(llm)
        ours = first_tokens(llm, prompts)
        rows = grown(llm, before)
        again = first_tokens(llm, longer, 1)
    for mine, theirs in zip(ours, dense, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-5)
        assert mine[1] != pytest.approx(theirs[1], abs=1e-3) and mine[2] != pytest.approx(theirs[2], abs=1e-3)
    assert rows["squeezed"] == 2 * len(prompts)
    assert rows.pop("dense: prefill") >= (len(prompts) if chunk is None else 2 * len(prompts))
    assert rows.keys() == {"squeezed"}
    # The KV of a prompt is vLLM's own, whoever finds it in the cache.
    for mine, theirs in zip(again, dense_again, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-5)


@pytest.mark.parametrize(("family", "chunk"), [("llama", None), ("gemma3", 64)], ids=["one-step", "chunks"])
def test_everything_that_tokens_choose_together_is_dense_attention(models, indexes, family, chunk):
    """Prompts beside answers, all at a budget of 1."""
    model, arguments = models(family), {"max_num_batched_tokens": chunk} if chunk else {}
    prompts = [PREFIX + question for question in QUESTIONS]
    with engine(model, **arguments) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        dense = first_tokens(llm, prompts)
    with engine(model, indexes(model, PREFIX), 1, {"prefill": 1}, **arguments) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        before = outcomes(llm)
        ours = first_tokens(llm, prompts)
        rows = grown(llm, before)
    for mine, theirs in zip(sum(ours, []), sum(dense, []), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert rows["squeezed"] >= (3 if chunk is None else 4) * len(prompts)
    assert rows.keys() <= {"squeezed", "dense: prefill"} and rows.get("dense: prefill", 0) < len(prompts)


def test_tokens_of_a_prompt_choose_together(models, indexes):
    """A share of the keys, whatever the answers' budget; and not in steps that have few of a prompt's tokens."""
    model = models("llama")
    prompts = [PREFIX + question for question in QUESTIONS]
    with engine(model) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        dense = first_tokens(llm, prompts, 1)
    with engine(model, indexes(model, PREFIX), 1, {"prefill": 0.5}) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        before, counted = outcomes(llm), count(llm)
        ours = first_tokens(llm, prompts, 1)
        assert grown(llm, before) == {"squeezed": len(prompts)}
        read = count(llm) - counted
        cost = residency_in(llm).active[0].cost
        # whose blocks are found in the cache, but for the last few tokens
        repeated, before = PREFIX + tokens(seed=8, count=72 + FEWEST_PROMPT_TOKENS - 1), outcomes(llm)
        for _ in range(2):
            first_tokens(llm, [repeated], 1)
        assert grown(llm, before) == {"squeezed": 1, "dense: prefill": 1}
    for (mine,), (theirs,) in zip(ours, dense, strict=True):
        assert mine != pytest.approx(theirs, abs=1e-3)
    assert read.kept_share == pytest.approx(cost.kept_share(0.5), rel=0.1)
    assert read.loaded < read.kept, "tokens have not shared what they chose"
