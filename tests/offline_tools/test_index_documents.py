"""How documents are handed to workers, with stand-ins for Ray and its actors; with Ray: tests/engine/test_ray.py."""

import socket
import sys
from types import SimpleNamespace

import pytest

from vllm_squeeze.cli import main
from vllm_squeeze.offline_tools.documents import Document
from vllm_squeeze.offline_tools.index_documents import (
    FAILED,
    INDEXED,
    RETRIES,
    EngineDidNotStart,
    Outcome,
    run,
    share_out,
)


class RayError(Exception):
    pass


def unexpected(cause: Exception) -> RayError:
    error = RayError()
    error.cause = cause
    return error


class Task:
    def __init__(self, result: object):
        self.result = result


class Worker:
    """An actor that dies, or fails, as a plan says: by document, or None for its start, an error each time."""

    def __init__(self, plan: dict):
        self.alive, self.handed, self._plan = True, [], plan
        self.start = SimpleNamespace(remote=lambda: self._task(None, ""))
        self.index = SimpleNamespace(remote=lambda d: self._task(d.name, Outcome(d.name, INDEXED)))

    def _task(self, name: str | None, result: object) -> SimpleNamespace:
        assert self.alive
        self.handed.append(name)
        errors = self._plan.get(name, [])
        return Task(errors.pop(0) if errors else result)


class FakeRay:
    exceptions = SimpleNamespace(RayError=RayError)

    @staticmethod
    def wait(refs: list, num_returns: int):
        return refs[:num_returns], refs[num_returns:]

    @staticmethod
    def get(ref):
        if isinstance(ref.result, Exception):
            raise ref.result
        return ref.result

    @staticmethod
    def kill(worker):
        worker.alive = False


def handed_out(documents: list[Document], plan: dict, count: int = 2) -> tuple[dict[str, Outcome], list[Worker]]:
    workers = []

    def new_worker() -> Worker:
        workers.append(Worker(plan))
        return workers[-1]

    outcomes = list(run(FakeRay, new_worker, count, documents))
    assert len(outcomes) == len(documents)
    return {outcome.name: outcome for outcome in outcomes}, workers


DOCUMENTS = [Document(name, text="text") for name in "abcd"]


def test_all_are_indexed_and_workers_stay():
    outcomes, workers = handed_out(DOCUMENTS, {})
    assert outcomes == {name: Outcome(name, INDEXED) for name in "abcd"}
    assert len(workers) == 2 and [None] * 2 == [worker.handed[0] for worker in workers]


def test_a_document_is_tried_again_by_another_worker():
    outcomes, workers = handed_out(DOCUMENTS, {"b": [RayError()] * RETRIES})
    assert outcomes == {name: Outcome(name, INDEXED) for name in "abcd"}
    assert sum("b" in worker.handed for worker in workers) == RETRIES + 1
    assert sum(not worker.alive for worker in workers) == RETRIES


def test_a_document_that_kills_its_workers_is_given_up():
    outcomes, workers = handed_out(DOCUMENTS, {"b": [RayError()] * 9, "c": [unexpected(OSError("disk\nfull"))] * 9})
    assert {name: outcome.state for name, outcome in outcomes.items()} == {
        "a": INDEXED,
        "b": FAILED,
        "c": FAILED,
        "d": INDEXED,
    }
    assert outcomes["b"].reason == "tried 3 times: the worker died, killed or out of memory (RayError)"
    assert outcomes["c"].reason == "tried 3 times: OSError: disk full"
    assert sum(worker.handed.count("b") for worker in workers) == RETRIES + 1


def test_a_file_that_cannot_be_read_takes_no_worker(tmp_path):
    missing = Document("missing", path=tmp_path / "missing")
    outcomes, workers = handed_out([missing, *DOCUMENTS, missing], {}, count=1)
    assert outcomes["missing"].state == FAILED and "No such file" in outcomes["missing"].reason
    assert workers[0].handed == [None, *"abcd"]
    handed_out([missing], {})


def test_workers_that_die_as_they_start():
    handed_out(DOCUMENTS, {None: [RayError()] * RETRIES})
    with pytest.raises(OSError, match="^3 workers could not start: the worker died"):
        handed_out(DOCUMENTS, {None: [RayError()] * 9})


