import dataclasses
import fcntl
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import writer_process
from hypothesis import given, settings
from hypothesis import strategies as st
from small_index import (
    LAYER_NAMES,
    NUM_TOKENS,
    make_clusters,
    make_identity,
    make_manifest,
    make_tokens,
    write_exact_index,
    write_index,
)

from vllm_squeeze.prefix_index.index_folder import (
    IndexWriter,
    LayerClusters,
    PrefixIndex,
    find_indexes,
    index_name,
    tokens_digest,
)
from vllm_squeeze.prefix_index.manifest import (
    FORMAT_VERSION,
    InvalidIndex,
    LayerEntry,
    Manifest,
    content_digest,
    with_digest,
)

NAME = "contract-000000000000"
FILES = ("manifest.json", "tokens.safetensors", "layer-0000.safetensors", "layer-0001.safetensors")
LAYER_FILE = FILES[2]


@pytest.fixture
def folder(tmp_path):
    return write_index(tmp_path / "store")


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """An index that tests may damage, if they restore it."""
    return write_index(tmp_path_factory.mktemp("store"))


def open_whole(folder):
    index = PrefixIndex.open(folder)
    index.verify()
    return index


def assert_refused(folder, *words):
    """The index cannot be opened and read, for one reason, given in one line with all of these words."""
    with pytest.raises(InvalidIndex) as error:
        open_whole(folder)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(tmp_path, dtype):
    folder = write_index(tmp_path, dtype=dtype)
    index = PrefixIndex.open(folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert index.token_ids.dtype == np.int32 and np.array_equal(index.token_ids, make_tokens())
    assert [layer.name for layer in index.manifest.layers] == list(LAYER_NAMES)
    for i in range(2):
        for field, expected in vars(make_clusters(i)).items():
            read = getattr(index.layer(i), field)
            assert read.dtype == expected.dtype and torch.equal(read, expected)
    index.verify()


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_another_format_is_named(folder, version):
    """Whatever else its files hold."""
    body = json.loads((folder / "manifest.json").read_text())
    del body["digest"]
    (folder / "manifest.json").write_text(with_digest({**body, "format_version": version}))
    assert_refused(folder, "manifest.json: made by a", f"format {version}; this one reads format {FORMAT_VERSION}")


def test_an_exact_index_holds_tokens_alone(tmp_path):
    index = open_whole(write_exact_index(tmp_path))
    assert sorted(file.name for file in index.folder.iterdir()) == sorted(FILES[:2])
    assert index.manifest.exact and np.array_equal(index.token_ids, make_tokens())


def test_an_exact_index_and_a_clustered_one_take_each_others_place(folder):
    for write, files in ((write_exact_index, 2), (write_index, 4)):
        assert write(folder.parent, NAME) == folder
        assert len(list(open_whole(folder).folder.iterdir())) == files
        assert visible(folder.parent) == [NAME]


def test_an_index_may_be_read_by_whoever_may_read_other_files(tmp_path, folder):
    (tmp_path / "ordinary").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


# Damage


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_anywhere_is_noticed(shared_folder, data):
    path = shared_folder / data.draw(st.sampled_from(FILES))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(flipped)
        assert_refused(shared_folder, path.name)
    finally:
        path.write_bytes(whole)


def test_every_other_blank_in_the_header_of_the_tokens_is_noticed(folder):
    """Only the ids have a digest, and JSON takes any white space for padding."""
    path = folder / FILES[1]
    whole = path.read_bytes()
    blanks = [i for i in range(8, len(whole) - 4 * NUM_TOKENS) if whole[i] == ord(" ")]
    assert blanks
    for position in blanks:
        for blank in b"\t\n\r":
            path.write_bytes(whole[:position] + bytes([blank]) + whole[position + 1 :])
            assert_refused(folder, path.name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99, 1.01], ids=["emptied", "half", "end cut", "longer"])
