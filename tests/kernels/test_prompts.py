"""Prompts whose tokens choose together, by tiles: the kernels against the oracle, with a library of torch."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.kernels.conftest import ON_GPU, Scene, check_close, poisoned
from tests.kernels.test_squeezed_attention import SIZES, UNEVEN, needs_gpu
from vllm_squeeze.kernels import prompts as kernels
from vllm_squeeze.kernels.prompts import PromptTiles, PromptWorkspace, squeezed_prompts
from vllm_squeeze.kernels.reference import attend_seen, squeezed_prompts_reference
from vllm_squeeze.kernels.tables import PROMPT_SLOTS, SAMPLE, prompt_tile_tokens


class PromptScene(Scene):
    """A step with prompts, to the kernels of which nobody tells what attention over suffixes is."""

    def operands(self) -> tuple:
        return super().operands()[1:]


class Library:
    """Causal attention to the keys of lists, each a page of its own; knows how long they were in each call."""

    def __init__(self, scene: Scene, soft_cap: float = 0.0):
        self._softmax = scene.scale, soft_cap
        self.lengths: list[list[int]] = []

    def __call__(
        self, q: Any, k: Any, v: Any, out: Any, cu_seqlens_q: Any, seqused_k: Any, block_table: Any, **sizes: int
    ) -> torch.Tensor:
        assert sizes == {"max_seqlen_q": int(cu_seqlens_q.diff().max()), "max_seqlen_k": block_table.shape[1]}
        assert k.shape[1:] == v.shape[1:] == (1, 1, q.shape[-1]) and len(q) == len(out) == cu_seqlens_q[-1]
        self.lengths.append(seqused_k.tolist())
        lse = poisoned(torch.empty(q.shape[1], len(q), device=q.device))
        poisoned(out)
        starts = cu_seqlens_q.tolist()
        for start, end, length, rows in zip(starts, starts[1:], self.lengths[-1], block_table.long()):
            if length:
                keys, values = (cache[rows[:length], 0, 0][None] for cache in (k, v))
                seen = torch.ones(end - start, length, dtype=torch.bool, device=q.device).tril(length - end + start)
                attended, log_sum = attend_seen(q[start:end, None], keys, values, seen, *self._softmax)
                out[start:end], lse[:, start:end] = attended[:, 0].to(out.dtype), log_sum[:, 0].T
        return lse


def prompts_of(scene: Scene, slots: tuple[int, ...], counts: tuple[int, ...], kept_share: float) -> PromptScene:
    """A step whose rows have these slots and numbers of tokens; those with a slot are prompts.

    Every second row has three tokens of earlier steps after its prefix. What follows that begins in its last page if that
    is not full, of which each row has a copy.
    """
    device, page_size = scene.query.device, scene.key_cache.shape[1]
    num_heads, head_size = scene.num_kv_heads, scene.query.shape[-1]
    random, ends = torch.Generator().manual_seed(1), torch.tensor(counts).cumsum(0)
    lens = [scene.keys[slot].shape[1] if slot >= 0 else 0 for slot in slots]
    after = [count + 3 * (row % 2) for row, count in enumerate(counts)]
    seq_lens = [length + more for length, more in zip(lens, after)]
    cache = torch.cat([scene.key_cache, scene.value_cache], -1)
    table = torch.full((len(slots), 1 + max(seq_lens) // page_size), 10**6, dtype=torch.int32)
    suffixes, output = [], scene.suffix_output.clone()
    for row, (slot, count, end, length, more) in enumerate(zip(slots, counts, ends.tolist(), lens, after)):
        keys_and_values = torch.randn(2, num_heads, more, head_size, generator=random).to(cache)
        suffixes += [keys_and_values[:, :, : more - left] for left in reversed(range(count))]
        pages, begun = divmod(length, page_size)
        table[row, :pages] = scene.block_table[end - 1, :pages]
        own = cache.new_full((-(-(begun + more) // page_size), *cache.shape[1:]), torch.nan)
        if begun:
            own[0] = cache[scene.block_table[end - 1, pages]]
        own.flatten(0, 1)[begun : begun + more] = keys_and_values.permute(2, 1, 0, 3).flatten(2)
        table[row, pages : pages + len(own)] = len(cache) + torch.arange(len(own))
        cache = torch.cat([cache, own])
        if slot >= 0:
            poisoned(output[end - count : end])

    def integers(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    prompts = PromptTiles.allocate(int(ends[-1]), len(counts), scene.group, head_size, device)
    prompts = prompts.of([count for slot, count in zip(slots, counts) if slot >= 0], max(seq_lens))
    row_slot = integers(*(slot + PROMPT_SLOTS if slot >= 0 else slot for slot in slots))
    prompts.fill(row_slot, integers(0, *ends), integers(*seq_lens), integers(*lens))
    scene.prefixes.kept_shares.fill_(kept_share)
    key_cache, value_cache = cache.split(head_size, -1)
    paged = {"key_cache": key_cache, "value_cache": value_cache, "block_table": table.to(device)}
    return PromptScene(**vars(scene) | paged | {"queries": prompts, "suffix": suffixes, "suffix_output": output})


def workspace_for(scene: Scene) -> PromptWorkspace:
    max_centroids, longest = int(scene.prefixes.slots[:, 1].max()), max(1, *(keys.shape[1] for keys in scene.keys))
    limits = max_centroids, longest, scene.queries.max_keys - scene.queries.size
    return PromptWorkspace.allocate(scene.table, scene.group, *limits, scene.query.dtype)


def check(scene: Scene, rest: bool = True, soft_cap: float = 0.0) -> torch.Tensor:
    """Fails if the kernels differ from the oracle, or, launched again, from themselves; returns what they made."""
    expected = scene.apply(squeezed_prompts_reference, rest, soft_cap)
    counters, workspace = scene.prefixes.counters.clone(), workspace_for(scene)
    output = scene.apply(squeezed_prompts, rest, workspace, Library(scene, soft_cap), soft_cap)
    check_close(output, expected)
    assert torch.equal(scene.prefixes.counters, counters)
    if ON_GPU:
        again = scene.apply(squeezed_prompts, rest, workspace, Library(scene, soft_cap), soft_cap)
        assert torch.equal(again, output)
    return output


SHAPES = (
    (1, 1, 64, 16),
    (2, 3, 128, 32),
    (2, 4, 128, 16),
    (1, 6, 256, 16),
    (2, 7, 64, 32),
    (3, 16, 8, 64),
    (1, 2, 72, 16),
)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in SHAPES),
        *((shape, torch.float16) for shape in SHAPES[2:4]),
        *(pytest.param(shape, torch.bfloat16, marks=needs_gpu) for shape in SHAPES),
    ],
    ids=lambda value: "H{}-G{}-D{}-S{}".format(*value) if isinstance(value, tuple) else str(value).split(".")[1],
)
def test_agrees_with_the_reference(make_scene, shape: tuple[int, int, int, int], dtype: torch.dtype):
    num_kv_heads, group, head_size, page_size = shape
    many = prompt_tile_tokens(group, head_size) + 1
    scene = make_scene(
        num_kv_heads=num_kv_heads,
        group=group,
        head_size=head_size,
        page_size=page_size,
        sizes=UNEVEN,
        slot_of=(0,) * many,
        dtype=dtype,
    )
    check(prompts_of(scene, (0,), (many,), 0.3))


@pytest.mark.parametrize("num_sinks", [0, 16])
@pytest.mark.parametrize("rest", [True, False], ids=["rest", "drop"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none-chosen", "some-chosen", "all-chosen"])
def test_any_choice(make_scene, share: float, rest: bool, num_sinks: int):
    scene = make_scene(num_kv_heads=1, sizes=UNEVEN, slot_of=(0,) * 5, num_sinks=num_sinks)
    check(prompts_of(scene, (0,), (5,), share), rest)


@pytest.mark.parametrize("rest", [True, False], ids=["rest", "drop"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_any_clusters(make_scene, sizes: tuple, rest: bool):
    scene = make_scene(num_kv_heads=1, sizes=sizes, slot_of=(0, 0), num_sinks=0)
    check(prompts_of(scene, (0,), (2,), 0.4), rest)


def test_everything_chosen_is_dense_attention(make_scene):
    scene = prompts_of(make_scene(sizes=UNEVEN, slot_of=(0,) * 3), (0,), (3,), 1.0)
    check_close(check(scene), torch.stack([scene.dense(token) for token in range(3)]))


def test_what_is_not_chosen_counts_by_its_means(make_scene):
    scene = prompts_of(make_scene(sizes=UNEVEN, slot_of=(0,), group=1), (0,), (1,), 0.0)
    everything = torch.ones_like(scene.table_of(0).sizes, dtype=torch.bool)
    check_close(check(scene)[0], scene.dense(0, replaced=everything))


def test_rows_beside_each_other(make_scene):
    """Prompts on two prefixes, one of them exact, of more than a tile and of less, between rows that are none.

    Each sees what was computed after its prefix before, and its own tokens up to itself.
    """
    group = 8
    size = prompt_tile_tokens(group, 64)
    counts = 2, size + 3, 1, 5, 2 * size
    slots = -1, 0, -1, 1, 0
    slot_of = sum(((max(slot, 0),) * count for slot, count in zip(slots, counts, strict=True)), ())
    scene = make_scene(num_kv_heads=1, group=group, sizes=(UNEVEN[0], UNEVEN[0][:7]), slot_of=slot_of).make_exact(1)
    scene = prompts_of(scene, slots, counts, 0.3)
    tiles = scene.queries.tiles[scene.queries.tiles[:, 0] >= 0].tolist()
    first, second = (keys.shape[1] for keys in scene.keys)
    rows = [
        (0, 1, 2, size, first, 3 + size),
        (0, 1, 2 + size, 3, first, 6 + size),
        (1, 3, size + 6, 5, second, 8),
        (0, 4, size + 11, size, first, size),
        (0, 4, 2 * size + 11, size, first, 2 * size),
    ]
    assert tiles == [list(row) for row in rows]
    assert scene.queries.slots.tolist() == [0, 1, 0, -1, -1]
    output = check(scene)
    others = [0, 1, size + 5]
    assert torch.equal(output[others], scene.suffix_output[others])
    exact = list(range(size + 6, size + 11))
    check_close(output[exact], torch.stack([scene.dense(token) for token in exact]))


def test_prompts_on_several_prefixes(make_scene):
    """The second of three is of a step's first prefix, and a third prefix has none; then only the last is left."""
    sizes = (UNEVEN[0], UNEVEN[0][:7], UNEVEN[0][3:])
    scene = make_scene(num_kv_heads=1, sizes=sizes, slot_of=(2,) * 2 + (2,) * 3 + (0,) * 2)
    check(prompts_of(scene, (2, 2, 0), (2, 3, 2), 0.3))
    check(prompts_of(scene, (-1, -1, 0), (2, 3, 2), 0.3))


