"""The rows of a step for FlashAttention, as far as they can be seen without it."""

import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends import flash_attn

from tests.attention_backend.world import OPTIONS
from tests.kernels.conftest import ON_GPU, build_scene, check_close
from tests.kernels.test_prompts import prompts_of, workspace_for
from tests.kernels.test_squeezed_attention import UNEVEN
from vllm_squeeze.attention_backend.matching import LiveBlock
from vllm_squeeze.attention_backend.room import Room
from vllm_squeeze.kernels.prompts import PromptTiles
from vllm_squeeze.kernels.reference import attend_seen, squeezed_prompts_reference
from vllm_squeeze.kernels.tables import Prefixes

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PAGE_SIZE, MAX_ROWS, WIDTH = 16, 6, 12


def test_flash_attention_gets_what_follows_the_prefixes(monkeypatch):
    """Rows of 5, 1 and 3 query tokens, the last two on a prefix of 32 tokens in blocks 3 and 7; and a padded one."""
    if not ON_GPU:
        monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", None, raising=False)
        monkeypatch.setattr(torch.cuda, "Stream", object)
        monkeypatch.setattr(torch.cuda, "Event", object)
    from vllm_squeeze.attention_backend.flash_attention import SuffixRows

    prefixes = Prefixes(
        slots=torch.tensor([[0, 0, 32, 0]] * 3, dtype=torch.int32, device=DEVICE),
        lens=torch.tensor([32] * 3, dtype=torch.int32, device=DEVICE),
        frames=torch.zeros(3, dtype=torch.int32, device=DEVICE),
        log_threshold=torch.zeros(3, device=DEVICE),
        kept_shares=torch.ones(3, device=DEVICE),
        counters=torch.zeros(3, 6, dtype=torch.int64, device=DEVICE),
    )
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MAX_ROWS, max_num_batched_tokens=32))
    room = Room(num_slots=1, num_centroids=0, num_members=0, longest_prefix=32, most_centroids=0)
    options = SimpleNamespace(prefill="dense")
    residency = SimpleNamespace(device=DEVICE, prefixes=prefixes, room=room, options=options)
    rows = SuffixRows(PAGE_SIZE, config, residency)
    rows.prepare(group=2)
    rows.warm_up(PAGE_SIZE)
    assert not rows.squeezing and (rows.queries.tiles[:, 0] == -1).all()

    def step(lengths, live, num_tokens):
        table = torch.arange(100, 100 + 4 * WIDTH, dtype=torch.int32).view(4, WIDTH)
        table[1:3, :2] = torch.tensor([3, 7])
        metadata = SimpleNamespace(
            block_table=table.to(DEVICE),
            seq_lens=torch.tensor([*lengths, 0], dtype=torch.int32, device=DEVICE),
            query_start_loc=torch.tensor([0, 5, 6, 9, 9], dtype=torch.int32, device=DEVICE),
            num_actual_tokens=9,
            max_seq_len=max(lengths),
        )
        rows.note(metadata, PAGE_SIZE)
        rows.begin_step([LiveBlock(0, 0, *block, block[-1]) for block in live], num_tokens)
        tiles = zip(rows.queries.tiles[:, :2].tolist(), rows.queries.tokens.tolist())
        tokens = [token for (slot, size), tokens in tiles if slot >= 0 for token in tokens[:size]]
        return rows.suffix_lens.tolist(), rows.suffix_blocks[:, :3].tolist(), tokens, table[:, :5].tolist()

    lens, blocks, tokens, table = step([40, 33, 47], [(1, 7, 32)], 4)
    assert lens == [40, 1, 15, 0, 0, 0]
    assert blocks == [table[0][:3], table[1][2:5], table[2][2:5], table[3][:3], [0] * 3, [0] * 3]
    assert tokens == [5, 6, 7, 8]
    addresses = [tensor.data_ptr() for tensor in (rows.suffix_lens, rows.suffix_blocks)]
    # with other live blocks; and there is no room for the last row's tokens
    lens, blocks, tokens, table = step([40, 33, 47], [(1, 7, 33), (0, 3, 16)], 3)
    assert lens == [40, 17, 47, 0, 0, 0]
    assert blocks[:4] == [table[0][:3], table[1][1:4], table[2][:3], table[3][:3]]
    assert tokens == [5]
    assert addresses == [tensor.data_ptr() for tensor in (rows.suffix_lens, rows.suffix_blocks)]
    # tiles of all slots are reckoned with where rows are on more than there are prefixes
    assert rows.num_slots == 1
    rows.begin_step([LiveBlock(slot, 0, 1, 7, 32, 32) for slot in (0, 1)], 3, crowded=True)
    assert rows.num_slots == 3
    rows.end_step()
    assert rows.num_slots == 1
    # each slot has the blocks of a row that is on it, where all of a prefix's rows attend at once
    rows.begin_step([LiveBlock(1, 0, 1, 7, 32, 32)], 4, shared=True)
    assert rows.num_slots == 3 and rows.prefix_blocks.shape == (3, WIDTH)
    assert rows.prefix_blocks[1, :2].tolist() == [3, 7] and rows.suffix_lens.tolist()[:3] == [40, 1, 15]
    assert rows.queries.starts.tolist() == [0, 0, 8, 8] and rows.queries.slot_rows.tolist() == [-1, 2, -1]
    rows.end_step()
    assert not rows.shared


