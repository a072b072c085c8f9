"""Puts many requests at once on a running server: questions on indexed documents, and ordinary ones in between.

    python benchmarks/load.py --url http://localhost:8000 --document a.txt --document b.txt --requests 64

Streams all answers through the openai client and prints errors, time to the first token, time between tokens and what
the server counted of rows and bytes. The exit code is 1 if any request failed.
"""

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from agreement import ORDINARY, questions
from openai import AsyncOpenAI, OpenAIError


@dataclass(frozen=True)
class Outcome:
    """Of one request: seconds to the first token and between tokens, or what went wrong."""

    kind: str
    first_s: float = 0.0
    between_s: float = 0.0
    error: str | None = None


async def ask(client: AsyncOpenAI, model: str, kind: str, messages: list[dict[str, str]], tokens: int) -> Outcome:
    """Streams one answer."""
    started, arrivals = time.monotonic(), []
    try:
        stream = await client.chat.completions.create(
            model=model, messages=messages, max_tokens=tokens, temperature=0, stream=True
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                arrivals.append(time.monotonic())
    except OpenAIError as error:
        return Outcome(kind, error=repr(error))
    if not arrivals:
        return Outcome(kind, error="no text")
    return Outcome(kind, arrivals[0] - started, (arrivals[-1] - arrivals[0]) / max(len(arrivals) - 1, 1))


async def load(arguments: argparse.Namespace) -> list[Outcome]:
    """Sends all requests at once: a third ordinary, the rest spread over the documents."""
    client = AsyncOpenAI(base_url=f"{arguments.url}/v1", api_key="unused", timeout=600, max_retries=0)
    model = (await client.models.list()).data[0].id
    documents = [path.read_text(encoding="utf-8") for path in arguments.document]
    asked = [questions(text, arguments.requests) for text in documents]
    for text in documents:
        await ask(client, model, "warm-up", [{"role": "system", "content": text}, {"role": "user", "content": "?"}], 1)
    requests = []
    for i in range(arguments.requests):
        which = i % (len(documents) + 1)
        if which == len(documents):
            requests.append(("ordinary", [{"role": "user", "content": ORDINARY.format(i=i)}]))
            continue
        messages = [{"role": "system", "content": documents[which]}, {"role": "user", "content": asked[which][i]}]
        requests.append((arguments.document[which].name, messages))
    return await asyncio.gather(*(ask(client, model, kind, m, arguments.tokens) for kind, m in requests))


def counters(url: str) -> dict[str, float]:
    """The server's counters of this backend."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    found = re.findall(r"^vllm:squeeze_(\w+)_total\{(.*)\} (\S+)$", text, re.MULTILINE)
    outcome = re.compile(r'outcome="([^"]*)"')
    return {" ".join([name, *outcome.findall(labels)]): float(value) for name, labels, value in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--document", type=Path, action="append", required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    started = time.monotonic()
    outcomes = asyncio.run(load(arguments))
    seconds = time.monotonic() - started
    failed = [outcome for outcome in outcomes if outcome.error]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        good = [o for o in outcomes if o.kind == kind and not o.error]
        if good:
            first, between = (statistics.median(values) for values in zip(*((o.first_s, o.between_s) for o in good)))
            print(
                f"{kind}: {len(good)} answers, median {first * 1e3:.0f} ms to first token, {between * 1e3:.1f} between"
            )
    print(f"{len(outcomes)} requests, {len(failed)} failed, {seconds:.1f} s")
    for outcome in failed[:5]:
        print(f"  {outcome.kind}: {outcome.error}")
    print(json.dumps(counters(arguments.url), indent=2))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
