"""Times requests on an engine in this process, step by step, and reads its counters of what became of their rows."""

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

REQUEST_NUMBERS = itertools.count()


def machine() -> dict[str, Any]:
    """What figures were measured on."""
    import torch
    import triton
    import vllm

    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "triton": triton.__version__},
    }


def rows_so_far(llm: Any) -> dict[str, float]:
    """Rows by what became of them, from the server's own counters; nothing for vLLM's own backend."""
    counters = (metric for metric in llm.get_metrics() if metric.name == "vllm:squeeze_rows")
    return {counter.labels["outcome"]: counter.value for counter in counters}


def prefix_bytes_so_far(llm: Any) -> dict[str, float]:
    """Bytes of the prefixes of rows that were not dense: "read", "alone" and "dense", as on /metrics."""
    start = "vllm:squeeze_prefix_bytes_"
    return {m.name.removeprefix(start): m.value for m in llm.get_metrics() if m.name.startswith(start)}


def growth(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """By how much counters grew, those that did."""
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


def steps(
    llm: Any, prompts: list[list[int]], num_tokens: int, cached: dict[str, int] | None = None
) -> Iterator[list[list[float]]]:
    """Runs requests together, ``num_tokens`` greedy tokens each, one step of the engine after another.

    Args:
        llm: vLLM's.
        prompts: token ids.
        num_tokens: of each answer.
        cached: filled with the tokens that each request found in the KV cache.

    Yields:
        when each token of each request arrived, in seconds on the clock ``time.perf_counter``: first when all requests
        were handed over, then after each step.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0,
        max_tokens=num_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    arrivals: dict[str, list[float]] = {str(next(REQUEST_NUMBERS)): [] for _ in prompts}
    for name, ids in zip(arrivals, prompts, strict=True):
        llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=ids), sampling)
    yield list(arrivals.values())
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        now = time.perf_counter()
        for output in outputs:
            arrivals[output.request_id] += [now] * len(output.outputs[0].token_ids)
            if cached is not None:
                cached[output.request_id] = max(cached.get(output.request_id, 0), output.num_cached_tokens or 0)
        yield list(arrivals.values())


def timed(llm: Any, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
    """Times requests that run together, ``num_tokens`` greedy tokens each.

    Args:
        llm: vLLM's, in this process.
        prompts: token ids.
        num_tokens: of each answer.

    Returns:
        ttft_ms: from handing over the first request until a request's first token, mean over requests.
        handed_ms: of that until all requests were handed over, the hashing of their prompts included.
        tpot_ms: between tokens of a request, while all requests have a first token and none its last; NaN where there
            is no such time.
        tokens_per_s: of all requests, from handing over the first request until the last token.
        least_tokens, most_tokens: that a request got.
        least_cached: tokens that a request found in the KV cache, the least.
    """
    cached: dict[str, int] = {}
    started = time.perf_counter()
    running = steps(llm, prompts, num_tokens, cached)
    arrivals = next(running)
    handed = time.perf_counter()
    for arrivals in running:
        pass
    first, last = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    between = sum(first < time <= last for time in arrivals[0])
    tokens = [len(times) for times in arrivals]
    return {
        "ttft_ms": statistics.mean(times[0] - started for times in arrivals) * 1e3,
        "handed_ms": (handed - started) * 1e3,
        "tpot_ms": (last - first) / between * 1e3 if between else math.nan,
        "tokens_per_s": sum(tokens) / (max(times[-1] for times in arrivals) - started),
        "least_tokens": min(tokens),
        "most_tokens": max(tokens),
        "least_cached": min(cached.values()),
    }