def test_a_file_of_another_length_is_noticed(folder, name, keep):
    path = folder / name
    size = path.stat().st_size
    os.truncate(path, size + 1 if keep > 1 else int(size * keep))
    assert_refused(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_an_absurd_size_is_refused_unread(folder, name):
    """A sparse file costs nothing on disk; to read it would end in MemoryError."""
    os.truncate(folder / name, 2**42)
    assert_refused(folder, name, "4398046511104 bytes")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, name, "No such file")


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_index_is_not_followed(tmp_path, folder, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert_refused(folder, name, "symbolic links are not followed")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    assert_refused(folder, name)


def test_files_of_two_indexes_are_not_mixed(tmp_path, folder):
    other = write_index(tmp_path / "other", seed=1)
    for name in FILES[1:]:
        (folder / name).rename(tmp_path / "kept")
        shutil.copy(other / name, folder / name)
        assert_refused(folder, name, "digest")
        (tmp_path / "kept").rename(folder / name)
    open_whole(folder)


def replace_first_layer(folder, content, name=LAYER_NAMES[0]):
    """Puts other bytes in place of the first layer's file, and has the manifest vouch for them."""
    manifest = PrefixIndex.open(folder).manifest
    entry = LayerEntry(name, manifest.layers[0].num_centroids, len(content), content_digest(content))
    manifest = dataclasses.replace(manifest, layers=(entry, *manifest.layers[1:]))
    (folder / "manifest.json").write_text(manifest.to_json())
    (folder / LAYER_FILE).write_bytes(content)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "layer-0001.safetensors", "a\0b", "\ud800", "\n"])
def test_a_layers_name_is_not_a_path(folder, name):
    replace_first_layer(folder, (folder / LAYER_FILE).read_bytes(), name)
    assert torch.equal(open_whole(folder).layer(0).members, make_clusters(0).members)


class MakeFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_loaded(tmp_path, folder):
    size = (folder / LAYER_FILE).stat().st_size
    replace_first_layer(folder, pickle.dumps(MakeFolder(tmp_path / "made")).ljust(size, b"\0"))
    assert_refused(folder, LAYER_FILE, "not safetensors")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("sizes"), "the tensors are not "),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "the tensors are not "),
        (lambda tensors: tensors.update(members=tensors["members"].float()), "members is torch.float32"),
        (lambda tensors: tensors.update(members=tensors["members"].T.contiguous()), "members is torch.int32 [37, 2]"),
        (lambda tensors: tensors.update(centroid_scales=tensors["sizes"].clone()), "centroid_scales is torch.int32"),
        (lambda tensors: tensors.update(centroids=tensors["centroids"][:1].clone()), "centroids is torch.int32 [1, 7"),
        (lambda tensors: [tensors.pop(name) for name in ("residuals", "directions")], "the tensors are not "),
        (lambda tensors: tensors.update(residuals=tensors["residuals"].float()), "residuals is torch.float32"),
        (lambda tensors: tensors.update(residuals=tensors["residuals"].long()), "residuals is torch.int64"),
        (
            lambda tensors: tensors.update(residuals=tensors["residuals"][..., :1].clone()),
            "residuals is torch.int32 [2, 37, 1], must be torch.int32 [2, 37, 2]",
        ),
        (
            lambda tensors: tensors.update(residuals=tensors["residuals"][:, 1:].clone()),
            "residuals is torch.int32 [2, 36",
        ),
        (lambda tensors: tensors.update(directions=tensors["directions"].half()), "directions is torch.float16"),
        (
            lambda tensors: tensors.update(directions=tensors["directions"][:, :8].clone()),
            "directions is torch.float32 [2, 8, 8], must be torch.float32 [2, 16, 8]",
        ),
        (
            lambda tensors: tensors.update(directions=tensors["directions"].mT.contiguous()),
            "directions is torch.float32 [2, 8, 16]",
        ),
    ],
    ids=[
        "one missing",
        "one more",
        "float members",
        "transposed members",
        "int scales",
        "one head",
        "as in format 7",
        "float residuals",
        "long residuals",
        "half of residuals",
        "residuals of fewer",
        "half directions",
        "fewer directions",
        "transposed directions",
    ],
)
def test_other_tensors_than_the_manifests_are_refused(folder, change, message):
    tensors = safetensors.torch.load_file(folder / LAYER_FILE)
    change(tensors)
    needed = (folder / LAYER_FILE).stat().st_size
    metadata = {"padding": "x" * max(0, needed - len(safetensors.torch.save(tensors)))}
    replace_first_layer(folder, safetensors.torch.save(tensors, metadata))
    assert_refused(folder, LAYER_FILE, message)


