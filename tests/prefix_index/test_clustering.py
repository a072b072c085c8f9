import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_squeeze.prefix_index.clustering import Clusters, cluster_keys, mean_cosine
from vllm_squeeze.prefix_index.manifest import IndexParameters

SINKS, OBSERVED = 16, 100

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def random_prefix(num_rows: int, num_tokens: int, head_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(42)
    return torch.randn(2, num_rows, num_tokens, head_size, generator=generator).unbind()


def outlier_prefix(num_rows: int, num_tokens: int, axis: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the keys are close to one big vector, and spread along one axis, as Qwen2's are."""
    keys, values = random_prefix(num_rows, num_tokens)
    spread = torch.linspace(-1, 1, num_tokens)[torch.randperm(num_tokens, generator=torch.Generator().manual_seed(1))]
    keys[:, ::2] *= 0.01
    keys[:, ::2, 0] += 50
    keys[:, ::2, axis] += spread[::2]
    return keys, values


def spans(clusters: Clusters, row: int) -> list[torch.Tensor]:
    """Members of each cluster of a row, empty ones included."""
    return list(clusters.members[row].split(clusters.sizes[row].tolist()))


def assert_equal(one: Clusters, other: Clusters) -> None:
    for name in ("sizes", "members", "centroids", "value_centroids", "key_squares", "value_squares"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def assert_consistent(clusters: Clusters, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Each clustered token belongs to one cluster, whose centroids are the means of what the cluster holds."""
    num_rows, num_tokens, head_size = keys.shape
    num_clusters = clusters.sizes.shape[1]
    clustered = torch.arange(SINKS, num_tokens - OBSERVED)
    assert clusters.centroids.shape == clusters.value_centroids.shape == (num_rows, num_clusters, head_size)
    assert clusters.centroids.dtype == clusters.value_centroids.dtype == torch.float32
    assert clusters.sizes.dtype == clusters.members.dtype == torch.int32
    assert torch.equal(clusters.members.sort(-1).values, clustered.int().expand(num_rows, -1))
    assert clusters.sizes.amax(0).min() > 0, "a cluster that is empty in every row"
    for row in range(num_rows):
        for cluster, members in enumerate(spans(clusters, row)):
            assert torch.equal(members, members.sort().values)
            for means, squares, source in (
                (clusters.centroids, clusters.key_squares, keys),
                (clusters.value_centroids, clusters.value_squares, values),
            ):
                # the mean of nothing is zero
                held = source[row, members.long()].double()
                for found, summed in ((means, held), (squares, held.square().sum(-1))):
                    mean = summed.sum(0) / max(len(members), 1)
                    torch.testing.assert_close(found[row, cluster].double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_finds_planted_clusters(device):
    num_planted, num_rows, num_tokens = 8, 3, 1500
    generator = torch.Generator().manual_seed(0)
    planted = torch.randint(num_planted, (num_rows, num_tokens), generator=generator)
    norms = torch.rand(num_rows, num_tokens, 1, generator=generator) + 0.5
    keys = norms * (functional.one_hot(planted, 32) + 0.01 * torch.randn(num_rows, num_tokens, 32, generator=generator))
    values = planted[..., None].expand(-1, -1, 32).float()

    clusters = cluster_keys(keys.to(device), values.to(device), IndexParameters())

    found = planted.gather(1, clusters.members.long().cpu())
    for row in range(num_rows):
        for labels in found[row].split(clusters.sizes[row].tolist()):
            assert len(labels.unique()) <= 1
    filled = clusters.sizes > 0
    value = clusters.value_centroids[filled]
    assert torch.equal(value, value.round())
    assert torch.equal(clusters.centroids[filled].argmax(-1), value[:, 0].long())
    assert mean_cosine(keys.to(device), clusters) > 0.99


@pytest.mark.parametrize(
    ("num_tokens", "window"),
    [(117, 8192), (118, 8192), (119, 2), (1000, 8192), (1000, 884), (1000, 883), (1000, 100), (1000, 7), (600, 1)],
    ids=lambda value: str(value),
)
def test_every_token_is_in_one_cluster(num_tokens, window):
    keys, values = random_prefix(3, num_tokens)
    clusters = cluster_keys(keys, values, IndexParameters(window=window, max_cluster=60))
    assert_consistent(clusters, keys, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_statistics_are_float32(dtype):
    keys, values = random_prefix(2, 700)
    keys, values = (keys * 100).to(dtype), values.to(dtype)
    assert_consistent(cluster_keys(keys, values, IndexParameters()), keys, values)


@pytest.mark.parametrize("device", DEVICES)
def test_seed_decides(device):
    keys, values = (t.to(device) for t in random_prefix(4, 3000))
    first = cluster_keys(keys, values, IndexParameters(seed=1, max_cluster=40))
    again = cluster_keys(keys, values, IndexParameters(seed=1, max_cluster=40))
    other = cluster_keys(keys, values, IndexParameters(seed=2, max_cluster=40))
    assert_equal(first, again)
    assert not torch.equal(first.members, other.members)


def test_rows_do_not_depend_on_each_other():
    """Tensor-parallel ranks cluster their own heads, and must get what one rank with all heads would."""
    keys, values = outlier_prefix(5, 2000)
    keys[3] = keys[3].roll(1, -1) * keys[0, :, :1]
    parameters = IndexParameters(window=700, max_cluster=50)
    together = cluster_keys(keys, values, parameters)
    alone = cluster_keys(keys[3:4], values[3:4], parameters)
    count = alone.sizes.shape[1]
    assert together.sizes[3, count:].sum() == 0
    assert torch.equal(together.members[3:4], alone.members)
    assert torch.equal(together.centroids[3:4, :count], alone.centroids)
    assert torch.equal(together.value_centroids[3:4, :count], alone.value_centroids)


class LargestTensor(TorchDispatchMode):
    """Records the most bytes that an operation's output takes, views of given tensors aside."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return output


def test_memory_bound_changes_nothing_but_memory():
    keys, values = outlier_prefix(4, 2000)
    parameters = IndexParameters(window=1000, max_cluster=100)
    with LargestTensor(keys, values) as roomy:
        expected = cluster_keys(keys, values, parameters)
    # the scores of one window, 1000 keys by 53 centroids, do not fit
    bound = 1 << 17
    with LargestTensor(keys, values) as tight:
        bounded = cluster_keys(keys, values, parameters, bound)
    assert tight.nbytes <= bound < roomy.nbytes
    assert_equal(expected, bounded)


@pytest.mark.parametrize("max_cluster", [1, 33, 512])
def test_large_clusters_are_split(max_cluster):
    keys, values = outlier_prefix(2, 3000)
    unlimited = cluster_keys(keys, values, IndexParameters(centroids=0.001, max_cluster=10_000))
    assert unlimited.sizes.amax(1).min() > 512
    clusters = cluster_keys(keys, values, IndexParameters(centroids=0.001, max_cluster=max_cluster))
    assert clusters.sizes.max() <= max_cluster
    assert_consistent(clusters, keys, values)
    for row in range(2):
        parents = enumerate(spans(unlimited, row))
        of_token = {token: cluster for cluster, members in parents for token in members.tolist()}
        parts: dict[int, list[int]] = {}
        for members in spans(clusters, row):
            if len(members):
                (parent,) = {of_token[token] for token in members.tolist()}
                parts.setdefault(parent, []).append(len(members))
        for parent, sizes in parts.items():
            assert max(sizes) - min(sizes) <= 1
            assert len(sizes) == -(-int(unlimited.sizes[row, parent]) // max_cluster)


def test_split_runs_along_the_main_direction():
    axis = 3
    keys, values = outlier_prefix(2, 3000, axis)
    clusters = cluster_keys(keys[:, ::2].contiguous(), values[:, ::2].contiguous(), IndexParameters(centroids=1e-4))
    for row in range(2):
        along = sorted(keys[row, ::2, axis][members.long()].aminmax() for members in spans(clusters, row))
        assert len(along) == 3
        # slabs of a key cloud of length 2 whose noise is 0.01
        assert all(low.max - high.min < 0.05 for low, high in zip(along, along[1:], strict=False))


def test_windows_are_near_equal_and_not_crossed():
    keys, values = random_prefix(3, 1121)
    clusters = cluster_keys(keys, values, IndexParameters(window=250))
    bounds = SINKS + torch.tensor([0, 201, 402, 603, 804, 1005])
    for row in range(3):
        windows = [torch.bucketize(members, bounds, right=True).unique() for members in spans(clusters, row)]
        windows = torch.cat([window for window in windows if len(window)])
        assert len(windows) == (clusters.sizes[row] > 0).sum(), "a cluster that lies in two windows"
        assert torch.equal(windows, windows.sort().values)
        # 5% of 1121 tokens, a fifth of it in each window
        assert windows.bincount()[1:].tolist() == pytest.approx([11] * 5, abs=1)


@pytest.mark.parametrize("window", [8192, 1000, 500])
@pytest.mark.parametrize("centroids", [0.02, 0.05, 0.2])
def test_number_of_centroids(centroids, window):
    keys, values = random_prefix(2, 4000)
    clusters = cluster_keys(keys, values, IndexParameters(centroids=centroids, window=window))
    assert clusters.sizes.shape[1] == pytest.approx(centroids * 4000, rel=0.1)


def test_first_centroids_are_distinct():
    keys, values = random_prefix(2, 500)
    assert (cluster_keys(keys, values, IndexParameters(centroids=1.0)).sizes == 1).all()


def test_empty_clusters_close_a_row():
    keys, values = random_prefix(2, 1000)
    keys[1] = 1.0
    clusters = cluster_keys(keys, values, IndexParameters(max_cluster=100))
    count = 884 // 100 + 1
    assert (clusters.sizes[0] > 0).all()
    assert (clusters.sizes[1, :count] > 0).all()
    assert not clusters.sizes[1, count:].any()
    assert not clusters.centroids[1, count:].any()
    assert not clusters.value_centroids[1, count:].any()
    assert_consistent(clusters, keys, values)


@pytest.mark.parametrize("fill", [0.0, 3.0, 1e-30, 1e4], ids=["zero", "same", "tiny", "huge"])
def test_keys_without_a_direction(fill):
    keys, values = random_prefix(2, 1000)
    keys = torch.full_like(keys, fill)
    clusters = cluster_keys(keys, values, IndexParameters(max_cluster=64))
    assert_consistent(clusters, keys, values)
    assert clusters.sizes.max() <= 64


def test_zero_keys_among_others():
    keys, values = random_prefix(2, 1000)
    keys[:, ::3] = 0
    assert_consistent(cluster_keys(keys, values, IndexParameters(max_cluster=64)), keys, values)


def test_coinciding_centroids_stay_in_place():
    """A text that repeats itself draws the same first centroid many times, and all but one are empty at once.

    They must wait where they are. The one that took all keys moves towards the few others, and is then theirs.
    """
    keys, values = torch.zeros(2, 1, 1000, 16)
    keys[..., 0] = 1
    keys[:, 500:503, 1] = 0.5
    clusters = cluster_keys(keys, values, IndexParameters())
    assert [500, 501, 502] in [members.tolist() for members in spans(clusters, 0)]


def test_few_keys_unlike_the_others_are_not_lumped_together():
    """Six pairs among 4,000 keys near one of ten directions: seeds drawn evenly miss most of them."""
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.zeros(2, 1, 4000, 32)
    keys[0, torch.arange(4000), torch.randint(10, (4000,), generator=generator)] = 1
    pairs = torch.randperm(4000 - SINKS - OBSERVED, generator=generator)[:12].view(6, 2) + SINKS
    for direction, pair in enumerate(pairs):
        keys[0, pair] = functional.one_hot(torch.tensor(20 + direction), 32).float()
    keys += 0.03 * torch.randn(keys.shape, generator=generator)
    found = [set(members.tolist()) for members in spans(cluster_keys(keys, values, IndexParameters()), 0)]
    for pair in map(set, pairs.tolist()):
        assert all(members <= pair for members in found if members & pair)


def test_what_all_keys_have_in_common_does_not_count():
    """Softmax does not see it either."""
    keys, values = random_prefix(2, 1000)
    keys = (keys * 64).round() / 64  # so that nothing is lost beside what they have in common
    expected = cluster_keys(keys, values, IndexParameters())
    clusters = cluster_keys(keys + torch.arange(keys.shape[-1]), values, IndexParameters())
    assert torch.equal(clusters.members, expected.members)


def test_iterations_draw_clusters_together():
    keys, values = random_prefix(4, 2000, 8)
    cosines = [mean_cosine(keys, cluster_keys(keys, values, IndexParameters(iterations=n))) for n in (1, 4, 12)]
    assert cosines == sorted(cosines)
    assert cosines[2] > cosines[0] + 0.01


def test_labels_are_those_of_nearest_centroids():
    """After many rounds K-means has come to rest: no key is nearer to another cluster's mean direction."""
    keys, values = random_prefix(2, 700, 4)
    clusters = cluster_keys(keys, values, IndexParameters(iterations=60, max_cluster=600))
    clustered = slice(SINKS, 700 - OBSERVED)
    unit = functional.normalize(keys - keys[:, clustered].mean(1, keepdim=True), dim=-1)
    for row in range(2):
        members = [m.long() for m in spans(clusters, row) if len(m)]
        means = torch.stack([unit[row, m].mean(0) for m in members])
        for cluster, m in enumerate(members):
            assert (torch.cdist(unit[row, m], means).argmin(-1) == cluster).all()


def test_mean_cosine():
    keys, values = random_prefix(3, 500)
    clusters = cluster_keys(keys, values, IndexParameters())
    cosines = [
        functional.cosine_similarity(keys[row, members.long()], clusters.centroids[row, cluster], dim=-1)
        for row in range(3)
        for cluster, members in enumerate(spans(clusters, row))
    ]
    assert mean_cosine(keys, clusters) == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-6)


def test_starts():
    keys, values = random_prefix(2, 500)
    clusters = cluster_keys(keys, values, IndexParameters())
    assert clusters.starts.dtype == torch.int32
    assert clusters.starts.tolist() == [[sum(row[:i]) for i in range(len(row))] for row in clusters.sizes.tolist()]


@pytest.mark.parametrize("num_tokens", [1, 116])
def test_too_short(num_tokens):
    keys, values = random_prefix(1, num_tokens)
    with pytest.raises(ValueError, match=rf"prefix of {num_tokens} tokens.* 16 attention sinks.* 100 tokens.* 117$"):
        cluster_keys(keys, values, IndexParameters())
