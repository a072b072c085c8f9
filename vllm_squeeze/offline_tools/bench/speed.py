"""One engine, as a server would run it, alone in its process: times of requests on the prefix, and their answers."""

from collections import Counter
from pathlib import Path
from typing import Any

from vllm_squeeze.offline_tools.bench.plan import DENSE, EXACT, Plan
from vllm_squeeze.offline_tools.index import MEMORY_UTILIZATION
from vllm_squeeze.offline_tools.timing import growth, machine, prefix_bytes_so_far, rows_so_far, timed

WARM_UP_TOKENS = 4


def run_arm(plan: Plan, arm: str) -> dict[str, Any]:
    """Times and answers of one arm.

    Returns:
        the machine; "answers", each with its "tokens" and "text"; and "batches", of each number of "requests" the
        "repeats" as ``timed`` has them, and by how much counters of "rows" and "bytes" grew in all of these.
    """
    llm = start(plan, arm)
    try:
        unasked = Unasked(llm, plan)
        answers = answer(llm, plan, unasked.take(plan.compared))
        block_size = llm.llm_engine.vllm_config.cache_config.block_size
        batches = [run_batch(llm, plan, unasked, requests) for requests in plan.batches]
        return machine() | {"block_size": block_size, "answers": answers, "batches": batches}
    finally:
        llm.llm_engine.engine_core.shutdown()


def start(plan: Plan, arm: str) -> Any:
    """Starts vLLM with its own backend, or with ours."""
    from vllm import LLM

    arguments = {
        "max_model_len": max(map(len, plan.prompts)) + plan.tokens,
        "gpu_memory_utilization": MEMORY_UTILIZATION,
        **plan.engine_args,
        "max_num_seqs": max(plan.batches),
        "enable_prefix_caching": True,
        "disable_log_stats": False,
    }
    if arm != DENSE:
        budget = {} if arm == EXACT else {"budget": float(arm)}
        settings = {"index": str(Path(plan.index)), "mode": plan.mode, **budget}
        arguments |= {"attention_backend": "squeeze", "additional_config": {"squeeze": settings}}
    return LLM(plan.model, **arguments)


class Unasked:
    """Hands out prompts that are not in the KV cache whole, where the prefix is.

    Args:
        llm: vLLM's.
        plan: with the prompts.
    """

    def __init__(self, llm: Any, plan: Plan):
        self._llm, self._plan = llm, plan
        self._left: list[list[int]] = []

    def take(self, count: int) -> list[list[int]]:
        """So many prompts; some of them more than once if there are fewer.

        Raises:
            RuntimeError: requests are still running.
        """
        if count > len(self._left):
            self._begin()
            prompts = self._plan.prompts
            self._left = prompts * -(-count // len(prompts))
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def _begin(self) -> None:
        """Leaves nothing but the prefix in the KV cache."""
        from vllm import SamplingParams, TokensPrompt

        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the KV cache could not be emptied")
        prefix = TokensPrompt(prompt_token_ids=self._plan.prefix)
        self._llm.generate(prefix, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)


def answer(llm: Any, plan: Plan, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Greedy answers to prompts; the engine takes as many at once as the largest batch has."""
    from vllm import SamplingParams, TokensPrompt

    given = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    results = llm.generate(given, SamplingParams(temperature=0, max_tokens=plan.tokens), use_tqdm=False)
    outputs = [result.outputs[0] for result in results]
    return [{"tokens": list(output.token_ids), "text": output.text} for output in outputs]


def run_batch(llm: Any, plan: Plan, unasked: Unasked, requests: int) -> dict[str, Any]:
    """Times requests that run together, after some that warm up."""
    timed(llm, unasked.take(requests), min(plan.tokens, WARM_UP_TOKENS))
    repeats, rows, read = [], Counter(), Counter()
    for _ in range(plan.repeats):
        prompts = unasked.take(requests)
        rows_before, bytes_before = rows_so_far(llm), prefix_bytes_so_far(llm)
        repeats.append(timed(llm, prompts, plan.tokens))
        rows.update(growth(rows_so_far(llm), rows_before))
        read.update(growth(prefix_bytes_so_far(llm), bytes_before))
    return {"requests": requests, "repeats": repeats, "rows": dict(rows), "bytes": dict(read)}
