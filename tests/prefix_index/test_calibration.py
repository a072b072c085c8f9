import math
from dataclasses import replace

import pytest
import torch

from vllm_squeeze.kernels.reference import attend_prefix
from vllm_squeeze.kernels.tables import (
    LEAST_PACKED,
    MARGIN,
    MOST_RAISE,
    NUM_DIRECTIONS,
    RULES,
    ClusterTable,
    elements_of,
    group_means,
    packed_keys,
    unpacked_keys,
    words_of,
)
from vllm_squeeze.prefix_index import calibration
from vllm_squeeze.prefix_index.calibration import (
    BIN_WIDTH,
    COUNTED_KEYS,
    LEAST_SHARE,
    LEVEL,
    LEVEL_SHARE,
    LOWEST,
    NUM_BINS,
    Choosable,
    attention_histogram,
    level,
    log_threshold,
    moved,
    recall,
    score_histogram,
    threshold_curve,
)
from vllm_squeeze.prefix_index.manifest import check_thresholds

SCALE = 0.25
FRAME = torch.stack([torch.linspace(-1, 2, 16), torch.logspace(-0.5, 0, 16)])


def frames(num_rows: int) -> torch.Tensor:
    return FRAME.expand(num_rows, 2, 16)


def case(
    num_rows: int = 3,
    num_queries: int = 90,
    group: int = 5,
    num_centroids: int = 63,
    num_members: int = 1500,
    **options,
) -> tuple[torch.Tensor, Choosable]:
    """Queries of very different sharpness, and clusters of which some rows lack the last."""
    generator = torch.Generator().manual_seed(42)
    query = torch.randn(num_rows, num_queries, group, 16, generator=generator)
    query *= torch.linspace(0.3, 3, num_queries)[:, None, None]
    centroids = torch.randn(num_rows, num_centroids, 16, generator=generator)
    large = torch.rand(num_rows, num_centroids, generator=generator)
    for row in range(num_rows):
        large[row, num_centroids - row :] = 0
        centroids[row, num_centroids - row :] = 0
    cluster_of = large.multinomial(num_members, replacement=True, generator=generator)
    sizes = torch.stack([of_row.bincount(minlength=num_centroids) for of_row in cluster_of]).int()
    return query, choosable(centroids, sizes, **options)


def choosable(centroids: torch.Tensor, sizes: torch.Tensor, **options) -> Choosable:
    """Clusters with some weight and some spread for each, and keys that lie somewhere beside their centroids."""
    generator, num_rows = torch.Generator().manual_seed(1), len(sizes)
    elements = torch.randint(LEAST_PACKED, 8, (num_rows, int(sizes[0].sum()), NUM_DIRECTIONS), generator=generator)
    directions = torch.randn(num_rows, NUM_DIRECTIONS, 16, generator=generator) / 16
    centroids = as_stored(centroids)
    # the same wherever a cluster is; of some raises are bounded
    facts = centroids.sum(-1) / 4, centroids[..., 0].square()
    return Choosable(
        centroids, frames(num_rows), *facts, sizes, words_of(elements), directions, **{"scale": SCALE, **options}
    )


def as_stored(centroids: torch.Tensor) -> torch.Tensor:
    """What is read back from 4 bits stays as it is when stored once more."""
    frame = frames(len(centroids))
    return unpacked_keys(*packed_keys(centroids, frame), frame)


def rows_of(clusters: Choosable, rows: slice) -> Choosable:
    tensors = {name: value[rows] for name, value in vars(clusters).items() if isinstance(value, torch.Tensor)}
    return replace(clusters, **tensors)


def table(clusters: Choosable, members: torch.Tensor | None = None) -> ClusterTable:
    """The same clusters as kernels read them."""
    sizes, frame = clusters.sizes, clusters.frame
    if members is None:
        members = torch.arange(clusters.residuals.shape[1], dtype=torch.int32).expand(len(sizes), -1)
    vectors = packed_keys(clusters.centroids, frame)
    starts = sizes.cumsum(1, dtype=torch.int32) - sizes
    facts = clusters.log_weights, clusters.variances, starts, sizes, sizes.log(), members, clusters.residuals
    groups = group_means(clusters.centroids, sizes, frame)
    return ClusterTable(*vectors, *vectors, *facts, *groups, frame[:, None], clusters.directions[:, None])


