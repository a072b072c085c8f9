"""One folder per indexed prefix, in a folder of indexes (the store): how it is read, and how it is published.

    store/contract-3f9a12bc04de/manifest.json
                                tokens.safetensors        token_ids [T]
                                layer-0000.safetensors    the clusters of the manifest's first layer, of all KV heads
                                ...                       (an exact index has no layers)
                                quality.json              what budgets cost, if it was measured
          contract-3f9a12bc04de.pinned                    empty, there if servers are to keep the prefix in memory

An index appears in the store, and is replaced, by rename. A writer that was killed leaves hidden folders behind, which
the next writer removes. Nothing that a file says is taken as a path.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from vllm_squeeze.kernels.tables import LEAST_PACKED, LEAST_SPREAD, NUM_DIRECTIONS, unpacked_keys
from vllm_squeeze.prefix_index.identity import ModelIdentity
from vllm_squeeze.prefix_index.manifest import (
    MAX_HEADER_BYTES,
    MOST_NATS,
    InvalidIndex,
    LayerEntry,
    Manifest,
    content_digest,
)
from vllm_squeeze.prefix_index.quality import Quality

MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.safetensors"
QUALITY_FILE = "quality.json"
LOCK_FILE = "lock"
# A megabyte of JSON takes a second or two to check.
MAX_MANIFEST_BYTES, MAX_QUALITY_BYTES = 2**20, 2**22
LARGEST_ELEMENT = 2.0**15
"""Of a mean key or value, either way: beyond what models have, and below what makes sums in 16 bits, or of logits in
32 bits, infinite."""
LARGEST_SCALE = LARGEST_ELEMENT / -LEAST_PACKED
LARGEST_DIRECTION = 2.0**10
"""Of an element of a direction, either way: beyond what models have, and low enough for products in 16 bits of queries
with directions to stay finite."""


@dataclass(frozen=True, eq=False)
class LayerClusters:
    """The clusters of one layer's keys, of all KV heads.

    Attributes:
        centroids: [H, C, D / 8] int32, the mean key of each cluster, as ``packed_keys``.
        centroid_scales: [H, C] float32, not negative, so that no element is further from the mean of all than
            ``LARGEST_ELEMENT``.
        value_centroids: [H, C, D / 8] int32, the mean value of each cluster, as ``packed``.
        value_scales: [H, C] float32, not negative, so that no element is beyond ``LARGEST_ELEMENT``.
        log_weights: [H, C] float32, natural log of the weight in the choice.
        variances: [H, C] float32, not negative: of the logits of a cluster's keys, over the squared length of the
            scaled query.
        sizes: [H, C] int32, how many members a cluster has, 0 if it is empty.
        members: [H, M] int32, positions of tokens in the prefix, ordered by cluster and ascending inside a cluster.
        residuals: [H, M, NUM_DIRECTIONS / 8] int32, of the members, and
        directions: [H, NUM_DIRECTIONS, D] float32, as in ``ClusterTable``; no element of these is beyond
            ``LARGEST_DIRECTION``.
        frame: [H, 2, D] float32, the ``frame_of`` the mean keys, none of which is beyond ``LARGEST_ELEMENT`` on average.
    """

    centroids: torch.Tensor
    centroid_scales: torch.Tensor
    value_centroids: torch.Tensor
    value_scales: torch.Tensor
    log_weights: torch.Tensor
    variances: torch.Tensor
    sizes: torch.Tensor
    members: torch.Tensor
    residuals: torch.Tensor
    frame: torch.Tensor
    directions: torch.Tensor

    def mean_keys(self) -> torch.Tensor:
        """The mean keys as they are read, [H, C, D] float32."""
        return unpacked_keys(self.centroids, self.centroid_scales, self.frame)


PER_HEAD = frozenset({"members", "residuals", "frame", "directions"})
"""Those of LayerClusters that are of one size whatever the number of clusters."""


@dataclass(frozen=True, eq=False)
class PrefixIndex:
    """An index on disk, with its manifest and tokens read and checked. Layers are read one by one.

    Attributes:
        folder: where it lies.
        manifest: what it was made from and for.
        token_ids: [T] int32, the prefix.
    """

    folder: Path
    manifest: Manifest
    token_ids: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Reads and checks the manifest and the tokens.

        Raises:
            InvalidIndex: a file is missing, damaged or not a plain file, or the index is of a newer format.
        """
        path = folder / MANIFEST_FILE
        content = read_plain_file(path, 1, MAX_MANIFEST_BYTES)
        try:
            manifest = Manifest.from_json(content.decode("ascii"))
        except (UnicodeDecodeError, InvalidIndex) as error:
            raise InvalidIndex(f"{path}: {error}") from None
        return cls(folder, manifest, read_tokens(folder / TOKENS_FILE, manifest))

    def layer(self, i: int) -> LayerClusters:
        """Reads and checks the clusters of the manifest's layer i.

        Raises:
            InvalidIndex: the file is missing, damaged or not a plain file, or holds what no indexer writes.
        """
        entry = self.manifest.layers[i]
        path = self.folder / layer_file(i)
        content = read_plain_file(path, entry.num_bytes, entry.num_bytes)
        if content_digest(content) != entry.digest:
            raise InvalidIndex(f"{path}: damaged, its digest is not the manifest's")
        tensors = read_tensors(safetensors.torch.load, content, path)
        names = [field.name for field in fields(LayerClusters)]
        if sorted(tensors) != sorted(names):
            raise InvalidIndex(f"{path}: the tensors are not {', '.join(names)}")
        clusters = LayerClusters(**tensors)
        try:
            check_clusters(clusters, self.manifest, entry.num_centroids)
        except InvalidIndex as error:
            raise InvalidIndex(f"{path}: {error}") from None
        return clusters

    def quality(self) -> Quality | None:
        """Reads and checks what budgets cost; None if that was not measured.

        Raises:
            InvalidIndex: the file is damaged, not a plain file, or another index's.
        """
        path = self.folder / QUALITY_FILE
        if not os.path.lexists(path):
            return None
        content = read_plain_file(path, 1, MAX_QUALITY_BYTES)
        try:
            return Quality.from_json(content.decode("ascii"), self.manifest)
        except (UnicodeDecodeError, InvalidIndex) as error:
            raise InvalidIndex(f"{path}: {error}") from None

    def verify(self) -> None:
        """Reads and checks all layers, and what budgets cost.

        Raises:
            InvalidIndex: as ``layer`` and ``quality``.
        """
        for i in range(len(self.manifest.layers)):
            self.layer(i)
        self.quality()