def set_value(field, place, value):
    def change(clusters: LayerClusters) -> None:
        getattr(clusters, field)[place] = value

    return change


def swap_members(clusters: LayerClusters) -> None:
    clusters.members[0, :2] = clusters.members[0, [1, 0]]


def move_member_to_next_cluster(clusters: LayerClusters) -> None:
    clusters.sizes[1, 1:3] += torch.tensor([-1, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("members", (0, 0), 3), "members must hold each position from 4 to 40 once"),
        (set_value("members", (1, 36), 41), "members must hold each position from 4 to 40 once"),
        (set_value("members", (1, 36), -1), "members must hold each position from 4 to 40 once"),
        (set_value("members", (1, 0), 2**31 - 1), "members must hold each position from 4 to 40 once"),
        (lambda clusters: clusters.members[:, 1].copy_(clusters.members[:, 0]), "members must hold each position"),
        (swap_members, "members must ascend inside a cluster"),
        (set_value("sizes", (0, 2), -1), "sizes must be from 0 to 12"),
        (set_value("sizes", (0, 0), 13), "sizes must be from 0 to 12"),
        (move_member_to_next_cluster, "sizes must add up to 37 for each head"),
        (set_value("centroid_scales", (1, 2), float("nan")), "centroid_scales must be from 0 to 4096"),
        (set_value("value_scales", (0, 0), float("inf")), "value_scales must be from 0 to 4096"),
        (set_value("value_scales", (0, 6), -1.0), "value_scales must be from 0 to 4096"),
        (set_value("centroid_scales", (0, 3), 3e38), "centroid_scales must be from 0 to 4096"),
        (set_value("variances", (1, 0), -0.5), "variances must be from 0 to "),
        (set_value("log_weights", (1, 0), float("-inf")), "log_weights must be from -1000 to 1000"),
        (set_value("frame", (1, 0, 3), float("nan")), "means in frame must be from -32768 to 32768"),
        (set_value("frame", (0, 1, 7), 0.0), "spreads in frame must be from 0.001 to 1"),
        (set_value("directions", (1, 15, 7), float("nan")), "directions must be from -1024 to 1024"),
        (set_value("directions", (0, 0, 0), float("inf")), "directions must be from -1024 to 1024"),
        (set_value("directions", (1, 3, 2), -1025.0), "directions must be from -1024 to 1024"),
    ],
    ids=[
        "sink",
        "observed",
        "negative",
        "far",
        "twice",
        "order",
        "negative size",
        "large",
        "sum",
        "nan",
        "inf",
        "negative scale",
        "huge scale",
        "negative variance",
        "no weight",
        "nan mean",
        "no spread",
        "nan direction",
        "endless direction",
        "long direction",
    ],
)
def test_clusters_that_no_indexer_writes_are_neither_read_nor_published(tmp_path, folder, change, message):
    clusters = make_clusters()
    change(clusters)
    with pytest.raises(InvalidIndex, match=message):
        write_index(tmp_path / "other", layers=[make_clusters(), clusters])
    assert visible(tmp_path / "other") == []
    replace_first_layer(folder, safetensors.torch.save(vars(clusters)))
    assert_refused(folder, LAYER_FILE, message)


# The store


def visible(store: Path) -> list[str]:
    """What the store holds besides its lock."""
    return sorted(path.name for path in store.iterdir() if path.name != ".lock")


def test_find_indexes(tmp_path, folder):
    store = folder.parent
    other = write_index(store, "annual-report-000000000000")
    (store / "unrelated").mkdir()
    shutil.copytree(folder, store / ".hidden")
    assert find_indexes(store) == [other, folder]
    assert find_indexes(folder) == [folder]


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "No such file"), ("file", "Not a directory"), ("empty", "holds no index")]
)
def test_a_path_without_an_index_is_named(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path / name}.*{message}"):
        find_indexes(tmp_path / name)


