"""Counts how much of a prefix questions choose together: what one read of it for all of them would have to load.

    python benchmarks/overlap.py --model M --index index/ --prefix contract.txt

Decodes different questions on one prefix, 1, 2, 4 ... 32 of them together, and reads the server's own counters:

    shared       query tokens that share loads; fewer than the batch where the kernels make several passes
    kept         share of the prefix's keys that one token chooses
    union        share that the tokens of a pass choose together
    independent  the union if choices had nothing to do with each other, 1 - (1 - kept) ** shared

All are means over layers, KV heads and steps. Shares differ between layers and heads, so that independent choices would
come to a little less than that formula makes of the mean.
"""

import argparse
import functools
import json
import operator
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agreement import questions
from running import chat_prompts, count_decoding

from vllm_squeeze.offline_tools.timing import rows_so_far, steps


def start(arguments: argparse.Namespace) -> Any:
    """Starts a server that squeezes whatever it costs."""
    from vllm import LLM

    settings = {"index": str(arguments.index), "mode": "squeezed"}
    if arguments.budget:
        settings["budget"] = arguments.budget
    engine_args = {"disable_log_stats": False, "max_num_seqs": max(arguments.batches)} | arguments.engine_args
    return LLM(
        str(arguments.model), attention_backend="squeeze", additional_config={"squeeze": settings}, **engine_args
    )


def overlap(llm: Any, prompts: list[list[int]], batch: int, num_tokens: int) -> dict[str, Any]:
    """The figures of decoding all prompts, ``batch`` at a time.

    Raises:
        RuntimeError: not all rows of answers were squeezed.
    """
    before = rows_so_far(llm)
    batches = (prompts[first : first + batch] for first in range(0, len(prompts), batch))
    total = functools.reduce(operator.add, (count_decoding(llm, together, num_tokens) for together in batches))
    rows = {name: value - before.get(name, 0) for name, value in rows_so_far(llm).items()}
    if {name for name, grown in rows.items() if grown} != {"squeezed", "dense: prefill"}:
        raise RuntimeError(f"not all rows were squeezed: {rows}")
    return {
        "batch": batch,
        "shared": total.tokens_per_pass,
        "kept": total.kept_share,
        "union": total.union_share,
        "independent": 1 - (1 - total.kept_share) ** total.tokens_per_pass,
        "counts": asdict(total),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--prefix", type=Path, required=True, help="the text that was indexed with --chat-system")
    parser.add_argument("--budget", type=float, help="of the server")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--out", type=Path, help="where to write all figures, as JSON")
    arguments = parser.parse_args()
    if odd := [batch for batch in arguments.batches if arguments.questions % batch]:
        parser.error(f"--batches: {odd[0]} does not divide {arguments.questions} questions")

    llm = start(arguments)
    text = arguments.prefix.read_text(encoding="utf-8")
    prompts = chat_prompts(llm.get_tokenizer(), text, questions(text, arguments.questions))
    for _ in steps(llm, prompts[:1], 1):
        pass
    rows = [overlap(llm, prompts, batch, arguments.tokens) for batch in arguments.batches]
    names = ("batch", "shared", "kept", "union", "independent")
    print("".join(f"{name:>12}" for name in names))
    for row in rows:
        print(f"{row['batch']:>12}{row['shared']:>12.1f}" + "".join(f"{row[name]:>12.4f}" for name in names[2:]))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
