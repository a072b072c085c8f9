"""The oracle itself, against softmax attention written down once more in float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.kernels.conftest import Scene
from vllm_squeeze.kernels.reference import (
    attend_causal,
    attend_prefix,
    choose_clusters,
    merge,
    squeezed_attention_reference,
)
from vllm_squeeze.kernels.tables import MARGIN, MOST_RAISE, NEIGHBOURS, RULES

SIZES = ((5, 1, 9, 0, 30, 2, 17, 8, 24), (40, 3, 3))


def test_everything_chosen_is_dense_attention(make_scene, assert_close):
    scene = make_scene(sizes=SIZES, slot_of=(0, 1, 0))
    expected = torch.stack([scene.dense(token) for token in range(3)])
    assert_close(scene.apply(squeezed_attention_reference, True), expected)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_keys_and_values_in_8_bits(make_scene, assert_close, cache_dtype: torch.dtype):
    """Attention over a prefix in 8-bit floats is that over what they stand for."""
    scene = make_scene(sizes=SIZES, slot_of=(0, 1, 0), cache_dtype=cache_dtype)
    assert scene.key_cache.dtype == scene.value_cache.dtype == cache_dtype
    expected = torch.stack([scene.dense(token) for token in range(3)])
    assert_close(scene.apply(squeezed_attention_reference, True), expected)


@pytest.mark.parametrize("num_sinks", [0, 16])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("rule", RULES)
def test_rest_is_dense_attention_over_means(make_scene, assert_close, share: float, num_sinks: int, rule: str):
    """A cluster that was not chosen counts as if each of its keys and values were the cluster's mean; of one that was,
    keys that were not count for nothing. By other rules all of them are chosen."""
    scene = make_scene(sizes=SIZES, slot_of=(0, 1), num_sinks=num_sinks, rule=rule)
    scene.set_threshold(share)
    expected = torch.stack([scene.squeezed(token) for token in range(2)])
    assert_close(scene.apply(squeezed_attention_reference, True), expected)
    if share:
        ranks = [torch.cat(scene.key_ranks(0)[0]), scene.rank(0)[0].repeat_interleave(scene.table_of(0).sizes[0])]
        chosen, looked_at = (rank > float(scene.prefixes.log_threshold[0]) for rank in ranks)
        assert chosen.any() and not (chosen & ~looked_at).any() and (looked_at & ~chosen).any() == (rule == "keys")


def test_nothing_to_attend_leaves_the_suffix(make_scene):
    scene = make_scene(num_sinks=0)
    scene.set_threshold(0.0)
    assert torch.equal(scene.apply(squeezed_attention_reference, False), scene.suffix_output)


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("shared", [True, False], ids=["beside clusters", "alone"])
def test_a_prefix_without_clusters_is_attended_to_exactly(make_scene, assert_close, shared: bool, rest: bool):
    """Its tokens are all always attended ones; the table may have clusters of other prefixes, or none at all."""
    scene = make_scene(sizes=SIZES, slot_of=(0, 1), num_sinks=4)
    scene.prefixes.log_threshold[0] = torch.inf
    scene.prefixes.slots[0, 0] = 2
    scene = scene.make_exact(0)
    expected = torch.stack([scene.dense(token) for token in range(2)])
    if not shared:
        none = {
            name: tensor[:, :0] for name, tensor in vars(scene.table).items() if name not in ("frames", "directions")
        }
        scene = dataclasses.replace(scene, table=dataclasses.replace(scene.table, **none)).tile((0, -1))
        expected[1] = scene.suffix_output[1]
    assert_close(scene.apply(squeezed_attention_reference, rest), expected)
    assert scene.prefixes.counters[0].tolist() == [0, 0, 0, 0, scene.num_kv_heads, scene.num_kv_heads]


@pytest.mark.parametrize("rule", RULES)
def test_predicted_probabilities_sum_to_one(make_scene, rule: str):
    """Over clusters by the paper's rule, else over groups of neighbours, of their mean keys."""
    scene = make_scene(sizes=SIZES, slot_of=(0,), group=1, rule=rule)
    log_p, sizes = scene.log_p(0), scene.table_of(0).sizes
    if rule != "paper":
        groups = list(zip(log_p.split(NEIGHBOURS, 1), sizes.split(NEIGHBOURS, 1), strict=True))
        log_p = torch.stack([(of_group * size).sum(1) / size.sum(1) for of_group, size in groups], 1)
        sizes = torch.stack([size.sum(1) for _, size in groups], 1)
    # but for 4 bits of groups' means
    assert torch.allclose((log_p.exp() * sizes).sum(-1), torch.ones_like(log_p[:, 0]), rtol=5e-2)


def test_a_needle_is_always_chosen(make_scene):
    """A cluster far above the others is chosen at any threshold below 1 / N_i, by one query head of the group."""
    scene = make_scene(sizes=SIZES, slot_of=(0,))
    table = scene.table_of(0)
    table = dataclasses.replace(table, variances=torch.zeros_like(table.variances))  # else others choose more
    query = scene.query[:1].view(1, scene.num_kv_heads, scene.group, -1).clone()
    query[:, :, -1] = 30 * table.mean_keys()[:, 5]
    chosen = choose_clusters(query, table, torch.tensor(0.49).log().item(), scene.scale).clusters
    assert chosen[0, :, 5].all() and not chosen.all(-1).any()


