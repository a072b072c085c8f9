"""``vllm-squeeze index --documents``: indexes many documents on Ray.

Each worker, an actor, has GPUs and an engine of its own, which it keeps from one document to the next. A worker that
dies, or in which something unexpected happens, is replaced, and its document goes to whichever is free.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tqdm import tqdm

from vllm_squeeze.offline_tools.documents import Document, list_documents
from vllm_squeeze.prefix_index.stores import check_out, is_url, store_at

RETRIES = 2
"""How often a document is tried again after its worker died or an error that is not the document's; also how many
starts of workers and engines may fail before the next document is done."""
CONNECT_TIMEOUT_S = 10
INDEXED, SKIPPED, FAILED = "indexed", "skipped", "failed"


class Outcome(NamedTuple):
    """What became of a document.

    Attributes:
        name: of the document.
        state: INDEXED, SKIPPED as its index was there, or FAILED.
        reason: of a failure, in a line.
    """

    name: str
    state: str
    reason: str = ""


class EngineDidNotStart(RuntimeError):
    """An engine failed as it started, for a reason that no document is to blame for."""


class DocumentWorker:
    """Indexes documents; an actor.

    Args:
        settings: arguments of ``Indexer``.
        out: folder of indexes, or URL.
    """

    def __init__(self, settings: dict[str, Any], out: str):
        self._settings, self._out = settings, out

    @cached_property
    def _indexer(self) -> Any:
        from vllm_squeeze.offline_tools.index import Indexer

        return Indexer(**self._settings, many=True)

    def start(self) -> str:
        """Imports vLLM and checks the settings; returns what is wrong with them, in a line, or nothing."""
        try:
            self._indexer.identity  # noqa: B018 (finds it)
        except (ValueError, OSError) as error:
            return one_line(error)
        return ""

    def index(self, document: Document) -> Outcome:
        """Indexes a document, unless its index is there. What the document is to blame for is no exception.

        Raises:
            EngineDidNotStart: for whatever reason.
        """
        try:
            asked = self._indexer.prepare(document)
            if self._indexer.is_indexed(asked, self._out):
                return Outcome(document.name, SKIPPED)
            try:
                self._indexer.start_engine(asked)
            except Exception as error:
                raise EngineDidNotStart(f"{type(error).__name__}: {one_line(error)}") from None
            with store_at(self._out) as store:
                self._indexer.write(asked, store)
        except ValueError as error:
            return Outcome(document.name, FAILED, one_line(error))
        return Outcome(document.name, INDEXED)


def index_documents(
    documents: Path, out: str, workers: int | None, address: str | None, settings: dict[str, Any]
) -> int:
    """Indexes all documents of a folder or list whose indexes are not there yet, and prints what became of them.

    Args:
        documents: folder, or file of JSON lines.
        out: folder of indexes that all machines share, or URL.
        workers: that index at the same time; None: as many as the cluster has GPUs for, 1 if it has none.
        address: of a Ray cluster; None: the one that RAY_ADDRESS names, or else this machine alone.
        settings: arguments of ``Indexer``, for all documents.

    Returns:
        the exit code: 1 if a document failed, else 0.

    Raises:
        ValueError: an argument that cannot be used.
        OSError: no worker lives.
    """
    started = time.monotonic()
    # Longest first: the last ones to end are short.
    listed = sorted(list_documents(documents), key=lambda document: -document.size)
    if not is_url(out):
        out = str(Path(out).resolve())
    check_out(out)
    ray = import_ray()
    address = address or os.environ.get("RAY_ADDRESS")
    check_reachable(address)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        hint = "if the cluster has token authentication, set RAY_AUTH_MODE=token"
        raise ValueError(f"--ray: {address}: {error}; {hint}") from None
    try:
        count, resources = share_out(workers, len(listed), ray.cluster_resources(), settings["engine_args"])
        actor = ray.remote(DocumentWorker).options(**resources)
        running = run(ray, lambda: actor.remote(settings, out), count, listed)
        outcomes = list(tqdm(running, total=len(listed), desc="Documents", unit="document"))
    finally:
        ray.shutdown()
    return summarise(out, outcomes, time.monotonic() - started)


def import_ray() -> ModuleType:
    """Ray, which is optional.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--documents: needs Ray, which is not installed: pip install vllm-squeeze[ray]") from None
    return ray


