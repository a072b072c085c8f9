"""Prefixes whose rows get another arm from step to step, in a real engine: by times that were made up for the CPU."""

import json
from collections import Counter

import pytest

from tests.engine.conftest import bytes_of_prefixes, engine, generate, grown, outcomes, tokens
from vllm_squeeze.attention_backend import policy

CONTRACT = tokens(seed=1, count=600)
# Begins with the whole contract.
APPENDIX = CONTRACT + tokens(seed=3, count=300)


@pytest.fixture(autouse=True)
def made_up_times(tmp_path, monkeypatch):
    """vLLM's attention is fastest for one row, squeezed for two to four tokens of others, exact for more.

    All take so long that the host's time does not count.
    """
    us = {
        "stock": {"1": 1e4, "2": 1e8},
        "exact": {"1": 4e6, "1000": 4e6},
        "drop": {"1": 1e6, "4": 1e6, "5": 1e8},
        "value_centroids": {"1": 1e6, "4": 1e6, "5": 1e8},
    }
    times = {
        "measured": "made up",
        "shape": {"kv_heads": 2, "group": 3, "head_size": 64, "element_size": 4},
        "kept": 0.35,
        "centroids": 0.05,
        "tflops": 1000,
        "step_us": 0,
        "us": {arm: {"100": by_rows, "10000": by_rows} for arm, by_rows in us.items()},
    }
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"cpu": times}))
    monkeypatch.setattr(policy, "MEASURED_TIMES", path)
    policy.measured_times.cache_clear()
    yield
    policy.measured_times.cache_clear()


def answers(llm, prompts: list[list[int]], lengths: list[int]) -> list[list[tuple[int, float]]]:
    """Greedy answers of so many tokens, each with its log-probability."""
    from vllm import SamplingParams, TokensPrompt

    sampling = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, logprobs=1)
        for length in lengths
    ]
    results = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    return [
        [(token, step[token].logprob) for token, step in zip(r.outputs[0].token_ids, r.outputs[0].logprobs)]
        for r in results
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_arms_that_change_in_the_middle_of_answers(models, indexes, family):
    """Eight requests, which end one after the other: exact, then squeezed, then vLLM's attention for the last."""
    model = models(family)
    prompts, lengths = [CONTRACT + tokens(seed, 3 + seed) for seed in range(8)], list(range(4, 20, 2))
    with engine(model) as llm:
        dense = answers(llm, prompts, lengths)
    with engine(model, indexes(model, CONTRACT)) as llm:
        generate(llm, prompts[:1], num_tokens=1)
        before = outcomes(llm)
        ours = answers(llm, prompts, lengths)
        rows = grown(llm, before)
    assert [[token for token, _ in answer] for answer in ours] == [[token for token, _ in answer] for answer in dense]
    assert len({tuple(answer) for answer in dense}) > 5, "the model answers alike whatever it is asked"
    # Rows of steps with 8 to 5, with 4 to 2, and with one.
    assert rows == {"exact": 8 * 4 + (7 + 6 + 5) * 2, "squeezed": (4 + 3 + 2) * 2, "dense: faster": 2}


def test_what_each_arm_attends_to(models, indexes):
    """At a small budget answers differ from vLLM's where they are squeezed, and only there."""
    model, prompts = models("llama"), [CONTRACT + tokens(seed, 40) for seed in range(6)]
    with engine(model) as llm:
        dense = answers(llm, prompts, [2] * 6)
    with engine(model, indexes(model, CONTRACT), budget=0.4) as llm:
        generate(llm, prompts[:1], num_tokens=1)
        for count, outcome in ((6, "exact"), (3, "squeezed"), (1, "dense: faster"), (6, "exact")):
            before, read = outcomes(llm), bytes_of_prefixes(llm)
            ours = [answer[1] for answer in answers(llm, prompts[:count], [2] * count)]
            theirs = [answer[1] for answer in dense[:count]]
            # The questions, several tokens each, come first.
            questions = "dense: faster" if count == 1 else "exact"
            assert grown(llm, before) == Counter({questions: count}) + Counter({outcome: count})
            read = [now - then for now, then in zip(bytes_of_prefixes(llm), read)]
            if outcome == "squeezed":
                assert all(our != pytest.approx(their, abs=1e-3) for our, their in zip(ours, theirs))
                # The step of one token each: 3 layers, 2 heads, keys and values of 64 in float32.
                step = count * 3 * 2 * len(CONTRACT) * 2 * 64 * 4
                assert read[2] - read[1] == pytest.approx(0.6 * step, rel=0.1)
            else:
                assert [logprob for _, logprob in ours] == pytest.approx([logprob for _, logprob in theirs], abs=1e-4)
                assert read[1] == read[2] and (read[2] > 0) == (outcome == "exact")


@pytest.mark.parametrize("left", ["appendix", "contract"])
def test_a_row_left_to_vllm_beside_squeezed_ones_on_a_nested_prefix(models, indexes, left):
    """One request on a prefix, three on another that begins with it, or that it begins with."""
    model = models("llama")
    alone, squeezed = (APPENDIX, CONTRACT) if left == "appendix" else (CONTRACT, APPENDIX)
    prompts = [alone + tokens(20, 9), *(squeezed + tokens(seed, 9) for seed in (21, 22, 23))]
    with engine(model) as llm:
        generate(llm, [APPENDIX + [5]], num_tokens=1)
        dense = answers(llm, prompts, [6] * 4)
    with engine(model, [indexes(model, prefix) for prefix in (CONTRACT, APPENDIX)], budget=0.4) as llm:
        generate(llm, [APPENDIX + [5]], num_tokens=1)
        before = outcomes(llm)
        ours = answers(llm, prompts, [6] * 4)
        rows = grown(llm, before)
    assert rows == {"dense: faster": 6, "exact": 3, "squeezed": 3 * 5}
    for (token, logprob), (its_token, its_logprob) in zip(ours[0], dense[0], strict=True):
        assert token == its_token and logprob == pytest.approx(its_logprob, abs=1e-4), "not vLLM's own"
    for our, their in zip(ours[1:], dense[1:], strict=True):
        assert [logprob for _, logprob in our] != pytest.approx([logprob for _, logprob in their], abs=1e-3), (
            "not squeezed"
        )
