"""Compares a server's greedy answers under squeezing with dense ones, token for token, on a real model.

    python benchmarks/agreement.py --model M --index index/ --prefix contract.txt --budget 1 --budget 0.125

Each arm runs in a fresh process, over the same questions on one prefix. Where an answer first differs, it counts as a
tie if the dense run's two best logits lie within one step of the model's dtype, as an error otherwise; what follows in
that answer is not compared. At a budget of 1 there must be no errors: the exit code says so.
``--ordinary`` requests without the prefix are answered together with the others, in the same steps, and compared too.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_squeeze.offline_tools.fidelity import first_difference

ORDINARY = "Name a river, a mountain and a city, and say a sentence about each. Number {i}."
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}


def questions(text: str, count: int) -> list[str]:
    """Asks for what follows ``count`` sentences spread over a text."""
    sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.;?!])\s+", text) if len(s.split()) > 8]
    chosen = [sentences[i * len(sentences) // count] for i in range(count)]
    return [f'What does the text say after "{" ".join(s.split()[:14])}"?' for s in chosen]


def answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one arm: the answers' tokens, the two best logits of each, and the server's own counters."""
    from vllm import LLM, SamplingParams

    engine_args = dict(arguments.engine_args)
    if arguments.arm != "dense":
        settings = {"index": str(arguments.index), "budget": float(arguments.arm), "mode": arguments.mode}
        engine_args |= {"attention_backend": "squeeze", "additional_config": {"squeeze": settings}}
    started = time.monotonic()
    llm = LLM(str(arguments.model), disable_log_stats=False, logprobs_mode="raw_logits", **engine_args)
    ready = time.monotonic()
    text = arguments.prefix.read_text(encoding="utf-8")
    conversations = [
        [{"role": "system", "content": text}, {"role": "user", "content": question}]
        for question in questions(text, arguments.questions)
    ]
    conversations += [[{"role": "user", "content": ORDINARY.format(i=i)}] for i in range(arguments.ordinary)]
    llm.chat(conversations[:1], SamplingParams(max_tokens=1), use_tqdm=False)
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, logprobs=2)
    generating = time.monotonic()
    results = [result.outputs[0] for result in llm.chat(conversations, sampling, use_tqdm=False)]
    done = time.monotonic()
    dtype = str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
    return {
        "tokens": [list(result.token_ids) for result in results],
        "best": [
            [sorted((p.logprob for p in step.values()), reverse=True)[:2] for step in r.logprobs] for r in results
        ],
        "texts": [result.text for result in results],
        "counters": server_counters(llm),
        "dtype": dtype,
        "start_s": round(ready - started, 1),
        "answers_s": round(done - generating, 2),
    }


def server_counters(llm: Any) -> dict[str, float]:
    """The server's own counters of squeezing; those of rows by what became of them."""
    return {
        f"{metric.name}{metric.labels.get('outcome', '')}": metric.value
        for metric in llm.get_metrics()
        if "squeeze" in metric.name
    }


BYTES_ALONE, BYTES_DENSE = (f"vllm:squeeze_prefix_bytes_{kind}" for kind in ("alone", "dense"))


def budget_used(counters: dict[str, float]) -> float | None:
    """Bytes read of prefixes over those that dense attention would read; None where no row was on an index."""
    read, whole = counters.get(BYTES_ALONE, 0), counters.get(BYTES_DENSE, 0)
    return read / whole if whole else None


def rows_of(counters: dict[str, float]) -> dict[str, float]:
    """Rows by what became of them."""
    return {name.removeprefix("vllm:squeeze_rows"): n for name, n in counters.items() if "rows" in name}


def is_tie(high: float, low: float, dtype: str) -> bool:
    """Whether two logits lie within one step of a dtype."""
    step = 2.0 ** (math.floor(math.log2(max(abs(high), 1e-30))) - MANTISSA_BITS[dtype])
    return high - low <= step


def compare(dense: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Counts answers that are the same, and those that first differ at a tie, or not at a tie."""
    counts = {"same": 0, "ties": 0, "errors": 0}
    agreed = total = 0
    for ours, theirs, best in zip(other["tokens"], dense["tokens"], dense["best"], strict=True):
        total += len(theirs)
        first = first_difference(theirs, ours)
        agreed += len(theirs) if first is None else first
        if first is None:
            counts["same"] += 1
            continue
        counts["ties" if first < len(best) and is_tie(*best[first], dense["dtype"]) else "errors"] += 1
    used = budget_used(other["counters"])
    return {
        **counts,
        "tokens_before_first_difference": round(agreed / total, 3),
        "budget_used": None if used is None else round(used, 4),
        "rows": rows_of(other["counters"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--prefix", type=Path, required=True, help="the text that was indexed with --chat-system")
    parser.add_argument("--budget", action="append", default=[], help="an arm at this budget; may be repeated")
    parser.add_argument("--mode", choices=("squeezed", "exact", "auto"), default="squeezed", help="of the server")
    parser.add_argument("--questions", type=int, default=24, help="on the prefix")
    parser.add_argument("--ordinary", type=int, default=0, help="requests without the prefix")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--out", type=Path, help="where to write all answers and figures, as JSON")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        arguments.out.write_text(json.dumps(answer(arguments)))
        return 0

    arms = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in ["dense", *(arguments.budget or ["1"])]:
            result = Path(folder) / "arm.json"
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--out", str(result)], check=True)
            arms[arm] = json.loads(result.read_text())
    failed = False
    for arm, result in arms.items():
        summary = compare(arms["dense"], result)
        print(f"{arm:>6}: {json.dumps(summary)}, start {result['start_s']} s, answers {result['answers_s']} s")
        failed |= arm != "dense" and float(arm) == 1 and summary["errors"] > 0
    if arguments.out:
        arguments.out.write_text(json.dumps(arms))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
