"""Index folders are untrusted: whatever lies in one is refused in one line, or gives exactly what was written.

SQUEEZE_FUZZ_EFFORT=50 tries 50 times as many inputs.
"""

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from small_index import (
    HEAD_SIZE,
    NUM_CENTROIDS,
    NUM_HEADS,
    NUM_TOKENS,
    make_clusters,
    make_identity,
    make_tokens,
    write_exact_index,
    write_index,
)
from small_quality import make_quality

import vllm_squeeze
from vllm_squeeze.kernels.reference import attend_prefix
from vllm_squeeze.kernels.tables import ClusterTable, group_means
from vllm_squeeze.offline_tools.inspect import inspect, inspect_index
from vllm_squeeze.prefix_index.calibration import log_threshold
from vllm_squeeze.prefix_index.index_folder import (
    MAX_MANIFEST_BYTES,
    MAX_QUALITY_BYTES,
    IndexWriter,
    LayerClusters,
    PrefixIndex,
    find_indexes,
    index_name,
    layer_file,
    write_quality,
)
from vllm_squeeze.prefix_index.manifest import InvalidIndex, Manifest, content_digest, with_digest
from vllm_squeeze.prefix_index.quality import Quality

EFFORT = int(os.environ.get("SQUEEZE_FUZZ_EFFORT", "1"))
FILES = ("manifest.json", "tokens.safetensors", "layer-0000.safetensors", "layer-0001.safetensors", "quality.json")
LONGEST_MESSAGE = 3000
# What reading a small index may take at once, by Python's and NumPy's count: some times what its JSON may be long.
MEMORY = 4 * MAX_QUALITY_BYTES


def fuzzed(count: int) -> Callable:
    """Settings of a test that tries so many inputs, times the effort."""
    return settings(
        max_examples=count * EFFORT,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def with_quality(folder: Path) -> Path:
    write_quality(folder, make_quality(PrefixIndex.open(folder).manifest))
    return folder


@pytest.fixture(scope="module")
def folder(memory_path):
    """An index that tests may damage, if they restore it."""
    return with_quality(write_index(memory_path / "index", dtype="float16"))


@pytest.fixture(scope="module")
def other(memory_path):
    """An index of the same shapes."""
    return with_quality(write_index(memory_path / "other", seed=1, dtype="float16"))


@pytest.fixture(scope="module")
def exact(memory_path):
    return write_exact_index(memory_path / "exact")


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Puts the files of an index back after they were damaged."""
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        yield
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, content in whole.items():
            (folder / name).write_bytes(content)


# Reading


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that an index gives its readers."""

    manifest: Manifest
    token_ids: np.ndarray
    layers: list[LayerClusters]
    quality: Quality | None

    def assert_equal(self, other: "Contents") -> None:
        assert self.manifest == other.manifest
        assert self.token_ids.dtype == other.token_ids.dtype and np.array_equal(self.token_ids, other.token_ids)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for field, tensor in vars(mine).items():
                assert tensor.dtype == getattr(theirs, field).dtype and torch.equal(tensor, getattr(theirs, field))
        assert self.quality == other.quality


def read(folder: Path) -> Contents:
    index = PrefixIndex.open(folder)
    layers = [index.layer(i) for i in range(len(index.manifest.layers))]
    index.verify()
    return Contents(index.manifest, index.token_ids, layers, index.quality())


def assert_one_line(error: InvalidIndex) -> str:
    message = str(error)
    assert message and message.isprintable() and len(message) < LONGEST_MESSAGE, message[:LONGEST_MESSAGE]
    return message


def read_or_refusal(folder: Path) -> Contents | str:
    """What a folder gives, or one line that names a file of it; ``inspect`` says the same."""
    tracemalloc.start()
    try:
        result = read(folder)
    except InvalidIndex as error:
        result = assert_one_line(error)
        assert any(str(folder / name) in result for name in FILES), result
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY
    out = io.StringIO()
    assert inspect_index(folder, out) == isinstance(result, str) and all(
        map(str.isprintable, out.getvalue().split("\n"))
    )
    event("refused" if isinstance(result, str) else "read")
    return result


# Trees of JSON


@st.composite
def odd_values(draw, tree: Any) -> Any:
    """A value of another type, size or place than a reader expects."""
    kind = draw(st.integers(0, 6))
    if kind == 0:
        return draw(st.sampled_from([None, True, False, "", [], {}, 0, -1, 1, 0.0, -0.0, 0.5, 1.0, "1", [[]], [None]]))
    if kind == 1:
        return draw(st.sampled_from([-1, 1])) * (2 ** draw(st.integers(0, 80)) + draw(st.integers(-1, 1)))
    if kind == 2:
        return draw(st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 1e-300]))
    if kind == 3:
        return draw(st.text(max_size=20) | st.sampled_from(["\ud800", "a\0b", "../../x", "x" * 10_000, "\n\x1b[2J"]))
    if kind == 4:
        return nested(draw(st.integers(1, 200)), draw(st.booleans()))
    if kind == 5:
        return 10 ** draw(st.integers(20, 4000))
    return copy.deepcopy(value_at(tree, draw(st.sampled_from(list(paths(tree))))))


