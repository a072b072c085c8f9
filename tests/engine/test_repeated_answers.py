"""Conversations: a prompt that repeats a squeezed answer reads none of the KV that was computed for that answer."""

import pytest

from tests.engine.conftest import engine, generate, grown, outcomes, tokens

PREFIX = tokens(seed=1, count=600)
QUESTION, NEXT = tokens(2, 20), tokens(3, 20)
# A block has 32 tokens; 19 are full of the prefix and the first question.
CACHED, LENGTH = 19 * 32, 80


def ask(llm, prompt, settings, num_tokens: int = 1):
    """The answer, log probabilities of the likeliest tokens at its first place, and how many tokens were cached."""
    from vllm import SamplingParams, TokensPrompt

    extra = settings and {"kv_transfer_params": {"squeeze": settings}}
    sampling = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=5, extra_args=extra
    )
    (result,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
    answer = result.outputs[0]
    logprobs = {token: logprob.logprob for token, logprob in answer.logprobs[0].items()}
    return list(answer.token_ids), logprobs, result.num_cached_tokens


def test_a_dense_or_exact_request_reads_no_squeezed_kv(models, indexes):
    model = models("llama")
    with engine(model, indexes(model, PREFIX), 0.4, {"prefill": "dense"}) as llm:
        generate(llm, [PREFIX + [5]], num_tokens=1)
        before = outcomes(llm)
        answer, *_ = ask(llm, PREFIX + QUESTION, None, LENGTH)
        assert grown(llm, before) == {"dense: prefill": 1, "squeezed": LENGTH - 1}
        conversation = PREFIX + QUESTION + answer + NEXT
        ours = [ask(llm, conversation + [9] * (mode == "exact"), {"mode": mode}) for mode in ("dense", "exact")]
        # what a prompt has computed is there for all
        *_, cached_again = ask(llm, conversation + [9, 9], None)
        exact, *_ = ask(llm, conversation + [8], {"mode": "exact"}, LENGTH)
        *_, cached_exact = ask(llm, conversation + [8] + exact, {"mode": "dense"})
    with engine(model) as llm:
        theirs = [ask(llm, conversation + [9] * more, None) for more in range(2)]
        dense, *_ = ask(llm, conversation + [8], None, LENGTH)
        *_, cached_dense = ask(llm, conversation + [8] + dense, None)
    assert ours[0][2] == CACHED, "the prefix was not found, or more than the first prompt"
    assert cached_again == (len(conversation) + 2) // 32 * 32
    assert exact == dense and cached_exact == cached_dense, "an exact answer is as good as a prompt"
    for (_, mine, _), (_, their, _) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(their, abs=1e-4)


def test_squeezed_prompts_are_for_requests_that_are_squeezed_alike(models, indexes):
    """With ``prefill: squeezed``, from the end of what the index covers on."""
    model = models("llama")
    covered = (600 - 100) // 32 * 32
    prompt = PREFIX + tokens(4, 100)
    with engine(model, indexes(model, PREFIX), 0.4) as llm:
        generate(llm, [PREFIX + [5]], num_tokens=1)
        ask(llm, prompt, None)
        cached = [
            ask(llm, prompt, settings)[2]
            for settings in ({"mode": "dense"}, {"mode": "exact"}, {"budget": 0.5}, {}, {"budget": 0.5})
        ]
    whole = 699 // 32 * 32
    assert cached == [covered, whole, covered, whole, whole]
