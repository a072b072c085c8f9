"""Writers in processes of their own: ``writer_process.py kill ROOT...`` and ``writer_process.py race STORE``."""

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

import torch
from small_index import write_index

from vllm_squeeze.prefix_index import index_folder

NUM_ROUNDS = 15
CHANGING_NOTHING = {"open", "layer", "verify", "read_plain_file", "read_tokens", "check_clusters", "__init__"}
CHANGING_NOTHING |= {"holds_index", "as_token_ids", "layer_file"}


def kill_at_every_step(root: Path) -> None:
    """Kills one writer at each step that it takes; leaves the store of the n-th in ROOT/n. ROOT/start is copied."""
    for step in count():
        store = root / f"{step}"
        shutil.copytree(root / "start", store)
        child = os.fork()
        if child == 0:
            kill_at(step, store)
            write_index(store, seed=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return


def kill_at(step: int, store: Path) -> None:
    """Has SIGKILL end this process before its step-th line of the writer's code or file operation in the store."""
    steps = count()

    def take_step() -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_file_operation(event: str, arguments: tuple) -> None:
        if event.startswith(("os.", "shutil.")) and str(arguments[0]).startswith(str(store)):
            take_step()

    def trace(frame, event, _):
        if frame.f_code.co_filename != index_folder.__file__ or frame.f_code.co_name in CHANGING_NOTHING:
            return None
        if event == "line":
            take_step()
        return trace

    sys.addaudithook(on_file_operation)
    sys.settrace(trace)


def race(store: Path) -> None:
    """Two writers publish one prefix over and over, at a time, with contents of seed 1 and of seed 2."""
    children = []
    for seed in (1, 2):
        children.append(os.fork())
        if children[-1] == 0:
            for _ in range(NUM_ROUNDS):
                write_index(store, seed=seed)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[2:]:
        {"kill": kill_at_every_step, "race": race}[sys.argv[1]](Path(path))
