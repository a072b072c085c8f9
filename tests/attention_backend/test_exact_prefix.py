"""An index without clusters: where its prefix lies in the KV cache, and in the tables that the kernels read."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.attention_backend.world import OPTIONS
from tests.prefix_index.small_index import HEAD_SIZE, LAYER_NAMES, NUM_HEADS, write_exact_index, write_index
from vllm_squeeze.attention_backend.placement import Admission, device_bytes, place
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.attention_backend.room import VARIANT_SLOTS
from vllm_squeeze.attention_backend.variants import VariantSlot
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import InvalidIndex

CONFIG = SimpleNamespace(
    device_config=SimpleNamespace(device="cpu"),
    parallel_config=SimpleNamespace(tensor_parallel_size=1),
    model_config=SimpleNamespace(dtype=torch.float32, max_model_len=1024),
)


def kv_cache(block_size: int) -> SimpleNamespace:
    """vLLM's KVCacheConfig of one group of full attention."""
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=NUM_HEADS, head_size=HEAD_SIZE, dtype=torch.float32)
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])


@pytest.fixture
def exact(tmp_path):
    """An index of 47 tokens."""
    return PrefixIndex.open(write_exact_index(tmp_path, "exact-0"))


@pytest.fixture
def clustered(tmp_path):
    return PrefixIndex.open(write_index(tmp_path, "clustered-0"))


@pytest.fixture
def reside(monkeypatch):
    """Makes the tables of opened indexes, on the only rank."""
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_world_size", lambda: 1)

    def make(*indexes: PrefixIndex, mode: str = OPTIONS.mode) -> Residency:
        monkeypatch.setattr(Admission, "open_all", lambda self, on_refusal: list(indexes))
        options = SimpleNamespace(**{**vars(OPTIONS), "indexes": list(indexes), "mode": mode})
        return Residency(CONFIG, options)

    return make


def test_prompts_have_a_budget_of_their_own(clustered, exact):
    """Whatever that of a request is; but where all keys are attended to."""
    options = dataclasses.replace(OPTIONS, prefill=0.95)
    placement = place(clustered, options, {0: 1})
    assert placement.budget == 1 and 0 < placement.prompt_share == placement.cost.kept_share(0.95) < 1
    assert placement.at_budget(0.97).prompt_share == placement.prompt_share
    assert placement.attended_exactly().prompt_share is place(exact, options, {0: 1}).prompt_share is None
    assert place(clustered, OPTIONS, {0: 1}).prompt_share is None
    with pytest.raises(
        InvalidIndex, match=r"^clustered-0: squeeze.prefill: 0.01 is less than the 0\.\d+ that centroids"
    ):
        place(clustered, dataclasses.replace(OPTIONS, prefill=0.01), {0: 1})


@pytest.mark.parametrize(("block_sizes", "covered"), [({0: 16}, 32), ({0: 4, 2: 8}, 40), ({1: 1}, 47)], ids=str)
def test_whole_blocks_without_an_observation_window(exact, block_sizes, covered):
    placement = place(exact, OPTIONS, block_sizes)
    assert placement.prefix_lens == dict.fromkeys(block_sizes, covered)
    assert placement.num_sinks == placement.covered == covered
    assert placement.log_threshold == math.inf


@pytest.mark.parametrize("budget", [1e-6, 1.0])
def test_a_dense_pass_is_read_at_any_budget(exact, budget):
    options = SimpleNamespace(**{**vars(OPTIONS), "budget": budget})
    assert place(exact, options, {0: 16}).cost.budget_used(0) == 1.0


@pytest.mark.parametrize("block_sizes", [{0: 64}, {0: 16, 1: 64}, {}], ids=str)
def test_less_than_a_block_is_refused(exact, block_sizes):
    with pytest.raises(InvalidIndex, match=r"^exact-0: the prefix has 47 tokens, too few to squeeze: blocks hold \["):
        place(exact, OPTIONS, block_sizes)


@pytest.mark.parametrize("block_sizes", [{0: 24}, {0: 16, 2: 24}], ids=str)
def test_blocks_that_the_kernels_do_not_take_are_refused(exact, block_sizes):
    with pytest.raises(InvalidIndex, match=r"^exact-0: blocks hold 24 tokens, which is not a power of two$"):
        place(exact, OPTIONS, block_sizes)


def test_it_takes_no_memory_of_the_device(exact):
    assert device_bytes(exact.manifest, OPTIONS, CONFIG) == 0


