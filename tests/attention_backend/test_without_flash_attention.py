"""The backend for GPUs on which vLLM has no FlashAttention, as far as it can be seen without one."""

import dataclasses
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends import fa_utils, triton_attn

from tests.attention_backend.test_layers import layer
from tests.kernels.conftest import check_close
from tests.kernels.test_suffix_attention import torch_kernel  # noqa: F401
from vllm_squeeze.attention_backend import triton_attention
from vllm_squeeze.attention_backend.compat import has_flash_attention
from vllm_squeeze.attention_backend.matching import LiveBlock
from vllm_squeeze.attention_backend.room import Room
from vllm_squeeze.attention_backend.triton_attention import PackedRows, SqueezeTritonImpl
from vllm_squeeze.kernels.reference import attend_causal
from vllm_squeeze.kernels.tables import NUM_DIRECTIONS, ClusterTable, Prefixes, packed

PAGE_SIZE, ROWS, WIDTH = 16, 6, 12


@pytest.mark.parametrize(("version", "found"), [(3, True), (2, True), (None, False)])
def test_what_vllm_says_of_flash_attention(monkeypatch, version, found):
    """It has no version of it for a GPU below 8.0."""
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda: version)
    assert has_flash_attention() is found


def test_a_build_without_flash_attention(monkeypatch):
    """vLLM's module cannot be imported there."""
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", None)
    assert has_flash_attention() is False


@pytest.mark.skipif(has_flash_attention(), reason="vLLM has FlashAttention here")
def test_triton_where_there_is_no_flash_attention():
    from vllm_squeeze.attention_backend.gpu_attention import SqueezeBackend

    assert SqueezeBackend.get_name() == "TRITON_ATTN"


