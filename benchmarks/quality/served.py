"""Asks the questions on a prefix of ``vllm serve`` through the OpenAI API, as users do, a server for each arm.

The server has vLLM's defaults but for the arguments given, and its log goes to the folder of the task.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.quality.answers import DENSE, SERVED, answers_path, go_on
from benchmarks.quality.questions import Task
from benchmarks.running import IN_THIS_PROCESS, conversation, raw_prompt
from vllm_squeeze.offline_tools.server import Server
from vllm_squeeze.offline_tools.timing import machine
from vllm_squeeze.offline_tools.warm import warm

START_TIMEOUT_S = 1200
STOP_TIMEOUT_S = 60
WARM_TIMEOUT_S = 60
# The server's counters come in a moment after the answer that they are about.
SETTLING_S = 0.2


def flags(engine_args: dict[str, Any]) -> list[str]:
    """Arguments of vLLM's engine as its command line has them."""
    found = []
    for name, value in engine_args.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            found += [f"--{dashed}", value if isinstance(value, str) else json.dumps(value)]
    return found


@contextmanager
def server(model: str, arguments: Sequence[str], log: Path) -> Iterator[str]:
    """Runs ``vllm serve`` and yields its URL once it answers.

    Raises:
        RuntimeError: it did not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1", "--port", port]
    environment = {name: value for name, value in os.environ.items() if IN_THIS_PROCESS.get(name) != value}
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    with log.open("w") as file:
        # With its own processes in a session, so that none is left over.
        process = subprocess.Popen(
            [*command, *arguments], stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            while not is_healthy(url):
                if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                    raise RuntimeError(f"the server did not start; its log is {log}")
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def counters_in(metrics: str) -> dict[str, float]:
    """The counters of squeezing in the text of /metrics, named as ``server_counters`` does."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if "squeeze" in family.name and sample.name.endswith("_total"):
                found[family.name + sample.labels.get("outcome", "")] += sample.value
    return dict(found)


def settled_counters(url: str) -> dict[str, float]:
    """The counters of squeezing of a server that has nothing to do, once they stay as they are."""
    known = None
    while True:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            found = counters_in(response.read().decode())
        if found == known:
            return found
        known = found
        time.sleep(SETTLING_S)


class ServedAsker:
    """Answers questions of a task's folder.

    Args:
        folder: of the task, with the index of its prefix.
        task: of the folder.
        model: as vLLM takes it.
        prompts: token ids, each of the prefix and a question: what the server should make of what it is asked.
        chat: whether the model has a chat template.
        engine_args: more arguments for vLLM's engine.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        model: str,
        prompts: list[list[int]],
        chat: bool,
        engine_args: dict[str, Any],
    ):
        self._folder, self._task, self._model, self._prompts, self._chat = folder, task, model, prompts, chat
        self._engine_args = {"max_model_len": max(map(len, prompts)) + task.answer_tokens} | engine_args

    def ask(self, arms: Sequence[str]) -> None:
        """Answers the questions that arms have no answer to; an arm that cannot go on says so on standard error."""
        for arm in arms:
            title = f"{self._task.name}, {SERVED}{arm}"
            log = self._folder / f"{SERVED}{arm}.log"
            try:
                with server(self._model, flags(self._engine_args | self._squeezing(arm)), log) as url:
                    self._bring_prefix(url, arm)
                    path = answers_path(self._folder, SERVED + arm)
                    go_on(path, len(self._prompts), lambda number, url=url: self._answer(url, number), title)
            except (RuntimeError, OSError) as error:
                print(f"{title}: {error}", file=sys.stderr)

    def _squeezing(self, arm: str) -> dict[str, Any]:
        if arm == DENSE:
            return {}
        settings = {"index": str(self._folder / "index"), "budget": float(arm), "mode": "squeezed"}
        return {"attention_backend": "squeeze", "additional_config": {"squeeze": settings}}

    def _bring_prefix(self, url: str, arm: str) -> None:
        """Has the prefix, and of no question anything, computed into the KV cache, without which no row is squeezed."""
        if warm(self._folder / "index", Server(url), WARM_TIMEOUT_S, sys.stderr) and arm != DENSE:
            raise RuntimeError("the index is not served")

    def _answer(self, url: str, number: int) -> dict[str, Any]:
        before = settled_counters(url)
        question = self._task.questions[number]
        asked = self._task.prefix, question.text, question.earlier
        body = {
            "model": self._model,
            "max_tokens": self._task.answer_tokens,
            "temperature": 0,
            # which a model may have by default
            "repetition_penalty": 1,
            "return_token_ids": True,
        }
        if self._chat:
            response = Server(url).post("/v1/chat/completions", body | {"messages": conversation(*asked)})
            (choice,) = response["choices"]
            text, prompt = choice["message"]["content"] or "", response["prompt_token_ids"]
        else:
            (choice,) = Server(url).post("/v1/completions", body | {"prompt": raw_prompt(*asked)})["choices"]
            text, prompt = choice["text"], choice["prompt_token_ids"]
        if prompt != self._prompts[number]:
            raise RuntimeError(f"the server makes other tokens of question {number} than the model's tokenizer does")
        growth = {name: value - before.get(name, 0) for name, value in settled_counters(url).items()}
        counters = {name: grown for name, grown in growth.items() if grown}
        return {"text": text, "tokens": choice["token_ids"], "counters": counters} | machine()
