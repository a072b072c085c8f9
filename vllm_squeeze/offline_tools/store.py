"""The indexes in a folder that servers watch: ``vllm-squeeze list``, ``add``, ``remove``, ``pin`` and ``unpin``.

None of them needs vLLM, a GPU, or a server that runs: a server sees what is in the folder.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple, TextIO

from vllm_squeeze.offline_tools.server import Server
from vllm_squeeze.prefix_index.index_folder import (
    IndexWriter,
    PrefixIndex,
    find_indexes,
    holds_index,
    is_pinned,
    list_indexes,
    pin_file,
    remove_index,
)
from vllm_squeeze.prefix_index.manifest import InvalidIndex, printable


class Line(NamedTuple):
    """What ``list`` says of an index."""

    name: str
    tokens: str
    kind: str
    pinned: str
    state: str


HEADINGS = Line("index", "tokens", "kind", "pinned", "on the server")


def list_store(store: Path, server: Server | None = None, out: TextIO = sys.stdout) -> int:
    """Prints a line on each index in a folder, and what a server that watches it makes of it.

    Args:
        store: folder of indexes.
        server: whose metrics tell; None: what servers make of them is not asked.
        out: where to print.

    Returns:
        the exit code: 1 if an index cannot be used, else 0.

    Raises:
        ValueError: there is no such folder.
        OSError: the server cannot be reached.
    """
    states = None if server is None else server.index_states()
    lines, damaged = [HEADINGS], 0
    for folder in list_indexes(store):
        state = "" if states is None else states.get(folder.name, "not served")
        try:
            manifest = PrefixIndex.open(folder).manifest
        except InvalidIndex as error:
            damaged += 1
            lines.append(Line(folder.name, "", str(error), "", state))
            continue
        kind = "exact" if manifest.exact else f"{len(manifest.layers)} layers"
        lines.append(Line(folder.name, str(manifest.num_tokens), kind, "pinned" if is_pinned(folder) else "", state))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(
            printable("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()), file=out
        )
    return 1 if damaged else 0


def add_to_store(index: Path, store: Path) -> list[Path]:
    """Copies an index, or each index in a folder, into another folder, whole or not at all.

    Returns:
        the folders of the copies. One of the same name is replaced.

    Raises:
        ValueError: an index is damaged, or there is none; the ones before it were copied.
        OSError: the disk is full, or refuses.
    """
    added = []
    for folder in find_indexes(index):
        opened = PrefixIndex.open(folder.resolve())
        with IndexWriter(store, opened.folder.name) as writer:
            writer.copy(opened)
            added.append(writer.publish(opened.manifest))
    return added


def remove_from_store(name: str, store: Path) -> None:
    """Removes an index, and its pin. Servers that watch the folder serve its prefix densely from then on.

    Raises:
        ValueError: there is no such index.
    """
    folder = named(name, store)
    pin_file(folder).unlink(missing_ok=True)
    remove_index(folder)


def pin_in_store(name: str, store: Path, pinned: bool) -> None:
    """Has servers that watch the folder keep the prefix of an index in their KV cache once it is there, or no longer.

    Raises:
        ValueError: there is no such index.
    """
    file = pin_file(named(name, store))
    if pinned:
        file.touch()
    else:
        file.unlink(missing_ok=True)


def named(name: str, store: Path) -> Path:
    """The folder of an index in a store.

    Raises:
        ValueError: there is none of this name, which has to be a plain one.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and holds_index(store / name):
        return store / name
    known = ", ".join(folder.name for folder in list_indexes(store)) or "none"
    raise ValueError(f"{name!r} is not an index in {store}; there are: {known}")