def test_wide_clusters_are_raised_up_to_a_bound(make_scene):
    """By half the variance of their keys' logits: at a threshold in between, a wide cluster is chosen by that alone."""
    scene = make_scene(sizes=SIZES, slot_of=(0,), group=1)
    table = scene.table_of(0)
    none = torch.zeros_like(table.variances)
    query = scene.query.view(1, scene.num_kv_heads, 1, -1)
    per_nat = 2 / (query * scene.scale).square().sum(-1)[0]  # [H, 1], the variance that raises by a nat
    log_p = scene.log_p(0) + table.log_weights + MARGIN
    for wanted in (1.0, MOST_RAISE, 100.0):
        variances = none.clone()
        variances[:, 4] = wanted * per_nat[:, 0]
        wide = dataclasses.replace(table, variances=variances)
        for head in range(scene.num_kv_heads):
            raised = min(float(variances[head, 4]) / float(per_nat[head, 0]), MOST_RAISE)
            assert raised == pytest.approx(min(wanted, MOST_RAISE), rel=1e-5)
            for more, is_chosen in ((-1e-3, True), (1e-3, False)):
                log_threshold = float(log_p[head, 4]) + raised + more
                chosen = choose_clusters(query, wide, log_threshold, scene.scale).clusters
                assert chosen[0, head, 4] == is_chosen


def attend_all(
    scene: Scene, query: torch.Tensor, num_sinks: int, rest: bool, soft_cap: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """``attend_prefix`` of queries [R, H * G, D] over the first prefix."""
    heads = torch.arange(scene.num_kv_heads, device=query.device)[:, None]

    def read_tokens(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scene.keys[0][heads, positions], scene.values[0][heads, positions]

    query = query.reshape(len(query), scene.num_kv_heads, scene.group, -1)
    table = scene.table_of(0)
    log_threshold = float(scene.prefixes.log_threshold[0])
    return attend_prefix(query, table, read_tokens, log_threshold, num_sinks, scene.scale, rest, soft_cap)


@pytest.mark.parametrize("soft_cap", [0.0, 0.7], ids=["no cap", "a cap"])
def test_a_logit_soft_cap_bounds_the_logits_of_prefix_and_suffix(make_scene, assert_close, soft_cap: float):
    scene = make_scene(sizes=SIZES, slot_of=(0,))
    suffix_keys, suffix_values = scene.suffix[0]
    query = scene.query.view(1, scene.num_kv_heads, scene.group, -1)
    prefix_output, prefix_lse, *_ = attend_all(scene, scene.query, 16, True, soft_cap)
    output, lse = attend_causal(query, suffix_keys, suffix_values, scene.scale, soft_cap)
    keys = torch.cat([scene.keys[0], suffix_keys], 1).double()
    logits = query[0].double() @ keys.mT * scene.scale
    if soft_cap:
        logits = soft_cap * (logits / soft_cap).tanh()
    expected = logits.softmax(-1) @ torch.cat([scene.values[0], suffix_values], 1).double()
    assert_close(merge(output, lse, prefix_output, prefix_lse)[0], expected)


def test_a_logit_soft_cap_bounds_predicted_probabilities(make_scene):
    """As it bounds the logits of the keys that they stand for."""
    scene = make_scene(sizes=SIZES, slot_of=(0,))
    table = scene.table_of(0)
    query = 30 * scene.query.view(1, scene.num_kv_heads, scene.group, -1)
    scores = choose_clusters(query, table, 0.0, scene.scale).scores
    bound = choose_clusters(query, table, 0.0, scene.scale, 0.7).scores
    assert scores.abs().max() > 0.7 and torch.allclose(bound, 0.7 * (scores / 0.7).tanh())


def test_queries_together_as_one_by_one(make_scene, assert_close):
    """Each query attends to its own choice only, although keys are read for all of them."""
    scene = make_scene(sizes=SIZES, slot_of=(0, 0, 0), num_sinks=4)
    scene.set_threshold(0.4)
    output, lse, kept, loaded = attend_all(scene, scene.query, 4, True)
    alone = [attend_all(scene, scene.query[row : row + 1], 4, True) for row in range(3)]
    assert_close(output, torch.cat([part[0] for part in alone]))
    assert_close(lse, torch.cat([part[1] for part in alone]))
    assert torch.equal(kept, torch.cat([part[2] for part in alone]))
    assert kept.unique().numel() > 1
    assert (loaded >= kept.amax(0)).all() and (loaded <= kept.sum(0)).all()


def test_a_query_that_chooses_nothing_beside_others(make_scene):
    scene = make_scene(num_kv_heads=1, sizes=SIZES, slot_of=(0, 0), num_sinks=0)
    highest = torch.stack([torch.cat(scene.key_ranks(token)[0]).max() for token in range(2)])
    scene.prefixes.log_threshold[0] = highest.mean()
    output, lse, kept, loaded = attend_all(scene, scene.query, 0, False)
    nothing, something = int(highest.argmin()), int(highest.argmax())
    assert (output[nothing] == 0).all() and (lse[nothing] == -torch.inf).all() and not kept[nothing].any()
    assert output[something].isfinite().all() and kept[something].all()
    assert torch.equal(loaded, kept[something])


@pytest.mark.parametrize("share", [0, 1])
def test_counters_count_look_ups_pairs_and_keys(make_scene: Callable, share: int):
    scene = make_scene(sizes=SIZES, slot_of=(0, 1, 0, -1))
    scene.set_threshold(share)
    scene.apply(squeezed_attention_reference, True)
    heads, keys = scene.num_kv_heads, [sum(sizes) for sizes in SIZES]
    assert scene.prefixes.counters.tolist() == [
        [heads, share * heads * keys[0], 2 * heads, share * 2 * heads * keys[0], 0, 0],
        [heads, share * heads * keys[1], heads, share * heads * keys[1], 0, 0],
    ]
