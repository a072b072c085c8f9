"""``vllm-squeeze index``, asked to end or killed for good: the next one, and every reader, must not notice.

That a writer may be killed at any of its steps is tested where indexes are written.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.conftest import ENGINE_ARGS
from tests.engine.tiny_models import make_model
from vllm_squeeze.offline_tools.index import index
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes
from vllm_squeeze.prefix_index.manifest import IndexParameters

SECONDS = 250
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a model and the text of a prefix."""
    folder = tmp_path_factory.mktemp("killed")
    make_model(folder / "model", "llama")
    (folder / "prefix.txt").write_text(" ".join(f"t{10 + number * number % 400}" for number in range(300)))
    return folder


def start(folder: Path, store: Path, seed: int) -> subprocess.Popen:
    arguments = ["index", "--model", folder / "model", "--prefix", folder / "prefix.txt", "--out", store]
    arguments += ["--seed", seed, "--engine-args", json.dumps(ENGINE_ARGS)]
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_squeeze.cli", *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def end_when(process: subprocess.Popen, reached, sent: signal.Signals) -> int:
    """Sends a process a signal as soon as it has got somewhere; returns its exit code."""
    end = time.monotonic() + SECONDS
    while not reached():
        assert process.poll() is None, f"it ended before: {process.stdout.read()[-2000:]}"
        assert time.monotonic() < end, "it never got there"
        time.sleep(0.0005)
    process.send_signal(sent)
    return process.wait(SECONDS)


def hidden(store: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in store.iterdir() if path.name.startswith("."))


def seeds(store: Path) -> list[int]:
    """The seeds, by which these indexes differ, of all indexes in a store, each read whole."""
    found = [PrefixIndex.open(folder) for folder in find_indexes(store)]
    for whole in found:
        whole.verify()
    return [whole.manifest.parameters.seed for whole in found]


def parts(store: Path, pattern: str) -> list[Path]:
    try:
        return list(store.glob(f".building-parts-*/{pattern}"))
    except FileNotFoundError:
        # A writer is removing what another has left.
        return []


@pytest.mark.long
def test_ended_and_run_again(folder):
    """Ended while keys are clustered, when the first layer's clusters have been written."""
    store = folder / "store"
    process = start(folder, store, seed=1)
    code = end_when(process, lambda: parts(store, "parts/*.safetensors"), signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert hidden(store) == [".lock"]

    process = start(folder, store, seed=1)
    assert end_when(process, lambda: parts(store, "parts/*.safetensors"), signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises(ValueError, match="holds no index"):
        seeds(store)
    assert hidden(store) == [".building", ".lock"]

    index(
        str(folder / "model"), folder / "prefix.txt", None, None, store, IndexParameters(seed=2), ENGINE_ARGS, measured=False
    )  # fmt: skip
    assert seeds(store) == [2]
    assert hidden(store) == [".lock"]