def test_a_tile_has_one_choice_that_others_do_not_change(make_scene):
    """A prompt's output is the same beside another on the same prefix, and not what each token alone would choose."""
    scene = make_scene(num_kv_heads=1, sizes=UNEVEN, slot_of=(0,) * 4)
    together = check(prompts_of(scene, (0, 0), (2, 2), 0.2))
    alone = check(prompts_of(scene, (0, -1), (2, 2), 0.2))
    assert torch.equal(together[:2], alone[:2])
    each = check(prompts_of(scene, (0, 0, -1), (1, 1, 2), 0.2))
    assert not torch.allclose(each[:2], together[:2], rtol=1e-2)


def test_how_query_heads_are_joined_elsewhere_does_not_matter(make_scene):
    scene = make_scene(num_kv_heads=1, group=3, sizes=UNEVEN, slot_of=(0,) * 4, rule="paper")
    by_mean = check(prompts_of(scene, (0,), (4,), 0.3))
    scene.prefixes.slots[0, 3] = 0
    assert torch.equal(check(prompts_of(scene, (0,), (4,), 0.3)), by_mean)


def test_a_logit_soft_cap(make_scene):
    scene = prompts_of(make_scene(sizes=UNEVEN, slot_of=(0,) * 4), (0,), (4,), 0.3)
    assert not torch.allclose(check(scene, soft_cap=1.5), check(scene), rtol=0.05)


