"""Arms in place of the layers that serve on GPUs, against the oracle of what those compute."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality.arms import Reads, TorchLayer
from benchmarks.quality.selection import Arm, cost_of
from tests.kernels.conftest import build_scene, check_close
from vllm_squeeze.kernels.reference import squeezed_attention_reference
from vllm_squeeze.prefix_index.budget import ReadCost

SIZES = (5, 1, 9, 0, 30, 2, 17, 8, 24)
SINKS = 16
COST = ReadCost(
    num_tokens=SINKS + sum(SIZES),
    num_always=SINKS,
    num_clustered=sum(SIZES),
    num_centroids=len(SIZES),
    head_size=64,
    element_size=4,
    rest=True,
)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["as the model", "8 bits"])
def test_a_layer_on_a_device(monkeypatch: pytest.MonkeyPatch, cache_dtype: torch.dtype | None):
    """More tokens than are attended to at once, some of them on no prefix."""
    monkeypatch.setattr("benchmarks.quality.arms.TOKENS_AT_ONCE", 2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scene = build_scene(device, sizes=(SIZES,), num_sinks=SINKS, slot_of=(0, -1, 0, 0), cache_dtype=cache_dtype)
    scene.set_threshold(0.4)
    expected = scene.apply(squeezed_attention_reference, True)
    counted = scene.prefixes.counters[0].tolist()

    impl = SimpleNamespace(
        num_kv_heads=scene.num_kv_heads,
        scale=scene.scale,
        logits_soft_cap=None,
        table=scene.table,
        rows=SimpleNamespace(queries=scene.queries, block_table=scene.block_table, suffix_done=None),
        residency=SimpleNamespace(
            device=device,
            prefixes=scene.prefixes,
            room=SimpleNamespace(num_centroids=len(SIZES)),
            active={0: SimpleNamespace(covered=COST.num_tokens, num_sinks=SINKS)},
        ),
    )
    reads = Reads(cost_of(Arm(), COST))
    layer = TorchLayer("layer", impl, Arm(), float(scene.prefixes.log_threshold[0]), 1.0, reads)
    output = scene.suffix_output.clone()
    layer.on_device(scene.query, output, scene.suffix_lse, scene.key_cache, scene.value_cache, **scene.cache_scales)
    check_close(output, expected)
    assert torch.equal(output[1], scene.suffix_output[1])
    _, _, pairs, kept = counted[:4]
    assert reads.kept_shares() == [kept / pairs / COST.num_clustered]
    assert reads.budget_used() == pytest.approx(COST.budget_used(kept / pairs))
    assert 0 < reads.recalls()[0] < 1


def test_the_threshold_of_a_share():
    reads = Reads(cost_of(Arm(), COST), ranks=[torch.tensor([3.0, 1.0]), torch.tensor([4.0, 2.0, -torch.inf])])
    assert [reads.threshold(share) for share in (0.2, 0.6, 0.9)] == [3, 1, -torch.inf]
    assert reads.threshold(1) == -torch.inf
