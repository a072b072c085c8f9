"""Requests that ask for another attention than others on the same prefix get in the same steps."""

import pytest

from tests.engine.conftest import bytes_of_prefixes, engine, generate, grown, outcomes, tokens

PREFIX = tokens(seed=1, count=600)
# They share all blocks of the KV cache but the last, which each fills for itself.
PROMPTS = [PREFIX + tokens(2, 20)] * 8
SETTINGS = [
    {"budget": 1}, {"budget": 0.3}, {"mode": "squeezed", "budget": 0.3}, {"mode": "exact"}, {"mode": "dense"},
    {"mode": "off"}, {}, None,
]  # fmt: skip


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
        dense, _ = answer(llm, [None] * len(PROMPTS))
    index = indexes(model, PREFIX)
    with engine(model, index, 0.4, {"prefill": "dense"}) as llm:
        generate(llm, [PREFIX + [5]], num_tokens=1)
        before, read = outcomes(llm), bytes_of_prefixes(llm)
        ours, told = answer(llm, SETTINGS)
        rows = grown(llm, before)
        read = [now - then for now, then in zip(bytes_of_prefixes(llm), read)]
    asked, usual, exact = {"dense: asked for": 4}, {"dense: prefill": 1, "squeezed": 3}, {"exact": 4}
    assert rows == {"dense: asked for": 8, "dense: prefill": 5, "squeezed": 15, "exact": 4}
    error = "kv_transfer_params.squeeze.mode: 'off' is not one of auto, squeezed, exact, dense"
    expected = [
        {"mode": "auto", "budget": 1.0, "rows": usual},
        {"mode": "auto", "budget": 0.3, "rows": usual},
        {"mode": "squeezed", "budget": 0.3, "rows": usual},
        {"mode": "exact", "budget": 1.0, "rows": exact},
        {"mode": "dense", "budget": None, "rows": asked},
        {"mode": "dense", "budget": None, "rows": asked, "error": error},
        {"mode": "auto", "budget": 0.4, "rows": usual},
    ]
    assert told == [*({"squeeze": {"index": index.name, **known}} for known in expected), None]
    for place, is_dense in enumerate([True, False, False, True, True, True, False, False]):
        assert (ours[place] == pytest.approx(dense[place], abs=1e-4)) == is_dense
    assert ours[6] == pytest.approx(ours[7], abs=1e-4) and ours[1] != pytest.approx(ours[6], abs=1e-3)
    # 3 layers and 2 heads, keys and values of 64 in float32: for each of 3 tokens of an answer, and of the exact one
    # for those 12 of its prompt too that are not in the cache.
    token = 3 * 2 * len(PREFIX) * 2 * 64 * 4
    assert read[2] == (5 * 3 + 15) * token
    assert read[1] == pytest.approx((3 * (1 + 2 * 0.3 + 2 * 0.4) + 15) * token, rel=0.1)
