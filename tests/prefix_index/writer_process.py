"""Writers in processes of their own: ``writer_process.py (kill | stop | refuse) ROOT...`` and ``... race STORE``."""

import errno
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch
from small_index import write_index

from vllm_squeeze.prefix_index import index_folder
from vllm_squeeze.prefix_index.manifest import InvalidIndex

NUM_ROUNDS = 15
CHANGING_NOTHING = {"open", "layer", "verify", "read_plain_file", "read_tokens", "check_clusters", "__init__"}
CHANGING_NOTHING |= {"holds_index", "as_token_ids", "layer_file"}
# Exit code of a writer that was interrupted.
INTERRUPTED = 3


def kill() -> None:
    """Ends the writer for good."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Asks the writer to end, in a process that cleans up when asked, as those of vLLM do."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    os.kill(os.getpid(), signal.SIGTERM)


def refuse() -> None:
    """Lets one operation fail."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt_every_step(interrupt: Callable[[], None], root: Path) -> None:
    """Interrupts one writer at each step that it takes; leaves the store of the n-th in ROOT/n. ROOT/start is copied."""
    for step in count():
        store = root / f"{step}"
        shutil.copytree(root / "start", store)
        child = os.fork()
        if child == 0:
            steps = interrupt_at(step, interrupt, store)
            write_or_give_up(store)
            os._exit(INTERRUPTED if next(steps) > step else 0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == INTERRUPTED


def write_or_give_up(store: Path) -> None:
    """Ends the process if another error comes out than that of the interruption."""
    try:
        write_index(store, seed=1)
    except (SystemExit, OSError, InvalidIndex):
        pass
    except BaseException:  # noqa: BLE001 (nothing may leave the child)
        traceback.print_exc()
        os._exit(1)


def interrupt_at(step: int, interrupt: Callable[[], None], store: Path) -> Iterator[int]:
    """Interrupts this process before its step-th line of the writer's code or file operation in the store.

    Returns:
        the counter of steps.
    """
    steps = count()

    def take_step() -> None:
        if next(steps) == step:
            interrupt()

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
    return steps


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
    # what is slow the first time would be so in each child
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder))
    interrupts = {function.__name__: partial(interrupt_every_step, function) for function in (kill, stop, refuse)}
    for path in sys.argv[2:]:
        {**interrupts, "race": race}[sys.argv[1]](Path(path))