@pytest.mark.parametrize("alone", [True, False])
def test_prompts_whose_tokens_choose_together_attend_over_pages_of_one_key(monkeypatch, alone):
    """Beside a row that is none, with torch in FlashAttention's place; that may go on to write what is overwritten."""
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", None, raising=False)
    from vllm_squeeze.attention_backend import flash_attention

    monkeypatch.setattr(flash_attention, "flash_attn_varlen_func", flash_in_torch)
    waited = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=waited.append))
    scene = build_scene(str(DEVICE), sizes=(UNEVEN[0],), slot_of=(0,) * 40)
    scene = prompts_of(scene, (0, -1), (37, 3), 0.3)
    impl = object.__new__(flash_attention.SqueezeImpl)
    impl.num_heads, impl.num_kv_heads, impl.head_size = scene.query.shape[1], scene.num_kv_heads, scene.query.shape[2]
    impl.scale, impl.logits_soft_cap, impl.supports_quant_query_input = scene.scale, 0, False
    impl.vllm_flash_attn_version, impl.table = 3, scene.table
    impl.rows = SimpleNamespace(prompts=scene.queries, block_table=scene.block_table, suffix_done="done", alone=alone)
    impl.residency = SimpleNamespace(prefixes=scene.prefixes, options=SimpleNamespace(rest="value_centroids"))
    impl._prompt_workspace = workspace_for(scene)
    one = torch.ones(1, device=DEVICE)
    layer, output = SimpleNamespace(_k_scale=one, _v_scale=one), scene.suffix_output.clone()
    impl._attend_prompts(layer, scene.query, output, scene.key_cache, scene.value_cache)
    check_close(output, scene.apply(squeezed_prompts_reference, True))
    assert torch.equal(output[37:], scene.suffix_output[37:]) and waited == ([] if alone else ["done"])


def test_lists_are_no_longer_than_the_longest_row_that_there_can_be(monkeypatch):
    """Though vLLM may reckon with drafts beyond it."""
    if not ON_GPU:
        monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", None, raising=False)
    from vllm_squeeze.attention_backend.flash_attention import SuffixRows

    rows = object.__new__(SuffixRows)
    rows.prompts = PromptTiles.allocate(32, 1, 4, 64, DEVICE)
    rows._vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))
    for rows.max_seq_len, longest in ((90, 90), (103, 100)):
        rows.set_prompts(())
        assert rows.prompts.max_keys == longest + rows.prompts.size


@pytest.mark.parametrize(
    ("prefill", "gpu", "version", "dtype", "cache", "drafts", "tiled"),
    [
        (0.3, True, 3, torch.bfloat16, "auto", None, True),
        (0.3, True, 3, torch.float16, "float16", 14, True),
        (0.3, True, 2, torch.float16, "auto", None, False),
        (0.3, True, 3, torch.float32, "auto", None, False),
        (0.3, True, 3, torch.float16, "fp8_e4m3", None, False),
        (0.3, True, 3, torch.float16, "auto", 15, False),
        (0.3, False, None, torch.float32, "fp8", 3, True),
        ("dense", True, 3, torch.float16, "auto", None, False),
        ("squeezed", False, None, torch.float32, "auto", None, False),
    ],
)
def test_where_tokens_of_prompts_choose_together(monkeypatch, prefill, gpu, version, dtype, cache, drafts, tiled):
    from vllm.platforms import current_platform

    from vllm_squeeze.attention_backend import placement

    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: gpu)
    monkeypatch.setattr(placement, "can_share_prefixes", lambda: version == 3)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=cache),
        model_config=SimpleNamespace(dtype=dtype),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts) if drafts else None,
    )
    assert placement.tiled_prompts(dataclasses.replace(OPTIONS, prefill=prefill), config) == tiled