def test_index_name():
    tokens, model = make_tokens(), make_identity()
    name = index_name("/data/My Contract (v2).txt", tokens, model)
    assert name.rpartition("-")[0] == "my-contract-v2" and len(name.rpartition("-")[2]) == 12
    assert index_name("/data/My Contract (v2).txt", list(tokens), make_identity(model="other name")) == name
    assert index_name("契約.txt", tokens, model).startswith("prefix-")
    assert len(index_name("x" * 1000, tokens, model)) < 64
    others = [(tokens[:-1], model), (tokens[::-1], model), (tokens, make_identity(weights="11ee"))]
    others.append((tokens, make_identity(dtype="bfloat16")))
    assert len({name, *(index_name("My Contract (v2)", *other) for other in others)}) == 5


@pytest.mark.parametrize("tokens", [[], [[1]], [1.0], [-1], [2**31], [2**70], ["1"]], ids=str)
def test_token_ids_that_are_none_are_refused(tokens):
    with pytest.raises(ValueError, match="token_ids must be"):
        tokens_digest(tokens)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, ">i4"], ids=str)
def test_the_digest_of_token_ids_depends_on_the_numbers_alone(dtype):
    assert tokens_digest(np.array([1, 2, 70_000], dtype)) == tokens_digest([1, 2, 70_000])


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a b", "x" * 200], ids=repr)
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="^name is "):
        IndexWriter(tmp_path, name)


def test_a_store_that_is_an_index_or_a_file_is_refused(folder):
    with pytest.raises(ValueError, match="is an index itself"):
        IndexWriter(folder, NAME)
    with pytest.raises(ValueError, match="is not a folder"):
        IndexWriter(folder / LAYER_FILE, NAME)


def test_leaving_without_publishing_removes_everything(tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexWriter(tmp_path / "new" / "store", NAME) as writer:
        writer.write_tokens(make_tokens())
        raise KeyboardInterrupt
    assert visible(tmp_path / "new" / "store") == []


def test_an_index_replaces_the_former_one(folder):
    assert write_index(folder.parent, seed=1) == folder
    assert np.array_equal(open_whole(folder).token_ids, make_tokens(1))
    assert visible(folder.parent) == [NAME]


def test_an_index_replaces_a_link_and_not_what_it_leads_to(tmp_path, folder):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / NAME).symlink_to(folder)
    write_index(tmp_path / "links", seed=1)
    assert np.array_equal(open_whole(tmp_path / "links" / NAME).token_ids, make_tokens(1))
    assert np.array_equal(open_whole(folder).token_ids, make_tokens(0))
    assert visible(tmp_path / "links") == [NAME]


@pytest.mark.parametrize("missing", ["tokens", "layer"])
def test_a_part_of_an_index_is_not_published(folder, missing):
    with IndexWriter(folder.parent, NAME) as writer:
        entries = [writer.write_layer(i, name, make_clusters(i)) for i, name in enumerate(LAYER_NAMES)]
        if missing == "layer":
            writer.write_tokens(make_tokens())
            (writer.folder / LAYER_FILE).unlink()
        with pytest.raises(InvalidIndex, match="No such file"):
            writer.publish(make_manifest(make_tokens(), entries))
    open_whole(folder)
    assert visible(folder.parent) == [NAME]


def test_a_writer_at_work_is_left_alone(tmp_path):
    """The second writer starts, publishes and ends while the first is at work on the same prefix."""
    with IndexWriter(tmp_path, NAME) as writer:
        writer.write_tokens(make_tokens())
        entries = [writer.write_layer(i, name, make_clusters(i)) for i, name in enumerate(LAYER_NAMES)]
        write_index(tmp_path, seed=1)
        assert np.array_equal(open_whole(tmp_path / NAME).token_ids, make_tokens(1))
        writer.publish(make_manifest(make_tokens(), entries))
    assert np.array_equal(open_whole(tmp_path / NAME).token_ids, make_tokens(0))
    assert visible(tmp_path) == [NAME]