def test_more_clusters_than_are_sampled(make_scene):
    """Every fourth tells where the choice ends; what is kept is about what was asked for."""
    scene = make_scene(num_kv_heads=1, group=1, sizes=((3,) * (4 * SAMPLE + 5),), slot_of=(0,) * 2, head_size=8)
    scene = prompts_of(scene, (0,), (2,), 0.25)
    expected = scene.apply(squeezed_prompts_reference, True)
    # so many that rounding changes the choice
    check_close(scene.apply(squeezed_prompts, True, workspace_for(scene), Library(scene)), expected, 1e-2)
    _, loaded, pairs, kept = scene.prefixes.counters[0, :4].tolist()
    assert pairs == 2 and kept == 2 * loaded
    assert loaded == pytest.approx(0.25 * 3 * (4 * SAMPLE + 5), rel=0.1)


@pytest.mark.parametrize(("limit", "value", "lists"), [("MAX_TILES", 2, [2, 2, 1]), ("MORE_KEYS", -(10**6), [1] * 5)])
def test_more_tiles_than_are_handled_at_once(make_scene, monkeypatch: pytest.MonkeyPatch, limit, value, lists):
    """Or longer lists."""
    monkeypatch.setattr(kernels, limit, value)
    scene = make_scene(num_kv_heads=1, group=16, head_size=8, sizes=UNEVEN, slot_of=(0,) * 37)
    scene = prompts_of(scene, (0, 0), (30, 7), 0.3)
    check(scene)
    library = Library(scene)
    scene.apply(squeezed_prompts, True, workspace_for(scene), library)
    assert [len(lengths) for lengths in library.lengths] == lists