@pytest.mark.parametrize(("version", "shared"), [(3, True), (2, False), (None, False)])
def test_prefixes_are_shared_by_more_tokens_than_a_tile_has(monkeypatch, version, shared):
    """And by FlashAttention 3 alone."""
    if not ON_GPU:
        monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", None, raising=False)
    from vllm_squeeze.attention_backend import compat, flash_attention

    monkeypatch.setattr(compat, "flash_attention_version", lambda: version)
    monkeypatch.setattr(flash_attention, "can_share_prefixes", compat.can_share_prefixes.__wrapped__)
    rows = object.__new__(flash_attention.SuffixRows)
    rows._group = 4
    assert rows.can_be_shared(17) == shared and not rows.can_be_shared(16)


def flash_in_torch(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, causal, block_table, softmax_scale, **others
):
    """FlashAttention's arithmetic."""
    assert others["return_softmax_lse"]
    assert others["k_descale"].shape == others["v_descale"].shape == (len(block_table), k.shape[2])
    starts, lens = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert max_seqlen_q >= max(b - a for a, b in pairwise(starts)) and max_seqlen_k >= max(lens)
    lse = torch.full((q.shape[1], len(q)), torch.nan, device=q.device)
    for (first, last), length, blocks in zip(pairwise(starts), lens, block_table, strict=True):
        if last > first:
            position = torch.arange(length, device=q.device)
            places = blocks[position // k.shape[1]].long(), position % k.shape[1]
            keys, values = (cache[places].transpose(0, 1) for cache in (k, v))
            seen = torch.ones(last - first, length, dtype=torch.bool, device=q.device)
            seen = seen.tril(length - last + first) if causal else seen
            grouped = q[first:last].unflatten(1, (k.shape[2], -1))
            attended, log_sum = attend_seen(grouped, keys, values, seen, softmax_scale)
            out[first:last], lse[:, first:last] = attended.flatten(1, 2).to(out), log_sum.flatten(1).T
    return out, lse


def test_all_rows_of_a_prefix_at_once(monkeypatch):
    """Of 25 rows, 20 on one prefix and 3 on another, with torch in FlashAttention's place."""
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", None, raising=False)
    from vllm_squeeze.attention_backend import flash_attention

    monkeypatch.setattr(flash_attention, "flash_attn_varlen_func", flash_in_torch)
    stream = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    slot_of = (2, 0, -1, 2, 0, *(0,) * 18, -1, 2)
    scene = build_scene(str(DEVICE), sizes=((3, 9, 30), (7, 20), (5, 40)), slot_of=slot_of)
    queries, lens = scene.queries, scene.prefixes.lens
    # what lies beyond a prefix's own blocks are no blocks
    blocks = scene.block_table[queries.slot_rows.clamp(min=0)]
    impl = object.__new__(flash_attention.SqueezeImpl)
    impl.num_heads, impl.num_kv_heads, impl.head_size = scene.query.shape[1], scene.num_kv_heads, scene.query.shape[2]
    impl.scale, impl.logits_soft_cap, impl.supports_quant_query_input = scene.scale, 0, False
    impl.vllm_flash_attn_version = 3
    impl.rows = SimpleNamespace(step_queries=queries, prefix_blocks=blocks, suffix_done=None)
    room = SimpleNamespace(longest_prefix=int(lens.max()))
    impl.residency = SimpleNamespace(prefixes=scene.prefixes, room=room)
    one = torch.ones(1, device=DEVICE)
    layer, output = SimpleNamespace(_k_scale=one, _v_scale=one), scene.suffix_output.clone()
    impl._attend_shared(layer, scene.query, scene.key_cache, scene.value_cache, output, scene.suffix_lse)
    expected = scene.suffix_output.double()
    on_prefix = [row for row, slot in enumerate(slot_of) if slot >= 0]
    expected[on_prefix] = torch.stack([scene.dense(row) for row in on_prefix])
    check_close(output, expected)
    assert scene.prefixes.counters[:, 4:].tolist() == [[2, 40], [0, 0], [2, 6]]
