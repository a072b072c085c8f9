"""Dense attention over prefixes by a library: what goes into it and what comes out, against the oracle."""

import pytest
import torch

from tests.kernels.conftest import Scene, check_close, poisoned
from tests.kernels.test_squeezed_attention import needs_gpu
from vllm_squeeze.kernels.reference import (
    attend_seen,
    gather_queries_reference,
    join_shared_reference,
    places_of_tokens,
)
from vllm_squeeze.kernels.shared_prefix import gather_queries, join_shared
from vllm_squeeze.kernels.tiles import most_tiles, tokens_per_tile

SIZES = ((3, 9, 1, 30), (7, 20), (5,))
SHAPES = ((1, 1, 64), (2, 3, 128), (2, 4, 128), (1, 6, 256), (2, 7, 64), (3, 16, 8), (1, 2, 72))
SLOT_OF = (0, 2, -1, 0, 0, 2, -1, *(0,) * 25)


def attend(scene: Scene, gathered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a library makes of queries side by side; NaN where no token is."""
    output = poisoned(torch.empty_like(gathered))
    lse = poisoned(torch.empty(gathered.shape[1], len(gathered), device=gathered.device))
    for slot, (_, places) in places_of_tokens(scene.queries).items():
        query = gathered[places].unflatten(1, (scene.num_kv_heads, -1))
        seen = torch.ones(len(places), scene.keys[slot].shape[1], dtype=torch.bool, device=query.device)
        attended, log_sum = attend_seen(query, scene.keys[slot], scene.values[slot], seen, scene.scale)
        output[places], lse[:, places] = attended.flatten(1, 2).to(output.dtype), log_sum.flatten(1).T
    return output, lse


def run(scene: Scene, gather, join) -> torch.Tensor:
    output = scene.suffix_output.clone()
    scene.prefixes.counters.zero_()
    attended = attend(scene, gather(scene.query, scene.queries, scene.group))
    join(output, scene.suffix_lse, *attended, scene.queries, scene.prefixes, scene.num_kv_heads)
    return output


@pytest.mark.parametrize(
    ("shape", "dtype", "room"),
    [
        *((shape, torch.float32, None) for shape in SHAPES),
        *((shape, torch.float32, 100) for shape in SHAPES[2:4]),
        *((shape, torch.float16, None) for shape in SHAPES[2:4]),
        *(pytest.param(shape, torch.bfloat16, 100, marks=needs_gpu) for shape in SHAPES),
    ],
    ids=lambda value: "H{}-G{}-D{}".format(*value) if isinstance(value, tuple) else str(value).split(".")[-1],
)
def test_is_attention_to_everything(make_scene, shape: tuple[int, int, int], dtype: torch.dtype, room: int | None):
    """Of tokens of two prefixes that stand in any order, in more than one tile; a third has none."""
    num_kv_heads, group, head_size = shape
    sizes = {"num_kv_heads": num_kv_heads, "group": group, "head_size": head_size, "sizes": SIZES}
    scene = make_scene(**sizes, slot_of=SLOT_OF, dtype=dtype).tile(SLOT_OF, room=room)
    output = run(scene, gather_queries, join_shared)
    expected = scene.suffix_output.double()
    on_prefix = [token for token, slot in enumerate(SLOT_OF) if slot >= 0]
    expected[on_prefix] = torch.stack([scene.dense(token) for token in on_prefix])
    check_close(output, expected)
    others = [token for token, slot in enumerate(SLOT_OF) if slot < 0]
    assert torch.equal(output[others], scene.suffix_output[others])
    counters = scene.prefixes.counters.clone()
    # a pass of each head for each prefix, however many tiles there are
    passes, pairs = [num_kv_heads, 0, num_kv_heads], [28 * num_kv_heads, 0, 2 * num_kv_heads]
    assert counters.tolist() == [[0] * 4 + [*both] for both in zip(passes, pairs, strict=True)]
    check_close(run(scene, gather_queries_reference, join_shared_reference), expected)
    assert torch.equal(scene.prefixes.counters, counters)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float8_e4m3fn, marks=needs_gpu)])
def test_queries_are_put_side_by_side(make_scene, dtype: torch.dtype):
    scene = make_scene(num_kv_heads=1, sizes=SIZES, slot_of=SLOT_OF)
    query = scene.query.to(dtype)
    gathered, expected = (gather(query, scene.queries, 4) for gather in (gather_queries, gather_queries_reference))
    assert len(gathered) == most_tiles(30, 3, 4) * tokens_per_tile(30, 4) >= len(expected)
    for tokens, places in places_of_tokens(scene.queries).values():
        for found in (gathered, expected):
            assert torch.equal(found[places].float(), query[tokens].float())


def test_a_step_without_tokens_changes_nothing(make_scene):
    scene = make_scene(num_kv_heads=1, slot_of=(0, 0)).tile((-1, -1), room=8)
    assert torch.equal(run(scene, gather_queries, join_shared), scene.suffix_output)
    assert not scene.prefixes.counters.any()
