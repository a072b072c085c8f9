"""``vllm-squeeze bench``: the user's own model, prefix and questions, on vLLM's own backend and on ours."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from vllm_squeeze.offline_tools.bench.comparison import Comparison, compare
from vllm_squeeze.offline_tools.bench.part import run_in_fresh_process
from vllm_squeeze.offline_tools.bench.plan import Plan
from vllm_squeeze.offline_tools.bench.table import as_text, cautions, conclusions, header, rows, told
from vllm_squeeze.offline_tools.bench.web_page import web_page


def bench(
    plan: Plan,
    page: Path | None,
    figures: Path | None,
    out: TextIO = sys.stdout,
    run: Callable[[Plan, str], dict[str, Any]] = run_in_fresh_process,
) -> int:
    """Carries a plan out, one engine after the other, and prints what was found.

    Args:
        plan: what to measure.
        page: HTML file to write, if any.
        figures: JSON file to write, if any.
        out: where to print.
        run: runs a part of the plan.

    Returns:
        the exit code: 1 if any speed-up was refused, else 0.
    """
    results = {}
    for part in plan.parts:
        print(f"bench: running {part} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        results[part] = run(plan, part)
        print(f"bench: {part} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    found = compare(plan, results)
    print(as_lines(found), file=out)
    if page is not None:
        page.write_text(web_page(found), encoding="utf-8")
        print(page, file=out)
    if figures is not None:
        figures.write_text(json.dumps(found.as_json(), indent=2), encoding="utf-8")
    return 1 if found.refusals else 0


def as_lines(found: Comparison) -> str:
    """All that is printed: the table, what follows from it, and what was refused."""
    lines = [told(found), "", as_text(header(found), rows(found)), ""]
    lines += [*conclusions(found), *cautions(found)]
    lines += [f"NO SPEED-UP IS STATED: {refusal}" for refusal in found.refusals]
    return "\n".join(lines)
