"""Serves random requests for a while, as indexes come, go and break under them, and compares every answer.

    python benchmarks/soak.py --model M --indexes indexes/ --seconds 600 --engine-args '{"dtype": "float32"}'

At a budget of 1 an answer has to be, token for token, that of vLLM's own backend, whatever became of its rows. In 16
bits, where the same sums in another order give other last bits, it may first differ where the dense run's two best
tokens are within --tie nats of each other; what follows there is not compared. The KV cache is too small for all
requests at once, so that some are preempted; some are aborted. Indexes are added to the watched folder, replaced, cut
short, removed and pinned. Prints what happened, and memory at the start and at the end. The exit code is 1 if any answer
was another.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psutil

from vllm_squeeze.cli import add_engine_args, prefill
from vllm_squeeze.config import SqueezeConfig
from vllm_squeeze.offline_tools.fidelity import first_difference
from vllm_squeeze.offline_tools.store import add_to_store, pin_in_store, remove_from_store
from vllm_squeeze.prefix_index.index_folder import IndexWriter, PrefixIndex, find_indexes, holds_index, layer_file

QUESTIONS_PER_PREFIX = 6
COUNTED = "vllm:num_preemptions", "vllm:squeeze_index_loads", "vllm:external_prefix_cache_hits"
"""The last are tokens that another connector had."""
CREATED = "2026-01-01T00:00:{:02}+00:00"


def resident_mib() -> float:
    """Memory of this process and of those that it started, in MiB."""
    this, resident = psutil.Process(), 0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            resident += process.memory_info().rss
    return resident / 2**20


def make_prompts(indexes: list[PrefixIndex], random: Random) -> list[list[int]]:
    """Questions on each prefix, some of them on only a part of it, which no index is of."""
    known = sorted({int(token) for index in indexes for token in index.token_ids})
    prompts = []
    for index in indexes:
        ids = index.token_ids.tolist()
        for number in range(QUESTIONS_PER_PREFIX):
            start = ids if number else ids[: random.randrange(len(ids) // 2, len(ids))]
            prompts.append(start + random.choices(known, k=random.randrange(3, 40)))
    return prompts


def sampling(num_tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **more)


class Answer(NamedTuple):
    """A dense answer: its tokens, and by how many nats the best was ahead of the second best at each."""

    tokens: list[int]
    leads: list[float]

    @classmethod
    def of(cls, output: Any) -> "Answer":
        """From vLLM's, with the log probabilities of the two best."""
        best = [sorted((p.logprob for p in step.values()), reverse=True) for step in output.logprobs]
        return cls(list(output.token_ids), [step[0] - step[1] for step in best])


def dense_answers(
    model: str, prompts: list[list[int]], num_tokens: int, arguments: dict[str, Any]
) -> tuple[list[Answer], int]:
    """Those of vLLM's own backend, and the size of its KV cache's blocks."""
    from vllm import LLM, TokensPrompt

    llm = LLM(model, **arguments)
    try:
        asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        results = llm.generate(asked, sampling(num_tokens, logprobs=2), use_tqdm=False)
        answers = [Answer.of(result.outputs[0]) for result in results]
        return answers, llm.llm_engine.vllm_config.cache_config.block_size
    finally:
        llm.llm_engine.engine_core.shutdown()
        if arguments.get("distributed_executor_backend") == "ray":
            import ray

            ray.shutdown()  # vLLM's engine keeps its GPUs there


class Store:
    """A watched folder to which something happens now and then.

    Attributes:
        folder: that is watched.
        events: what happened so far.
    """

    def __init__(self, folder: Path, indexes: list[PrefixIndex], random: Random):
        self.folder, self.events = folder, Counter[str]()
        self._indexes, self._random = indexes, random

    def disturb(self) -> None:
        """Does something to one index: adds it, or replaces, cuts short, removes, pins or unpins it if it is there."""
        index = self._random.choice(self._indexes)
        name = index.folder.name
        event = "added"
        if holds_index(self.folder / name):
            event = self._random.choice(["replaced", "cut short", "removed", "pinned", "unpinned"])
        self.events[event] += 1
        if event == "added":
            add_to_store(index.folder, self.folder)
        elif event == "replaced":
            created = CREATED.format(self._random.randrange(60))
            with IndexWriter(self.folder, name) as writer:
                writer.copy(index)
                writer.publish(dataclasses.replace(index.manifest, created=created))
        elif event == "cut short":
            file = layer_file(0) if index.manifest.layers else "tokens.safetensors"
            os.truncate(self.folder / name / file, 100)
            os.utime(self.folder / name / "manifest.json")
        elif event == "removed":
            remove_from_store(name, self.folder)
        else:
            pin_in_store(name, self.folder, event == "pinned")


