"""Indexes a document, serves a model with the squeeze backend, asks questions, and asks the dense backend the same.

    make demo
    make demo MODEL=folder-or-name PREFIX=document.txt BUDGET=0.2

Takes SmolLM2-135M-Instruct, the first chapter of Jane Austen's Persuasion and a budget of a third, unless told
otherwise; runs on the CPU where there is no GPU. So small a model knows little: what counts is how the answers compare.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fetch_model import fetch_model
from openai import OpenAI
from openai_client import ask, text_in

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
QUESTIONS = [
    "Where does the family live?",
    "What is the Baronetage?",
    "What is Sir Walter proud of?",
    "What is the title of this book, and who wrote it?",
]
START_TIMEOUT_S = 600
LOG_LINES = 10


def main() -> None:
    budget = read_budget()
    prefix = Path(os.environ.get("PREFIX") or ROOT / "examples" / "data" / "persuasion.txt")
    try:
        document = text_in(prefix)
    except argparse.ArgumentTypeError as error:
        sys.exit(f"PREFIX: {error}")
    model = os.environ.get("MODEL") or str(fetch_model(WORK / "smollm2"))
    # Answers are compared, so both servers compute in the same dtype; the CPU is at its best in float32.
    dtype = "auto" if on_gpu() else "float32"
    index = WORK / "index"

    say(f"Indexing {prefix.name} for {model}")
    command = ["vllm_squeeze.cli", "index", "--model", model, "--prefix", str(prefix), "--chat-system"]
    run(*command, "--out", str(index), "--engine-args", f'{{"dtype": "{dtype}"}}')

    common = ["--dtype", dtype, "--gpu-memory-utilization", "0.5"] + ([] if on_gpu() else ["--enforce-eager"])
    squeeze = f'{{"squeeze": {{"index": "{index}", "budget": {budget}, "mode": "squeezed"}}}}'
    say(f"Asking the squeezed server, budget {budget}")
    with server(model, *common, "--attention-backend", "squeeze", "--additional-config", squeeze) as url:
        squeezed = answers(url, document)
        report(url)
    say("Asking the dense server")
    with server(model, *common) as url:
        dense = answers(url, document)

    same = sum(a == b for a, b in zip(squeezed, dense, strict=True))
    say(f"{same} of {len(QUESTIONS)} answers are the same")
    for question, ours, theirs in zip(QUESTIONS, squeezed, dense, strict=True):
        print(f"  {question}\n    squeezed: {' '.join(ours.split())}\n    dense:    {' '.join(theirs.split())}")


def read_budget() -> float:
    """The budget that is asked for, in (0, 1]. Ends the program if there is none such."""
    budget = os.environ.get("BUDGET") or "0.33"
    try:
        if 0 < float(budget) <= 1:
            return float(budget)
    except ValueError:
        pass
    sys.exit(f"BUDGET: {budget!r} is not a number above 0, at most 1")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run(module: str, *arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", module, *arguments]).returncode:
        sys.exit(1)


@contextmanager
def server(model: str, *arguments: str) -> Iterator[str]:
    """Runs ``vllm serve`` and yields its URL once it answers. Its log goes to .demo/server.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1"]
    with open(WORK / "server.log", "w") as log:
        process = subprocess.Popen([*command, "--port", str(port), *arguments], stdout=log, stderr=log)
        try:
            started = time.monotonic()
            while not answers_at(f"{url}/health"):
                if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                    ending = "".join(Path(log.name).read_text().splitlines(keepends=True)[-LOG_LINES:])
                    sys.exit(f"{ending}the server did not start; its log, which ends so, is {log.name}")
                time.sleep(1)
            print(f"the server was ready after {time.monotonic() - started:.0f} s", flush=True)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def answers_at(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def answers(url: str, document: str) -> list[str]:
    """Asks all questions, one after the other, and prints the answers as they come."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    given = []
    for question in QUESTIONS:
        print(f"\n  {question}\n    ", end="")
        started, pieces = time.monotonic(), []
        for piece in ask(client, document, question, max_tokens=40):
            print(piece.replace("\n", " "), end="", flush=True)
            pieces.append(piece)
        print(f"\n    ({time.monotonic() - started:.1f} s)")
        given.append("".join(pieces))
    return given


def report(url: str) -> None:
    """Prints what the server counted: rows by outcome, and the budget used."""
    metrics = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    rows = re.findall(r'^vllm:squeeze_rows_total\{.*outcome="([^"]*)".*\} (\S+)$', metrics, re.MULTILINE)
    alone, dense = (
        sum(map(float, re.findall(rf"^vllm:squeeze_prefix_bytes_{kind}_total\S* (\S+)$", metrics, re.MULTILINE)))
        for kind in ("alone", "dense")
    )
    print("\n  rows (a row is one request in one step):")
    for outcome, count in rows:
        print(f"    {float(count):6.0f}  {outcome}")
    if dense:
        print(
            f"  budget used: {alone / dense:.3f} ({alone / 2**20:.0f} MiB, if no two rows share a load, of the "
            f"{dense / 2**20:.0f} MiB of a dense pass)"
        )


if __name__ == "__main__":
    WORK.mkdir(exist_ok=True)
    main()