def kept_share(query: torch.Tensor, clusters: Choosable, threshold: float) -> float:
    """Of clustered keys, those that attention attends to."""
    softmax = clusters.scale, False, clusters.soft_cap, clusters.rule
    num_kept, of_kernels = 0, table(clusters)
    for tokens in query.transpose(0, 1).split(50):
        *_, kept, _ = attend_prefix(tokens, of_kernels, nothing_at, threshold, 0, *softmax)
        num_kept += int(kept.sum())
    return num_kept / (query.shape[1] * int(clusters.sizes.sum()))


def nothing_at(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at positions [H, M], of which nothing is asked but how many they are."""
    return torch.zeros(2, *positions.shape, 16).unbind()


@pytest.mark.parametrize("share", [0.97, 0.9, 0.7, 0.5, 0.33, 0.2, 0.125, 0.1, 0.05, 0.02, 0.01, 0.005])
@pytest.mark.parametrize("rule", RULES)
def test_threshold_keeps_its_share(share, rule):
    """On the queries that it was calibrated on, the oracle keeps what was asked for."""
    query, clusters = case(num_queries=150, num_centroids=200, rule=rule)
    threshold = log_threshold(threshold_curve(score_histogram(query, clusters)), share)
    within_a_bin = [kept_share(query, clusters, threshold + side * BIN_WIDTH) for side in (1, -1)]
    assert kept_share(query, clusters, threshold) == pytest.approx(share, rel=0.02) or (
        within_a_bin[0] <= share <= within_a_bin[1]
    )


@pytest.mark.parametrize(
    ("soft_cap", "edges"), [(0.0, (1988, 2238, 2488, 2648)), (2.0, (2155, 2238, 2321, 2338))], ids=["no cap", "a cap"]
)
@pytest.mark.parametrize("rule", RULES)
def test_histogram_counts_what_the_oracle_chooses(soft_cap, edges, rule):
    query, clusters = case(soft_cap=soft_cap, rule=rule)
    histogram = score_histogram(query, clusters)
    total = int(query.shape[1] * clusters.sizes.sum())
    assert histogram.dtype == torch.int64
    assert histogram.shape == (NUM_BINS,)
    assert int(histogram.sum()) == total
    for edge in edges:
        share = kept_share(query, clusters, LOWEST + edge * BIN_WIDTH)
        assert 0 < share < 1
        # a key may fall on the other side of an edge by rounding
        assert float(histogram[edge:].sum() / total) == pytest.approx(share, abs=1e-3)


def thresholds_by_hand(query: torch.Tensor, clusters: Choosable) -> list[float]:
    """The log threshold up to which each key is chosen, of one KV head, by its definition, key by key.

    Args:
        query: [W, G, D].
        clusters: of one KV head, joined by the largest.
    """
    *vectors, group_sizes = group_means(clusters.centroids, clusters.sizes, clusters.frame)
    mean_keys, group_sizes = unpacked_keys(*vectors, clusters.frame)[0].double(), group_sizes[0]
    elements, directions = elements_of(clusters.residuals[0]).double(), clusters.directions[0].double()
    ends, found = clusters.sizes[0].cumsum(0).tolist(), []
    for of_token in query.double():
        masses = [(group_sizes * (mean_keys @ head * SCALE).exp()).sum() for head in of_token]
        for key, element in enumerate(elements):
            cluster = next(number for number, end in enumerate(ends) if key < end)
            weight, spread = (facts[0, cluster].double() for facts in (clusters.log_weights, clusters.variances))
            of_cluster, of_key = [], []
            for head, mass in zip(of_token, masses, strict=True):
                log_p = clusters.centroids[0, cluster].double() @ head * SCALE - mass.log()
                raised = (head * SCALE).square().sum() * spread / 2
                of_cluster.append(log_p + min(float(raised), MOST_RAISE))
                aimed = directions @ head
                unit = aimed.abs().max() / 127
                of_key.append(log_p + element @ ((aimed / unit).round() * unit) * SCALE)
            found.append(float(weight + min(max(of_cluster) + MARGIN, max(of_key))))
    return found


def test_keys_count_where_their_definition_puts_them():
    """Some for themselves, others where their cluster is looked at no more."""
    query, clusters = case(num_rows=1, num_queries=6, group=3, num_centroids=20, num_members=120)
    expected = (torch.tensor(thresholds_by_hand(query[0], clusters)) - LOWEST) / BIN_WIDTH
    bins = clusters.bins(0, query[0], torch.arange(120)).flatten()
    assert ((bins <= expected + 0.01) & (expected < bins + 1.01)).all()
    assert torch.equal(score_histogram(query, clusters), bins.bincount(minlength=NUM_BINS))
    alone = replace(clusters, variances=torch.full_like(clusters.variances, 1e9))
    for_themselves = (
        clusters.bins(0, query[0], torch.arange(120)) == alone.bins(0, query[0], torch.arange(120))
    ).float()
    assert 0.2 < for_themselves.mean() < 0.98


def test_joined_by_the_mean_keys_are_chosen_with_their_cluster():
    """Whatever they are like, and their cluster counts as often as it has keys."""
    query, clusters = case(rule="paper")
    histogram = score_histogram(query, clusters)
    others = replace(clusters, residuals=clusters.residuals.flip(1), directions=clusters.directions * 5)
    assert torch.equal(score_histogram(query, others), histogram)
    bins = clusters.bins(0, query[0], torch.arange(1500))
    first = 0
    for size in clusters.sizes[0].tolist():
        assert (bins[:, first : first + size] == bins[:, first : first + 1]).all()
        first += size
    by_key = score_histogram(query, replace(clusters, rule="keys"))
    assert not torch.equal(by_key, score_histogram(query, replace(others, rule="keys")))


def test_of_many_keys_some_count():
    """At equal distances, so that each cluster counts by its size."""
    query, clusters = case(num_queries=30, num_centroids=200, num_members=3 * COUNTED_KEYS - 100)
    assert clusters.residuals.shape[1] > 2 * COUNTED_KEYS
    histogram = score_histogram(query, clusters)
    assert int(histogram.sum()) == query.shape[0] * query.shape[1] * COUNTED_KEYS
    everything = torch.arange(clusters.residuals.shape[1])
    bins = [clusters.bins(row, query[row], everything) for row in range(len(query))]
    whole = torch.cat(bins).flatten().bincount(minlength=NUM_BINS)
    counted, all_of_them = (counts.cumsum(0) / counts.sum() for counts in (histogram, whole))
    assert (counted - all_of_them).abs().max() < 0.01
    curve = threshold_curve(histogram)
    for share in (0.5, 0.2, 0.1, 0.05, 0.02):
        assert kept_share(query, clusters, log_threshold(curve, share)) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("num_members", [1, COUNTED_KEYS, COUNTED_KEYS + 1])
def test_no_more_keys_count_than_may(num_members):
    query, clusters = case(num_rows=2, num_queries=3, num_members=num_members)
    assert int(score_histogram(query, clusters).sum()) == 2 * 3 * min(num_members, COUNTED_KEYS)


@pytest.mark.parametrize("memory_bytes", [1, 1 << 20, 1 << 30])
@pytest.mark.parametrize("split", [1, 3])
def test_histograms_add_up(split, memory_bytes):
    query, clusters = case()
    whole = score_histogram(query, clusters)
    parts = [
        score_histogram(query[rows], rows_of(clusters, rows), memory_bytes)
        for rows in (slice(None, split), slice(split, None))
    ]
    assert torch.equal(whole, parts[0] + parts[1])
    assert torch.equal(whole, parts[1] + parts[0])


def test_empty_clusters_do_not_count():
    query, clusters = case(num_rows=1)
    padded = {
        "centroids": torch.full_like(clusters.centroids, 9.0),
        "log_weights": torch.full_like(clusters.log_weights, 36.0),
        "variances": torch.full_like(clusters.variances, 81.0),
        "sizes": torch.zeros_like(clusters.sizes),
    }
    padded = {name: torch.cat([getattr(clusters, name), more], 1) for name, more in padded.items()}
    assert torch.equal(score_histogram(query, replace(clusters, **padded)), score_histogram(query, clusters))


def test_half_precision_is_scored_in_float32():
    query, clusters = case()
    query, rounded = query.bfloat16(), clusters.centroids.bfloat16()
    assert torch.equal(
        score_histogram(query, replace(clusters, centroids=rounded)),
        score_histogram(query.float(), replace(clusters, centroids=rounded.float())),
    )


@pytest.mark.parametrize("rule", RULES)
def test_scores_below_the_lowest_bin_count_in_it(rule):
    query, clusters = case(num_rows=1, rule=rule)
    histogram = score_histogram(query * 1000, clusters)
    assert int(histogram.sum()) == int(query.shape[1] * clusters.sizes.sum())
    if rule == "paper":
        assert histogram[0] > histogram.sum() // 2
    else:
        assert histogram[0] + histogram[-1] > histogram.sum() * 0.9


@pytest.mark.parametrize("sharpness", [0.0, 0.1, 1.0, 1000.0])
def test_curve(sharpness):
    query, clusters = case()
    curve = threshold_curve(score_histogram(query * sharpness, clusters))
    shares, thresholds = zip(*curve, strict=True)
    assert shares[0] == 1.0
    assert shares[-1] == pytest.approx(LEAST_SHARE)
    assert all(math.isfinite(threshold) for threshold in thresholds)
    assert list(thresholds) == sorted(thresholds)
    check_thresholds(curve)
    assert all(type(number) is float for pair in curve for number in pair)


def test_curve_of_one_bin():
    histogram = torch.zeros(NUM_BINS, dtype=torch.int64)
    histogram[1000] = 7
    edge = LOWEST + 1000 * BIN_WIDTH
    assert all(edge <= threshold <= edge + BIN_WIDTH for _, threshold in threshold_curve(histogram))


def test_threshold_falls_as_the_share_grows():
    curve = threshold_curve(score_histogram(*case()))
    shares = torch.logspace(-5, 0.1, 300).tolist()
    thresholds = [log_threshold(curve, share) for share in shares]
    assert thresholds == sorted(thresholds, reverse=True)
    assert len(set(thresholds)) > 150


def test_threshold_at_the_ends():
    curve = ((1.0, -12.0), (0.1, -8.0), (0.01, -4.0))
    assert log_threshold(curve, 1.0) == log_threshold(curve, 1.5) == -math.inf
    assert log_threshold(curve, 0.0) == log_threshold(curve, -0.1) == math.inf
    assert log_threshold(curve, 1e-6) == log_threshold(curve, 0.01) == -4.0


def test_threshold_is_linear_in_the_log_of_the_share():
    curve = ((1.0, -12.0), (0.1, -8.0), (0.01, -4.0))
    assert log_threshold(curve, 0.1) == pytest.approx(-8.0)
    assert log_threshold(curve, math.sqrt(0.1)) == pytest.approx(-10.0)
    assert log_threshold(curve, 10**-1.25) == pytest.approx(-7.0)


def prefix_case(
    num_rows: int = 3, num_queries: int = 20, group: int = 3, num_keys: int = 300, num_sinks: int = 7, **options
):
    """Queries, keys, and clusters of all keys but the first, of uneven sizes; some have no keys."""
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(num_rows, num_queries, group, 16, generator=generator) * 2
    keys = torch.randn(num_rows, num_keys, 16, generator=generator)
    cluster_of = torch.randint(0, 40, (num_rows, num_keys - num_sinks), generator=generator) * 2 % 61
    sizes = torch.stack([row.bincount(minlength=61) for row in cluster_of]).int()
    members = cluster_of.argsort(stable=True).int() + num_sinks
    centroids = (
        torch.stack(
            [
                torch.stack([keys[b, members[b].long()][cluster_of[b].sort().values == c].sum(0) for c in range(61)])
                for b in range(num_rows)
            ]
        )
        / sizes.clamp(min=1)[..., None]
    )
    return query, keys, choosable(centroids, sizes, **options), members, num_sinks


def attended_by(
    query: torch.Tensor, clusters: Choosable, members: torch.Tensor, threshold: float
) -> list[torch.Tensor]:
    """Which keys of clusters each token [W, G, D] attends to, in one KV head, by where they lie."""
    read = []

    def read_tokens(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        read.append(positions[0])
        return nothing_at(positions)

    of_kernels = table(clusters, members)
    for token in query:
        softmax = clusters.scale, False, clusters.soft_cap, clusters.rule
        attend_prefix(token[None, None], of_kernels, read_tokens, threshold, 0, *softmax)
    return read


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("memory_bytes", [1, 1 << 28])
def test_attention_kept_is_that_of_what_is_chosen(rule, memory_bytes):
    soft_cap = 4.0
    query, keys, clusters, members, num_sinks = prefix_case(soft_cap=soft_cap, rule=rule)
    histogram = attention_histogram(query, keys, members, clusters, memory_bytes)
    assert histogram.shape == (len(query), NUM_BINS)
    logits = soft_cap * torch.tanh(torch.einsum("bwgd,btd->bwgt", query, keys) * SCALE / soft_cap)
    attention = logits.softmax(-1)
    always = attention[..., :num_sinks].sum(-1).mean((1, 2))
    for edge in (2088, 2388, 2488, 2588):
        threshold = LOWEST + edge * BIN_WIDTH
        expected = always.clone()
        for row in range(len(query)):
            of_row = slice(row, row + 1)
            attended = attended_by(query[row], rows_of(clusters, of_row), members[of_row], threshold)
            kept = [
                of_token[:, places].sum(-1).mean() for of_token, places in zip(attention[row], attended, strict=True)
            ]
            expected[row] += torch.stack(kept).mean()
        assert recall(histogram, threshold) == pytest.approx(expected, abs=0.01)
    assert (always < expected).all() and (expected < 0.9).all(), "some keys are chosen and others not"
    assert recall(histogram, -math.inf) == pytest.approx(torch.ones(len(query)))
    assert recall(histogram, math.inf) == pytest.approx(always, abs=1e-5)


def test_of_many_tokens_some_tell_what_all_attend_to(monkeypatch: pytest.MonkeyPatch):
    query, keys, clusters, members, _ = prefix_case()
    few = attention_histogram(query, keys, members, clusters)
    monkeypatch.setattr(calibration, "ATTENDING_TOKENS", query.shape[1])
    assert torch.equal(attention_histogram(query.repeat_interleave(3, 1), keys, members, clusters), few)


def test_keys_chosen_for_themselves_keep_more_attention_than_whole_clusters():
    """As many of them, by residuals that tell all of how keys lie."""
    query, keys, clusters, members, _ = prefix_case()
    of_members = keys.gather(1, members.long()[..., None].expand(-1, -1, 16))
    of_cluster = [row.repeat_interleave(sizes.long(), 0) for row, sizes in zip(clusters.centroids, clusters.sizes)]
    elements = ((of_members - torch.stack(of_cluster)) * 2).round().clamp(LEAST_PACKED, 7)
    along = torch.eye(NUM_DIRECTIONS).expand(len(keys), -1, -1) / 2
    by_key = replace(clusters, residuals=words_of(elements), directions=along, log_weights=clusters.log_weights * 0)
    by_cluster = replace(by_key, directions=along * 0)
    for share in (0.1, 0.3):
        kept = []
        for chosen in (by_key, by_cluster):
            threshold = log_threshold(threshold_curve(score_histogram(query, chosen)), share)
            kept.append(recall(attention_histogram(query, keys, members, chosen), threshold))
        assert (kept[0] > kept[1] + 0.05).all()


@pytest.mark.parametrize("weight", [-9.0, 0.0, 3.0])
def test_layers_are_moved_to_one_level(weight):
    """By whole bins, so that the histogram of the weights as they become is that of before, moved."""
    query, clusters = case()

    def histogram_at(weight: float) -> torch.Tensor:
        return score_histogram(query, replace(clusters, log_weights=clusters.log_weights + weight))

    histogram = histogram_at(weight)
    bins = level(histogram)
    assert log_threshold(threshold_curve(moved(histogram, bins)), LEVEL_SHARE) == pytest.approx(LEVEL, abs=BIN_WIDTH)
    differences = (moved(histogram, bins) - histogram_at(weight + bins * BIN_WIDTH)).abs()
    assert differences.sum() <= 1e-3 * histogram.sum(), "rounding alone may put a key into another bin"


def test_what_leaves_a_histogram_counts_at_its_end():
    histogram = torch.zeros(2, NUM_BINS)
    histogram[0, 5], histogram[0, 9], histogram[1, NUM_BINS - 2] = 1, 2, 4
    down, up = moved(histogram, -7), moved(histogram, 3)
    assert down[0, 0] == 1 and down[0, 2] == 2 and up[0, 8] == 1 and up[1, NUM_BINS - 1] == 4
    assert down.sum() == up.sum() == histogram.sum() and torch.equal(moved(histogram, 0), histogram)


def test_attention_inside_a_bin_is_taken_to_be_even():
    histogram = torch.zeros(2, NUM_BINS)
    histogram[1, 2000], histogram[1, 3000] = 0.4, 0.2
    places = {2000: 1.0, 2000.25: 0.9, 2001: 0.6, 3000.5: 0.5, 3001: 0.4}
    for place, kept in places.items():
        assert recall(histogram, LOWEST + place * BIN_WIDTH).tolist() == pytest.approx([1, kept])
