"""``vllm-squeeze index --documents`` on a real Ray cluster of this machine, whose workers have engines of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.engine.conftest import ENGINE_ARGS
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes

SECONDS = 250
GOOD = ("a.txt", "b.txt", "c.txt", "d.txt")


def start(folder: Path, *options: str) -> subprocess.Popen:
    arguments = [
        "--documents",
        folder / "documents",
        "--out",
        f"file://{folder}/store",
        "--questions",
        folder / "asked",
    ]
    arguments += ["--model", folder / "model", "--engine-args", json.dumps(ENGINE_ARGS), *options]
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_squeeze.cli", "index", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def working(driver: subprocess.Popen) -> list[psutil.Process]:
    """The workers that have a document in hand, by the name that Ray gives their processes."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::DocumentWorker.index"]:
                found.append(process)
        except psutil.Error:
            pass
    return found


def until(driver: subprocess.Popen, reached) -> None:
    end = time.monotonic() + SECONDS
    while not reached():
        assert driver.poll() is None, f"it ended before: {driver.communicate()}"
        assert time.monotonic() < end, "it never got there"
        time.sleep(0.02)


def result(driver: subprocess.Popen) -> tuple[dict[str, int], list[str], str]:
    """The numbers that it prints at its end, the lines of documents that failed, and what it says on the way."""
    out, err = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 1, err
    lines = out.splitlines()
    # Ray may tell before that a worker died.
    lines = lines[lines.index(driver.args[driver.args.index("--out") + 1]) :]
    numbers = {label: int(value) for label, value in (line.split() for line in lines[1:4])}
    return numbers, [line for line in lines if line.startswith("failed: ")], err


@pytest.mark.long
def test_a_worker_is_killed(models, tmp_path):
    (tmp_path / "model").symlink_to(models("llama"))
    (tmp_path / "asked").write_text("t10 t11\nt12")
    (tmp_path / "documents").mkdir()
    for number, name in enumerate(GOOD):
        words = (f"t{10 + (number + place * place) % 400}" for place in range(200))
        (tmp_path / "documents" / name).write_text(" ".join(words))
    (tmp_path / "documents" / "short.txt").write_text("t10")
    failed = "failed: short.txt: 0 tokens; an index needs at least 117"
    store = tmp_path / "store"

    driver = start(tmp_path, "--workers", "2")
    until(driver, lambda: store.exists())  # a first one is done, and others begun
    until(driver, lambda: working(driver))
    killed = working(driver)[0]
    os.kill(killed.pid, signal.SIGKILL)
    numbers, failures, progress = result(driver)
    # it may have put its index there before it was killed
    assert numbers["indexed"] + numbers["skipped"] == 4 and numbers["failed"] == 1
    assert len(failures) == 1 and failures[0].startswith(failed)
    assert "5/5" in progress

    made = [PrefixIndex.open(folder) for folder in find_indexes(store)]
    assert sorted(index.manifest.source for index in made) == list(GOOD)
    for index in made:
        index.verify()
        assert index.manifest.calibration.num_questions == 2

    # Again: only what failed is tried.
    numbers, failures, _ = result(start(tmp_path))
    assert numbers == {"indexed": 0, "skipped": 4, "failed": 1}
    assert len(failures) == 1 and failures[0].startswith(failed)
