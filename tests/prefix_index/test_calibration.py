import math

import pytest
import torch

from vllm_squeeze.kernels.reference import choose_clusters
from vllm_squeeze.kernels.tables import JOINS, ClusterTable, group_means, packed_keys, unpacked_keys
from vllm_squeeze.prefix_index.calibration import (
    BIN_WIDTH,
    LEAST_SHARE,
    LEVEL,
    LEVEL_SHARE,
    LOWEST,
    NUM_BINS,
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


def case(num_rows: int = 5, num_queries: int = 90, group: int = 7, num_centroids: int = 63):
    """Queries of very different sharpness, and clusters of which some rows lack the last."""
    generator = torch.Generator().manual_seed(42)
    query = torch.randn(num_rows, num_queries, group, 16, generator=generator)
    query *= torch.linspace(0.3, 3, num_queries)[:, None, None]
    centroids = torch.randn(num_rows, num_centroids, 16, generator=generator)
    sizes = torch.randint(1, 60, (num_rows, num_centroids), generator=generator, dtype=torch.int32)
    for row in range(num_rows):
        sizes[row, num_centroids - row :] = 0
        centroids[row, num_centroids - row :] = 0
    return query, as_stored(centroids), sizes


def as_stored(centroids: torch.Tensor) -> torch.Tensor:
    """What is read back from 4 bits stays as it is when stored once more."""
    frame = frames(len(centroids))
    return unpacked_keys(*packed_keys(centroids, frame), frame)


def log_weights(centroids: torch.Tensor) -> torch.Tensor:
    """Some weight for each cluster, the same wherever it is."""
    return centroids.float().sum(-1) / 4


def variances(centroids: torch.Tensor) -> torch.Tensor:
    """Some spread of each cluster's keys, the same wherever it is; of some raises are bounded."""
    return centroids.float()[..., 0].square()


def histogram_of(query: torch.Tensor, centroids: torch.Tensor, sizes: torch.Tensor, *more, **options) -> torch.Tensor:
    clusters = centroids, frames(len(centroids)), log_weights(centroids), variances(centroids), sizes
    return score_histogram(query, *clusters, SCALE, *more, **options)


def table(centroids: torch.Tensor, sizes: torch.Tensor) -> ClusterTable:
    starts = sizes.cumsum(1, dtype=torch.int32) - sizes
    frame = frames(len(centroids))
    vectors = packed_keys(centroids, frame)
    facts = log_weights(centroids), variances(centroids), starts, sizes, sizes.log(), sizes.new_zeros(len(sizes), 0)
    return ClusterTable(*vectors, *vectors, *facts, *group_means(centroids, sizes, frame), frame[:, None])


def kept_share(query, centroids, sizes, threshold: float, soft_cap: float = 0.0, join: str = "max") -> float:
    _, chosen = choose_clusters(query.transpose(0, 1), table(centroids, sizes), threshold, SCALE, soft_cap, join)
    return float((chosen * sizes).sum() / (query.shape[1] * sizes.sum()))


@pytest.mark.parametrize("share", [0.97, 0.9, 0.7, 0.5, 0.33, 0.2, 0.125, 0.1, 0.05, 0.02, 0.01, 0.005])
@pytest.mark.parametrize("join", JOINS)
def test_threshold_keeps_its_share(share, join):
    """On the queries that it was calibrated on, the oracle keeps what was asked for."""
    query, centroids, sizes = case(num_queries=400, num_centroids=200)
    threshold = log_threshold(threshold_curve(histogram_of(query, centroids, sizes, join=join)), share)
    within_a_bin = [kept_share(query, centroids, sizes, threshold + side * BIN_WIDTH, join=join) for side in (1, -1)]
    assert kept_share(query, centroids, sizes, threshold, join=join) == pytest.approx(share, rel=0.02) or (
        within_a_bin[0] <= share <= within_a_bin[1]
    )


@pytest.mark.parametrize(
    ("soft_cap", "edges"), [(0.0, (1988, 2238, 2488, 2648)), (2.0, (2155, 2238, 2321, 2338))], ids=["no cap", "a cap"]
)
def test_histogram_counts_what_the_oracle_chooses(soft_cap, edges):
    query, centroids, sizes = case()
    histogram = histogram_of(query, centroids, sizes, soft_cap)
    total = int(query.shape[1] * sizes.sum())
    assert histogram.dtype == torch.int64
    assert histogram.shape == (NUM_BINS,)
    assert int(histogram.sum()) == total
    for edge in edges:
        log_p = LOWEST + edge * BIN_WIDTH
        share = kept_share(query, centroids, sizes, log_p, soft_cap)
        assert 0 < share < 1
        # a key may fall on the other side of an edge by rounding
        assert float(histogram[edge:].sum() / total) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("memory_bytes", [1, 1 << 20, 1 << 30])
@pytest.mark.parametrize("split", [1, 3])
def test_histograms_add_up(split, memory_bytes):
    query, centroids, sizes = case()
    whole = histogram_of(query, centroids, sizes)
    parts = [
        histogram_of(query[rows], centroids[rows], sizes[rows], memory_bytes=memory_bytes)
        for rows in (slice(None, split), slice(split, None))
    ]
    assert torch.equal(whole, parts[0] + parts[1])
    assert torch.equal(whole, parts[1] + parts[0])


def test_empty_clusters_do_not_count():
    query, centroids, sizes = case(num_rows=1)
    padded = histogram_of(
        query,
        torch.cat([centroids, torch.full_like(centroids, 9.0)], 1),
        torch.cat([sizes, torch.zeros_like(sizes)], 1),
    )
    assert torch.equal(padded, histogram_of(query, centroids, sizes))


def test_half_precision_centroids_are_scored_in_float32():
    query, centroids, sizes = case()
    rounded = centroids.bfloat16()
    assert torch.equal(histogram_of(query, rounded, sizes), histogram_of(query, rounded.float(), sizes))


def test_scores_below_the_lowest_bin_count_in_it():
    query, centroids, sizes = case(num_rows=1)
    histogram = histogram_of(query * 1000, centroids, sizes, join="mean")
    assert int(histogram.sum()) == int(query.shape[1] * sizes.sum())
    assert histogram[0] > histogram.sum() // 2


@pytest.mark.parametrize("sharpness", [0.0, 0.1, 1.0, 1000.0])
def test_curve(sharpness):
    query, centroids, sizes = case()
    curve = threshold_curve(histogram_of(query * sharpness, centroids, sizes))
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
    query, centroids, sizes = case()
    curve = threshold_curve(histogram_of(query, centroids, sizes))
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


def prefix_case(num_rows: int = 3, num_queries: int = 20, group: int = 3, num_keys: int = 300, num_sinks: int = 7):
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
    return query, keys, as_stored(centroids), sizes, members, num_sinks


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("memory_bytes", [1, 1 << 28])
def test_attention_kept_is_that_of_what_is_chosen(join, memory_bytes):
    query, keys, centroids, sizes, members, num_sinks = prefix_case()
    clusters = centroids, frames(len(centroids)), log_weights(centroids), variances(centroids), sizes
    soft_cap = 4.0
    histogram = attention_histogram(query, keys, *clusters, members, SCALE, soft_cap, join, memory_bytes)
    assert histogram.shape == (len(query), NUM_BINS)
    logits = soft_cap * torch.tanh(torch.einsum("bwgd,btd->bwgt", query, keys) * SCALE / soft_cap)
    attention = logits.softmax(-1)
    cluster = torch.stack([torch.arange(61).repeat_interleave(row.long()) for row in sizes])
    for edge in (2088, 2388, 2488, 2588):
        threshold = LOWEST + edge * BIN_WIDTH
        stored = table(centroids, sizes)
        _, chosen = choose_clusters(query.transpose(0, 1), stored, threshold, SCALE, soft_cap, join)  # [W, B, C]
        kept = torch.ones(len(query), query.shape[1], keys.shape[1], dtype=torch.bool)
        of_members = chosen.transpose(0, 1).gather(2, cluster[:, None].expand(-1, query.shape[1], -1))
        kept.scatter_(2, members.long()[:, None].expand(-1, query.shape[1], -1), of_members)
        expected = (attention * kept[:, :, None]).sum(-1).mean((1, 2))
        assert recall(histogram, threshold) == pytest.approx(expected, abs=0.01)
    assert recall(histogram, -math.inf) == pytest.approx(torch.ones(len(query)))
    always = attention[..., :num_sinks].sum(-1).mean((1, 2))
    assert recall(histogram, math.inf) == pytest.approx(always, abs=1e-5)


@pytest.mark.parametrize("weight", [-9.0, 0.0, 3.0])
def test_layers_are_moved_to_one_level(weight):
    """By whole bins, so that the histogram of the weights as they become is that of before, moved."""
    query, centroids, sizes = case()

    def histogram_at(weight: float) -> torch.Tensor:
        weights = log_weights(centroids) + weight
        clusters = centroids, frames(len(centroids)), weights, variances(centroids), sizes
        return score_histogram(query, *clusters, SCALE)

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