def test_lists_that_there_is_no_room_for(make_scene):
    scene = prompts_of(make_scene(num_kv_heads=1), (0,), (2,), 0.3)
    longer = dataclasses.replace(scene, queries=scene.queries.of([2], 10**6))
    with pytest.raises(AssertionError, match="lists of 1000032 keys"):
        longer.apply(squeezed_prompts, True, workspace_for(scene), Library(scene))


def test_a_step_knows_nothing_of_the_one_before(make_scene):
    prompts = prompts_of(make_scene(slot_of=(0,) * 3), (0, 0), (1, 2), 0.3).queries
    assert prompts.slots.tolist() == [0, 0]
    facts = ([-1, PROMPT_SLOTS], [0, 1, 3], [9, 50], [0, 48])
    prompts.fill(*(torch.tensor(fact).int().to(prompts.slots) for fact in facts))
    assert prompts.slots.tolist() == [0, -1]
    assert prompts.tiles[0].tolist() == [0, 1, 1, 2, 48, 2] and (prompts.tiles[1:, 0] == -1).all()


def test_no_prompts(make_scene):
    scene = prompts_of(make_scene(), (-1,), (2,), 0.3)
    assert torch.equal(check(scene), scene.suffix_output)


def test_pages_of_one_key(make_scene):
    scene = make_scene()
    rows = kernels.rows_of(scene.value_cache)
    size = scene.query.shape[-1]
    block, place, head = 3, 5, 1
    strides = scene.value_cache.stride()
    row = (block * strides[0] + place * strides[1] + head * strides[2]) // size
    scene.value_cache[block, place, head] = 7.0
    assert rows.shape[1:] == (1, 1, size) and (rows[row] == 7).all() and (rows != 7).any(-1).sum() == len(rows) - 1