def test_engines_that_do_not_start():
    """They are not tried for one document after another."""
    failure = unexpected(EngineDidNotStart("ValueError: no memory"))
    outcomes, _ = handed_out(DOCUMENTS, {"b": [failure] * RETRIES})
    assert outcomes == {name: Outcome(name, INDEXED) for name in "abcd"}
    with pytest.raises(OSError, match="^3 workers could not start: EngineDidNotStart: ValueError: no memory$"):
        handed_out(DOCUMENTS, {name: [failure] * 9 for name in "abcd"})


def test_settings_that_no_worker_takes():
    with pytest.raises(ValueError, match="^--model: m: no such folder$"):
        handed_out(DOCUMENTS, {None: ["--model: m: no such folder"]})


@pytest.mark.parametrize(
    ("workers", "cluster", "engine_args", "expected"),
    [
        (None, {"CPU": 2.0}, {}, (1, {"num_cpus": 2})),
        (2, {"CPU": 2.0}, {}, (2, {"num_cpus": 1})),
        (None, {"CPU": 96.0, "GPU": 8.0}, {}, (8, {"num_gpus": 1, "num_cpus": 1})),
        (None, {"CPU": 96.0, "GPU": 8.0}, {"tensor_parallel_size": 4}, (2, {"num_gpus": 4, "num_cpus": 1})),
        (3, {"CPU": 96.0, "GPU": 8.0}, {}, (3, {"num_gpus": 1, "num_cpus": 1})),
        (None, {"CPU": 96.0, "GPU": 64.0}, {}, (10, {"num_gpus": 1, "num_cpus": 1})),
    ],
)
def test_a_worker_for_each_gpu(workers, cluster, engine_args, expected):
    assert share_out(workers, 10, cluster, engine_args) == expected


@pytest.mark.parametrize(
    ("workers", "engine_args", "message"),
    [
        (9, {}, "--workers is 9, must be from 1 to 8: the cluster has 8 GPUs"),
        (0, {}, "--workers is 0, must be from 1 to 8"),
        (3, {"tensor_parallel_size": 4}, "--workers is 3, must be from 1 to 2"),
        (None, {"tensor_parallel_size": 16}, "--workers: the cluster has 8 GPUs and 96 CPUs, an engine takes 16"),
    ],
)
def test_more_workers_than_there_is_room_for(workers, engine_args, message):
    with pytest.raises(ValueError, match=message):
        share_out(workers, 10, {"CPU": 96.0, "GPU": 8.0}, engine_args)


def refused(capsys, tmp_path, *arguments) -> str:
    assert main(["index", "--model", "m", "--out", str(tmp_path / "store"), *map(str, arguments)]) == 1
    return capsys.readouterr().err.removeprefix("vllm-squeeze index: error: ").rstrip()


def test_what_is_refused_before_anything_starts(capsys, tmp_path, monkeypatch):
    (tmp_path / "list.jsonl").write_text('{"text": "t10"}')
    monkeypatch.setitem(sys.modules, "ray", None)
    error = refused(capsys, tmp_path, "--documents", tmp_path / "list.jsonl")
    assert error == "--documents: needs Ray, which is not installed: pip install vllm-squeeze[ray]"
    (tmp_path / "list.jsonl").write_text("text")
    assert "list.jsonl, line 1: not JSON" in refused(capsys, tmp_path, "--documents", tmp_path / "list.jsonl")
    assert refused(capsys, tmp_path, "--prefix", "-", "--workers", 2) == "--workers: only with --documents"
    assert refused(capsys, tmp_path, "--prefix", "-", "--ray", "auto") == "--ray: only with --documents"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there(scheme, capsys, tmp_path, monkeypatch):
    (tmp_path / "list.jsonl").write_text('{"text": "t10"}')
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
    error = refused(capsys, tmp_path, "--documents", tmp_path / "list.jsonl", "--ray", address)
    assert error == f"--ray: {address}: [Errno 111] Connection refused"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refused(capsys, tmp_path, "--documents", tmp_path / "list.jsonl") == error
