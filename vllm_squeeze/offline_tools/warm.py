"""Has a running server compute the prefixes of indexes before the first question: ``vllm-squeeze warm``."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from vllm_squeeze.offline_tools.server import Server
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes
from vllm_squeeze.prefix_index.manifest import printable

SQUEEZED = {"squeezed", "exact", "dense: faster"}
"""What a row on an index is that the server has on its devices."""
COMING = {"dense: no index", "dense: index not on the device yet"}
"""What it is while the server has not seen the index, or not loaded it."""
INTERVAL = 0.5
"""Seconds between two requests for the same prefix."""
ASKED = 3
"""Tokens asked for: the first comes of the prompt, the others are served as answers are."""


def warm(index: Path, server: Server, seconds: float, out: TextIO = sys.stdout) -> int:
    """Sends each prefix as a prompt, and says what became of it.

    Args:
        index: an index, or a folder of indexes, whose models the server serves.
        server: that serves them.
        seconds: how long an index is waited for that the server has not seen or not loaded yet.
        out: where to print.

    Returns:
        the exit code: 1 if a prefix is not served by its index, else 0.

    Raises:
        ValueError: there is no index.
        OSError: the server cannot be reached, or refuses the prompt.
    """
    model, failed = server.model(), 0
    for folder in find_indexes(index):
        opened = PrefixIndex.open(folder.resolve())
        name, start = opened.folder.name, time.monotonic()
        for rows in asked(opened, server, model):
            if COMING.isdisjoint(rows) or time.monotonic() - start > seconds:
                break
            time.sleep(INTERVAL)
        served = not SQUEEZED.isdisjoint(rows)
        failed += not served
        became = ", ".join(f"{outcome} {count}" for outcome, count in rows.items()) or "the server has no such backend"
        took = f"{time.monotonic() - start:.1f} s"
        print(printable(f"{'warm' if served else 'not served'}  {name}  {took}  ({became})"), file=out)
    return 1 if failed else 0


def asked(index: PrefixIndex, server: Server, model: str) -> Iterator[dict[str, int]]:
    """The rows of one request on a prefix after another, by what became of them."""
    while True:
        body = {
            "model": model,
            "prompt": index.token_ids.tolist(),
            "max_tokens": ASKED,
            "temperature": 0,
            "ignore_eos": True,
            "kv_transfer_params": {"squeeze": {}},
        }
        answer = server.post("/v1/completions", body)
        yield ((answer.get("kv_transfer_params") or {}).get("squeeze") or {}).get("rows", {})