def test_a_layer_without_xformers_stays_dense(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    plain = layer(logits_soft_cap=0)
    impl = object.__new__(SqueezeTritonImpl)
    vars(impl).update(vars(plain.impl), head_size=64, residency=SimpleNamespace(device=torch.device("cpu")))
    plain.impl = impl
    assert "xformers is not installed" in impl.why_dense(plain, torch.float16)
    for name, value, reason in (
        ("kv_cache_dtype", "fp8", "a KV cache in fp8"),
        ("logits_soft_cap", 30.0, "soft cap"),
        ("sinks", object(), "sinks"),
    ):
        setattr(impl, name, value)
        assert reason in impl.why_dense(plain, torch.float16)


@pytest.fixture
def rows(monkeypatch):
    """Rows of 5, 1, 1 and 3 query tokens, the last three squeezed by a prefix of 32 tokens in blocks 3 and 7."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(triton_attention, "MAX_SUFFIX_KEYS", 64)
    prefixes = Prefixes(
        slots=torch.tensor([[0, 0, 32, 0]], dtype=torch.int32, device=device),
        lens=torch.tensor([32], dtype=torch.int32, device=device),
        frames=torch.zeros(1, dtype=torch.int32, device=device),
        log_threshold=torch.zeros(1, device=device),
        kept_shares=torch.ones(1, device=device),
        counters=torch.zeros(1, 6, dtype=torch.int64, device=device),
    )
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=ROWS, max_num_batched_tokens=32))
    options = SimpleNamespace(rest="drop")
    room = Room(num_slots=1, num_centroids=0, num_members=0, longest_prefix=32, most_centroids=0)
    residency = SimpleNamespace(device=device, prefixes=prefixes, room=room, options=options)
    rows = PackedRows(PAGE_SIZE, config, residency)
    rows.prepare(group=2)

    def begin(lengths, alone=False):
        table = torch.arange(100, 100 + 4 * WIDTH, dtype=torch.int32).view(4, WIDTH)
        table[0 if alone else 1 :, :2] = torch.tensor([3, 7])
        metadata = SimpleNamespace(
            block_table=table.to(device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_start_loc=torch.tensor([0, 5, 6, 7, 10], dtype=torch.int32, device=device),
            num_actual_tokens=10,
            max_seq_len=max(lengths),
        )
        rows.note(metadata, PAGE_SIZE)
        rows.begin_step([LiveBlock(0, 0, 1, 7, 32, 32)], 10 if alone else 5, alone)
        return rows

    return begin


def test_vllm_attends_to_all_of_dense_rows_and_to_no_more_of_others_than_it_must(rows):
    step = rows([90, 33, 40, 50])
    assert step.dense_lens[:4].tolist() == [90, 1, 1, 3]
    assert step.suffixes.lens[:4].tolist() == [0, 1, 8, 18]
    assert step.suffixes.starts.tolist() == [0, 0, 1, 9, 27, 27, 27]
    assert step.suffixes.rows[:11].tolist() == [0] * 5 + [1, 2, 3, 3, 3, 4]
    assert step.suffixes.positions[:10].tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 1, 2]
    # row 3 begins at block 100 + 3 * WIDTH; its suffix with the third block of its table
    first = (100 + 3 * WIDTH + 2) * PAGE_SIZE
    assert step.suffixes.places[9:27].tolist() == list(range(first, first + 18))
    tiles = step.queries.tiles[: len(step.queries.tokens)]
    assert step.queries.tokens[tiles[:, 0] >= 0].unique().tolist() == [-1, 5, 6, 7, 8, 9]


def test_rows_whose_suffixes_do_not_fit_go_dense(rows):
    """Room for 64 keys: the third row's 60 do not fit beside the second's 20, and no row after it is tried."""
    step = rows([90, 52, 92, 35])
    assert step.dense_lens[:4].tolist() == [90, 1, 92, 35]
    assert step.suffixes.lens[:4].tolist() == [0, 20, 0, 0]
    tiles = step.queries.tiles[: len(step.queries.tokens)]
    assert tiles[tiles[:, 0] >= 0, 1].tolist() == [1]


def read(kv_cache, blocks, length):
    """Keys and values [H, length, D] of a row."""
    return kv_cache[blocks.long()].transpose(0, 1).flatten(1, 2)[:, :length].chunk(2, -1)


def unified_attention(q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, block_table, **others):
    """What vLLM's Triton kernel does, which does not run on the CPU."""
    kv_cache = torch.cat([k, v], -1).transpose(1, 2)
    for row, (start, end) in enumerate(pairwise(cu_seqlens_q.tolist())):
        keys, values = read(kv_cache, block_table[row, : -(-int(seqused_k[row]) // PAGE_SIZE)], int(seqused_k[row]))
        query = q[start:end].unflatten(1, (k.shape[2], -1))
        out[start:end] = attend_causal(query, keys, values, softmax_scale)[0].flatten(1, 2).to(out)


@pytest.mark.usefixtures("torch_kernel")
@pytest.mark.parametrize("alone", [False, True], ids=["beside-a-dense-row", "alone"])
def test_a_layer_attends_to_the_prefix_and_to_what_follows_it(rows, monkeypatch, alone):
    """All of the prefix is attended to, so each row's attention has to be that over all of its keys.

    Without dense rows no other attention is asked.
    """
    lengths, heads, size = [90, 33, 40, 50], 2, 64
    step = rows(lengths, alone)
    device = step.seq_lens.device
    if alone:
        monkeypatch.setattr(triton_attn, "unified_attention", None)
        monkeypatch.setattr(triton_attention, "attend_suffix", None)
    elif device.type == "cpu":
        monkeypatch.setattr(triton_attn, "unified_attention", unified_attention)
    with set_current_vllm_config(VllmConfig()):
        impl = SqueezeTritonImpl(2 * heads, size, 0.1, heads, None, None, "auto")
    nothing = packed(torch.zeros(heads, 0, size, device=device))
    numbers = torch.zeros(heads, 0, dtype=torch.int32, device=device)
    residuals = torch.zeros(heads, 0, NUM_DIRECTIONS // 8, dtype=torch.int32, device=device)
    facts = nothing[1], nothing[1], *[numbers] * 2, nothing[1], numbers, residuals
    frames, directions = (torch.zeros(heads, 1, count, size, device=device) for count in (2, NUM_DIRECTIONS))
    impl.table, impl.rows = ClusterTable(*nothing, *nothing, *facts, *nothing, numbers, frames, directions), step
    impl.residency, impl.dtype = step._residency, torch.float16
    impl._workspace = impl.make_workspace()
    impl._packed = torch.full((2, 64, heads, size), torch.nan, dtype=torch.float16, device=device)

    random = torch.Generator().manual_seed(3)
    kv_cache = torch.randn(150, PAGE_SIZE, heads, 2 * size, generator=random).to(device, torch.float16).transpose(1, 2)
    query = torch.randn(12, 2 * heads, size, generator=random).to(device, torch.float16)
    known = {
        "num_actual_tokens": 10,
        "max_query_len": 5,
        "query_start_loc": step.query_start_loc,
        "max_seq_len": step.max_seq_len,
        "seq_lens": step.seq_lens,
        "block_table": step.block_table,
        "causal": True,
        "use_cascade": False,
    }
    # of the fields some are a version's own
    fields = (field.name for field in dataclasses.fields(triton_attn.TritonAttentionMetadata))
    metadata = triton_attn.TritonAttentionMetadata(**{name: known.get(name) for name in fields})
    scale = torch.ones((), device=device)
    scales = SimpleNamespace(_q_scale=scale, _k_scale=scale, _v_scale=scale, impl=impl)
    if not alone:  # once, as it takes long where kernels are interpreted
        impl.warm_up(scales, kv_cache)
    step = rows(lengths, alone)
    output = torch.full_like(query, 5.0)
    assert impl.forward(scales, query, None, None, kv_cache, metadata, output) is output

    for row, (start, end) in enumerate([(0, 5), (5, 6), (6, 7), (7, 10)]):
        keys, values = read(kv_cache, step.block_table[row, : -(-lengths[row] // PAGE_SIZE)], lengths[row])
        expected, _ = attend_causal(query[start:end].unflatten(1, (heads, -1)), keys, values, 0.1)
        check_close(output[start:end], expected.flatten(1, 2).to(output))
    assert (output[10:] == 5.0).all()
    assert impl.residency.prefixes.counters[0, 4:].tolist() == [heads, (10 if alone else 5) * heads]
    assert metadata.seq_lens.tolist() == lengths, "vLLM's metadata are shared by all layers"
