"""Looks for indexes that appear in folders, are replaced, or disappear, in a thread of its own."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.prefix_index.index_folder import MANIFEST_FILE, QUALITY_FILE, PrefixIndex, is_pinned, list_indexes
from vllm_squeeze.prefix_index.manifest import InvalidIndex


class Seen(NamedTuple):
    """What there is of an index now.

    Attributes:
        folder: of the index.
        index: that lies there, read whole; None if there is none, or one that is refused.
        pinned: whether its prefix is to stay in the KV cache.
        reason: why it is refused.
    """

    folder: Path
    index: PrefixIndex | None
    pinned: bool = False
    reason: str | None = None


class Watcher:
    """Reads each index once it appears or changes, so that the one who asks never waits for a disk.

    Args:
        folders: of indexes, or single indexes.
        seconds: between two looks.
        known: the indexes that were there at the start, which are not told of.
        open_index: opens an index, or raises InvalidIndex if it is not to be served.

    Attributes:
        seen: what changed since it was last taken, in order.
    """

    def __init__(
        self,
        folders: Iterable[Path],
        seconds: float,
        known: Iterable[Path],
        open_index: Callable[[Path], PrefixIndex],
    ):
        self.seen: SimpleQueue[Seen] = SimpleQueue()
        self._folders, self._seconds, self._open = list(folders), seconds, open_index
        self._known = {folder: (_signature(folder), is_pinned(folder)) for folder in known}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="squeeze-watcher", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stops looking."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._look()
            except Exception:  # noqa: BLE001 (a server goes on with the indexes it has)
                logger.exception("squeeze: looking for indexes failed; trying again in %g s.", self._seconds)

    def _look(self) -> None:
        found = []
        for path in self._folders:
            try:
                found += [folder.resolve() for folder in list_indexes(path)]
            except ValueError:
                # gone, or on a disk that does not answer: those known are asked for one by one
                continue
        for folder in dict.fromkeys([*found, *self._known]):
            state = _signature(folder), is_pinned(folder)
            if state != self._known.get(folder):
                self._tell(folder, *state)

    def _tell(self, folder: Path, signature: tuple[int, ...] | None, pinned: bool) -> None:
        if signature is None:
            del self._known[folder]
            self.seen.put(Seen(folder, None))
            return
        self._known[folder] = signature, pinned
        try:
            index = self._open(folder)
            index.verify()
        except InvalidIndex as error:
            self.seen.put(Seen(folder, None, reason=str(error)))
        else:
            self.seen.put(Seen(folder, index, pinned))


def _signature(folder: Path) -> tuple[int, ...] | None:
    """What changes when an index is replaced; None if there is none."""
    signature: tuple[int, ...] = ()
    # what budgets cost is written last, some time after the rest
    for path in (folder / MANIFEST_FILE, folder / QUALITY_FILE):
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            break
        signature += stat.st_ino, stat.st_mtime_ns, stat.st_size
    return signature or None
