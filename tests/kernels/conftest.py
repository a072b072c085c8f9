"""Scenes for the kernels' tests: one serving step over a paged cache full of traps, on the GPU or interpreted."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from vllm_squeeze.kernels.reference import attend_causal
from vllm_squeeze.kernels.tables import (
    LEAST_PACKED,
    MARGIN,
    MOST_RAISE,
    MOST_REST_RAISE,
    NEIGHBOURS,
    NUM_DIRECTIONS,
    RULES,
    ClusterTable,
    Prefixes,
    elements_of,
    frame_of,
    group_means,
    packed,
    packed_keys,
    words_of,
)
from vllm_squeeze.kernels.tiles import QueryTiles

ON_GPU = torch.cuda.is_available()

SUFFIX_LENGTH = 5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


def check_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Fails if the RMS of the error exceeds ``tolerance`` times the RMS of ``expected``, or on any NaN."""
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    assert actual.isfinite().all(), f"{(~actual.isfinite()).sum()} of {actual.numel()} values are not finite"
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    assert error <= tolerance, f"relative RMS error {error:.2e}, allowed {tolerance:.0e}"


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Fills memory with what must not be used: NaN, or -1 for integers."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)


@dataclass(frozen=True)
class Scene:
    """Arguments of ``squeezed_attention`` but for the output, and what a test needs to compute them another way.

    Attributes:
        slot_of: slot of each token, -1 for those without an indexed prefix.
        keys: per slot, [H, T, D], the keys of the prefix.
        values: per slot, [H, T, D].
        suffix: [N, 2, H, L, D], keys and values of each token's suffix, as far as it sees them.
        suffix_output: [N, H * G, D], attention over the suffix.
        cache_scales: key_scale and value_scale where the cache is in 8-bit floats; else empty.
    """

    query: torch.Tensor
    suffix_lse: torch.Tensor | None
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    queries: QueryTiles | None
    table: ClusterTable
    prefixes: Prefixes
    scale: float
    slot_of: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    suffix: Sequence[torch.Tensor]
    suffix_output: torch.Tensor
    cache_scales: dict[str, torch.Tensor]

    @property
    def num_kv_heads(self) -> int:
        return len(self.table.centroids)

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.num_kv_heads

    def operands(self) -> tuple:
        """The arguments from ``suffix_lse`` to ``scale``."""
        cache = (self.key_cache, self.value_cache, self.block_table)
        return (self.suffix_lse, *cache, self.queries, self.table, self.prefixes, self.scale)

    def apply(self, op: Callable, *arguments: object) -> torch.Tensor:
        """Calls the kernels or the reference with ``arguments`` after the scale; gives the merged output."""
        output = self.suffix_output.clone()
        self.prefixes.counters.zero_()
        op(self.query, output, *self.operands(), *arguments, **self.cache_scales)
        return output

    def table_of(self, token: int) -> ClusterTable:
        """The clusters of a token's prefix."""
        slot = self.slot_of[token]
        return self.table.prefix(*self.prefixes.slots[slot, :2].tolist(), int(self.prefixes.frames[slot]))

    def log_p(self, token: int, raised: bool = False) -> torch.Tensor:
        """Log of the predicted probability of the clusters of a token's prefix, [H, C], joined over the group."""
        table, rule = self.table_of(token), int(self.prefixes.slots[self.slot_of[token], 3])
        query = self.query[token].view(self.num_kv_heads, self.group, -1).double()
        scores = query @ table.mean_keys().double().mT * self.scale
        if RULES[rule] == "paper":
            mass = (table.sizes[:, None] * scores.exp()).sum(-1, keepdim=True)
        else:
            groups = query @ table.group_keys().double().mT * self.scale
            mass = (table.group_sizes[:, None] * groups.exp()).sum(-1, keepdim=True)
        log_p = scores - mass.log()
        if raised:
            log_p += self.raises(token, MOST_RAISE)
        return log_p.exp().mean(1).log() if RULES[rule] == "paper" else log_p.amax(1)

    def raises(self, token: int, most: float) -> torch.Tensor:
        """What the spread of keys adds to logits of a token for the clusters of its prefix, [H, G, C]."""
        query = self.query[token].view(self.num_kv_heads, self.group, -1).double() * self.scale
        variances = self.table_of(token).variances[:, None].double()
        return (query.square().sum(-1, keepdim=True) * variances / 2).clamp(max=most)

    def rank(self, token: int) -> torch.Tensor:
        """The thresholds up to which clusters are chosen, [H, C]."""
        rank = self.log_p(token, raised=True) + self.table_of(token).log_weights.double()
        return rank + MARGIN * self.chooses_keys(token)

    def chooses_keys(self, token: int) -> bool:
        """Whether keys of chosen clusters are chosen for themselves, and not all of them."""
        return RULES[int(self.prefixes.slots[self.slot_of[token], 3])] == "keys"

    def key_ranks(self, token: int) -> list[list[torch.Tensor]]:
        """The thresholds up to which keys are chosen, of each KV head and cluster, in the order of its members."""
        table, query = self.table_of(token), self.query[token].view(self.num_kv_heads, self.group, -1)
        ranks, directions = self.rank(token), table.directions[:, 0].to(query.dtype).double()
        aimed = query.double() @ directions.mT  # [H, G, n]
        unit = (aimed.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        aimed = (aimed / unit).round() * unit
        scores = query.double() @ table.mean_keys().double().mT * self.scale
        mass = (table.group_sizes[:, None] * (query.double() @ table.group_keys().double().mT * self.scale).exp()).sum(
            -1
        )
        found = []
        for head in range(self.num_kv_heads):
            found.append([])
            for cluster, (start, size) in enumerate(zip(table.starts[head].tolist(), table.sizes[head].tolist())):
                rank = ranks[head, cluster].expand(size)
                if self.chooses_keys(token):
                    beside = (
                        aimed[head] @ elements_of(table.residuals[head, start : start + size]).double().mT * self.scale
                    )
                    log_p = scores[head, :, cluster, None] - mass[head, :, None].log() + beside
                    rank = torch.minimum(rank, log_p.amax(0) + table.log_weights[head, cluster].double())
                found[-1].append(rank)
        return found

    def set_threshold(self, share: float) -> None:
        """Lets about ``share`` of each prefix's clustered keys be chosen; 0 and 1 are none and all.

        The threshold lies in the middle of a gap, so that rounding cannot change the choice.
        """
        for slot in set(self.slot_of) - {-1}:
            tokens = [token for token, other in enumerate(self.slot_of) if other == slot]
            of_keys = torch.cat([rank for token in tokens for of_head in self.key_ranks(token) for rank in of_head])
            of_keys = of_keys.sort(descending=True).values
            of_clusters = torch.cat([self.rank(token).flatten() for token in tokens])
            ends = of_keys.new_tensor([torch.inf, -torch.inf])
            ranks = torch.cat([of_keys, of_clusters, ends]).sort(descending=True).values
            cut = round(share * len(of_keys))
            if 0 < cut < len(of_keys):
                cut = int((ranks > of_keys[cut]).sum())
                wide = ((ranks[:-1] - ranks[1:]) > 1e-3).nonzero().flatten()
                wide = wide[(wide > 0) & (wide < len(ranks) - 2)]
                cut = int(wide[(wide - cut).abs().argmin()])
            else:
                cut = 0 if cut == 0 else len(ranks) - 2
            self.prefixes.log_threshold[slot] = ranks[cut : cut + 2].mean()

    def squeezed(self, token: int) -> torch.Tensor:
        """What attention must be at the threshold, [H * G, D], in float64."""
        threshold = float(self.prefixes.log_threshold[self.slot_of[token]])
        replaced = self.rank(token) <= threshold
        left_out = [[rank <= threshold for rank in of_head] for of_head in self.key_ranks(token)]
        return self.dense(token, replaced, left_out)

    def make_exact(self, slot: int) -> "Scene":
        """The same, with all tokens of a prefix attended to whatever the choice."""
        self.prefixes.slots[slot, 1:3] = torch.tensor([0, self.keys[slot].shape[1]])
        return self.tile(self.slot_of)

    def tile(self, row_slot: tuple[int, ...], counts: tuple[int, ...] = (), room: int | None = None) -> "Scene":
        """The same, in a step whose rows have these slots and numbers of tokens, one if not said.

        Args:
            row_slot: the slot of each row, negative for none.
            counts: tokens of each row.
            room: tokens to make room for; as many as have a slot if not said.
        """
        counts = counts or (1,) * len(row_slot)
        with_slot = sum(count for slot, count in zip(row_slot, counts, strict=True) if slot >= 0)
        device = self.query.device
        max_keys = max(1, *(keys.shape[1] for keys in self.keys))
        queries = QueryTiles.allocate(max(room or 0, with_slot), len(self.keys), max_keys, self.group, device)
        starts = torch.nn.functional.pad(torch.tensor(counts).cumsum(0), (1, 0)).int().to(device)
        slots = torch.tensor(row_slot, device=device)
        pages = self.key_cache.shape[1]
        queries.fill(slots, starts, self.block_table, self.prefixes, with_slot, self.group, pages)
        return dataclasses.replace(self, queries=queries)

    def list_suffixes(self, row_slot: tuple[int, ...], counts: tuple[int, ...]) -> "Scene":
        """The same, with the suffix of each row's last token in pages of its own, and listed.

        Prefixes have to end with a page. The output is poisoned, as it is only written.
        """
        scene = self.tile(row_slot, counts)
        page_size, device = self.key_cache.shape[1], self.query.device
        num_rows, width = len(row_slot), self.block_table.shape[1]
        lens = torch.tensor([self.keys[slot].shape[1] if slot >= 0 else 0 for slot in row_slot], device=device)
        ends = torch.tensor(counts, device=device).cumsum(0)
        own = torch.full((num_rows, page_size, *self.key_cache.shape[2:3], 2 * self.query.shape[-1]), torch.nan)
        own[:, :SUFFIX_LENGTH] = self.suffix[ends - 1].permute(0, 3, 2, 1, 4).flatten(3)
        cache = torch.cat([self.key_cache, self.value_cache], -1)
        table = torch.nn.functional.pad(self.block_table[:num_rows], (0, 1), value=10**6)
        table[torch.arange(num_rows), lens // page_size] = len(cache) + torch.arange(num_rows, dtype=torch.int32).to(
            table
        )
        cache = torch.cat([cache, own.to(cache)])
        starts = torch.nn.functional.pad(ends, (1, 0)).int()
        scene.queries.list_suffixes(
            lens, (lens + SUFFIX_LENGTH).int(), starts, table, scene.queries.num_tokens, self.group, page_size
        )
        key_cache, value_cache = cache.split(self.query.shape[-1], -1)
        assert width < table.shape[1] and (lens % page_size == 0).all()
        return dataclasses.replace(
            scene, suffix_lse=None, key_cache=key_cache, value_cache=value_cache, block_table=table,
            suffix_output=torch.full_like(self.suffix_output, torch.nan),
        )  # fmt: skip

    def dense(
        self,
        token: int,
        replaced: torch.Tensor | None = None,
        left_out: list[list[torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Softmax attention of a token over prefix and suffix, [H * G, D], in float64.

        Args:
            token: index of the token.
            replaced: [H, C] bool, clusters whose keys and values are replaced by their means, and raised.
            left_out: of each KV head and of its other clusters, which keys nothing attends to.
        """
        slot = self.slot_of[token]
        keys, values = self.keys[slot].double(), self.values[slot].double()
        suffix_keys, suffix_values = self.suffix[token].double()
        raised = keys.new_zeros(self.num_kv_heads, self.group, keys.shape[1] + suffix_keys.shape[1])
        if replaced is not None:
            table = self.table_of(token)
            mean_keys, mean_values = table.mean_keys().double(), table.mean_values().double()
            for head, cluster in torch.ones_like(replaced).nonzero().tolist():
                start, size = int(table.starts[head, cluster]), int(table.sizes[head, cluster])
                members = table.members[head, start : start + size].long()
                if not replaced[head, cluster]:
                    if left_out is not None:
                        raised[head, :, members[left_out[head][cluster]]] = -torch.inf
                    continue
                keys[head, members], values[head, members] = mean_keys[head, cluster], mean_values[head, cluster]
                raised[head, :, members] = self.raises(token, MOST_REST_RAISE)[head, :, cluster, None]
        keys, values = torch.cat([keys, suffix_keys], 1), torch.cat([values, suffix_values], 1)
        query = self.query[token].view(self.num_kv_heads, self.group, -1).double()
        weights = (query @ keys.mT * self.scale + raised).softmax(-1)
        return (weights @ values).flatten(0, 1)


def build_scene(
    device: str,
    num_kv_heads: int = 2,
    group: int = 4,
    head_size: int = 64,
    page_size: int = 16,
    sizes: tuple[tuple[int, ...], ...] = ((5, 1, 9, 30, 2, 17, 8, 24) * 2,),
    slot_of: tuple[int, ...] = (0, 0),
    num_sinks: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    rule: str = "keys",
    seed: int = 42,
) -> Scene:
    """A step of N tokens, one of each request. ``sizes`` holds the sizes of the clusters of each prefix.

    Pages in use are scattered over the cache, which is NaN elsewhere, as is what belongs to clusters between prefixes;
    rows of query, block table and log-sum-exp are padded with NaN or numbers of pages that do not exist. With an 8-bit
    float as ``cache_dtype`` the prefixes' keys and values are what the cache and its scales make of them.
    """
    random = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype).float()

    # no powers of two, so that scaling rounds
    key_scale, value_scale = (0.03, 0.07) if cache_dtype else (1.0, 1.0)

    def stored(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return (tensor / scale).to(cache_dtype or dtype).float()

    num_tokens, num_heads = len(slot_of), num_kv_heads * group
    keys, values, in_pages, prefix_pages, slots = [], [], [], [], []
    centroids, value_centroids, starts, all_sizes, members = ([] for _ in range(5))
    num_members = num_pages = 0
    for prefix_sizes in sizes:
        length = num_sinks + sum(prefix_sizes)
        count = torch.tensor(prefix_sizes, dtype=torch.int64)
        cluster_of = torch.arange(len(count)).repeat_interleave(count)
        centres = randn(num_kv_heads, len(prefix_sizes), head_size)
        prefix_keys, prefix_values = randn(2, num_kv_heads, length, head_size)
        head_members = []
        for head in range(num_kv_heads):
            order = num_sinks + torch.randperm(length - num_sinks, generator=random)
            order = order[torch.argsort(cluster_of * length + order)]
            head_members.append(order)
            prefix_keys[head, order] = centres[head, cluster_of] + 0.5 * prefix_keys[head, order]
        stored_rows = torch.cat([stored(prefix_keys, key_scale), stored(prefix_values, value_scale)], -1)
        prefix_keys, prefix_values = stored_rows.split(head_size, -1)
        prefix_keys, prefix_values = prefix_keys * key_scale, prefix_values * value_scale
        # three clusters at least that belong to nobody, before the next prefix, which begins with a group
        others = 3 + (-len(count) - 3) % NEIGHBOURS
        for source, means in ((prefix_keys, centroids), (prefix_values, value_centroids)):
            in_order = torch.stack([source[head, head_members[head]] for head in range(num_kv_heads)])
            total = torch.zeros_like(centres).index_add_(1, cluster_of, in_order)
            means += [total / count.clamp(min=1)[:, None], torch.full((num_kv_heads, others, head_size), torch.nan)]
        first = sum(len(part) for part in all_sizes)
        slots.append((first, len(prefix_sizes), num_sinks, RULES.index(rule)))
        starts += [num_members + count.cumsum(0) - count, torch.full((others,), num_members + int(count.sum()))]
        all_sizes += [count, torch.full((others,), 2)]
        # and two members
        members += [torch.stack(head_members), torch.full((num_kv_heads, 2), 10**6)]
        num_members += int(count.sum()) + 2
        keys.append(prefix_keys)
        values.append(prefix_values)
        in_pages.append(stored_rows.transpose(0, 1))
        prefix_pages.append(range(num_pages, num_pages + -(-length // page_size)))
        num_pages = prefix_pages[-1].stop

    cache = torch.full((2 * num_pages + 4, page_size, num_kv_heads, 2 * head_size), torch.nan)
    physical = torch.randperm(len(cache), generator=random)
    block_table = torch.full((num_tokens, num_pages + 3), 10**6, dtype=torch.int32)
    for pages, rows in zip(prefix_pages, in_pages, strict=True):
        token = torch.arange(len(rows))
        cache[physical[pages.start + token // page_size], token % page_size] = rows
    for token, slot in enumerate(slot_of):
        if slot >= 0:
            block_table[token, : len(prefix_pages[slot])] = physical[prefix_pages[slot]].int()

    query = rounded(randn(num_tokens, num_heads, head_size))
    suffix = rounded(randn(num_tokens, 2, num_kv_heads, SUFFIX_LENGTH, head_size))
    scale = head_size**-0.5
    suffix_output, suffix_lse = query.clone(), torch.full((num_heads, num_tokens + 3), torch.nan)
    for token in range(num_tokens):
        grouped = query[token].view(1, num_kv_heads, group, head_size)
        attended, lse = attend_causal(grouped, *suffix[token], scale)
        suffix_output[token], suffix_lse[:, token] = attended.view(num_heads, -1), lse.flatten()

    sizes_per_head = torch.cat(all_sizes).int().expand(num_kv_heads, -1).contiguous()
    starts_per_head = torch.cat(starts).int().expand(num_kv_heads, -1).contiguous()
    cache = cache.to(device, cache_dtype or dtype)
    scales = {"key_scale": key_scale, "value_scale": value_scale} if cache_dtype else {}
    wide_query = torch.full((num_tokens, num_heads, head_size + 8), torch.nan)
    wide_query[..., :head_size] = query
    in_frames, groups = [], []
    # those of prefixes, after one that is of nobody
    frames = [torch.full((num_kv_heads, 2, head_size), torch.nan)]
    directions = [torch.full((num_kv_heads, NUM_DIRECTIONS, head_size), torch.nan)]
    directions += [0.1 * randn(num_kv_heads, NUM_DIRECTIONS, head_size) for _ in sizes]
    # of nobody's members too
    residuals = [
        words_of(torch.randint(LEAST_PACKED, 8, (*of_prefix.shape, NUM_DIRECTIONS), generator=random))
        for of_prefix in members
    ]
    for of_prefix, others, count in zip(centroids[::2], centroids[1::2], all_sizes[::2], strict=True):
        count = count.expand(num_kv_heads, -1)
        frame = frame_of(of_prefix, count)
        frames.append(frame)
        in_frames.append(packed_keys(torch.cat([of_prefix, others], 1), frame))
        of_groups, *facts = group_means(of_prefix, count, frame)
        left = (count.shape[1] + others.shape[1]) // NEIGHBOURS - of_groups.shape[1]  # that belong to nobody
        traps = (torch.nn.functional.pad(fact, (0, left), value=trap) for fact, trap in zip(facts, (torch.nan, 2)))
        groups.append((torch.nn.functional.pad(of_groups, (0, 0, 0, left)), *traps))
    group_centroids, group_scales, group_sizes = (torch.cat(parts, 1).to(device) for parts in zip(*groups))
    of_keys = [torch.cat(parts, 1).to(device) for parts in zip(*in_frames)]
    of_values = packed(torch.cat(value_centroids, 1).to(device))
    of_nobody = of_keys[1].isnan()
    table = ClusterTable(
        centroids=of_keys[0],
        centroid_scales=of_keys[1],
        value_centroids=of_values[0],
        value_scales=of_values[1],
        log_weights=torch.where(of_nobody, torch.nan, randn(*of_nobody.shape).to(device)),
        # that raise by up to some 6 nats, were there no bound
        variances=torch.where(of_nobody, torch.nan, 3 * randn(*of_nobody.shape).to(device).square()),
        starts=starts_per_head.to(device),
        sizes=sizes_per_head.to(device),
        log_sizes=sizes_per_head.log().to(device),
        members=torch.cat(members, 1).int().to(device),
        residuals=torch.cat(residuals, 1).to(device),
        group_centroids=group_centroids,
        group_scales=group_scales,
        group_sizes=group_sizes,
        frames=torch.stack(frames, 1).to(device),
        directions=torch.stack(directions, 1).to(device),
    )
    prefixes = Prefixes(
        slots=torch.tensor(slots, dtype=torch.int32, device=device),
        lens=torch.tensor([keys.shape[1] for keys in keys], dtype=torch.int32, device=device),
        frames=torch.arange(1, 1 + len(slots), dtype=torch.int32, device=device),
        log_threshold=torch.full((len(slots),), -torch.inf, device=device),
        kept_shares=torch.ones(len(slots), device=device),
        counters=torch.zeros(len(slots), 6, dtype=torch.int64, device=device),
    )
    scene = Scene(
        query=wide_query.to(device, dtype)[..., :head_size],
        suffix_lse=suffix_lse.to(device)[:, :num_tokens],
        key_cache=cache[..., :head_size],
        value_cache=cache[..., head_size:],
        block_table=block_table.to(device)[:, : num_pages + 1],
        queries=None,
        table=table,
        prefixes=prefixes,
        scale=scale,
        slot_of=slot_of,
        keys=tuple(tensor.to(device) for tensor in keys),
        values=tuple(tensor.to(device) for tensor in values),
        suffix=suffix.to(device),
        suffix_output=suffix_output.to(device, dtype),
        cache_scales={name: torch.tensor(scale, device=device) for name, scale in scales.items()},
    )
    return scene.tile(slot_of)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes memory that nobody wrote show: ``torch.empty`` gives NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(allocate(*args, **kwargs)))


@pytest.fixture
def assert_close() -> Callable[..., None]:
    return check_close


@pytest.fixture
def make_scene() -> Callable[..., Scene]:
    device = "cuda" if ON_GPU else "cpu"
    return lambda **settings: build_scene(device, **settings)
