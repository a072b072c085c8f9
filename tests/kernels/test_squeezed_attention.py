"""The Triton kernels against the oracle, over shapes and clusters that do not fit their tiles."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.kernels.conftest import Scene
from vllm_squeeze.kernels import squeezed_attention as kernels
from vllm_squeeze.kernels import workspace as workspaces
from vllm_squeeze.kernels.reference import attend_causal, squeezed_attention_reference
from vllm_squeeze.kernels.tables import LEAST_PACKED, NUM_DIRECTIONS, NUM_ROW_FACTS, RULES, Prefixes, packed, words_of
from vllm_squeeze.kernels.tiles import MAX_BLOCK, MAX_TILE_ROWS, PART_KEYS, most_tiles, tokens_per_tile
from vllm_squeeze.kernels.workspace import MAX_MASSES, MAX_PROGRAMS_PER_MULTIPROCESSOR, SPLITS_PER_MASS, Workspace

UNEVEN = ((1, 70, 3, 11, 1, 1, 40, 6, 29) * 2,)
SIZES = {
    "one-token": ((1,),),
    "one-cluster": ((100,),),
    "single-tokens": ((1,) * 90,),
    "a-giant": ((2, 3, 550, 1, 4, 2, 3),),
    "empty-ones": ((0, 5, 0, 0, 60, 7, 0),),
    "only-empty": ((0, 0, 0),),
    "more-than-a-block": (tuple(range(1, 25)) + (0,) * 50 + (2,) * 70,),
}


def workspace_for(scene: Scene, max_tiles: int = 4) -> Workspace:
    return Workspace.allocate(
        max_tiles,
        scene.num_kv_heads,
        scene.query.shape[-1],
        int(scene.prefixes.slots[:, 1].max()),
        max(1, *(keys.shape[1] for keys in scene.keys)),
        scene.query.device,
    )


def run(scene: Scene, rest: bool = True, workspace: Workspace | None = None) -> torch.Tensor:
    workspace = workspace_for(scene) if workspace is None else workspace
    return scene.apply(kernels.squeezed_attention, rest, workspace)


def check_against_reference(
    scene: Scene, rest: bool, assert_close: Callable, workspace: Workspace | None = None
) -> None:
    expected = scene.apply(squeezed_attention_reference, rest)
    counters = scene.prefixes.counters.clone()
    assert_close(run(scene, rest, workspace), expected)
    assert torch.equal(scene.prefixes.counters, counters)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Triton's interpreter multiplies bf16 matrices as if they were integers
every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, id="bf16", marks=needs_gpu),
    ],
)


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 64, 16), (2, 3, 128, 32), (2, 4, 128, 16), (1, 6, 256, 16), (2, 7, 64, 32), (3, 16, 8, 64), (1, 2, 72, 16)],
    ids=lambda shape: "H{}-G{}-D{}-S{}".format(*shape),
)
def test_agrees_with_the_reference(make_scene, assert_close, shape: tuple[int, int, int, int], dtype: torch.dtype):
    num_kv_heads, group, head_size, page_size = shape
    scene = make_scene(
        num_kv_heads=num_kv_heads,
        group=group,
        head_size=head_size,
        page_size=page_size,
        sizes=UNEVEN,
        slot_of=(0,),
        dtype=dtype,
    )
    scene.set_threshold(0.3)
    check_against_reference(scene, True, assert_close)


@pytest.mark.parametrize("rest", [True, False], ids=["rest", "drop"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("cache_dtype", "shape"),
    [(torch.float8_e4m3fn, (2, 4, 128, 16)), (torch.float8_e5m2, (1, 1, 64, 64))],
    ids=["e4m3-H2-G4-D128-S16", "e5m2-H1-G1-D64-S64"],
)
def test_keys_and_values_in_8_bits(make_scene, assert_close, cache_dtype, dtype, shape, rest: bool):
    num_kv_heads, group, head_size, page_size = shape
    scene = make_scene(
        num_kv_heads=num_kv_heads,
        group=group,
        head_size=head_size,
        page_size=page_size,
        sizes=(UNEVEN[0], UNEVEN[0][:7]),
        slot_of=(0, 1, 0),
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    scene.set_threshold(0.4)
    scene = scene.make_exact(1)
    check_against_reference(scene, rest, assert_close)
    assert_close(run(scene)[1], scene.dense(1))


@pytest.mark.parametrize("num_sinks", [0, 16])
@pytest.mark.parametrize("rest", [True, False], ids=["rest", "drop"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["none-chosen", "some-chosen", "all-chosen"])
def test_any_choice(make_scene, assert_close, share: float, rest: bool, num_sinks: int):
    scene = make_scene(num_kv_heads=1, sizes=UNEVEN, slot_of=(0,), num_sinks=num_sinks)
    scene.set_threshold(share)
    check_against_reference(scene, rest, assert_close)


@pytest.mark.parametrize(
    ("share", "rest", "num_sinks"), [(0.3, True, 16), (0.3, False, 0), (1.0, True, 0)], ids=["rest", "drop", "all"]
)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_any_clusters(make_scene, assert_close, sizes: tuple, share: float, rest: bool, num_sinks: int):
    scene = make_scene(num_kv_heads=1, sizes=sizes, slot_of=(0,), num_sinks=num_sinks)
    if sum(sizes[0]):
        scene.set_threshold(share)
    check_against_reference(scene, rest, assert_close)


@every_dtype
def test_everything_chosen_is_dense_attention(make_scene, assert_close, dtype: torch.dtype):
    scene = make_scene(sizes=UNEVEN, dtype=dtype)
    assert_close(run(scene), torch.stack([scene.dense(0), scene.dense(1)]))


@pytest.mark.parametrize("rule", ["clusters", "paper"])
@pytest.mark.parametrize(("group", "tokens"), [(1, 3), (3, 3), (4, 3), (4, 9)])
def test_each_prefix_has_its_own_rule(make_scene, assert_close, rule: str, group: int, tokens: int):
    """Beside a prefix whose keys are chosen for themselves."""
    slot_of = (0, 1, 0) * (tokens // 3)
    scene = make_scene(num_kv_heads=1, group=group, sizes=(UNEVEN[0], UNEVEN[0]), slot_of=slot_of, rule=rule)
    scene.prefixes.slots[1, 3] = RULES.index("keys")
    scene = scene.tile(scene.slot_of)
    scene.set_threshold(0.3)
    check_against_reference(scene, True, assert_close)
    by_rule = run(scene)
    scene.prefixes.slots[0, 3] = RULES.index("keys")
    assert not torch.equal(run(scene.tile(scene.slot_of)), by_rule)


@pytest.mark.parametrize("tokens", [1, 9])
def test_keys_that_lie_as_far_from_their_mean_as_can_be_told(make_scene, assert_close, tokens: int):
    """So many of them that a difference of one in a whole number would show, in a cluster whose keys may all be chosen."""
    scene = make_scene(num_kv_heads=1, sizes=((6000,),), slot_of=(0,) * tokens)
    scene.table.variances.fill_(100.0)
    shape = *scene.table.residuals.shape[:2], NUM_DIRECTIONS
    ends = torch.tensor([LEAST_PACKED, -LEAST_PACKED - 1])
    scene.table.residuals[:] = words_of(ends[torch.randint(2, shape, generator=torch.Generator().manual_seed(0))])
    for share in (0.1, 0.3, 0.5, 0.7):
        scene.set_threshold(share)
        check_against_reference(scene, True, assert_close)


@pytest.mark.parametrize("tokens", [1, 9])
def test_queries_that_no_direction_tells_of(make_scene, assert_close, tokens: int):
    """All keys of a cluster are then as likely as its mean."""
    scene = make_scene(num_kv_heads=1, sizes=UNEVEN[:1], slot_of=(0,) * tokens)
    scene.table.directions.zero_()
    scene.set_threshold(0.3)
    check_against_reference(scene, True, assert_close)
    assert 0 < scene.prefixes.counters[0, 1] < sum(UNEVEN[0])


def test_nothing_to_attend_leaves_the_suffix(make_scene):
    scene = make_scene(num_sinks=0)
    scene.set_threshold(0.0)
    assert torch.equal(run(scene, rest=False), scene.suffix_output)


def test_prefixes_beside_each_other(make_scene, assert_close):
    scene = make_scene(sizes=((3, 0, 41), UNEVEN[0]), slot_of=(1, 0, 1), group=3)
    scene.set_threshold(0.4)
    check_against_reference(scene, True, assert_close)
    assert scene.prefixes.counters[:, 2].tolist() == [2, 4]


# nothing and everything is chosen by groups of three, whose tiles have rows of no query head
@pytest.mark.parametrize(("share", "group"), [(0.0, 3), (1.0, 3), (0.2, 1), (0.2, 3), (0.2, 4), (0.2, 16)])
def test_many_tokens_share_tiles(make_scene, assert_close, group: int, share: float):
    """Full tiles and one that is not, of tokens that choose differently."""
    scene = make_scene(num_kv_heads=1, group=group, sizes=UNEVEN, slot_of=(0,) * 21)
    scene.set_threshold(share)
    check_against_reference(scene, True, assert_close)
    look_ups, loaded, pairs, kept = scene.prefixes.counters[0, :4].tolist()
    assert pairs == 21 and look_ups == -(-21 // tokens_per_tile(21, group))
    assert kept == 0 if share == 0 else loaded < kept if group < 16 else True


def test_exact_and_squeezed_prefixes_beside_each_other(make_scene, assert_close):
    scene = make_scene(sizes=(UNEVEN[0], UNEVEN[0][:7]), slot_of=(1, 0, 1, 0, 0))
    scene.set_threshold(0.4)
    scene = scene.make_exact(0)
    check_against_reference(scene, True, assert_close)
    output = run(scene)
    for token in (1, 3, 4):
        assert_close(output[token], scene.dense(token))


def test_a_logit_soft_cap(make_scene, assert_close):
    scene = make_scene(sizes=UNEVEN, slot_of=(0, 0))
    scene.set_threshold(0.4)
    expected = scene.apply(squeezed_attention_reference, True, 1.5)
    assert_close(scene.apply(kernels.squeezed_attention, True, workspace_for(scene), 1.5), expected)
    uncapped = scene.apply(squeezed_attention_reference, True)
    assert not torch.allclose(expected, uncapped, rtol=0.05)


def test_tokens_of_one_request(make_scene, assert_close):
    """Several tokens of a row, which is not the first, between rows without a slot."""
    scene = make_scene(num_kv_heads=1, slot_of=(-1, 0, 0, 0, -1))
    scene.block_table[[0, 2, 3, 4]] = 10**6
    scene = scene.tile((-1, 0, -1), counts=(1, 3, 1))
    assert scene.queries.tokens[0, :3].tolist() == [1, 2, 3] and scene.queries.tiles[0, :3].tolist() == [0, 3, 1]
    scene.set_threshold(0.4)
    check_against_reference(scene, True, assert_close)


@pytest.mark.parametrize("rest", [True, False], ids=["rest", "drop"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("exact", [False, True], ids=["squeezed", "exact"])
def test_listed_suffixes(make_scene, assert_close, exact: bool, group: int, rest: bool):
    """What follows the prefixes is in pages too, instead of attended to beforehand: rows of tiles full and not."""
    slot_of = (0,) * 19 + (1, 1)
    scene = make_scene(num_kv_heads=1, group=group, sizes=(UNEVEN[0], (30, 6)), slot_of=slot_of, num_sinks=28)
    scene.set_threshold(0.3)
    if exact:
        scene = scene.make_exact(0)
    expected = scene.apply(squeezed_attention_reference, rest)
    listed = scene.list_suffixes(slot_of, (1,) * 21)
    assert_close(listed.apply(squeezed_attention_reference, rest), expected)
    check_against_reference(listed, rest, assert_close)


def test_tokens_see_no_further_than_themselves(make_scene, assert_close):
    """Rows of several tokens, of which one is in two tiles, beside a row that is not squeezed."""
    counts, slots = (3, 2, 4, 1), (0, -1, 0, 0)
    scene = make_scene(num_kv_heads=1, group=16, slot_of=(0,) * 3 + (-1,) * 2 + (0,) * 5, num_sinks=16)
    scene.set_threshold(0.4)
    tokens = [0, 1, 2, 5, 6, 7, 8, 9]
    output, lse = scene.suffix_output.clone(), scene.suffix_lse.clone()
    for first, count in ((0, 3), (5, 4)):
        query = scene.query[first : first + count].unflatten(1, (1, -1))
        attended, row_lse = attend_causal(query, *scene.suffix[first + count - 1], scene.scale)
        output[first : first + count] = attended.flatten(1, 2)
        lse[:, first : first + count] = row_lse.flatten(1).T
    before = dataclasses.replace(scene, suffix_output=output, suffix_lse=lse)
    scene.block_table[1:4] = scene.block_table[[5, 0, 0]]
    expected = before.tile(slots, counts).apply(squeezed_attention_reference, True)
    listed = scene.list_suffixes(slots, counts)
    assert listed.queries.tokens[:2, :4].tolist() == [tokens[:4], tokens[4:]]
    assert_close(run(listed)[tokens], expected[tokens])
    assert run(listed)[[3, 4]].isnan().all()


def test_slots_that_share_a_prefix(make_scene, assert_close):
    """Its rows at one threshold, at another, and exact, among slots that nobody is on and for which no tiles are made."""
    scene = make_scene(num_kv_heads=1, sizes=(UNEVEN[0],), slot_of=(0,) * 9, num_sinks=28)
    scene.set_threshold(0.5)
    facts = scene.prefixes.slots.repeat(12, 1)
    facts[7, 1:3] = torch.tensor([0, scene.keys[0].shape[1]])
    thresholds = scene.prefixes.log_threshold.repeat(12)
    thresholds[3] = torch.inf
    same = (tensor.repeat(12) for tensor in (scene.prefixes.lens, scene.prefixes.frames))
    shares = scene.prefixes.kept_shares.repeat(12)
    prefixes = Prefixes(facts, *same, thresholds, shares, scene.prefixes.counters.repeat(12, 1))
    several = dataclasses.replace(scene, prefixes=prefixes, keys=scene.keys * 12).tile((3, 0, 7, 0, 3, 7, 0, 0, 0))
    tiles = most_tiles(9, 12, several.group)
    several = dataclasses.replace(several, queries=several.queries.first(9, 3))
    assert most_tiles(9, 3, several.group) < tiles, "no tiles are spared"
    check_against_reference(several, True, assert_close)
    at_once = scene.apply(squeezed_attention_reference, True)
    output = run(several)
    assert_close(output[[1, 3, 6, 7, 8]], at_once[[1, 3, 6, 7, 8]])
    assert (several.prefixes.counters[[0, 3, 7]] > 0).any(1).all() and not several.prefixes.counters[[1, 2, 4]].any()


def test_other_tokens_stay_untouched(make_scene, assert_close):
    """Tokens without a slot keep their bits, also where there is room for more tokens than were matched."""
    scene = make_scene(num_kv_heads=1, slot_of=(-1, 0, -1, 0))
    scene.set_threshold(0.4)
    expected = scene.apply(squeezed_attention_reference, True)
    output = run(scene.tile(scene.slot_of, room=9))
    assert torch.equal(output[[0, 2]], scene.suffix_output[[0, 2]])
    assert_close(output[[1, 3]], expected[[1, 3]])


def test_no_tiles(make_scene):
    scene = make_scene(slot_of=(-1, -1))
    assert torch.equal(run(scene), scene.suffix_output)
    assert torch.equal(run(scene.tile((-1, -1), room=5)), scene.suffix_output)


def test_tiles_hold_no_more_tokens_than_there_are(make_scene):
    """Also where more were reckoned with, and every row has a slot."""
    scene = make_scene(num_kv_heads=1, slot_of=(0, 0))
    queries, starts = scene.queries, torch.arange(3, dtype=torch.int32, device=scene.query.device)
    slots = torch.zeros(2, dtype=torch.int64, device=scene.query.device)
    queries.fill(slots, starts, scene.block_table, scene.prefixes, 9, scene.group, scene.key_cache.shape[1])
    assert queries.tiles[0, :2].tolist() == [0, 2] and (queries.tiles[1:, 0] == -1).all()
    assert queries.tokens[0, :2].tolist() == [0, 1]


def test_tiles_made_for_fewer_tokens_than_the_launch(make_scene, assert_close):
    """As in a CUDA graph that was captured for more."""
    scene = make_scene(num_kv_heads=1, sizes=(UNEVEN[0], (3, 0, 41)), slot_of=(0, 1) * 2)
    scene.set_threshold(0.4)
    expected = scene.apply(squeezed_attention_reference, True)
    assert tokens_per_tile(4, scene.group) < tokens_per_tile(40, scene.group)
    assert_close(run(scene.tile(scene.slot_of, room=40)), expected)


def test_more_tiles_than_the_workspace_holds(make_scene, assert_close):
    scene = make_scene(num_kv_heads=1, group=16, slot_of=(0,) * 11)
    scene.set_threshold(0.4)
    for max_tiles in (1, 2, 3):
        check = dataclasses.replace(scene)
        expected = check.apply(squeezed_attention_reference, True)
        assert_close(run(check, workspace=workspace_for(scene, max_tiles)), expected)


@pytest.mark.parametrize(
    ("multiprocessors", "masses", "num_rows"),
    [(1, 1, 1), (4, 3, 1), (32, MAX_MASSES, 1), (32, MAX_MASSES, 9), (8, 6, 15)],
)
def test_any_number_of_programs(
    make_scene, assert_close, monkeypatch: pytest.MonkeyPatch, multiprocessors: int, masses: int, num_rows: int
):
    """Two blocks to choose from in a split, one of empty clusters alone, and more splits than are needed.

    The fewer of these are used the more tiles there are: one, three, or four, whose shares are as long as they get.
    """
    sizes = ((0,) * 600 + SIZES["more-than-a-block"][0] + (1,) * 200,)
    scene = make_scene(num_kv_heads=1, group=16, sizes=sizes, slot_of=(0,) * num_rows)
    scene.set_threshold(0.4)
    monkeypatch.setattr(workspaces, "INTERPRETED_MULTIPROCESSORS", multiprocessors)
    workspace = workspace_for(scene)
    if not scene.query.is_cuda:
        assert workspace.num_splits == masses * SPLITS_PER_MASS
        assert workspace.num_programs(2) == 2 * max(multiprocessors, 4)
    check_against_reference(scene, True, assert_close, workspace)


def test_programs_that_are_not_there_attract_nothing(make_scene, assert_close, monkeypatch: pytest.MonkeyPatch):
    """Three sum up groups, in the place of four; all that these attract is less than a logit of 0 would be."""
    scene = make_scene(num_kv_heads=1, group=1, slot_of=(0,))
    away, scales = packed(-60 * scene.query.sign())
    table = dataclasses.replace(
        scene.table,
        group_centroids=away.expand_as(scene.table.group_centroids).contiguous(),
        group_scales=scales.expand_as(scene.table.group_scales).contiguous(),
    )
    scene = dataclasses.replace(scene, table=table)
    scene.set_threshold(0.4)
    monkeypatch.setattr(workspaces, "INTERPRETED_MULTIPROCESSORS", 4)
    assert_close(run(scene), scene.apply(squeezed_attention_reference, True))


def test_runs_repeat_bit_for_bit_in_a_used_workspace(make_scene):
    """A second run finds what other prefixes left behind in the workspace."""
    scene = make_scene(num_kv_heads=1, sizes=(UNEVEN[0], (3, 0, 41)), slot_of=(0, 0, 1))
    scene.set_threshold(0.4)
    workspace = workspace_for(scene)
    first = run(scene, workspace=workspace)
    scene.block_table.copy_(scene.block_table.flip(0))
    run(scene.tile((1, -1, 0)), workspace=workspace)
    scene.block_table.copy_(scene.block_table.flip(0))
    assert torch.equal(run(scene, workspace=workspace), first)
    assert (workspace.turns[0] == 3).all()


@pytest.mark.parametrize("turns", [-2, 2**31 - 2])
def test_turns_begin_anew(make_scene, turns: int):
    """Tiles of few rows and of many; none is taken where there is no tile."""
    few, many = (make_scene(num_kv_heads=1, group=4, sizes=(UNEVEN[0],), slot_of=(0,) * rows) for rows in (3, 6))
    for scene in (few, many):
        scene.set_threshold(0.4)
    workspace = workspace_for(many)
    expected = [run(scene, workspace=workspace_for(scene)) for scene in (few, many)]
    workspace.turns.fill_(turns)
    for _ in range(2):
        for scene, output in zip((few, many), expected, strict=True):
            assert torch.equal(run(scene, workspace=workspace), output)
    assert workspace.turns[0].item() == (turns + 4 + 2**31) % 2**32 - 2**31
    assert (workspace.turns[1:] == turns).all()


def test_physical_pages_do_not_matter(make_scene):
    scene = make_scene()
    scene.set_threshold(0.4)
    expected = run(scene)
    order = torch.randperm(len(scene.key_cache), generator=torch.Generator().manual_seed(0)).to(scene.query.device)
    cache = torch.cat([scene.key_cache, scene.value_cache], -1)[order.argsort()]
    used = scene.block_table < len(order)
    block_table = torch.where(used, order[scene.block_table.where(used, 0).long()].int(), scene.block_table)
    head_size = scene.query.shape[-1]
    moved = dataclasses.replace(
        scene, key_cache=cache[..., :head_size], value_cache=cache[..., head_size:], block_table=block_table
    )
    assert torch.equal(run(moved.tile(scene.slot_of)), expected)


@needs_gpu
def test_cuda_graph_replays_over_new_contents(make_scene):
    scene = make_scene(sizes=(UNEVEN[0], (3, 0, 41)), slot_of=(0, 1, 0), dtype=torch.bfloat16)
    scene.set_threshold(0.4)
    workspace = workspace_for(scene)
    wanted, slots = run(scene, workspace=workspace), scene.queries.tiles[:, 0].clone()
    output = scene.suffix_output.clone()
    scene.queries.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.squeezed_attention(scene.query, output, *scene.operands(), True, workspace)
    graph.replay()
    assert torch.equal(output, scene.suffix_output)
    scene.queries.tiles[:, 0] = slots
    graph.replay()
    assert torch.equal(output, wanted)


@pytest.mark.parametrize("limit", ["max_tiles", "num_kv_heads", "head_size", "max_keys"])
def test_workspace_refuses_empty_sizes(limit: str):
    sizes = {"max_tiles": 1, "num_kv_heads": 1, "head_size": 64, "max_centroids": 10, "max_keys": 10} | {limit: 0}
    with pytest.raises(ValueError, match=f"{limit} must be at least 1, got 0"):
        Workspace.allocate(**sizes, device="cpu")


def test_workspace_refuses_too_many_tiles():
    with pytest.raises(ValueError, match="max_tiles must be at most 64, got 65"):
        Workspace.allocate(65, 1, 64, 10, 10, "cpu")


def test_workspace_counts_its_bytes():
    workspace = Workspace.allocate(1, 2, 64, 10, 20, "cpu")
    splits, programs = workspace.num_splits, workspace.num_programs(MAX_PROGRAMS_PER_MULTIPROCESSOR)
    centroids, keys = 16 + MAX_BLOCK, 32 + MAX_BLOCK
    assert workspace.logits.shape[-1] == centroids and workspace.list_places.shape[-1] == keys
    masses = workspace.masses.shape[2]
    assert splits == masses * SPLITS_PER_MASS
    per_split = 2 * (2 * masses * MAX_TILE_ROWS + splits * (NUM_ROW_FACTS * MAX_TILE_ROWS + 2 + 1)) + 2
    per_centroid = 2 * centroids * (MAX_TILE_ROWS + 1)
    words, bases = 2 * (2 * (centroids + keys // PART_KEYS) + keys), 2 * centroids * MAX_TILE_ROWS
    numbers = per_centroid + per_split + 2 * 2 * keys + 2 + programs * MAX_TILE_ROWS * 65
    assert workspace.nbytes == 2 * bases + 4 * numbers + 8 * words
