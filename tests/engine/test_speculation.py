"""Speculative decoding: rows with several query tokens a step. At a budget of 1, answers are the dense ones."""

import pytest

from tests.engine.conftest import engine, generate, outcomes, tokens

PREFIX = tokens(seed=1, count=600)
NUM_TOKENS, NUM_DRAFTED = 48, 7


def drafts(llm) -> tuple[int, int, int]:
    """Rows with drafted tokens so far, the tokens drafted, and those of them that were accepted."""
    found = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    kinds = ("drafts", "draft_tokens", "accepted_tokens")
    return tuple(found[f"vllm:spec_decode_num_{kind}"] for kind in kinds)


@pytest.mark.long
def test_answers_are_the_dense_ones(models, indexes, dense_answers, monkeypatch):
    model = models("gemma2")
    prompts = [PREFIX + tokens(seed, 3 + seed) for seed in range(8)]
    ngram = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTED, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    dense, index = dense_answers(model, prompts, NUM_TOKENS), indexes(model, PREFIX)
    # vLLM's drafting leaves a process behind in which no other engine can start
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(model, index, speculative_config=ngram) as llm:
        generate(llm, prompts[:1], num_tokens=1)  # brings the prefix into the KV cache
        squeezed = generate(llm, prompts, NUM_TOKENS)
        rows, (num_rows, num_draft_tokens, num_accepted) = outcomes(llm), drafts(llm)
    assert squeezed == dense
    assert len({token for answer in dense for token in answer}) > 30, "the answers have nothing to tell apart"
    assert num_draft_tokens > 2 * num_rows and num_accepted > 50, "no row had several tokens, or all for nothing"
    # An accepted token saves a step, unless the answer ends before it.
    squeezed_rows = rows.pop("squeezed")
    assert 0 <= squeezed_rows - (8 * NUM_TOKENS - num_accepted) <= 8 * NUM_DRAFTED
    assert rows == {"dense: prefix not in the KV cache yet": 1}
