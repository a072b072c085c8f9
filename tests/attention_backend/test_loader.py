"""What a worker makes of orders to load and to drop indexes, on the only rank."""

import dataclasses
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.attention_backend.world import OPTIONS
from tests.prefix_index.small_index import HEAD_SIZE, LAYER_NAMES, NUM_HEADS, NUM_MEMBERS, write_index
from vllm_squeeze.attention_backend.loader import Loader
from vllm_squeeze.attention_backend.orders import Drop, Load, LoadReport
from vllm_squeeze.attention_backend.placement import Admission, place
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.room import Needs, Room
from vllm_squeeze.prefix_index.index_folder import PrefixIndex

CONFIG = SimpleNamespace(
    device_config=SimpleNamespace(device="cpu"),
    parallel_config=SimpleNamespace(tensor_parallel_size=1),
    model_config=SimpleNamespace(dtype=torch.float32, max_model_len=1024),
)
ROOM = Room(num_slots=2, num_centroids=20, num_members=200, longest_prefix=100, most_centroids=10)


@pytest.fixture
def residency(monkeypatch):
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(Admission, "open_all", lambda self, on_refusal: [])
    monkeypatch.setattr(Room, "of", classmethod(lambda cls, manifests, options, vllm_config: ROOM))
    residency = Residency(CONFIG, dataclasses.replace(OPTIONS, watch=1.0))
    for name in LAYER_NAMES:
        residency.make_table(name, NUM_HEADS, HEAD_SIZE)
    return residency


@pytest.fixture
def order(tmp_path):
    index = PrefixIndex.open(write_index(tmp_path, "contract-0"))
    span = ROOM.find(Needs.of(index.manifest, OPTIONS))
    return Load(1, str(index.folder), index.manifest.digest, place(index, OPTIONS, {0: 8}), span)


def report(loader: Loader) -> LoadReport:
    """The first that comes."""
    end = time.monotonic() + 30
    while (found := loader.take_report()) is None:
        assert time.monotonic() < end, "no report came"
        time.sleep(0.01)
    return found


def test_an_index_is_loaded_and_dropped(residency, order):
    loader = Loader(residency)
    loader.follow(order)
    assert residency.active == {}, "before anyone asked whether it is there"
    assert report(loader).loaded == {1: 1}
    assert residency.active == {0: order.placement} and residency.prefixes.slots[0, 1] == 8
    assert loader.take_report() is None
    loader.follow(Drop(0))
    assert residency.active == {} and not residency.prefixes.slots.any()


@pytest.mark.parametrize("slot", [0, 1])
def test_what_is_loaded_lies_in_its_place(residency, order, slot):
    """Of each layer, not that of another, and nothing else is written."""
    index, span = PrefixIndex.open(Path(order.folder)), order.span._replace(slot=slot, first_member=9)
    tables = [residency._tables[name] for name in LAYER_NAMES]
    for table in tables:
        table.residuals.fill_(-1), table.directions.fill_(torch.nan)
    loader = Loader(residency)
    loader.follow(order._replace(span=span))
    assert report(loader).loaded == {1: 1}
    for number, table in enumerate(tables):
        clusters, there = index.layer(number), slice(9, 9 + NUM_MEMBERS)
        assert torch.equal(table.members[:, there], clusters.members)
        assert torch.equal(table.residuals[:, there], clusters.residuals)
        assert (table.residuals[:, :9] == -1).all() and (table.residuals[:, 9 + NUM_MEMBERS :] == -1).all()
        assert torch.equal(table.directions[:, slot], clusters.directions)
        assert table.directions[:, 1 - slot].isnan().all()
        assert torch.equal(table.frames[:, slot], clusters.frame)


def test_what_was_dropped_before_it_was_loaded_is_never_attended_to(residency, order):
    loader = Loader(residency)
    loader.follow(order)
    loader.follow(Drop(0))
    loader.follow(order._replace(number=2, span=order.span._replace(slot=1)))
    assert report(loader).loaded == {2: 1}
    assert residency.active.keys() == {1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"digest": "another"}, "it was replaced while it was being loaded"), ({"folder": "nowhere"}, "nowhere")],
    ids=["replaced", "gone"],
)
def test_what_cannot_be_loaded_is_told(residency, order, changes, reason):
    loader = Loader(residency)
    loader.follow(order._replace(**changes))
    told = report(loader)
    assert told.loaded == {} and reason in told.failed[1] and "contract-0" in told.failed[1]
    assert residency.active == {}


def test_a_place_is_used_again(residency, order, tmp_path):
    """A smaller index after a larger one leaves nothing of that to choose."""
    loader = Loader(residency)
    loader.follow(order._replace(span=order.span._replace(num_centroids=12)))
    assert report(loader).loaded == {1: 1}
    for name in LAYER_NAMES:
        table = residency._tables[name]
        assert table.sizes[:, 7:12].sum() == 0 and (table.starts[:, 1:12] >= table.starts[:, :11]).all()
        assert table.group_sizes[:, 2:].sum() == 0 and table.group_sizes[:, :2].all()


def test_nothing_is_begun_after_the_end(residency, order, monkeypatch):
    """Neither the next layer, nor the next index."""
    read, reading, go_on = [], threading.Event(), threading.Event()

    def slow(index, name, *_):
        read.append(name)
        reading.set()
        go_on.wait(30)

    monkeypatch.setattr(residency, "_load_layer", slow)
    loader = Loader(residency)
    loader.follow(order)
    loader.follow(order._replace(number=2, span=order.span._replace(slot=1)))
    assert reading.wait(30)
    loader.end()
    go_on.set()
    loader._thread.shutdown()
    assert read == [LAYER_NAMES[0]]
    assert [future.cancelled() for _, future in loader._running.values()] == [False, True]


def test_reports_of_ranks_are_joined():
    first = LoadReport(Counter({1: 1, 2: 1}), seconds={1: 0.5, 2: 2.0})
    second = LoadReport(Counter({1: 1}), failed={2: "no"}, seconds={1: 1.5})
    for joined in (first.aggregate(second), second.aggregate(first)):
        assert (joined.loaded, joined.failed, joined.seconds) == ({1: 2, 2: 1}, {2: "no"}, {1: 1.5, 2: 2.0})
