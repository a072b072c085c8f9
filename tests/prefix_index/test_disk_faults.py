"""A disk that is full, may not be written, or goes away: one clear line, and the index that was there stays."""

import errno
import io
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from small_index import make_tokens, write_index
from small_quality import make_quality
from test_index_folder import NAME, open_whole, seed_of_index, start_writers, visible

from vllm_squeeze.offline_tools.inspect import inspect_index
from vllm_squeeze.prefix_index import index_folder
from vllm_squeeze.prefix_index.index_folder import IndexWriter, PrefixIndex, write_quality
from vllm_squeeze.prefix_index.manifest import InvalidIndex


@pytest.fixture
def folder(tmp_path):
    return write_index(tmp_path / "store")


def assert_untouched(folder: Path) -> None:
    assert seed_of_index(folder.parent) == 0
    assert visible(folder.parent) == [NAME]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("mode", ["stop", "refuse"])
def test_a_writer_that_gives_up_at_any_step_leaves_the_former_index_or_the_new_one(memory_path, mode):
    """Visible at once, not only after the next writer has cleared up. Of what else is left nothing passes for one."""
    root = memory_path / mode
    (root / "start").mkdir(parents=True)
    write_index(root / "start")
    assert start_writers(mode, root).wait() == 0
    stores = [path for path in root.iterdir() if path.name != "start"]
    found = set()
    for store in stores:
        found.add(seed_of_index(store))
        assert found <= {0, 1}, store
        with IndexWriter(store, NAME):
            pass
        assert visible(store) == [NAME], store
    assert len(stores) > 50 and found == {0, 1}


def as_on_a_disk_with_room_for(size: int, action) -> str:
    """The error of an action in a process whose files may be of so many bytes; empty if there is none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            action()
        except BaseException as error:  # noqa: BLE001 (nothing may leave the child)
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        message = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return message


@pytest.mark.parametrize(("size", "file"), [(0, "tokens"), (200, "tokens"), (500, "layer-0000"), (1 << 20, "")])
def test_a_file_that_has_no_room(folder, size, file):
    message = as_on_a_disk_with_room_for(size, lambda: write_index(folder.parent, seed=1))
    assert message.startswith("OSError: [Errno 27]") == bool(file) and f"/{file}" in message + "/"
    assert "\n" not in message
    if file:
        assert_untouched(folder)
    else:
        assert seed_of_index(folder.parent) == 1


@pytest.mark.parametrize("call", range(6))
def test_a_disk_that_turns_out_to_be_full(folder, monkeypatch, call):
    """Which many file systems find out as late as when they are asked to write it down."""
    calls, fsync = iter(range(99)), os.fsync

    def refusing(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(index_folder.os, "fsync", refusing)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_index(folder.parent, seed=1)
    assert "\n" not in str(error.value)
    if call < 4:
        # Of a file, which is named: the fifth is of the folder, the sixth of the store, with the new index in place.
        assert ".building-" in str(error.value)
    if call < 5:
        assert_untouched(folder)
    else:
        assert seed_of_index(folder.parent) == 1


@pytest.mark.parametrize("size", [0, 300])
def test_no_room_for_what_budgets_cost(folder, size):
    quality = make_quality(PrefixIndex.open(folder).manifest)
    message = as_on_a_disk_with_room_for(size, lambda: write_quality(folder, quality))
    assert message.startswith("OSError: [Errno 27]") and "quality.json" in message
    assert_untouched(folder)
    assert open_whole(folder).quality() is None


def test_a_folder_that_may_not_be_written(folder):
    """As a user whom the system does not let, since it lets root."""

    def write() -> None:
        os.chdir(folder.parents[1])
        if os.getuid() == 0:
            os.setuid(65534)
        write_index(Path(folder.parent.name), seed=1)

    before = sorted(folder.parent.iterdir())
    folder.parent.chmod(0o555)
    try:
        message = as_on_a_disk_with_room_for(1 << 20, write)
    finally:
        folder.parent.chmod(0o755)
    assert message.startswith("PermissionError: [Errno 13]") and folder.parent.name in message and "\n" not in message
    assert sorted(folder.parent.iterdir()) == before
    assert seed_of_index(folder.parent) == 0


def test_a_folder_that_disappears_after_it_was_opened(folder):
    write_quality(folder, make_quality(PrefixIndex.open(folder).manifest))
    index = PrefixIndex.open(folder)
    shutil.rmtree(folder)
    for read in (lambda: index.layer(0), index.verify):
        with pytest.raises(InvalidIndex, match=r"^.*layer-0000.safetensors: No such file or directory$"):
            read()
    assert index.quality() is None
    assert (index.token_ids == make_tokens()).all()


def test_a_folder_that_disappears_while_it_is_inspected(folder, monkeypatch):
    opened = PrefixIndex.open(folder)
    shutil.rmtree(folder)
    monkeypatch.setattr(PrefixIndex, "open", lambda _: opened)
    out = io.StringIO()
    assert inspect_index(folder, out) == 1
    assert out.getvalue().count("\n") == 1 and "No such file or directory" in out.getvalue()
