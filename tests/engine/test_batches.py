"""What vLLM does to rows: mixes them, cuts their prompts, evicts, resumes and aborts them. No row may be taken for another."""

import pytest

from tests.engine.conftest import engine, generate, outcomes, tokens

CONTRACT = tokens(seed=1, count=600)
MANUAL = tokens(seed=2, count=500)
# Begins with the whole contract.
APPENDIX = CONTRACT + tokens(seed=3, count=300)

MIXED = {
    "contract": CONTRACT + tokens(11, 9),
    "manual": MANUAL + tokens(12, 40),
    "appendix": APPENDIX + tokens(13, 5),
    "half of the contract": CONTRACT[:300] + tokens(14, 20),
    "no prefix": tokens(15, 70),
    "contract again": CONTRACT + tokens(16, 33),
}
SQUEEZED = ("contract", "manual", "appendix", "contract again")


@pytest.fixture(scope="module")
def model(models):
    return models("llama", group=3)


@pytest.fixture(scope="module")
def three_indexes(indexes, model):
    return [indexes(model, prefix) for prefix in (CONTRACT, MANUAL, APPENDIX)]


def warm(llm):
    """Brings all three prefixes into the KV cache."""
    for prefix in (CONTRACT, MANUAL, APPENDIX):
        generate(llm, [prefix + [5]], num_tokens=1)


def test_a_row_gets_in_a_batch_what_it_gets_alone(model, three_indexes):
    with engine(model, three_indexes, budget=0.4) as llm:
        warm(llm)
        alone = [generate(llm, [prompt])[0] for prompt in MIXED.values()]
        before = outcomes(llm)
        together = generate(llm, list(MIXED.values()))
        after = outcomes(llm)
        rows = {outcome: n - before[outcome] for outcome, n in after.items() if n != before[outcome]}
    assert dict(zip(MIXED, together, strict=True)) == dict(zip(MIXED, alone, strict=True))
    assert rows == {
        "squeezed": len(SQUEEZED) * 8,
        "dense: no index": (len(MIXED) - len(SQUEEZED)) * 8,
    }


def test_dense_rows_of_a_mixed_batch_are_vllms_own_to_the_bit(model, three_indexes):
    from vllm import SamplingParams, TokensPrompt

    def logprobs(llm):
        warm(llm)
        sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False, logprobs=5)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in MIXED.values()]
        results = llm.generate(prompts, sampling, use_tqdm=False)
        steps = [[{t: p.logprob for t, p in step.items()} for step in r.outputs[0].logprobs] for r in results]
        return dict(zip(MIXED, steps, strict=True))

    with engine(model) as llm:
        dense = logprobs(llm)
    with engine(model, three_indexes, budget=0.4) as llm:
        mixed = logprobs(llm)
    for name in MIXED:
        if name in SQUEEZED:
            assert mixed[name] != dense[name], f"{name}: not squeezed"
        else:
            assert mixed[name] == dense[name], name


CROWD = [list(prompt) + tokens(100 + i, 7 * i) for i in range(2) for prompt in MIXED.values()]
TIGHT = {"max_num_seqs": 5, "max_num_batched_tokens": 160, "num_gpu_blocks_override": 42, "max_model_len": 1100}


def preemptions(llm):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_chunked_crowded_and_preempted_at_budget_one(model, three_indexes):
    """Chunks of 160 tokens cut prompts across the end of a prefix; the cache has room for about two requests."""
    with engine(model, **TIGHT) as llm:
        dense = generate(llm, CROWD, num_tokens=40)
    with engine(model, three_indexes, **TIGHT) as llm:
        squeezed = generate(llm, CROWD, num_tokens=40)
        rows, preempted = outcomes(llm), preemptions(llm)
    assert squeezed == dense
    assert preempted > 0, "nothing was preempted: make the cache smaller"
    assert rows["squeezed"] > 150
    assert rows["dense: prefix not in the KV cache yet"] > 5


def test_without_prefix_caching(model, three_indexes):
    """Each request owns its copy of the prefix."""
    arguments = {"enable_prefix_caching": False, "max_num_batched_tokens": 256}
    with engine(model, **arguments) as llm:
        dense = generate(llm, list(MIXED.values()))
    with engine(model, three_indexes, **arguments) as llm:
        squeezed = generate(llm, list(MIXED.values()))
        rows = outcomes(llm)
    assert squeezed == dense
    assert rows["squeezed"] >= len(SQUEEZED) * 7


def test_aborts_in_mid_stream_and_several_samples(model, three_indexes):
    from vllm import SamplingParams, TokensPrompt

    def run(llm):
        finished = {}
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        for i, prompt in enumerate([*MIXED.values()] * 3):
            llm.llm_engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), sampling)
        steps = 0
        while llm.llm_engine.has_unfinished_requests():
            for result in llm.llm_engine.step():
                if result.finished:
                    finished[result.request_id.split("-")[0]] = tuple(result.outputs[0].token_ids)
            steps += 1
            if steps in (3, 9):
                llm.llm_engine.abort_request([str(steps + i) for i in range(3)])
        several = generate(llm, [MIXED["contract"]], n=3, temperature=0.9, seed=7)
        return finished, several

    with engine(model, max_num_seqs=4) as llm:
        warm(llm)
        dense = run(llm)
    with engine(model, three_indexes, max_num_seqs=4) as llm:
        warm(llm)
        squeezed = run(llm)
        rows = outcomes(llm)
    assert squeezed[0] == dense[0]
    assert len(dense[0]) in range(12, 16), "aborts came too early or too late to count"
    assert squeezed[1] == dense[1] and len(set(dense[1])) > 1
    assert rows["squeezed"] > 100
