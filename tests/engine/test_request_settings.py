"""Requests that ask for dense attention, on an engine that squeezes others on the same prefix in the same steps."""

import pytest

from tests.engine.conftest import engine, generate, grown, outcomes, tokens

PREFIX = tokens(seed=1, count=600)
PROMPTS = [PREFIX + tokens(seed, 20) for seed in range(2, 6)]
SETTINGS = [{"mode": "dense"}, {}, {"mode": "squeezed"}, None]


def answer(llm, settings):
    """Log probabilities of each prompt's answer of 4 tokens, and what is told of it."""
    from vllm import SamplingParams, TokensPrompt

    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=4,
            ignore_eos=True,
            detokenize=False,
            logprobs=1,
            allowed_token_ids=[7],
            extra_args=None if asked is None else {"kv_transfer_params": {"squeeze": asked}},
        )
        for asked in settings
    ]
    results = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS], sampling, use_tqdm=False)
    logprobs = [[place[7].logprob for place in result.outputs[0].logprobs] for result in results]
    return logprobs, [result.kv_transfer_params for result in results]


def test_each_request_gets_what_it_asked_for(models, indexes):
    model = models("llama")
    with engine(model) as llm:
        generate(llm, [PREFIX + [5]], num_tokens=1)
        dense, _ = answer(llm, [None] * 4)
    index = indexes(model, PREFIX)
    with engine(model, index, 0.4, {"prefill": "dense"}) as llm:
        generate(llm, [PREFIX + [5]], num_tokens=1)
        before = outcomes(llm)
        ours, told = answer(llm, SETTINGS)
        rows = grown(llm, before)
    asked, usual = {"dense: asked for": 4}, {"dense: prefill": 1, "squeezed": 3}
    assert rows == {"dense: asked for": 8, "dense: prefill": 2, "squeezed": 6}
    known = {"index": index.name, "budget": 0.4}
    error = "kv_transfer_params.squeeze.mode: 'squeezed' is not one of auto, dense"
    assert told == [
        {"squeeze": {**known, "rows": asked}},
        {"squeeze": {**known, "rows": usual}},
        {"squeeze": {**known, "rows": asked, "error": error}},
        None,
    ]
    for place, is_dense in enumerate([True, False, True, False]):
        assert (ours[place] == pytest.approx(dense[place], abs=1e-5)) == is_dense