def nested(depth: int, lists: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if lists else {"model": value}
    return value


def paths(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def value_at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutated(draw, tree: Any) -> Any:
    """The tree with one to three values changed, removed, added or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = [path for path in paths(tree) if path]
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        inner = value_at(tree, tuple(above))
        action = draw(st.sampled_from(["change", "change", "nudge", "remove", "add", "exchange"]))
        if action == "remove":
            del inner[key]
        elif action == "add" and isinstance(inner, list):
            inner.insert(key, copy.deepcopy(inner[draw(st.integers(0, len(inner) - 1))]))
        elif action == "add":
            inner[draw(st.sampled_from(["more", "", "\n", "__class__", "file", *map(str, inner)]))] = draw(
                odd_values(tree)
            )
        elif action == "exchange":
            another = draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
            inner[key], inner[another] = inner[another], inner[key]
        elif action == "nudge" and type(inner[key]) in (int, float):
            inner[key] += draw(st.sampled_from([-1, 1] if type(inner[key]) is int else [-1.0, 0.5, -1e-9]))
        else:
            inner[key] = draw(odd_values(tree))
    return tree


@st.composite
def texts(draw, whole: str) -> str:
    """JSON with a digest of its own, most of the time a valid one."""
    body = json.loads(whole)
    digest = body.pop("digest")
    body = draw(mutated(body))
    if type(body) is not dict:
        return json.dumps(body)
    kind = draw(st.sampled_from(["valid", "valid", "valid", "former", "odd", "compact", "twice"]))
    if kind == "valid":
        return with_digest(body)
    if kind == "former":
        return json.dumps({**body, "digest": digest}, indent=1) + "\n"
    if kind == "odd":
        return json.dumps({**body, "digest": draw(odd_values(body))}, indent=1) + "\n"
    if kind == "compact":
        return json.dumps(json.loads(with_digest(body)))
    key = draw(st.sampled_from([*body, "digest"]))
    return with_digest(body).replace("{", "{\n" + f" {json.dumps(key)}: {json.dumps(body.get(key, digest))},", 1)


def assert_manifest_holds(manifest: Manifest, text: str) -> None:
    """It is what the text says, and all that a server works out from it is finite."""
    assert text == with_digest({name: value for name, value in json.loads(text).items() if name != "digest"})
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(json.dumps(dataclasses.asdict(manifest))).items() <= json.loads(text).items()
    assert 1 <= manifest.num_tokens < 2**31 and 0 <= manifest.num_members < manifest.num_tokens
    for layer in manifest.layers:
        assert 0 < manifest.tensor_bytes(layer) < layer.num_bytes <= 2**62
    if not manifest.exact:
        for share in (1e-9, 0.003, 0.3, 1 - 1e-12):
            threshold = np.float32(log_threshold(manifest.thresholds, share))
            assert np.isfinite(threshold) and np.isfinite(threshold * np.float32(1.5))


@pytest.mark.parametrize("kind", ["clustered", "exact"])
@fuzzed(400)
@given(data=st.data())
def test_any_manifest_is_refused_or_valid(folder, exact, kind, data):
    whole = ((folder if kind == "clustered" else exact) / "manifest.json").read_text()
    text = data.draw(texts(whole))
    try:
        manifest = Manifest.from_json(text)
    except InvalidIndex as error:
        assert_one_line(error)
        event("refused")
    else:
        assert_manifest_holds(manifest, text)
        event("read")


@fuzzed(200)
@given(data=st.data())
def test_any_quality_is_refused_or_valid(folder, data):
    text = data.draw(texts((folder / "quality.json").read_text()))
    manifest = PrefixIndex.open(folder).manifest
    try:
        quality = Quality.from_json(text, manifest)
    except InvalidIndex as error:
        assert_one_line(error)
    else:
        assert json.loads(quality.to_json()) == {**json.loads(text), "digest": json.loads(quality.to_json())["digest"]}
        for max_kl in (1e-300, 0.01, 1e300):
            budget = quality.least_budget(max_kl)
            assert budget is None or 0 < budget <= 1
        assert all(0 <= measured.mean_recall <= 1 for measured in quality.budgets)


@pytest.mark.parametrize(
    ("field", "item"),
    [
        ("thresholds", "[1,1]"),
        ("layers", '{"name":"","num_centroids":1,"num_bytes":1,"digest":""}'),
        ("source", '{"":'),
        ("source", "["),
        ("source", "1"),
        ("more", "0"),
    ],
)
def test_a_manifest_as_large_as_may_be_is_refused_within_seconds(folder, field, item):
    with restored(folder):
        text = (folder / "manifest.json").read_text()
        filler = "1" if item == "1" else item if item[-1] in "[:" else f"{item},"
        body = json.loads(text) | {field: "FILLER"}
        room = MAX_MANIFEST_BYTES - len(json.dumps(body)) - 10
        many = (filler * (room // len(filler))).rstrip(",")
        (folder / "manifest.json").write_text(
            json.dumps(body).replace('"FILLER"', f"[{many}]" if filler[-1] == "," else many)
        )
        begun = time.process_time()
        with pytest.raises(InvalidIndex) as error:
            PrefixIndex.open(folder)
        assert time.process_time() - begun < 10
        assert_one_line(error.value)


# Files


def flip(draw, path: Path, folders: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    path.write_bytes(content)


def cut(draw, path: Path, folders: list[Path]) -> None:
    os.truncate(path, draw(st.integers(0, path.stat().st_size - 1)))


def insert(draw, path: Path, folders: list[Path]) -> None:
    content = path.read_bytes()
    place = draw(st.integers(0, len(content)) | st.just(len(content)))
    path.write_bytes(content[:place] + draw(st.binary(min_size=1, max_size=100)) + content[place:])


def remove_part(draw, path: Path, folders: list[Path]) -> None:
    content = path.read_bytes()
    begin, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    path.write_bytes(content[:begin] + content[end:])


def claim_a_header(draw, path: Path, folders: list[Path]) -> None:
    """Its first eight bytes are how long a header safetensors is to read."""
    length = draw(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 9]))
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def grow(draw, path: Path, folders: list[Path]) -> None:
    """Sparse: it costs nothing on disk, and could not be read."""
    os.truncate(path, draw(st.integers(2**20, 2**43)))


def exchange(draw, path: Path, folders: list[Path]) -> None:
    another = draw(st.sampled_from(FILES))
    path.write_bytes((folders[1] / another).read_bytes())


def link(draw, path: Path, folders: list[Path]) -> None:
    target = draw(st.sampled_from([folders[1] / path.name, path, Path("/dev/zero"), Path("missing"), folders[1]]))
    path.unlink()
    path.symlink_to(target)


def put_pipe(draw, path: Path, folders: list[Path]) -> None:
    path.unlink()
    os.mkfifo(path)


def put_folder(draw, path: Path, folders: list[Path]) -> None:
    path.unlink()
    shutil.copytree(folders[1], path)


def put_socket(draw, path: Path, folders: list[Path]) -> None:
    path.unlink()
    os.mknod(path, stat.S_IFSOCK | 0o600)


def remove(draw, path: Path, folders: list[Path]) -> None:
    path.unlink()


DAMAGES = (flip, cut, insert, remove_part, claim_a_header, grow, exchange, link)
DAMAGES += (put_pipe, put_folder, put_socket, remove)


@pytest.mark.timeout(60 * (1 + EFFORT))
@fuzzed(200)
@given(data=st.data())
def test_any_damage_is_refused_or_changes_nothing(folder, other, data):
    whole = read(folder)
    names = data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True))
    with restored(folder):
        for name in names:
            damage = data.draw(st.sampled_from(DAMAGES))
            event(damage.__name__)
            damage(data.draw, folder / name, [folder, other])
        found = read_or_refusal(folder)
        if isinstance(found, Contents):
            # Without that file it is an index that was never measured.
            measured = whole.quality if (folder / "quality.json").exists() else None
            found.assert_equal(dataclasses.replace(whole, quality=measured))


def vouched(folder: Path, number: int, content: bytes, **changes: Any) -> None:
    """Puts other bytes in place of a layer's file, and makes all digests anew, as far as the manifest allows."""
    body = json.loads((folder / "manifest.json").read_text())
    del body["digest"]
    body["layers"][number].update(num_bytes=len(content), digest=content_digest(content), **changes)
    (folder / layer_file(number)).write_bytes(content)
    (folder / "manifest.json").write_text(with_digest(body))
    (folder / "quality.json").unlink()


def with_header(header: bytes, data: bytes, length: int) -> bytes:
    """A safetensors file, with blanks after the header up to a length, if there is room."""
    header = header.ljust(length - 8 - len(data))
    return struct.pack("<Q", len(header)) + header + data


def header_and_data(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def headers(draw, whole: dict[str, Any]) -> bytes:
    """Headers that claim other tensors than there are, some of no elements but huge dimensions."""
    header = draw(mutated(whole))
    if isinstance(header, dict) and draw(st.booleans()):
        sizes = st.lists(st.integers(0, 2**64) | st.sampled_from([0, 2**63 - 1, 2**40]), max_size=4)
        dtype = draw(st.sampled_from(["F4", "F8_E8M0", "F8_E5M2", "BF16", "I32", "C64", "U64", "BOOL", "F6_E2M3"]))
        shape = [0, *draw(sizes)] if draw(st.booleans()) else draw(sizes)
        header["more"] = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
    return json.dumps(header).encode()


@pytest.mark.parametrize("name", ["tokens.safetensors", "layer-0001.safetensors"])
@fuzzed(120)
@given(data=st.data())
def test_any_header_is_refused_or_changes_nothing(folder, name, data):
    """Of a layer with a digest made anew; that of the tokens is of the ids alone."""
    whole = read(folder)
    header, content = header_and_data((folder / name).read_bytes())
    crafted = with_header(data.draw(headers(header)), content, (folder / name).stat().st_size)
    with restored(folder):
        if name == "tokens.safetensors":
            (folder / name).write_bytes(crafted)
        else:
            vouched(folder, 1, crafted)
        found = read_or_refusal(folder)
        if isinstance(found, Contents):
            assert np.array_equal(found.token_ids, whole.token_ids)
            assert_safe(found.layers[1], found.manifest, NUM_CENTROIDS)


# Token ids of which not even an address space of 4 GiB has room for.
HUGE = {"num_tokens": 2**31 - 1, "num_members": 2**31 - 11}


@pytest.mark.parametrize("name", ["tokens.safetensors", "layer-0000.safetensors"])
def test_a_sparse_file_of_the_size_that_a_manifest_claims_is_refused(folder, name):
    """An attacker's manifest may claim any size, and a sparse file has it at no cost."""
    with restored(folder):
        body = json.loads((folder / "manifest.json").read_text())
        del body["digest"]
        if name == "tokens.safetensors":
            body |= HUGE
            size = 4 * HUGE["num_tokens"] + 100
            of_head = 12 * HUGE["num_members"] + NUM_CENTROIDS * (HEAD_SIZE + 20) + 72 * HEAD_SIZE
            layer_bytes = NUM_HEADS * of_head + 100
            for layer in body["layers"]:
                layer["num_bytes"] = layer_bytes
        else:
            body["model"]["head_size"] = 2**16
            body["model"]["num_kv_heads"] = 2**16
            size = 2**16 * (12 * body["num_members"] + NUM_CENTROIDS * (2**16 + 20) + 72 * 2**16) + 100
            for layer in body["layers"]:
                layer["num_bytes"] = size
        (folder / "manifest.json").write_text(with_digest(body))
        (folder / "quality.json").unlink()
        os.truncate(folder / name, size)
        script = (
            "import pathlib, resource, sys, vllm_squeeze.prefix_index.index_folder as i;"
            "resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32));"
            "i.PrefixIndex.open(pathlib.Path(sys.argv[1])).verify()"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(vllm_squeeze.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script, str(folder)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(rf"InvalidIndex: .*{name}: the file has {size} bytes, more than there is memory for", run.stderr)


# Tensors


def assert_safe(clusters: LayerClusters, manifest: Manifest, num_centroids: int) -> None:
    """All that kernels rely on where they read a layer, whose tensors they take without a look."""
    heads, members, model = manifest.model.num_kv_heads, manifest.num_members, manifest.model
    # Shapes and dtypes, from which addresses are made.
    words = model.head_size // 8
    expected = {
        "centroids": (torch.int32, heads, num_centroids, words),
        "centroid_scales": (torch.float32, heads, num_centroids),
        "value_centroids": (torch.int32, heads, num_centroids, words),
        "value_scales": (torch.float32, heads, num_centroids),
        "log_weights": (torch.float32, heads, num_centroids),
        "variances": (torch.float32, heads, num_centroids),
        "sizes": (torch.int32, heads, num_centroids),
        "members": (torch.int32, heads, members),
        "residuals": (torch.int32, heads, members, 2),
        "frame": (torch.float32, heads, 2, model.head_size),
        "directions": (torch.float32, heads, 16, model.head_size),
    }
    assert {name: (tensor.dtype, *tensor.shape) for name, tensor in vars(clusters).items()} == expected
    assert all(tensor.is_contiguous() for tensor in vars(clusters).values())
    for sizes, places in zip(clusters.sizes.tolist(), clusters.members.tolist(), strict=True):
        # Members of a cluster lie in the list, whose room in workspaces is that of all of them.
        assert all(0 <= size <= manifest.parameters.max_cluster for size in sizes) and sum(sizes) == members
        # Members are places in the prefix, whose blocks are looked up; each key counts once, and no sink twice.
        assert sorted(places) == list(range(manifest.parameters.num_sinks, manifest.parameters.num_sinks + members))
        # They ascend, by which members beyond the covered blocks are cut off.
        begin = 0
        for size in sizes:
            assert places[begin : begin + size] == sorted(places[begin : begin + size])
            begin += size
    # Products of queries and centroids stay finite, and in 16 bits probabilities times values' scales do, 8 times as
    # large.
    for scales in clusters.centroid_scales, clusters.value_scales:
        assert (scales >= 0).all() and (scales * 8 <= 2**15).all()
        assert (scales * 8).half().isfinite().all()
    means, spreads = clusters.frame.unbind(1)
    assert (means.abs() <= 2**15).all() and (spreads > 0).all() and (spreads <= 1).all()
    assert (clusters.variances >= 0).all() and clusters.variances.isfinite().all()
    assert (clusters.log_weights.abs() <= 1000).all()
    assert (clusters.directions.abs() <= 2**10).all() and clusters.directions.half().isfinite().all()
    assert_attention_is_finite(clusters, manifest.parameters.num_sinks)


def assert_attention_is_finite(clusters: LayerClusters, num_sinks: int) -> None:
    """By the kernels' formulas, whatever is chosen, also of queries as large as they get in half precision."""
    keys = torch.randn(NUM_TOKENS, HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    starts = clusters.sizes.cumsum(1, dtype=torch.int32) - clusters.sizes
    facts = clusters.log_weights, clusters.variances, starts, clusters.sizes, clusters.sizes.log()
    of_members = clusters.members, clusters.residuals
    of_keys = clusters.centroids, clusters.centroid_scales
    groups = group_means(clusters.mean_keys(), clusters.sizes, clusters.frame)
    of_values = clusters.value_centroids, clusters.value_scales
    of_prefix = clusters.frame[:, None], clusters.directions[:, None]
    table = ClusterTable(*of_keys, *of_values, *facts, *of_members, *groups, *of_prefix)
    query = torch.tensor([1.0, -60000.0])[:, None, None, None].expand(2, NUM_HEADS, 1, HEAD_SIZE)
    for of_dtype, threshold in itertools.product((query, query.half()), (-math.inf, -5.0, math.inf)):
        output, lse, *_ = attend_prefix(
            of_dtype, table, lambda places: (keys[places], keys[places]), threshold, num_sinks, 0.5, rest=True
        )
        assert output.isfinite().all() and output[0].half().isfinite().all() and lse.isfinite().all()


NUMBERS = st.floats(width=32) | st.sampled_from(
    [0.0, -0.0, 1e-45, 1e-3, 1.0, 4096.0, 4097.0, 1e30, 3e38, -1000.0, 1e9, math.nan]
)
INTEGERS = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, NUM_TOKENS + 2)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool]


@st.composite
def crafted_tensors(draw) -> dict[str, torch.Tensor]:
    """A layer's tensors with one to four changes, of which none to all are such that a check has to notice them."""
    tensors = dict(vars(make_clusters(draw(st.integers(0, 3)))))
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(list(tensors)))
        tensor = tensors[name].clone()
        kind = draw(
            st.sampled_from(["value", "value", "value", "row", "dtype", "shape", "permute", "move", "clusters"])
        )
        event(kind)
        if tensor.ndim < 2 or not tensor.numel():
            continue
        if kind == "dtype":
            dtype = draw(st.sampled_from(DTYPES))
            same_size = dtype.itemsize == tensor.itemsize
            tensor = tensor.view(dtype) if same_size and draw(st.booleans()) else tensor.to(dtype)
        elif kind == "shape":
            shapes = [tensor.flatten(), tensor[:1], tensor[:, :-1], tensor[:, :0], tensor.transpose(0, 1), tensor[None]]
            tensor = draw(st.sampled_from([*shapes, torch.cat([tensor, tensor]), tensor.reshape(-1)[0]]))
        elif kind in ("value", "row"):
            value = torch.tensor(draw(NUMBERS if tensor.is_floating_point() else INTEGERS)).to(tensor.dtype)
            place = draw(st.tuples(*(st.integers(0, size - 1) for size in tensor.shape)))
            tensor[place if kind == "value" else place[0]] = value
        elif kind == "permute":
            tensor = tensor[:, draw(st.permutations(range(tensor.shape[1])))]
        elif kind == "move":
            first, second = draw(st.tuples(*[st.integers(0, tensor.shape[1] - 1)] * 2))
            tensor[0, first], tensor[0, second] = tensor[0, second].clone(), tensor[0, first].clone()
        elif "members" in tensors and tensors["members"].ndim == 2:
            # Other clusters that are as good as these, or nearly.
            tensors["members"] = (
                tensors["members"].sort(1).values.flip(1) if draw(st.booleans()) else tensors["members"]
            )
            cuts = draw(st.lists(st.integers(0, 12), min_size=NUM_CENTROIDS, max_size=NUM_CENTROIDS))
            name, tensor = "sizes", torch.tensor([cuts] * NUM_HEADS, dtype=torch.int32)
        tensors[name] = tensor.contiguous()
    return tensors


@fuzzed(300)
@given(tensors=crafted_tensors())
def test_any_tensors_are_refused_or_safe(folder, tensors):
    """An attacker makes digests and sizes anew."""
    size = (folder / layer_file(0)).stat().st_size
    content = safetensors.torch.save(tensors)
    header, data = header_and_data(content)
    with restored(folder):
        vouched(folder, 0, with_header(json.dumps(header).encode(), data, size))
        found = read_or_refusal(folder)
        if isinstance(found, Contents):
            assert_safe(found.layers[0], found.manifest, NUM_CENTROIDS)


@pytest.mark.parametrize(("scale", "value_scale"), [(0.0, 0.0), (4096.0, 4096.0)])
def test_the_largest_numbers_that_are_read_are_safe(folder, scale, value_scale):
    largest = {"centroid_scales": scale, "centroids": 0, "value_scales": value_scale, "value_centroids": 0}
    tensors = dict(vars(make_clusters()))
    tensors |= {name: torch.full_like(tensors[name], value) for name, value in largest.items()}
    tensors["log_weights"] = torch.full_like(tensors["log_weights"], 1000 if scale else -1000)
    tensors["variances"] = torch.full_like(tensors["variances"], 2**30 if scale else 0)
    tensors["frame"] = torch.tensor([-(2.0**15), 1] if scale else [2.0**15, 1e-3])[:, None].expand_as(tensors["frame"])
    tensors["frame"] = tensors["frame"].contiguous()
    tensors["directions"] = torch.full_like(tensors["directions"], 2**10 if scale else -(2**10))
    with restored(folder):
        vouched(folder, 0, safetensors.torch.save(tensors))
        assert_safe(read(folder).layers[0], read(folder).manifest, NUM_CENTROIDS)


# Names


ESCAPES = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "\ud800",
    "\n\x1b[2J",
    "layer-0001.safetensors",
    "~",
    "x" * 300,
]
NAMES = st.text(max_size=40) | st.sampled_from(ESCAPES)


class Opened:
    """Paths that this process opens while it is on."""

    def __init__(self) -> None:
        self.on, self.paths = False, set()
        sys.addaudithook(self._note)

    def _note(self, name: str, arguments: tuple) -> None:
        if self.on and name in ("open", "os.listdir", "os.scandir"):
            self.paths.add(str(arguments[0]))


@pytest.fixture(scope="module")
def opened():
    return Opened()


@fuzzed(150)
@given(data=st.data())
def test_no_text_in_a_manifest_is_taken_as_a_path(folder, opened, data):
    places = [("source",), ("tool_version",), ("layers", 0, "name"), ("layers", 1, "name"), ("tokens_digest",)]
    places += [("layers", 0, "digest"), ("model", "model"), ("model", "weights"), ("model", "rope"), ("created",)]
    with restored(folder):
        body = json.loads((folder / "manifest.json").read_text())
        del body["digest"]
        *above, key = data.draw(st.sampled_from(places))
        value_at(body, tuple(above))[key] = data.draw(NAMES)
        (folder / "manifest.json").write_text(with_digest(body))
        (folder / "quality.json").unlink()
        opened.paths.clear()
        opened.on = True
        try:
            found = read_or_refusal(folder)
        finally:
            opened.on = False
        assert opened.paths <= {str(folder), *(str(folder / name) for name in FILES)}
        if isinstance(found, Contents):
            assert find_indexes(folder.parent) == [folder]


@fuzzed(150)
@given(name=NAMES)
def test_a_writer_stays_in_its_store(memory_path, name):
    """Whatever a document or a folder is called."""
    made = index_name(name, make_tokens(), make_identity())
    for tried in (name, made):
        try:
            writer = IndexWriter(memory_path, tried)
        except ValueError as error:
            assert tried == name and "\n" not in str(error)
        else:
            assert writer.folder.parent == memory_path and writer.folder.name == os.path.basename(writer.folder)
            assert (memory_path / tried).resolve().parent == memory_path.resolve()


@fuzzed(60)
@given(name=st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=30))
def test_an_oddly_named_folder_is_read_or_refused_in_one_line(folder, name):
    with tempfile.TemporaryDirectory(dir=folder.parents[1]) as path:
        if name in (".", ".."):
            return
        odd = shutil.copytree(folder, Path(path) / name)
        read(odd).assert_equal(read(folder))
        os.truncate(odd / "tokens.safetensors", 10)
        with pytest.raises(InvalidIndex) as error:
            read(odd)
        assert_one_line(error.value)
        assert inspect(Path(path), io.StringIO()) == 1