def check_reachable(address: str | None) -> None:
    """Tries to connect to HOST:PORT, also of Ray's client, as Ray itself would try for minutes.

    Raises:
        ValueError: nothing answers there.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ValueError(f"--ray: {address}: {error}") from None


def share_out(
    workers: int | None, num_documents: int, cluster: dict[str, float], engine_args: dict[str, Any]
) -> tuple[int, dict[str, int]]:
    """How many workers there are, and what Ray is to give each.

    Args:
        workers: that were asked for, or None.
        num_documents: no more are needed.
        cluster: what it has of "GPU" and "CPU".
        engine_args: say how many GPUs an engine takes.

    Raises:
        ValueError: there is no room for as many.
    """
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 1))
    per_engine = engine_args.get("tensor_parallel_size", 1) * engine_args.get("pipeline_parallel_size", 1)
    room = gpus // per_engine if gpus else cpus
    if (gpus and not room) or (workers is not None and not 1 <= workers <= room):
        asked = "" if workers is None else f" is {workers}, must be from 1 to {room}"
        raise ValueError(f"--workers{asked}: the cluster has {gpus} GPUs and {cpus} CPUs, an engine takes {per_engine}")
    count = min(workers or (room if gpus else 1), num_documents)
    # Ray tells PyTorch to use as many threads as a worker has CPUs.
    return count, {"num_gpus": per_engine, "num_cpus": 1} if gpus else {"num_cpus": max(1, cpus // count)}


def run(
    ray: ModuleType, new_worker: Callable[[], Any], num_workers: int, documents: Sequence[Document]
) -> Iterator[Outcome]:
    """Hands documents to workers, those first in the list first.

    Args:
        ray: the module.
        new_worker: makes a ``DocumentWorker`` as an actor.
        num_workers: that live at a time.
        documents: to be indexed.

    Yields:
        of each document what became of it, as it does.

    Raises:
        ValueError: workers cannot start with these settings.
        OSError: one worker or engine after another failed as it started.
    """
    waiting = deque((document, 0) for document in documents)
    workers = [new_worker() for _ in range(num_workers)]
    starting, idle, busy = {worker.start.remote(): worker for worker in workers}, [], {}
    false_starts = 0
    while waiting or busy:
        while waiting and idle:
            document, tries = waiting.popleft()
            try:
                loaded = document.load()
            except ValueError as error:
                yield Outcome(document.name, FAILED, one_line(error))
                continue
            worker = idle.pop()
            busy[worker.index.remote(loaded)] = worker, document, tries + 1
        if not waiting and not busy:
            break
        (ref,), _ = ray.wait([*starting, *busy], num_returns=1)
        worker, document, tries = busy.pop(ref) if ref in busy else (starting.pop(ref), None, 0)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayError as error:
            reason = reason_of(error)
            ray.kill(worker)
            replacement = new_worker()
            starting[replacement.start.remote()] = replacement
            if document is None or isinstance(getattr(error, "cause", None), EngineDidNotStart):
                false_starts += 1
                if false_starts > RETRIES:
                    raise ChildProcessError(f"{false_starts} workers could not start: {reason}") from None
                if document is not None:
                    waiting.appendleft((document, tries - 1))
            elif tries > RETRIES:
                yield Outcome(document.name, FAILED, f"tried {tries} times: {reason}")
            else:
                waiting.appendleft((document, tries))
            continue
        idle.append(worker)
        if document is not None:
            false_starts = 0
            yield result
        elif result:
            raise ValueError(result)


def reason_of(error: Exception) -> str:
    """Why a worker gave no result, in a line."""
    cause = getattr(error, "cause", None)
    if cause is None:
        return f"the worker died, killed or out of memory ({type(error).__name__})"
    return f"{type(cause).__name__}: {one_line(cause)}"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def summarise(out: str, outcomes: Sequence[Outcome], seconds: float) -> int:
    """Prints how many documents were indexed, and which failed; returns the exit code."""
    numbers = {state: sum(outcome.state == state for outcome in outcomes) for state in (INDEXED, SKIPPED, FAILED)}
    print(out)
    for label, value in {**numbers, "time": f"{seconds:.1f} s"}.items():
        print(f"  {label:<15}  {value}")
    for outcome in sorted(outcomes):
        if outcome.state == FAILED:
            print(f"failed: {outcome.name}: {outcome.reason}")
    return 1 if numbers[FAILED] else 0