class Soak:
    """One engine under random requests.

    Args:
        llm: vLLM's, which watches the store.
        store: that is disturbed.
        prompts: token ids.
        answers: that each has to get.
        tie: nats, as in the module's docstring.
        steps_per_event: steps between two disturbances of the store.
        random: decides.
        at_once: requests, at most.
        aborted: share of them, about.
    """

    def __init__(
        self,
        llm: Any,
        store: Store,
        prompts: list[list[int]],
        answers: list[Answer],
        tie: float,
        steps_per_event: int,
        random: Random,
        at_once: int,
        aborted: float,
    ):
        self.engine, self.counts = llm.llm_engine, Counter[str]()
        self.wrong: list[dict[str, Any]] = []
        self._llm, self._store, self._prompts, self._answers = llm, store, prompts, answers
        self._tie, self._steps_per_event, self._random = tie, steps_per_event, random
        self._at_once, self._aborted = at_once, aborted
        self.largest_lead = 0.0
        self._running: dict[str, int] = {}

    def run(self, seconds: float, answers: float) -> None:
        """Takes steps for so long, or until there are so many answers in all; then until all requests have ended."""
        end = time.monotonic() + seconds
        while (goes_on := time.monotonic() < end and self.counts["answered"] < answers) or self._running:
            if goes_on:
                self._disturb()
            for result in self.engine.step():
                number = self._running.pop(result.request_id, None) if result.finished else None
                if number is not None:
                    self._compare(number, list(result.outputs[0].token_ids))
            self.counts["steps"] += 1

    def _disturb(self) -> None:
        from vllm import TokensPrompt

        if self.counts["steps"] % self._steps_per_event == 0:
            self._store.disturb()
        if self._running and self._random.random() < self._aborted / 4:
            id = self._random.choice(sorted(self._running))
            del self._running[id]
            self.engine.abort_request([id])
            self.counts["aborted"] += 1
        # An engine in another process would be waited for, had it nothing to do.
        while not self._running or (len(self._running) < self._at_once and self._random.random() < 0.5):
            number, id = self._random.randrange(len(self._prompts)), str(self.counts["requests"])
            asked = TokensPrompt(prompt_token_ids=self._prompts[number])
            self.engine.add_request(id, asked, sampling(len(self._answers[number].tokens)))
            self._running[id] = number
            self.counts["requests"] += 1

    def _compare(self, number: int, answer: list[int]) -> None:
        self.counts["answered"] += 1
        dense = self._answers[number]
        differs = first_difference(dense.tokens, answer)
        if differs is None:
            return
        self.largest_lead = max(self.largest_lead, dense.leads[differs])
        if dense.leads[differs] < self._tie:
            self.counts["ties"] += 1
        else:
            wrong = {"prompt": number, "answer": answer, "dense": dense.tokens}
            self.wrong.append({**wrong, "first difference": differs, "lead": dense.leads[differs]})

    def metrics(self) -> dict[str, float]:
        """What the engine counted: rows by what became of them, and COUNTED."""
        found = {}
        for metric in self._llm.get_metrics():
            if metric.name == "vllm:squeeze_rows":
                found[f"rows {metric.labels['outcome']}"] = metric.value
            elif metric.name in COUNTED:
                found[metric.name.removeprefix("vllm:").replace("_", " ")] = metric.value
        return found


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all of it; returns what happened."""
    from vllm import LLM

    random = Random(arguments.seed)
    indexes = [PrefixIndex.open(folder.resolve()) for folder in find_indexes(arguments.indexes)]
    prompts = make_prompts(indexes, random)
    longest = max(map(len, prompts)) + arguments.tokens
    shared = {"max_model_len": longest, "enforce_eager": True, "disable_log_stats": False, **arguments.engine_args}
    answers, block_size = dense_answers(arguments.model, prompts, arguments.tokens, shared)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        store = Store(Path(folder), indexes, random)
        settings = {"index": folder, "watch": 0.1, "budget": 1, "mode": arguments.mode}
        settings |= {"memory_limit_gib": arguments.memory_limit_gib, "prefill": arguments.prefill}
        llm = LLM(
            arguments.model,
            attention_backend="squeeze",
            additional_config={"squeeze": settings},
            num_gpu_blocks_override=arguments.room * -(-longest // block_size) + 4,
            **shared,
        )
        few = arguments.steps_per_event, random, arguments.at_once, arguments.aborted
        run = Soak(llm, store, prompts, answers, arguments.tie, *few)
        run_start = time.monotonic()
        run.run(arguments.seconds / 10, arguments.answers / 10)
        at_start = resident_mib()
        run.run(arguments.seconds, arguments.answers)
        result = {
            "seconds": round(time.monotonic() - run_start, 1),
            **run.counts,
            **{f"indexes {event}": count for event, count in store.events.items()},
            **run.metrics(),
            "MiB after a tenth": round(at_start),
            "MiB at the end": round(resident_mib()),
            "largest lead where answers part": run.largest_lead,
            "wrong answers": len(run.wrong),
        }
        llm.llm_engine.engine_core.shutdown()
    for wrong in run.wrong[:5]:
        print(json.dumps(wrong), file=sys.stderr)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--indexes", type=Path, required=True, help="folder of indexes of this model")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--answers", type=float, default=math.inf, help="end sooner when there are so many")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument(
        "--tie", type=float, default=0.0, help="nats: where the best tokens are this close, any will do"
    )
    parser.add_argument("--mode", choices=("squeezed", "exact", "auto"), default="squeezed", help="of the server")
    parser.add_argument("--prefill", type=prefill, default=SqueezeConfig.prefill, help="as the setting: dense or 1")
    parser.add_argument("--aborted", type=float, default=0.1, metavar="SHARE", help="of requests, about")
    parser.add_argument("--at-once", type=int, default=10, metavar="N", help="requests, at most")
    parser.add_argument(
        "--room", type=int, default=3, metavar="N", help="requests that the KV cache is large enough for"
    )
    parser.add_argument("--steps-per-event", type=int, default=12, help="a GPU takes many more steps a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--memory-limit-gib", type=float, default=0.5, help="less than all indexes need: they take turns"
    )
    add_engine_args(parser)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    result = soak(parser.parse_args())
    for name, value in result.items():
        print(f"{name:48} {value:g}")
    return 1 if result["wrong answers"] else 0


if __name__ == "__main__":
    sys.exit(main())
