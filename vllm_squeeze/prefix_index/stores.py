"""Where indexes are put: a folder of them, or a URL as fsspec takes it, "s3://bucket/indexes".

A folder is written in place. What goes to a URL is made in a temporary folder, and its manifest is uploaded last: an
index without one is none to any reader, and a part of a manifest is no manifest.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from vllm_squeeze.prefix_index.index_folder import (
    MANIFEST_FILE,
    QUALITY_FILE,
    TOKENS_FILE,
    check_store,
    find_indexes,
    layer_file,
)
from vllm_squeeze.prefix_index.manifest import InvalidIndex, Manifest


def is_url(out: Path | str) -> bool:
    return isinstance(out, str) and "://" in out


def check_out(out: Path | str) -> None:
    """Checks that indexes may be put somewhere, as far as can be told without writing.

    Raises:
        ValueError: it is no folder of indexes, or a URL that cannot be reached, whose protocol is unknown or lacks its
            package.
    """
    if not is_url(out):
        check_store(Path(out))
        return
    system, path = file_system(out)
    try:
        system.exists(path)
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"--out: {out} cannot be reached: {error}") from error


def file_system(out: Path | str) -> tuple[Any, str]:
    """fsspec's file system of a folder or a URL, and the path in it.

    Raises:
        ValueError: the protocol is unknown, or its package is not installed.
    """
    try:
        system, path = url_to_fs(str(out))
    except (ValueError, ImportError) as error:
        raise ValueError(f"--out: {out}: {error}") from None
    return system, path.rstrip("/")


@contextmanager
def store_at(out: Path | str, keep: bool = False) -> Iterator[Path]:
    """The folder of indexes to write into: the one given; or a temporary one, whose indexes are then uploaded.

    Args:
        out: folder or URL.
        keep: whether the temporary folder stays if they cannot be uploaded.

    Raises:
        ValueError: nothing can be put there, see ``check_out``.
        OSError: they could not be uploaded; it says where they are, if they were kept.
    """
    if not is_url(out):
        yield Path(out)
        return
    check_out(out)
    folder, left = Path(tempfile.mkdtemp(prefix="vllm-squeeze-")), False
    try:
        yield folder
        left = keep
        try:
            for index in find_indexes(folder):
                upload(index, out)
        except Exception as error:  # each file system has errors of its own
            where = f"; it is in {folder}, to be copied from there" if left else ""
            raise OSError(f"--out: {out}: the index could not be uploaded: {error}{where}") from error
        left = False
    finally:
        if not left:
            shutil.rmtree(folder)


def place_in(out: Path | str, folder: Path) -> Path | str:
    """Where an index is, or will be, that was made in a folder of ``store_at``."""
    return f"{out.rstrip('/')}/{folder.name}" if is_url(out) else folder


def upload(index: Path, url: str) -> None:
    """Copies an index to a URL, in place of a former one of its name."""
    system, root = file_system(url)
    target = f"{root}/{index.name}"
    if system.exists(f"{target}/{MANIFEST_FILE}"):
        system.rm_file(f"{target}/{MANIFEST_FILE}")
    if system.exists(target):
        system.rm(target, recursive=True)
    system.makedirs(target, exist_ok=True)
    for file in sorted(index.iterdir(), key=lambda file: file.name == MANIFEST_FILE):
        system.put_file(str(file), f"{target}/{file.name}")


def find_manifest(out: Path | str, name: str, needs_quality: bool = False) -> Manifest | None:
    """The manifest of an index that is whole, going by the sizes of its files.

    Args:
        out: folder of indexes, or URL.
        name: of the index.
        needs_quality: whether what budgets cost belongs to it.

    Returns:
        None if there is no such index.
    """
    system, root = file_system(out)
    folder = f"{root}/{name}"
    try:
        manifest = Manifest.from_json(system.cat_file(f"{folder}/{MANIFEST_FILE}").decode("ascii"))
        sizes = {file["name"].rpartition("/")[2]: file["size"] for file in system.ls(folder, detail=True)}
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, InvalidIndex):
        return None
    whole = (
        all(sizes.get(layer_file(i)) == layer.num_bytes for i, layer in enumerate(manifest.layers))
        and sizes.get(TOKENS_FILE, 0) > 4 * manifest.num_tokens
        and (QUALITY_FILE in sizes or not needs_quality)
    )
    return manifest if whole else None