def test_alone_it_has_empty_tables_of_every_layer(exact, reside):
    residency = reside(exact)
    for name in ("any.layer", "another.layer"):
        table = residency.make_table(name, NUM_HEADS, HEAD_SIZE)
        assert table.centroids.shape == (NUM_HEADS, 0, HEAD_SIZE // 8) and table.members.shape == (NUM_HEADS, 0)
    residency.load_all(kv_cache(16))
    assert residency.active.keys() == {0} and residency.room.most_centroids == 0
    assert residency.prefixes.slots.tolist() == [[0, 0, 32, 0]]
    assert residency.prefixes.log_threshold.tolist() == [math.inf]


def test_beside_clusters_it_has_none(exact, clustered, reside):
    residency = reside(clustered, exact, clustered)
    for name in LAYER_NAMES:
        assert residency.make_table(name, NUM_HEADS, HEAD_SIZE).centroids.shape[1] == 2 * 8
    residency.load_all(kv_cache(8))
    assert residency.prefixes.slots[:3].tolist() == [[0, 8, 4, 0], [0, 0, 40, 0], [8, 8, 4, 0]]
    assert residency.prefixes.frames[:3].tolist() == [0, 1, 2]
    assert not residency.prefixes.slots[3:].any() and len(residency.prefixes.slots) == 3 + VARIANT_SLOTS


def test_a_clustered_prefix_is_attended_to_exactly_for_a_while(exact, clustered, reside):
    residency = reside(clustered, exact, clustered)
    residency.make_table(LAYER_NAMES[0], NUM_HEADS, HEAD_SIZE)
    residency.load_all(kv_cache(8))
    residency.drop(2)
    choosing = [[0, 8, 4, 0], [0, 0, 40, 0], [0, 0, 0, 0]]
    exactly = [[0, 0, 40, 0], [0, 0, 40, 0], [0, 0, 0, 0]]
    for slots, written in (({0}, exactly), ({0, 1, 2}, exactly), ({1}, choosing), ({0}, exactly), (set(), choosing)):
        residency.set_step(frozenset(slots), ())
        assert residency.prefixes.slots[:3].tolist() == written


def test_slots_for_settings_of_requests(exact, clustered, reside):
    """They have their prefix's clusters, and go with it."""
    residency = reside(clustered, exact, clustered)
    residency.make_table(LAYER_NAMES[0], NUM_HEADS, HEAD_SIZE)
    residency.load_all(kv_cache(8))
    first, third = VariantSlot(3, 0, -5.0), VariantSlot(5, 2, -math.inf)
    nothing = [0, 0, 0, 0]
    residency.set_step(frozenset({5}), (first, third))
    assert residency.prefixes.slots[3:6].tolist() == [[0, 8, 4, 0], nothing, [8, 0, 40, 0]]
    assert residency.prefixes.log_threshold[[3, 5]].tolist() == [-5.0, -math.inf]
    assert residency.prefixes.frames[[3, 5]].tolist() == [0, 2]
    assert residency.costs[5] is residency.active[2].cost
    residency.set_step(frozenset(), (first._replace(prefix=2, log_threshold=-6.0), third))
    assert residency.prefixes.slots[3:6].tolist() == [[8, 8, 4, 0], nothing, [8, 8, 4, 0]]
    assert residency.prefixes.log_threshold[3] == -6.0 and residency.costs[3] is residency.active[2].cost
    residency.drop(2)
    assert residency.prefixes.slots.tolist() == [[0, 8, 4, 0], [0, 0, 40, 0], *[nothing] * (1 + VARIANT_SLOTS)]


def test_clusters_are_not_loaded_where_all_attention_is_exact(clustered, reside):
    residency = reside(clustered, mode="exact")
    assert residency.make_table("any.layer", NUM_HEADS, HEAD_SIZE).sizes.shape == (NUM_HEADS, 0)
    residency.load_all(kv_cache(8))
    assert residency.prefixes.slots.tolist() == [[0, 0, 40, 0]] and residency.room.most_centroids == 0
    residency.set_step(frozenset(), ())
    assert residency.prefixes.slots.tolist() == [[0, 0, 40, 0]]


@pytest.mark.parametrize(
    ("name", "num_heads", "head_size", "active"),
    [
        (LAYER_NAMES[0], NUM_HEADS, HEAD_SIZE, {0, 1}),
        ("a layer that was not indexed", NUM_HEADS, HEAD_SIZE, {1}),
        (LAYER_NAMES[0], NUM_HEADS + 1, HEAD_SIZE, {1}),
        (LAYER_NAMES[0], NUM_HEADS, HEAD_SIZE + 1, {1}),
    ],
    ids=["as indexed", "another layer", "other heads", "another head size"],
)
def test_what_a_layer_that_does_not_fit_keeps_from_being_served(
    exact, clustered, reside, name, num_heads, head_size, active
):
    residency = reside(clustered, exact)
    assert residency.make_table(name, num_heads, head_size) is not None
    residency.load_all(kv_cache(8))
    assert residency.active.keys() == active


def test_a_layer_that_no_clustered_index_has_stays_dense(clustered, reside):
    assert reside(clustered).make_table("a layer that was not indexed", NUM_HEADS, HEAD_SIZE) is None