@pytest.mark.parametrize("step", ["start", "publish"])
def test_folders_are_made_and_renamed_by_one_writer_at_a_time(tmp_path, step):
    """Or one could clear away what another has just made and not yet locked, or two could move one index aside."""
    with IndexWriter(tmp_path, NAME) as writer, ThreadPoolExecutor() as pool:
        writer.write_tokens(make_tokens())
        entries = [writer.write_layer(i, name, make_clusters(i)) for i, name in enumerate(LAYER_NAMES)]
        with open(tmp_path / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = visible(tmp_path)
            if step == "start":
                step_taken = pool.submit(write_index, tmp_path, "other-000000000000")
            else:
                step_taken = pool.submit(writer.publish, make_manifest(make_tokens(), entries))
            with pytest.raises(TimeoutError):
                step_taken.result(timeout=0.5)
            assert visible(tmp_path) == before
        open_whole(step_taken.result())


def seed_of_index(store: Path) -> int | None:
    """Which of ``write_index``'s contents the store's only index has, whole; None if there is no index."""
    try:
        (folder,) = find_indexes(store)
    except ValueError:
        return None
    index = open_whole(folder)
    (seed,) = (seed for seed in range(4) if tokens_digest(make_tokens(seed)) == index.manifest.tokens_digest)
    for i in range(2):
        assert torch.equal(index.layer(i).centroids, make_clusters(10 * seed + i).centroids)
    return seed


def start_writers(mode: str, *paths: Path) -> subprocess.Popen:
    root = Path(writer_process.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, writer_process.__file__, mode, *paths], env={**os.environ, "PYTHONPATH": str(root)}
    )


@pytest.fixture(scope="module")
def killed(memory_path):
    """By what the store held at the start: the stores that writers left which were killed at their n-th step.

    In "leftovers" they were killed while clearing up, or later, after one that had died between its two renames.
    """
    roots = {name: memory_path / name for name in ("nothing", "an index", "leftovers")}
    for name, root in roots.items():
        (root / "start").mkdir(parents=True)
        if name != "nothing":
            write_index(root / "start", seed=0)
    start = roots["leftovers"] / "start"
    (start / NAME).rename(start / f".replaced-{NAME}-01")
    (start / f".building-{NAME}-02").mkdir()
    (start / f".building-{NAME}-02" / "lock").touch()
    assert start_writers("kill", *roots.values()).wait() == 0
    return {name: [path for path in root.iterdir() if path.name != "start"] for name, root in roots.items()}


@pytest.mark.parametrize(
    ("start", "former"), [("nothing", None), ("an index", 0), ("leftovers", 0)], ids=["nothing", "index", "leftovers"]
)
def test_a_writer_killed_at_any_step_leaves_a_whole_index_or_none(killed, start, former):
    """The next reader, the next writer that gives up and the next writer that succeeds all find a store that works."""
    found = set()
    for store in killed[start]:
        seed = seed_of_index(store)
        found.add(seed)
        assert seed in (former, 1) or list(store.glob(".replaced-*")), store
        with IndexWriter(store, NAME):
            pass
        assert seed_of_index(store) == (former if seed is None else seed), store
        assert visible(store) in ([], [NAME]), store
        write_index(store, seed=2)
        assert seed_of_index(store) == 2
    assert len(killed[start]) > 50
    assert found == {None, former, 1}


def test_writers_of_one_prefix_at_a_time_each_publish_a_whole_index(memory_path):
    """A reader meanwhile finds a whole index, or an error it can report; at the end there is one index."""
    store = memory_path / "race"
    store.mkdir()
    writers = start_writers("race", store)
    seen = set()
    while writers.poll() is None:
        try:
            seen.add(seed_of_index(store))
        except InvalidIndex:
            continue
    assert writers.returncode == 0
    assert seen - {None} and seen <= {None, 1, 2}
    assert seed_of_index(store) in (1, 2)
    assert visible(store) == [NAME]


def test_the_manifest_of_a_published_index_is_the_one_given(tmp_path):
    folder = write_index(tmp_path, source="contract.txt", created="2026-05-06T07:08:09Z")
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    assert manifest == PrefixIndex.open(folder).manifest
    assert manifest.created == "2026-05-06T07:08:09Z"
