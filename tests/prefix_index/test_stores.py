"""Indexes at URLs: whole or not there, whatever stops an upload."""

import re
import tempfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.prefix_index.small_index import write_index
from tests.prefix_index.small_quality import make_quality
from vllm_squeeze.prefix_index.index_folder import MANIFEST_FILE, PrefixIndex, find_indexes, write_quality
from vllm_squeeze.prefix_index.stores import check_out, find_manifest, place_in, store_at


class Disk(LocalFileSystem):
    """Local files under another protocol, which may stop at the n-th file."""

    protocol = "disk"
    left = 99

    def put_file(self, *args, **kwargs):
        Disk.left -= 1
        if Disk.left < 0:
            raise OSError("the line is cut")
        super().put_file(*args, **kwargs)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    fsspec.register_implementation("disk", Disk, clobber=True)
    monkeypatch.setattr(Disk, "left", 99)
    return f"disk://{tmp_path}/there"


def put(out, tmp_path, seed: int = 0) -> Path:
    """Puts an index somewhere; returns where it would be on this disk."""
    with store_at(out) as store:
        index = write_index(store, seed=seed)
        place = place_in(out, index)
    assert str(place) == f"{out}/{index.name}"
    return tmp_path / "there" / index.name


def test_a_folder_is_written_in_place(tmp_path):
    index = put(tmp_path / "there", tmp_path)
    assert find_indexes(tmp_path / "there") == [index]
    assert find_manifest(tmp_path / "there", index.name) == PrefixIndex.open(index).manifest


def test_an_upload_is_a_whole_index(disk, tmp_path):
    index = put(disk, tmp_path)
    PrefixIndex.open(index).verify()
    assert find_manifest(disk, index.name) == PrefixIndex.open(index).manifest
    assert not list((tmp_path / "there").glob(".*"))


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("files", range(4))
def test_an_upload_that_stops_is_no_index(disk, tmp_path, monkeypatch, files, replaced):
    if replaced:
        put(disk, tmp_path)
    monkeypatch.setattr(Disk, "left", files)
    with pytest.raises(OSError, match="the line is cut"):
        put(disk, tmp_path)
    (index,) = (tmp_path / "there").iterdir()
    assert len(list(index.iterdir())) == files
    assert find_manifest(disk, index.name) is None
    with pytest.raises(ValueError, match="holds no index"):
        find_indexes(tmp_path / "there")
    # The next one makes it whole.
    monkeypatch.setattr(Disk, "left", 99)
    PrefixIndex.open(put(disk, tmp_path)).verify()


@pytest.mark.parametrize("keep", [False, True])
def test_what_cannot_be_uploaded_is_kept(disk, tmp_path, monkeypatch, keep):
    monkeypatch.setattr(Disk, "left", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = r"; it is in (/\S+), to be copied from there$" if keep else "$"
    with pytest.raises(
        OSError, match="^--out: disk://.*: the index could not be uploaded: the line is cut" + kept
    ) as no:
        with store_at(disk, keep) as store:
            write_index(store)
    assert store.exists() == keep
    if keep:
        assert re.search(kept, str(no.value)).group(1) == str(store)
        PrefixIndex.open(find_indexes(store)[0]).verify()


def test_nothing_of_a_former_index_stays(disk, tmp_path):
    index = put(disk, tmp_path)
    write_quality(index, make_quality(PrefixIndex.open(index).manifest))
    assert find_manifest(disk, index.name, needs_quality=True)
    put(disk, tmp_path)
    assert PrefixIndex.open(index).quality() is None
    assert find_manifest(disk, index.name) and not find_manifest(disk, index.name, needs_quality=True)


def cut_short(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [Path.unlink, cut_short])
@pytest.mark.parametrize("file", [MANIFEST_FILE, "tokens.safetensors", "layer-0001.safetensors"])
def test_an_index_that_lacks_something_is_not_there(tmp_path, file, damage):
    index = put(tmp_path / "there", tmp_path)
    damage(index / file)
    assert find_manifest(tmp_path / "there", index.name) is None


def test_where_no_index_can_be_put(disk, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="^--out: nowhere://a: .*nowhere"):
        check_out("nowhere://a")
    monkeypatch.setattr(Disk, "exists", lambda self, path: self.info(f"{path}/unplugged"))
    with pytest.raises(ValueError, match=f"^--out: {disk} cannot be reached: .*unplugged"):
        check_out(disk)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        check_out(str(tmp_path / "file"))
    check_out(str(tmp_path / "new"))


def test_nothing_is_uploaded_where_the_making_fails(disk, tmp_path):
    with pytest.raises(RuntimeError), store_at(disk) as store:
        write_index(store)
        raise RuntimeError
    assert not (tmp_path / "there").exists()