def layer_file(i: int) -> str:
    return f"layer-{i:04d}.safetensors"


def read_plain_file(path: Path, smallest: int, largest: int) -> bytes:
    """Reads a file at once, if it is one: no symbolic link, which could lead out of the index, no pipe, no folder.

    Raises:
        InvalidIndex: it is not, cannot be read, or its size in bytes is not what it may be.
    """
    # A pipe that nobody writes to would block open() for ever without O_NONBLOCK.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidIndex(f"{path}: not a plain file")
            if not smallest <= status.st_size <= largest:
                allowed = f"{smallest}" if smallest == largest else f"from {smallest} to {largest}"
                raise InvalidIndex(f"{path}: the file has {status.st_size} bytes, must have {allowed}")
            content = file.read(status.st_size)
    except MemoryError:
        raise InvalidIndex(f"{path}: the file has {status.st_size} bytes, more than there is memory for") from None
    except OSError as error:
        reason = "symbolic links are not followed" if error.errno == errno.ELOOP else error.strerror
        raise InvalidIndex(f"{path}: {reason}") from None
    if len(content) != status.st_size:
        raise InvalidIndex(f"{path}: the file shrank while it was read")
    return content


def read_tensors(load: Callable[[bytes], dict[str, Any]], content: bytes, path: Path) -> dict[str, Any]:
    """The tensors in the content of a file, by name, as a library's ``load`` makes them.

    Raises:
        InvalidIndex: it cannot.
    """
    try:
        return load(content)
    except Exception as error:  # noqa: BLE001 (a header may claim anything, and each library fails in its own ways)
        raise InvalidIndex(f"{path}: not safetensors ({str(error)[:100]!r})") from None


