"""The Triton kernels against the oracle, over shapes and clusters that do not fit their tiles."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.kernels.conftest import Scene
from vllm_squeeze.kernels import squeezed_attention as kernels
from vllm_squeeze.kernels import workspace as workspaces
from vllm_squeeze.kernels.reference import squeezed_attention_reference
from vllm_squeeze.kernels.workspace import MAX_SPLITS, Workspace, num_splits

UNEVEN = ((1, 70, 3, 11, 1, 1, 40, 6, 29) * 2,)
SIZES = {
    "one-token": ((1,),),
    "one-cluster": ((100,),),
    "single-tokens": ((1,) * 90,),
    "a-giant": ((2, 3, 250, 1, 4, 2, 3),),
    "empty-ones": ((0, 5, 0, 0, 60, 7, 0),),
    "only-empty": ((0, 0, 0),),
    "more-than-a-tile": (tuple(range(1, 25)) + (0,) * 50 + (2,) * 70,),
}


def workspace_for(scene: Scene, max_work: int = 4) -> Workspace:
    max_centroids = max(1, int(scene.prefixes.slots[:, 1].max()))
    head_size = scene.query.shape[-1]
    device = scene.query.device
    return Workspace.allocate(max_work, scene.num_kv_heads, scene.group, head_size, max_centroids, device)


def run(scene: Scene, rest: bool = True, workspace: Workspace | None = None) -> torch.Tensor:
    workspace = workspace_for(scene) if workspace is None else workspace
    return scene.apply(kernels.squeezed_attention, rest, workspace)


def check_against_reference(scene: Scene, rest: bool, assert_close: Callable) -> None:
    expected = scene.apply(squeezed_attention_reference, rest)
    counters = scene.prefixes.counters.clone()
    assert_close(run(scene, rest), expected)
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


def test_nothing_to_attend_leaves_the_suffix(make_scene):
    scene = make_scene(num_sinks=0)
    scene.set_threshold(0.0)
    assert torch.equal(run(scene, rest=False), scene.suffix_output)


def test_prefixes_beside_each_other(make_scene, assert_close):
    scene = make_scene(sizes=((3, 0, 41), UNEVEN[0]), slot_of=(1, 0, 1), group=3)
    scene.set_threshold(0.4)
    check_against_reference(scene, True, assert_close)
    assert scene.prefixes.counters[:, 0].tolist() == [2, 4]


def test_tokens_of_one_request(make_scene, assert_close):
    """Work items name their row of the block table, which is not the token's number."""
    scene = make_scene(num_kv_heads=1, slot_of=(0, 0, 0))
    rows = scene.work.clone()
    rows[:, 1] = 1
    scene.block_table[[0, 2]] = 10**6
    scene = dataclasses.replace(scene, work=rows)
    scene.set_threshold(0.4)
    check_against_reference(scene, True, assert_close)


@pytest.mark.parametrize("max_work", [1, 3])
def test_padding_and_other_tokens_stay_untouched(make_scene, assert_close, max_work: int):
    """Tokens without a slot keep their bits, in a list longer than the workspace and with padding at any place."""
    scene = make_scene(num_kv_heads=1, slot_of=(-1, 0, -1, 0))
    scene.set_threshold(0.4)
    expected = scene.apply(squeezed_attention_reference, True)
    counters = scene.prefixes.counters.clone()
    padding = scene.work.new_tensor([[10**6, 10**6, -1]])
    padded = torch.cat([padding, scene.work[:1], padding, padding, scene.work[1:], padding])
    scene = dataclasses.replace(scene, work=padded)
    output = run(scene, workspace=workspace_for(scene, max_work))
    assert torch.equal(output[[0, 2]], scene.suffix_output[[0, 2]])
    assert_close(output[[1, 3]], expected[[1, 3]])
    assert torch.equal(scene.prefixes.counters, counters)


def test_no_work(make_scene):
    scene = make_scene(slot_of=(-1, -1))
    assert torch.equal(run(scene), scene.suffix_output)


def test_long_work_lists_are_handled_in_chunks(make_scene, assert_close):
    scene = make_scene(num_kv_heads=1, slot_of=(0,) * 3)
    scene.set_threshold(0.4)
    expected = scene.apply(squeezed_attention_reference, True)
    for max_work in (1, 2, 3):
        assert_close(run(scene, workspace=workspace_for(scene, max_work)), expected)


@pytest.mark.parametrize("splits", [1, MAX_SPLITS])
def test_any_number_of_splits(make_scene, assert_close, monkeypatch: pytest.MonkeyPatch, splits: int):
    """Many tiles in one split, the first of empty clusters alone, and so many splits that most have nothing to do."""
    scene = make_scene(num_kv_heads=1, sizes=((0,) * 64 + SIZES["more-than-a-tile"][0],), slot_of=(0,))
    scene.set_threshold(0.4)
    monkeypatch.setattr(workspaces, "PROGRAMS_PER_MULTIPROCESSOR", splits)
    workspace = dataclasses.replace(workspace_for(scene), num_multiprocessors=1)
    assert workspace.num_splits(1) == splits
    assert_close(run(scene, workspace=workspace), scene.apply(squeezed_attention_reference, True))


def test_runs_repeat_bit_for_bit_in_a_used_workspace(make_scene):
    """A second run finds what other prefixes left behind in the workspace."""
    scene = make_scene(num_kv_heads=1, sizes=(UNEVEN[0], (3, 0, 41)), slot_of=(0, 0, 1))
    scene.set_threshold(0.4)
    workspace = workspace_for(scene)
    first = run(scene, workspace=workspace)
    run(dataclasses.replace(scene, work=scene.work.flip(0).contiguous()), workspace=workspace)
    assert torch.equal(run(scene, workspace=workspace), first)


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
    assert torch.equal(run(moved), expected)


@needs_gpu
def test_cuda_graph_replays_over_new_contents(make_scene):
    scene = make_scene(sizes=(UNEVEN[0], (3, 0, 41)), slot_of=(0, 1, 0), dtype=torch.bfloat16)
    scene.set_threshold(0.4)
    workspace = workspace_for(scene)
    wanted, work = run(scene, workspace=workspace), scene.work.clone()
    output = scene.suffix_output.clone()
    scene.work.fill_(-1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.squeezed_attention(scene.query, output, *scene.operands(), True, workspace)
    graph.replay()
    assert torch.equal(output, scene.suffix_output)
    scene.work.copy_(work)
    graph.replay()
    assert torch.equal(output, wanted)


@pytest.mark.parametrize("programs", [1, 8, 64, 528, 100_000])
def test_splits_fill_the_device(programs: int):
    splits = num_splits(programs, 132)
    assert 1 <= splits <= MAX_SPLITS and splits & (splits - 1) == 0
    assert splits == MAX_SPLITS or programs * splits >= 132


def test_workspace_refuses_empty_sizes():
    with pytest.raises(ValueError, match="max_work must be at least 1, got 0"):
        Workspace.allocate(0, 1, 1, 64, 10, "cpu")


def test_workspace_counts_its_bytes():
    workspace = Workspace.allocate(1, 2, 3, 64, 10, "cpu")
    splits = workspace.num_splits(1)
    assert workspace.max_work == 1 and workspace.max_centroids == 16
    assert workspace.nbytes == 4 * (2 * 3 * 16 + 2 * 16 + 2 * splits * (3 + 1 + 3 * 64 + 3))
