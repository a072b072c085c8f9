"""What prompts attend to: by default all of their prefix, so that answers begin as vLLM's own do, and only then are
squeezed; or with a budget of their own what some of their tokens choose together."""

import functools

import pytest

from benchmarks.quality.arms import residency_in
from benchmarks.running import count
from tests.engine.conftest import engine, grown, outcomes, tokens
from vllm_squeeze.attention_backend.placement import FEWEST_PROMPT_TOKENS

PREFIX = tokens(seed=1, count=600)
PROMPTS = [PREFIX + tokens(seed, 20 + 30 * seed) for seed in range(2, 7)]
LONGER = [prompt + [7] for prompt in PROMPTS]


def first_tokens(llm, prompts, count: int = 3) -> list[list[dict[int, float]]]:
    """Log probabilities of the likeliest tokens at the places of each answer, whose tokens are the same in any case."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=count, logprobs=5, detokenize=False, allowed_token_ids=[7])
    results = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    return [
        [{token: logprob.logprob for token, logprob in place.items()} for place in result.outputs[0].logprobs]
        for result in results
    ]


@pytest.fixture(scope="module")
def dense_tokens(models):
    """The same of vLLM's own backend, of the questions and then of these with one token more, by the model's family."""

    @functools.cache
    def answered(family: str, chunk: int | None):
        with engine(models(family), **chunks_of(chunk)) as llm:
            first_tokens(llm, [PREFIX + [5]], 1)
            return first_tokens(llm, PROMPTS), first_tokens(llm, LONGER, 1)

    return answered


def chunks_of(size: int | None) -> dict[str, int]:
    """Arguments of engines that compute prompts in chunks of so many tokens."""
    return {"max_num_batched_tokens": size} if size else {}


CHUNKS = pytest.mark.parametrize(("family", "chunk"), [("llama", None), ("gemma3", 64)], ids=["one-step", "chunks"])


@CHUNKS
def test_the_first_token_is_dense_and_the_others_are_squeezed(models, indexes, dense_tokens, family, chunk):
    """All at once: prompts, in chunks or not, beside rows that are squeezed."""
    model = models(family)
    dense, dense_again = dense_tokens(family, chunk)
    with engine(model, indexes(model, PREFIX), 0.4, {"prefill": "dense"}, **chunks_of(chunk)) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        before = outcomes(llm)
        ours = first_tokens(llm, PROMPTS)
        rows = grown(llm, before)
        again = first_tokens(llm, LONGER, 1)
    for mine, theirs in zip(ours, dense, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-5)
        assert mine[1] != pytest.approx(theirs[1], abs=1e-3) and mine[2] != pytest.approx(theirs[2], abs=1e-3)
    assert rows["squeezed"] == 2 * len(PROMPTS)
    assert rows.pop("dense: prefill") >= (len(PROMPTS) if chunk is None else 2 * len(PROMPTS))
    assert rows.keys() == {"squeezed"}
    # The KV of a prompt is vLLM's own, whoever finds it in the cache.
    for mine, theirs in zip(again, dense_again, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-5)


@CHUNKS
def test_everything_that_tokens_choose_together_is_dense_attention(models, indexes, dense_tokens, family, chunk):
    """Prompts beside answers, all at a budget of 1."""
    model = models(family)
    dense, _ = dense_tokens(family, chunk)
    with engine(model, indexes(model, PREFIX), 1, {"prefill": 1}, **chunks_of(chunk)) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        before = outcomes(llm)
        ours = first_tokens(llm, PROMPTS)
        rows = grown(llm, before)
    for mine, theirs in zip(sum(ours, []), sum(dense, []), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert rows["squeezed"] >= (3 if chunk is None else 4) * len(PROMPTS)
    assert rows.keys() <= {"squeezed", "dense: prefill"} and rows.get("dense: prefill", 0) < len(PROMPTS)


def test_tokens_of_a_prompt_choose_together(models, indexes, dense_tokens):
    """A share of the keys, whatever the answers' budget; and not in steps that have few of a prompt's tokens."""
    model = models("llama")
    dense, _ = dense_tokens("llama", None)
    with engine(model, indexes(model, PREFIX), 1, {"prefill": 0.5}) as llm:
        first_tokens(llm, [PREFIX + [5]], 1)
        before, counted = outcomes(llm), count(llm)
        ours = first_tokens(llm, PROMPTS, 1)
        assert grown(llm, before) == {"squeezed": len(PROMPTS)}
        read = count(llm) - counted
        cost = residency_in(llm).active[0].cost
        # whose blocks are found in the cache, but for the last few tokens
        repeated, before = PREFIX + tokens(seed=8, count=72 + FEWEST_PROMPT_TOKENS - 1), outcomes(llm)
        for _ in range(2):
            first_tokens(llm, [repeated], 1)
        assert grown(llm, before) == {"squeezed": 1, "dense: prefill": 1}
    for (mine,), (theirs, *_) in zip(ours, dense, strict=True):
        assert mine != pytest.approx(theirs, abs=1e-3)
    assert read.kept_share == pytest.approx(cost.kept_share(0.5), rel=0.1)
    assert read.loaded < read.kept, "tokens have not shared what they chose"