def read_tokens(path: Path, manifest: Manifest) -> np.ndarray:
    """Reads the token ids of an index, [T] int32.

    Raises:
        InvalidIndex: they are not those of the manifest.
    """
    num_bytes = 4 * manifest.num_tokens
    content = read_plain_file(path, num_bytes, num_bytes + MAX_HEADER_BYTES)
    # Unlike the layers, the file has no digest of its own: only the ids do. Of what a header could hold besides, JSON
    # lets pass nothing but white space, and safetensors pads with blanks alone.
    header = content[8 : len(content) - num_bytes]
    tensors = read_tensors(safetensors.numpy.load, content, path)
    token_ids = tensors.get("token_ids")
    if list(tensors) != ["token_ids"] or token_ids.dtype != np.int32 or token_ids.shape != (manifest.num_tokens,):
        raise InvalidIndex(f"{path}: must hold token_ids and nothing else, int32 of shape [{manifest.num_tokens}]")
    if min(header) < ord(" ") or token_ids.min() < 0 or tokens_digest(token_ids) != manifest.tokens_digest:
        raise InvalidIndex(f"{path}: damaged, the digest of token_ids is not the manifest's")
    return token_ids


def check_clusters(clusters: LayerClusters, manifest: Manifest, num_centroids: int) -> None:
    """Checks that a layer's clusters are whole and of the manifest's shapes.

    Raises:
        InvalidIndex: they are not. Names the tensor.
    """
    model, parameters, num_members = manifest.model, manifest.parameters, manifest.num_members
    of_clusters = (model.num_kv_heads, num_centroids)
    expected = {
        "centroids": (torch.int32, (*of_clusters, model.head_size // 8)),
        "centroid_scales": (torch.float32, of_clusters),
        "value_centroids": (torch.int32, (*of_clusters, model.head_size // 8)),
        "value_scales": (torch.float32, of_clusters),
        "log_weights": (torch.float32, of_clusters),
        "variances": (torch.float32, of_clusters),
        "sizes": (torch.int32, of_clusters),
        "members": (torch.int32, (model.num_kv_heads, num_members)),
        "residuals": (torch.int32, (model.num_kv_heads, num_members, NUM_DIRECTIONS // 8)),
        "frame": (torch.float32, (model.num_kv_heads, 2, model.head_size)),
        "directions": (torch.float32, (model.num_kv_heads, NUM_DIRECTIONS, model.head_size)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(clusters, name)
        if tensor.dtype != dtype or tensor.shape != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise InvalidIndex(f"{name} is {found}, must be {dtype} {list(shape)}")
    means, spreads = clusters.frame.unbind(1)
    for name, tensor, least, most in (
        ("centroid_scales", clusters.centroid_scales, 0.0, LARGEST_SCALE),
        ("value_scales", clusters.value_scales, 0.0, LARGEST_SCALE),
        ("log_weights", clusters.log_weights, -MOST_NATS, MOST_NATS),
        ("variances", clusters.variances, 0.0, LARGEST_ELEMENT**2),
        ("means in frame", means, -LARGEST_ELEMENT, LARGEST_ELEMENT),
        ("spreads in frame", spreads, LEAST_SPREAD, 1.0),
        ("directions", clusters.directions, -LARGEST_DIRECTION, LARGEST_DIRECTION),
    ):
        # Both are NaN if any value is; a mask of all values would take 30 times as long.
        lowest, highest = tensor.aminmax()
        if not least <= lowest <= highest <= most:
            raise InvalidIndex(f"{name} must be from {least:g} to {most:g}")

    sizes, members = clusters.sizes.long(), clusters.members
    if sizes.min() < 0 or sizes.max() > parameters.max_cluster:
        raise InvalidIndex(f"sizes must be from 0 to {parameters.max_cluster}, max_cluster")
    if (sizes.sum(1) != num_members).any():
        raise InvalidIndex(f"sizes must add up to {num_members} for each head, num_members")
    first, last = parameters.num_sinks, parameters.num_sinks + num_members - 1
    met = torch.zeros(members.shape, dtype=torch.bool)
    if members.min() < first or members.max() > last or not met.scatter_(1, members.long() - first, True).all():
        raise InvalidIndex(f"members must hold each position from {first} to {last} once for each head")
    begins = torch.zeros(len(members), num_members + 1, dtype=torch.bool).scatter_(1, sizes.cumsum(1) - sizes, True)
    if not (begins[:, 1:-1] | (members[:, 1:] > members[:, :-1])).all():
        raise InvalidIndex("members must ascend inside a cluster")


def find_indexes(path: Path) -> list[Path]:
    """``list_indexes`` where there has to be one.

    Raises:
        ValueError: there is no such folder, or no index in it.
    """
    if not (folders := list_indexes(path)):
        raise ValueError(f"{path} holds no index")
    return folders


def list_indexes(path: Path) -> list[Path]:
    """The folders of the indexes at a path: the path itself, or the folders in it, by name and without hidden ones.

    Raises:
        ValueError: there is no such folder.
    """
    if holds_index(path):
        return [path]
    try:
        return sorted(folder for folder in path.iterdir() if not folder.name.startswith(".") and holds_index(folder))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def check_store(store: Path) -> None:
    """Raises ValueError if a path is no folder of indexes, nor free for one."""
    if store.exists() and not store.is_dir():
        raise ValueError(f"{store} is not a folder")
    if holds_index(store):
        raise ValueError(f"{store} is an index itself, must be a folder of indexes")


def holds_index(folder: Path) -> bool:
    return os.path.lexists(folder / MANIFEST_FILE)


def tokens_digest(token_ids: Sequence[int] | np.ndarray) -> str:
    """The digest of token ids [T], as int32 in little-endian order."""
    return content_digest(as_token_ids(token_ids).tobytes())


def as_token_ids(token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids [T] as little-endian int32.

    Raises:
        ValueError: there are none, or one is not a whole number from 0 to 2**31 - 1.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or ids.min() < 0 or ids.max() >= 2**31:
        raise ValueError("token_ids must be a list of whole numbers from 0 to 2**31 - 1, at least one")
    return ids.astype("<i4")


def index_name(source: str, token_ids: Sequence[int] | np.ndarray, model: ModelIdentity) -> str:
    """The folder name of an index: "contract-3f9a12bc04de" for contract.txt.

    The digits stand for the tokens and the model, so that two prefixes, or one prefix indexed for two models, do not
    take each other's place, and the same prefix of the same model always gets the same name.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", Path(source).stem.lower())[:48].strip("-") or "prefix"
    key = json.dumps([tokens_digest(token_ids), model.compared()])
    return f"{slug}-{content_digest(key.encode())[:12]}"


class IndexWriter:
    """Writes an index into a hidden folder of the store, and publishes it under its name, or removes it.

        with IndexWriter(store, name) as writer:
            writer.write_tokens(token_ids)
            layers = [writer.write_layer(i, layer_name, clusters) for ...]
            writer.publish(Manifest(..., layers=tuple(layers)))

    Killed at any point, it leaves the former index or the new one, and never a part of one. (Between the two renames
    that replace an index there is none; the next writer puts the former one back.) Several may write one prefix at a
    time: each publishes a whole index, and the last one stays.

    Attributes:
        folder: the hidden folder.
    """

    def __init__(self, store: Path, name: str) -> None:
        """Names the index. Nothing is written before ``with``.

        Raises:
            ValueError: the name is no plain folder name, or the store is no folder, or an index itself.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
            raise ValueError(f"name is {name!r}, must be letters, digits, dots, dashes and underscores")
        check_store(store)
        self.store = store
        self.name = name
        self.folder = store / f".building-{name}-{secrets.token_hex(8)}"

    def __enter__(self) -> Self:
        self.store.mkdir(parents=True, exist_ok=True)
        with self._locked_store():
            self._remove_leftovers()
            self.folder.mkdir()
            self._lock = open(self.folder / LOCK_FILE, "wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._lock.close()

    def write_tokens(self, token_ids: Sequence[int] | np.ndarray) -> None:
        """Writes the token ids of the prefix, [T]."""
        self._write(TOKENS_FILE, safetensors.numpy.save({"token_ids": as_token_ids(token_ids)}))

    def write_layer(self, i: int, name: str, clusters: LayerClusters) -> LayerEntry:
        """Writes the clusters of one layer.

        Args:
            i: the layer's place in the manifest.
            name: the layer's name in the model.
            clusters: of the prefix's keys in this layer, on any device.

        Returns:
            the layer's entry in the manifest.
        """
        tensors = {field.name: getattr(clusters, field.name).cpu().contiguous() for field in fields(clusters)}
        content = safetensors.torch.save(tensors)
        self._write(layer_file(i), content)
        return LayerEntry(name, clusters.centroids.shape[1], len(content), content_digest(content))

    def copy(self, index: PrefixIndex) -> None:
        """Writes the tokens, clusters and figures of another index, as they lie there.

        Raises:
            InvalidIndex: a file is missing, or has another size than its manifest says.
        """
        self.write_tokens(index.token_ids)
        for i, layer in enumerate(index.manifest.layers):
            name = layer_file(i)
            self._write(name, read_plain_file(index.folder / name, layer.num_bytes, layer.num_bytes))
        if (quality := index.quality()) is not None:
            self._write(QUALITY_FILE, quality.to_json().encode())

    def publish(self, manifest: Manifest) -> Path:
        """Checks what was written by reading it, and gives the index its name, in place of a former one.

        Returns:
            the folder of the index.

        Raises:
            InvalidIndex: a file is missing or is not what the manifest says.
            OSError: the disk is full, or refuses; a former index stays.
        """
        self._write(MANIFEST_FILE, manifest.to_json().encode())
        PrefixIndex.open(self.folder).verify()
        sync_folder(self.folder)
        published = self.store / self.name
        replaced = self.store / f".replaced-{self.name}-{secrets.token_hex(8)}"
        with self._locked_store():
            (self.folder / LOCK_FILE).unlink()
            try:
                if os.path.lexists(published):
                    published.rename(replaced)
                self.folder.rename(published)
            finally:
                if not os.path.lexists(published) and os.path.lexists(replaced):
                    replaced.rename(published)
            sync_folder(self.store)
            remove_index(replaced)
        return published

    def _write(self, name: str, content: bytes) -> None:
        write_file(self.folder / name, content)

    @contextmanager
    def _locked_store(self) -> Iterator[None]:
        """Keeps other writers from making, replacing and removing folders of the store for a moment."""
        with open(self.store / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _remove_leftovers(self) -> None:
        """Removes what killed writers left, and puts back an index that one had moved aside without a successor."""
        for replaced in self.store.glob(".replaced-*"):
            published = self.store / replaced.name.removeprefix(".replaced-").rpartition("-")[0]
            if holds_index(replaced) and not os.path.lexists(published):
                replaced.rename(published)
            else:
                remove_index(replaced)
        for building in self.store.glob(".building-*"):
            if not is_locked(building / LOCK_FILE):
                remove_index(building)


def pin_file(folder: Path) -> Path:
    """The file beside an index that says its prefix is pinned. It stays where the index is replaced."""
    return folder.with_name(f"{folder.name}.pinned")


def is_pinned(folder: Path) -> bool:
    """Whether the prefix of an index is to stay in the KV cache once it is there."""
    return pin_file(folder).exists()


def write_quality(folder: Path, quality: Quality) -> None:
    """Adds to a published index what its budgets cost, whole or not at all."""
    unfinished = folder / f".{QUALITY_FILE}-{secrets.token_hex(8)}"
    try:
        write_file(unfinished, quality.to_json().encode())
        unfinished.rename(folder / QUALITY_FILE)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(folder)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, and waits until its content is on disk.

    Raises:
        OSError: the disk is full, or refuses. Names the file, as the system does not once it is open.
    """
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file. A killed process holds none."""
    try:
        with open(path, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def remove_index(folder: Path) -> None:
    """Removes what a path names, if anything. The manifest goes first: a part of an index never passes for one."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
