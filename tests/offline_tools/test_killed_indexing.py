"""``vllm-squeeze index``, killed for good at several points: the next one, and every reader, must not notice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.tiny_models import make_model
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes

# Runs the command; killed before the n-th renaming of a folder in the store, where n is given.
COMMAND = """
import os, signal, sys
from vllm_squeeze.cli import main
renamings, store = iter(range(99)), sys.argv[sys.argv.index("--out") + 1]
def before(event, arguments):
    if event == "os.rename" and str(arguments[0]).startswith(store) and next(renamings) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(before)
sys.exit(main(sys.argv[2:]))
"""
NEVER = -1
SECONDS = 250
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a model and the text of a prefix."""
    folder = tmp_path_factory.mktemp("killed")
    make_model(folder / "model", "llama")
    (folder / "prefix.txt").write_text(" ".join(f"t{10 + number * number % 400}" for number in range(300)))
    return folder


def start(folder: Path, store: Path, seed: int, renaming: int = NEVER) -> subprocess.Popen:
    arguments = ["index", "--model", folder / "model", "--prefix", folder / "prefix.txt", "--out", store]
    arguments += ["--seed", seed, "--engine-args", '{"dtype": "float32", "gpu_memory_utilization": 0.1}']
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, [renaming, *arguments])],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def kill_when(process: subprocess.Popen, reached) -> None:
    """Kills a process as soon as it has got somewhere."""
    end = time.monotonic() + SECONDS
    while not reached():
        assert process.poll() is None, f"it ended before: {process.stdout.read()[-2000:]}"
        assert time.monotonic() < end, "it never got there"
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def hidden(store: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in store.iterdir() if path.name.startswith("."))


def seeds(store: Path) -> list[int]:
    """The seeds, by which these indexes differ, of all indexes in a store, each read whole."""
    indexes = [PrefixIndex.open(folder) for folder in find_indexes(store)]
    for index in indexes:
        index.verify()
    return [index.manifest.parameters.seed for index in indexes]


def parts(store: Path, pattern: str) -> list[Path]:
    try:
        return list(store.glob(f".building-parts-*/{pattern}"))
    except FileNotFoundError:
        # A writer is removing what another has left.
        return []


def test_killed_again_and_again(folder):
    """Each kill finds what the one before has left. A first index is there from the middle on."""
    store = folder / "store"

    # While keys are clustered: the first layer's clusters have been written.
    process = start(folder, store, seed=1)
    kill_when(process, lambda: parts(store, "parts/*.safetensors"))
    with pytest.raises(ValueError, match="holds no index"):
        seeds(store)
    assert hidden(store) == [".building", ".lock"]

    # Just before the index gets its name.
    assert start(folder, store, seed=2, renaming=0).wait(SECONDS) == -signal.SIGKILL
    with pytest.raises(ValueError, match="holds no index"):
        seeds(store)
    assert len(parts(store, "parts")) == 1, "the leftovers of the first were not removed"

    # Not at all.
    process = start(folder, store, seed=3)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert seeds(store) == [3]
    assert hidden(store) == [".lock"]

    # Between moving the former index aside and giving the new one its name.
    assert start(folder, store, seed=4, renaming=1).wait(SECONDS) == -signal.SIGKILL
    assert [name for name in hidden(store) if name != ".building"] == [".lock", ".replaced"]

    process = start(folder, store, seed=5)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert seeds(store) == [5]
    assert hidden(store) == [".lock"]
