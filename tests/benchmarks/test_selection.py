"""Ways to choose what of a prefix is read, on clusters of random keys."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.quality.selection import Arm, Prefix, attend, cost_of, parse, rank, unit_scores, units_of
from tests.prefix_index.small_index import COST
from vllm_squeeze.kernels.reference import attend_prefix, capped, choose_clusters
from vllm_squeeze.kernels.tables import (
    MARGIN,
    MOST_RAISE,
    ClusterTable,
    frame_of,
    group_means,
    packed,
    packed_keys,
    unpacked_keys,
)
from vllm_squeeze.prefix_index.budget import KeyCost
from vllm_squeeze.prefix_index.clustering import cluster_keys, logit_residuals
from vllm_squeeze.prefix_index.manifest import IndexParameters

HEADS, GROUP, SIZE, TOKENS, SINKS = 2, 3, 16, 272, 16
KEYS = TOKENS - SINKS
LEFT_OUT = 3  # the last clustered tokens, which no whole block holds


@pytest.fixture(scope="module")
def query() -> torch.Tensor:
    return torch.randn(5, HEADS, GROUP, SIZE, generator=torch.Generator().manual_seed(1)) * 2


@pytest.fixture(scope="module")
def prefix() -> Prefix:
    generator = torch.Generator().manual_seed(0)
    window = 8
    keys, values = torch.randn(2, HEADS, TOKENS + LEFT_OUT + window, SIZE, generator=generator)
    found = cluster_keys(keys, values, IndexParameters(centroids=0.1, num_sinks=SINKS, observation_window=window))
    sizes = found.sizes.clone()
    covered = found.members < TOKENS
    for head, cluster in (~covered).nonzero():
        sizes[head, torch.searchsorted(found.starts[head], cluster, right=True) - 1] -= 1
    # and an empty cluster at the end, as a layer with fewer clusters than another has
    empty = [torch.nn.functional.pad(c, (0, 0, 0, 1)) for c in (found.centroids, found.value_centroids)]
    starts = torch.nn.functional.pad(found.starts, (0, 1), value=found.members.shape[1])
    sizes = torch.nn.functional.pad(sizes, (0, 1))
    frame = frame_of(empty[0], sizes)
    vectors = *packed_keys(empty[0], frame), *packed(empty[1])
    log_weights = torch.randn(sizes.shape, generator=generator)
    variances = torch.rand(sizes.shape, generator=generator) * 3
    as_read = unpacked_keys(*vectors[:2], frame)
    along = torch.randn(HEADS, 5, GROUP, SIZE, generator=generator)
    residuals, directions = logit_residuals(keys, found, as_read[:, :-1], along)
    facts = log_weights, variances, starts, sizes, sizes.log(), found.members, residuals
    groups = group_means(as_read, sizes, frame)
    table = ClusterTable(*vectors, *facts, *groups, frame[:, None], directions[:, None])
    return Prefix(keys[:, :TOKENS], values[:, :TOKENS], table, SINKS, SIZE**-0.5)


def run(arm: str | Arm, query: torch.Tensor, prefix: Prefix, threshold: float, share: float = 0.25):
    arm = parse(arm) if isinstance(arm, str) else arm
    return attend(arm, query, prefix, units_of(arm, prefix), threshold, share, torch.Generator().manual_seed(0))


def by_oracle(arm: Arm, query: torch.Tensor, prefix: Prefix, threshold: float, rule: str):
    """What the server attends to, of an index that has no weights or no raises where the arm passes over these."""
    table, heads = prefix.table, torch.arange(HEADS)[:, None]
    if arm.plain:
        table = replace(table, log_weights=torch.zeros_like(table.log_weights))
    if not arm.spread:
        table = replace(table, variances=torch.zeros_like(table.variances))
    return attend_prefix(
        query,
        table,
        lambda positions: (prefix.keys[heads, positions], prefix.values[heads, positions]),
        threshold,
        SINKS,
        prefix.scale,
        arm.rest,
        prefix.soft_cap,
        rule,
    )


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("name", ["ours", "ours+whole", "ours+mean", "ours+drop", "ours+plain", "ours+flat", "paper"])
def test_the_built_in_rules_are_those_of_the_oracle(query, prefix, name: str, soft_cap: float):
    prefix, arm, threshold = replace(prefix, soft_cap=soft_cap), parse(name), -math.log(KEYS)
    found = run(arm, query, prefix, threshold)
    output, lse, kept, _ = by_oracle(arm, query, prefix, threshold, arm.rule)
    assert 0 < kept.float().mean() < KEYS
    assert torch.equal(found.kept, kept) and torch.equal((found.ranks > threshold).sum(-1), kept)
    torch.testing.assert_close(found.output, output)
    torch.testing.assert_close(found.lse, lse)


def test_whole_clusters_have_all_of_their_keys_chosen(query, prefix):
    """Of those that are looked at where keys are chosen for themselves, which are fewer; the same contribute else."""
    threshold = -math.log(KEYS)
    whole, ours = run("ours+whole", query, prefix, threshold - MARGIN), run("ours", query, prefix, threshold)
    looked_at = choose_clusters(query, prefix.table, threshold, prefix.scale).clusters
    assert torch.equal(whole.kept, (looked_at * prefix.table.sizes).sum(-1))
    of_key = units_of(parse("ours"), prefix).of_key.expand(len(query), -1, -1)
    assert torch.equal(whole.ranks > threshold - MARGIN, looked_at.gather(-1, of_key))
    assert (ours.ranks <= whole.ranks + MARGIN).all() and (ours.ranks < whole.ranks + MARGIN).float().mean() > 0.5
    assert (ours.kept < whole.kept).all()


@pytest.mark.parametrize("option", ["mean", "topk", "topp", "variance", "tile", "wide", "whole"])
def test_arms_whose_clusters_are_chosen_whole(query, prefix, option: str):
    """All keys of a cluster have its rank, and residuals are neither told of nor paid for."""
    arm = parse(f"ours+{option}")
    units = units_of(arm, prefix)
    ranks = run(arm, query, prefix, -math.log(KEYS)).ranks
    of_first = torch.stack([(units.of_key == unit).int().argmax(-1) for unit in range(units.sizes.shape[1])], -1)
    first = of_first.gather(-1, units.of_key).expand(len(query), -1, -1)
    assert torch.equal(ranks, ranks.gather(-1, first))
    assert units.residuals is None and cost_of(arm, COST).keys == KeyCost(260, 0, 0)


def test_keys_chosen_for_themselves_are_worth_more_than_whole_clusters(query, prefix):
    recall = {}
    for name in ("ours", "ours+whole"):
        ranks = run(name, query, prefix, -math.inf).ranks
        found = run(name, query, prefix, float(ranks.quantile(0.75)))
        assert found.kept.float().mean() == pytest.approx(KEYS / 4, rel=0.1)
        recall[name] = (found.exact_lse - found.whole_lse).exp().mean()
    assert recall["ours"] > recall["ours+whole"] + 0.05


@pytest.mark.parametrize(
    "name", ["ours", "paper", "oracle", "pages", "random", "ours+topp", "ours+wide", "ours+plain", "pages+mean"]
)
def test_everything_chosen_is_dense_attention(query, prefix, name: str):
    found = run(name, query, prefix, -math.inf)
    logits = torch.einsum("rhgd,htd->rhgt", query, prefix.keys) * prefix.scale
    torch.testing.assert_close(found.output, torch.einsum("rhgt,htd->rhgd", logits.softmax(-1), prefix.values))
    torch.testing.assert_close(found.exact_lse, found.whole_lse)
    assert (found.kept == KEYS).all()


def test_the_oracle_chooses_the_most_likely_keys(query, prefix):
    one = query[:, :, :1]  # of a single query head, nothing is to be joined
    found = run("oracle", one, prefix, -40)
    assert (found.kept == 40).all()
    logits = torch.einsum("rhgd,htd->rhgt", one, prefix.keys) * prefix.scale
    best = logits[..., SINKS:].sort(descending=True).values[..., :40]
    expected = torch.cat([logits[..., :SINKS], best], -1).logsumexp(-1)
    torch.testing.assert_close(found.exact_lse, expected)


def test_what_is_chosen_by_truth_is_worth_more_than_by_clusters_and_by_lot(query, prefix):
    recall = {}
    for name in ("oracle", "ours+topk", "random+topk"):
        threshold = {"random+topk": 0.75}.get(name, -KEYS / 4)
        found = run(name, query, prefix, threshold)
        assert found.kept.float().mean() == pytest.approx(KEYS / 4, rel=0.15)
        recall[name] = (found.exact_lse - found.whole_lse).exp().mean()
    assert recall["oracle"] > recall["ours+topk"] + 0.05 and recall["ours+topk"] > recall["random+topk"] + 0.05


def test_scores_of_pages_bound_those_of_their_keys(query, prefix):
    units = units_of(parse("pages"), prefix)
    bounds = unit_scores(query, units, prefix).gather(-1, units.of_key[None, :, None].expand(5, -1, GROUP, -1))
    logits = capped(torch.einsum("rhgd,htd->rhgt", query, prefix.keys[:, SINKS:]) * prefix.scale, 0)
    assert (bounds >= logits - 1e-5).all()
    assert (units.sizes == 16).all()


def test_top_p_stays_between_floor_and_cap(query, prefix):
    for threshold, bound in ((0.0, 0.25), (-2.0, 4.0)):  # no mass at all, and all of it
        kept = run("ours+topp", query, prefix, threshold, share=0.1).kept
        # a cluster is chosen as a whole
        largest = prefix.table.sizes.max()
        assert (kept >= bound * 0.1 * KEYS).all() and (kept <= bound * 0.1 * KEYS + largest).all()
    free = run("ours+topp", query, prefix, -0.3, share=0.1).kept
    assert free.float().std() > 1, "as many keys whatever the mass"


def test_spread_raises_wide_clusters(query, prefix):
    """By half the variance of logits; where scores themselves are raised, the mass takes part of it back from all."""
    one = query[:, :, :1]  # of a single query head, nothing is to be joined
    arms = [parse(name) for name in ("ours+flat", "ours", "ours+variance")]
    units = units_of(arms[1], prefix)
    scores, lots = unit_scores(one, units, prefix), torch.Generator()
    flat, ours, variance = (rank(arm, one, scores, units, prefix, 1, lots) for arm in arms)
    expected = (one * prefix.scale).square().sum(-1) * units.variances / 2
    occupied = (units.sizes > 0).expand_as(flat)
    torch.testing.assert_close((ours - flat)[occupied], expected.clamp(max=MOST_RAISE)[occupied])
    assert (expected > MOST_RAISE).any() and (expected < MOST_RAISE).any()
    taken_back = (expected - (variance - flat)).masked_fill(~occupied, torch.nan)
    assert (taken_back.nan_to_num(torch.inf) > 0).all()
    torch.testing.assert_close(taken_back.nan_to_num(-torch.inf).amax(-1), taken_back.nan_to_num(torch.inf).amin(-1))


def test_a_tile_has_one_choice(query, prefix):
    many = query.repeat(10, 1, 1, 1)
    kept = run("ours+tile", many, prefix, -math.log(KEYS)).kept
    size = 16  # tokens of a tile of the kernels: 64 rows of 4 padded query heads
    assert all((tile == tile[0]).all() for tile in kept.split(size))
    assert (kept >= run("ours+whole", many, prefix, -math.log(KEYS)).kept).all()


def test_bytes_of_arms():
    always = 116 * 256
    framed = always + (2 + 16) * 64 * 4
    grouped = framed + 13 * (32 + 4 + 4)
    assert cost_of(parse("ours"), COST).fixed_bytes == COST.fixed_bytes == grouped + 50 * (32 + 32 + 8 + 20)
    assert cost_of(parse("ours+each"), COST).fixed_bytes == framed + 50 * (32 + 32 + 8 + 20)
    assert cost_of(parse("ours+variance"), COST).fixed_bytes == framed + 50 * (32 + 32 + 8 + 20)
    assert cost_of(parse("ours+drop"), COST).fixed_bytes == grouped + 50 * (32 + 4 + 20)
    assert cost_of(parse("ours+wide"), COST).fixed_bytes == grouped + 50 * (256 + 20)
    assert cost_of(parse("ours+plain"), COST).fixed_bytes == grouped + 50 * (32 + 32 + 8 + 16)
    assert cost_of(parse("ours+flat"), COST).fixed_bytes == grouped + 50 * (32 + 32 + 8 + 16)
    assert cost_of(parse("paper"), COST).fixed_bytes == framed + 50 * (32 + 4 + 12)
    assert cost_of(parse("oracle"), COST).fixed_bytes == always
    assert cost_of(parse("pages"), COST).fixed_bytes == always + 56 * 256
    assert cost_of(parse("ours+whole"), COST).fixed_bytes == COST.fixed_bytes
    per_key = {
        "ours": KeyCost(260, 32, 884 * 8),
        "ours+drop": KeyCost(260, 32, 884 * 8),
        "ours+each": KeyCost(260, 32, 884 * 8),
        "paper": KeyCost(260, 0, 0),
        "random": KeyCost(260, 0, 0),
        "oracle": KeyCost(256, 0, 0),
        "pages": KeyCost(256, 0, 0),
    }
    assert {name: cost_of(parse(name), COST).keys for name in per_key} == per_key
    served_by_the_papers_rule = replace(COST, by_key=False)
    assert {name: cost_of(parse(name), served_by_the_papers_rule).keys for name in per_key} == per_key


def test_shares_meet_budgets():
    cost = cost_of(parse("ours"), COST)
    assert cost.budget_used(cost.share(0.3)) == pytest.approx(0.3)
    assert cost.share(1) == 1
    with pytest.raises(ValueError, match=r"budget: 0.1 is less than the 0.154"):
        cost.share(0.1)


@pytest.mark.parametrize("name", ["best", "ours+worse", "oracle+wide", "pages+variance", ""])
def test_names_that_are_none(name: str):
    with pytest.raises(ValueError, match="is no arm"):
        parse(name)
