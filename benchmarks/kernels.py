"""Times one attention layer of decoding over a shared prefix, arm by arm, against FlashAttention.

    python benchmarks/kernels.py --prefixes 8 32 128 512 --batches 1 4 16 64 --kept 0.1 --out kernels.json

All arms compute the same: B rows, each one query token, over one shared prefix and a suffix of its own. The time is
that of a layer in a CUDA graph through several layers with memory of their own, so that the L2 cache does not flatter.
Each arm runs in a fresh process, and first checks a layer's output; a wrong one is not timed. Ours attend to the
suffixes too, as in steps whose rows are all on indexed prefixes; with --beside FlashAttention does, on another stream, as
in steps with other rows.

    stock      vLLM's FlashAttention over prefix and suffix, scheduled beforehand
    cascade    FlashAttention over the prefix for all rows, over the suffixes, and vLLM's merge
    xformers   its paged memory-efficient attention, where it is installed
    exact      ours, all keys of the prefix, each loaded once for a tile of rows
    shared     FlashAttention over the prefix for all rows, whose queries ours put together, and over the suffixes
    drop       ours, squeezed, the clusters that were not chosen dropped
    squeezed   ours, squeezed, with value centroids for them
    clusters   the same where clusters are chosen whole; and clusters_drop, where the others are dropped
    look_up    of "drop", only what says which keys are needed, after all of it was checked
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ARMS = ("stock", "cascade", "xformers", "exact", "shared", "drop", "squeezed", "clusters_drop", "clusters", "look_up")
WITH_REST = ("squeezed", "clusters")
SQUEEZED = ("drop", "clusters_drop", *WITH_REST)
OURS = ("exact", "look_up", *SQUEEZED)
NUM_SINKS = 16
KEYS_PER_CENTROID = 20
# Standard deviation of the clusters' sizes over their mean: what K-means makes of the demo's text.
SIZE_SPREAD = 0.46
TOLERANCE = 1e-2
REPLAYS = 20
RESIDUAL_SPREAD = 0.027
"""Of directions: so that four times as many keys are looked at as a tenth of them, which is about what models have."""
SAMPLED_KEYS = 1 << 14
"""Keys that say what threshold chooses a share of them."""


class Shape(NamedTuple):
    """What is timed: tokens of the prefix and of each suffix, rows, and the model's attention."""

    prefix: int
    suffix: int
    batch: int
    kv_heads: int
    group: int
    head_size: int
    page_size: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's key and value in one layer, in bfloat16."""
        return self.kv_heads * 2 * self.head_size * 2


class Layer(NamedTuple):
    """One layer's tensors. Rows of a batch share the prefix's blocks; their suffixes are their own."""

    query: Any
    output: Any
    key_cache: Any
    value_cache: Any
    block_table: Any
    table: Any
    prefixes: Any
    queries: Any


def make_layer(shape: Shape, kept: float, likeness: float, beside: bool, rule: str = "keys") -> Layer:
    """Random clusters and queries, and a threshold by which about ``kept`` of the keys are chosen.

    Args:
        shape: of the layer.
        beside: whether FlashAttention attends to the suffixes, which are then not listed.
        kept: share of the keys that a row chooses.
        likeness: correlation of the rows' queries, by which their choices overlap. 0: they choose independently.
        rule: by which keys are chosen.
    """
    import torch

    from vllm_squeeze.kernels.reference import joined, log_mass, residual_scores, scores_of
    from vllm_squeeze.kernels.tables import (
        LEAST_PACKED,
        MARGIN,
        NUM_DIRECTIONS,
        RULES,
        ClusterTable,
        Prefixes,
        frame_of,
        group_means,
        packed,
        packed_keys,
        words_of,
    )

    heads, group, size, page = shape.kv_heads, shape.group, shape.head_size, shape.page_size
    device, dtype = "cuda", torch.bfloat16
    num_members = shape.prefix - NUM_SINKS
    num_centroids = num_members // KEYS_PER_CENTROID
    prefix_blocks, suffix_blocks = shape.prefix // page, -(-shape.suffix // page)
    num_blocks = prefix_blocks + shape.batch * suffix_blocks
    cache = torch.randn(num_blocks, page, heads, 2 * size, dtype=dtype, device=device)
    order = torch.randperm(num_blocks, device=device).int()
    own = order[prefix_blocks:].view(shape.batch, suffix_blocks)
    block_table = torch.cat([order[:prefix_blocks].expand(shape.batch, -1), own], 1).contiguous()

    weights = torch.distributions.Gamma(SIZE_SPREAD**-2, 1.0).sample((heads, num_centroids)).to(device)
    starts = ((weights.cumsum(1) - weights) / weights.sum(1, keepdim=True) * num_members).int()
    sizes = torch.diff(starts, append=starts.new_full((heads, 1), num_members)).int()
    means = torch.randn(2, heads, num_centroids, size, device=device)
    frame = frame_of(means[0], sizes)
    (centroids, centroid_scales), (value_centroids, value_scales) = packed_keys(means[0], frame), packed(means[1])
    table = ClusterTable(
        centroids=centroids,
        centroid_scales=centroid_scales,
        value_centroids=value_centroids,
        value_scales=value_scales,
        log_weights=torch.zeros_like(value_scales),
        variances=torch.zeros_like(value_scales),
        starts=starts,
        sizes=sizes,
        log_sizes=sizes.log(),
        members=torch.stack([torch.randperm(num_members, device=device) for _ in range(heads)]).int() + NUM_SINKS,
        residuals=torch.stack(
            [
                words_of(torch.randint(LEAST_PACKED, -LEAST_PACKED, (num_members, NUM_DIRECTIONS), device=device))
                for _ in range(heads)
            ]
        ),
        **dict(zip(("group_centroids", "group_scales", "group_sizes"), group_means(means[0], sizes, frame))),
        frames=frame[:, None],
        directions=RESIDUAL_SPREAD * torch.randn(heads, 1, NUM_DIRECTIONS, size, device=device),
    )
    common, own = torch.randn(2, shape.batch, heads * group, size, device=device)
    query = (common[:1] * likeness**0.5 + own * (1 - likeness) ** 0.5).to(dtype)
    some = query[:4].float().view(-1, heads, group, size)
    scores, groups = (scores_of(some, keys, size**-0.5) for keys in (table.mean_keys(), table.group_keys()))
    scores -= log_mass(groups, table.group_sizes)
    log_p = joined(scores, rule)
    if rule == "keys":
        # of so many keys at equal distances
        sampled = torch.arange(0, num_members, -(-num_members // SAMPLED_KEYS), device=device)
        cluster = torch.searchsorted(starts, sampled.int().expand(heads, -1).contiguous(), right=True) - 1
        of_keys = cluster.expand(len(some), -1, -1)
        residual = residual_scores(some, table.directions[:, 0], table.residuals[:, sampled], size**-0.5)
        of_themselves = joined(scores.gather(3, of_keys[:, :, None].expand(-1, -1, group, -1)) + residual, rule)
        log_p = torch.minimum(of_themselves, log_p.gather(2, of_keys) + MARGIN)
    prefixes = Prefixes(
        slots=torch.tensor([[0, num_centroids, NUM_SINKS, RULES.index(rule)]], dtype=torch.int32, device=device),
        lens=torch.tensor([shape.prefix], dtype=torch.int32, device=device),
        frames=torch.zeros(1, dtype=torch.int32, device=device),
        log_threshold=threshold(log_p, kept).view(1),
        kept_shares=torch.tensor([kept], device=device),
        counters=torch.zeros(1, 6, dtype=torch.int64, device=device),
    )
    queries = tile(shape, block_table, prefixes, shape.batch, beside)
    caches = cache[..., :size], cache[..., size:]
    return Layer(query, torch.empty_like(query), *caches, block_table, table, prefixes, queries)


def threshold(log_p: Any, kept: float) -> Any:
    """What about ``kept`` of the values exceed, in the widest gap thereabouts: rounding must not change a choice."""
    import torch

    values = log_p.flatten().sort(descending=True).values
    middle, reach = round(kept * len(values)), max(len(values) // 1000, 1)
    near = values[max(middle - reach, 0) : middle + reach + 1]
    widest = torch.argmax(near[:-1] - near[1:])
    return (near[widest] + near[widest + 1]) / 2


def tile(shape: Shape, block_table: Any, prefixes: Any, batch: int, beside: bool) -> Any:
    """The first ``batch`` rows in tiles, and their suffixes unless FlashAttention attends to these."""
    import torch

    from vllm_squeeze.kernels.tiles import QueryTiles

    queries = QueryTiles.allocate(batch, 1, shape.prefix, shape.group, "cuda")
    rows = torch.zeros(batch, dtype=torch.int64, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    queries.fill(rows, starts, block_table, prefixes, batch, shape.group, shape.page_size)
    if not beside:
        lens = torch.full_like(starts, shape.prefix)
        queries.list_suffixes(lens, lens + shape.suffix, starts, block_table, batch, shape.group, shape.page_size)
    return queries


def exact(layer: Layer, shape: Shape, beside: bool) -> Layer:
    """The same, as of a prefix that is not in clusters."""
    prefixes = replace(layer.prefixes, slots=layer.prefixes.slots.new_tensor([[0, 0, shape.prefix, 0]]))
    queries = tile(shape, layer.block_table, prefixes, shape.batch, beside)
    return layer._replace(table=layer.table.prefix(0, 0, 0), prefixes=prefixes, queries=queries)


class Attention:
    """The arms' calls, for layers of one shape."""

    def __init__(self, arm: str, shape: Shape, layer: Layer, beside: bool):
        import torch

        from vllm_squeeze.kernels.workspace import Workspace

        self.arm, self.shape, self.beside, batch = arm, shape, beside, shape.batch
        self.scale = shape.head_size**-0.5
        self.each = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.all = torch.tensor([0, batch], dtype=torch.int32, device="cuda")
        self.total = torch.full((batch,), shape.prefix + shape.suffix, dtype=torch.int32, device="cuda")
        self.suffix = torch.full((batch,), shape.suffix, dtype=torch.int32, device="cuda")
        self.prefix = torch.full((1,), shape.prefix, dtype=torch.int32, device="cuda")
        self.schedules: dict[str, Any] = {}
        self.side, self.begun, self.done = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
        if arm in OURS:
            clusters = layer.table.sizes.shape[1]
            limits = (8, shape.kv_heads, shape.head_size, clusters, shape.prefix)
            self.workspace = Workspace.allocate(*limits, "cuda")

    def __call__(self, layer: Layer) -> None:
        """Attends into ``layer.output``."""
        calls = {"stock": self._stock, "cascade": self._cascade, "xformers": self._xformers, "shared": self._shared}
        calls.get(self.arm, self._ours)(layer)

    def flash(
        self,
        name: str,
        layer: Layer,
        starts: Any,
        lengths: Any,
        blocks: Any,
        output: Any,
        causal: bool,
        query: Any = None,
    ) -> Any:
        """FlashAttention, scheduled once for all layers as vLLM does; returns the log-sum-exp.

        With a ``query`` in place of the layer's it is not scheduled beforehand.
        """
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        if name not in self.schedules:
            most, longest = int(starts.diff().max()), int(lengths.max())
            schedule = None
            if query is None:
                schedule = get_scheduler_metadata(
                    batch_size=len(starts) - 1,
                    max_seqlen_q=most,
                    max_seqlen_k=longest,
                    num_heads_q=layer.query.shape[1],
                    num_heads_kv=self.shape.kv_heads,
                    headdim=self.shape.head_size,
                    cache_seqlens=lengths,
                    qkv_dtype=layer.query.dtype,
                    cu_seqlens_q=starts,
                    page_size=self.shape.page_size,
                    causal=causal,
                )
            self.schedules[name] = most, longest, schedule
        most, longest, schedule = self.schedules[name]
        _, lse = flash_attn_varlen_func(
            q=layer.query if query is None else query,
            k=layer.key_cache,
            v=layer.value_cache,
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=most,
            seqused_k=lengths,
            max_seqlen_k=longest,
            softmax_scale=self.scale,
            causal=causal,
            block_table=blocks,
            scheduler_metadata=schedule,
            fa_version=3,
            return_softmax_lse=True,
        )
        return lse

    def attend_suffix(self, layer: Layer, output: Any) -> Any:
        blocks = layer.block_table[:, self.shape.prefix // self.shape.page_size :]
        return self.flash("suffix", layer, self.each, self.suffix, blocks, output, True)

    def _stock(self, layer: Layer) -> None:
        self.flash("stock", layer, self.each, self.total, layer.block_table, layer.output, True)

    def _cascade(self, layer: Layer) -> None:
        import torch
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        prefix, suffix = torch.empty_like(layer.output), torch.empty_like(layer.output)
        prefix_lse = self.flash("prefix", layer, self.all, self.prefix, layer.block_table[:1], prefix, False)
        suffix_lse = self.attend_suffix(layer, suffix)
        merge_attn_states(layer.output, prefix, prefix_lse, suffix, suffix_lse)

    def _suffix_beside(self, layer: Layer) -> Any:
        """FlashAttention over the suffixes on another stream; returns the log-sum-exp, there when ``self.done`` is."""
        import torch

        self.begun.record()
        with torch.cuda.stream(self.side):
            self.side.wait_event(self.begun)
            lse = self.attend_suffix(layer, layer.output)
            self.done.record()
        return lse

    def _shared(self, layer: Layer) -> None:
        import torch

        from vllm_squeeze.kernels.shared_prefix import gather_queries, join_shared

        suffix_lse = self._suffix_beside(layer)
        gathered = gather_queries(layer.query, layer.queries, self.shape.group)
        attended, blocks = torch.empty_like(gathered), layer.block_table[:1]
        starts, lens = layer.queries.starts, layer.prefixes.lens
        lse = self.flash("prefix", layer, starts, lens, blocks, attended, False, gathered)
        torch.cuda.current_stream().wait_event(self.done)
        join_shared(layer.output, suffix_lse, attended, lse, layer.queries, layer.prefixes, self.shape.kv_heads)

    def _xformers(self, layer: Layer) -> None:
        from xformers.ops import fmha
        from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask as Mask

        shape = self.shape
        if "xformers" not in self.schedules:
            width = layer.block_table.shape[1] * shape.page_size
            mask = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
                [1] * shape.batch, width, [shape.prefix + shape.suffix] * shape.batch
            )
            self.schedules["xformers"] = mask.q_seqinfo.to("cuda"), mask.k_seqinfo.to("cuda")
        mask = Mask(*self.schedules["xformers"], layer.block_table, shape.page_size)

        def paged(cache: Any) -> Any:
            return cache.flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, shape.group, -1)

        query = layer.query.view(1, shape.batch, shape.kv_heads, shape.group, shape.head_size)
        keys, values = paged(layer.key_cache), paged(layer.value_cache)
        result = fmha.memory_efficient_attention_forward(
            query, keys, values, mask, scale=self.scale, op=fmha.triton_splitk.FwOp
        )
        layer.output.copy_(result.view_as(layer.output))

    def _ours(self, layer: Layer) -> None:
        from vllm_squeeze.kernels.squeezed_attention import squeezed_attention

        lse, done = (self._suffix_beside(layer), self.done) if self.beside else (None, None)
        operands = (layer.key_cache, layer.value_cache, layer.block_table, layer.queries, layer.table, layer.prefixes)
        squeezed_attention(
            layer.query, layer.output, lse, *operands, self.scale, self.arm in WITH_REST, self.workspace,
            suffix_done=done,
        )  # fmt: skip

    def look_up(self, layer: Layer) -> None:
        """Of ours only the look-up, of one tile."""
        from vllm_squeeze.kernels.squeezed_attention import look_up

        operands = layer.queries, layer.table, layer.prefixes, self.scale, self.workspace
        look_up(layer.query, layer.block_table, self.shape.page_size, *operands)

    def expected(self, layer: Layer) -> Any:
        """The output of the first two rows in float32, from the oracle."""
        import torch

        from vllm_squeeze.kernels.reference import attend_causal, squeezed_attention_reference

        rows = min(2, self.shape.batch)
        if self.arm not in OURS:
            layer = exact(layer, self.shape, True)
        query, output, lse = layer.query[:rows], torch.empty_like(layer.query[:rows], dtype=torch.float32), []
        grouped = query.unflatten(1, (self.shape.kv_heads, self.shape.group))
        for row in range(rows):
            blocks = layer.block_table[row, self.shape.prefix // self.shape.page_size :].long()
            keys, values = (
                cache[blocks].flatten(0, 1)[: self.shape.suffix].transpose(0, 1)
                for cache in (layer.key_cache, layer.value_cache)
            )
            attended, row_lse = attend_causal(grouped[row : row + 1], keys, values, self.scale)
            output[row] = attended.flatten(1, 2)[0]
            lse.append(row_lse.flatten())
        prefixes = replace(layer.prefixes, counters=torch.zeros_like(layer.prefixes.counters))
        queries = tile(self.shape, layer.block_table, prefixes, rows, True)
        squeezed_attention_reference(
            query, output, torch.stack(lse, 1), layer.key_cache, layer.value_cache, layer.block_table, queries,
            layer.table, prefixes, self.scale, self.arm in WITH_REST,
        )  # fmt: skip
        return output


def time_graph(call: Callable[[Layer], None], layers: list[Layer]) -> float:
    """Median microseconds of a layer, over replays of one graph through all layers."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in layers:
            call(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            call(layer)
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[3:])[REPLAYS // 2] * 1000 / len(layers)


def run_case(arm: str, shape: Shape, kept: float, likeness: float, beside: bool) -> dict[str, Any]:
    """Checks and times one arm on one shape."""
    import torch

    torch.manual_seed(shape.prefix + shape.batch)
    share = min(1.0, 1.2 * kept * shape.batch**0.5) if arm in SQUEEZED else 1.0
    if arm == "look_up":
        share = 1.25 / KEYS_PER_CENTROID / 8  # in 4 bits, and keys alone
    most = 128 if arm == "look_up" else 16
    count = round(max(3, min(most, 250e6 / (shape.prefix * shape.kv_bytes * share))))
    rule = "clusters" if arm.startswith("clusters") else "keys"
    layers = [make_layer(shape, kept, likeness, beside, rule) for _ in range(count)]
    if arm == "exact":
        layers = [exact(layer, shape, beside) for layer in layers]
    attention = Attention(arm, shape, layers[0], beside)
    expected = attention.expected(layers[0])
    layers[0].output.fill_(torch.nan)
    attention(layers[0])
    torch.cuda.synchronize()
    actual = layers[0].output[: len(expected)].float()
    error = ((actual - expected).norm() / expected.norm()).item()
    if not (error < TOLERANCE and layers[0].output.isfinite().all()):
        return {"error": f"relative error {error:.1e}: wrong, and not timed"}
    result = {"us": time_graph(attention.look_up if arm == "look_up" else attention, layers)}
    counters = layers[0].prefixes.counters[0].tolist()
    if counters[0]:
        look_ups, loaded, pairs, chosen = counters[:4]
        result |= {"kept": chosen / pairs / shape.prefix, "union": loaded / look_ups / shape.prefix}
        held = layers[0].table
        centroids = (
            held.centroids.nbytes + held.group_centroids.nbytes + (arm in WITH_REST) * held.value_centroids.nbytes
        )
        tiles = look_ups / pairs * shape.batch
        if arm == "look_up":
            return result | {"bytes": centroids}
        read = tiles * (centroids + result["union"] * shape.prefix * shape.kv_bytes)
    else:
        read = shape.prefix * shape.kv_bytes * (shape.batch if arm in ("stock", "xformers") else 1)
    result["bytes"] = read + shape.batch * shape.suffix * shape.kv_bytes
    return result


def run_arm(arguments: argparse.Namespace) -> None:
    """Runs one arm over all shapes; prints a line of JSON for each."""
    import torch

    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    seconds = min(timed_copy(source, target) for _ in range(5))
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "bytes_per_s": 2 * 2**30 / seconds}
    del source, target
    print(json.dumps(machine), flush=True)
    for prefix in arguments.prefixes:
        for batch in arguments.batches:
            shape = Shape(
                prefix * 1024, arguments.suffix, batch, *arguments.heads, arguments.head_size, arguments.page_size
            )
            try:
                case = run_case(arguments.arm, shape, arguments.kept, arguments.likeness, arguments.beside)
            except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
                case = {"error": f"{type(error).__name__}: {error}".splitlines()[-1][:200]}
            torch.cuda.empty_cache()
            print(json.dumps({"arm": arguments.arm, "prefix": prefix, "batch": batch, **case}), flush=True)


def timed_copy(source: Any, target: Any) -> float:
    """Seconds of a device-to-device copy."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Microseconds of each arm, and how many times faster than stock; no ratio for what is wrong."""
    stock = {(row["prefix"], row["batch"]): row.get("us") for row in rows if row["arm"] == "stock"}
    lines = [f"{'prefix':>7} {'B':>3} {'arm':9} {'us':>8} {'x stock':>8} {'kept':>6} {'union':>6} {'of floor':>8}"]
    for row in sorted(rows, key=lambda row: (row["prefix"], row["batch"], ARMS.index(row["arm"]))):
        start = f"{row['prefix']:>6}K {row['batch']:>3} {row['arm']:9}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        base = stock.get((row["prefix"], row["batch"]))
        ratio = f"{base / row['us']:8.2f}" if base else f"{'':8}"
        shares = "".join(f" {row[name]:6.3f}" if name in row else f" {'':6}" for name in ("kept", "union"))
        floor = row["bytes"] / machine["bytes_per_s"] * 1e6 / row["us"]
        lines.append(f"{start} {row['us']:8.1f} {ratio}{shares} {floor:8.0%}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws microseconds of each arm and number of rows against the prefix, both on logarithmic axes."""
    from vllm_squeeze.offline_tools.page import new_figure

    figure, (axes,) = new_figure(6, 4)
    timed = [row for row in rows if "us" in row]
    for arm, batch in dict.fromkeys((row["arm"], row["batch"]) for row in timed):
        points = sorted((row["prefix"], row["us"]) for row in timed if (row["arm"], row["batch"]) == (arm, batch))
        axes.plot(*zip(*points), marker="o", label=f"{arm}, {batch} row{'s' if batch > 1 else ''}")
    prefixes = sorted({row["prefix"] for row in timed})
    axes.set(
        xscale="log", yscale="log", xlabel="tokens of the prefix, in units of 1024", ylabel="microseconds of a layer"
    )
    axes.set_xticks(prefixes, prefixes)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[8, 32, 128, 512], help="units of 1024 tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="rows")
    parser.add_argument("--kept", type=float, default=0.1, help="share of the clusters that a row chooses")
    parser.add_argument("--likeness", type=float, default=0.7, help="correlation of the rows' queries")
    parser.add_argument("--suffix", type=int, default=128, help="tokens behind the prefix, of each row")
    parser.add_argument("--heads", type=int, nargs=2, default=(8, 4), help="KV heads, and query heads for each")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--beside", action="store_true", help="let FlashAttention attend to the suffixes")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="where to draw times against prefixes; needs matplotlib"
    )
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        return run_arm(arguments)
    rows, machine = [], {}
    for arm in arguments.arms:
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
        child = subprocess.run(command, check=False, capture_output=True, text=True)
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        if child.returncode or not lines:
            sys.exit(f"{arm} failed:\n{child.stderr[-3000:]}")
        run = {"date": str(date.today()), "command": " ".join(sys.argv)}
        run |= {"kv_heads": arguments.heads[0], "group": arguments.heads[1], "head_size": arguments.head_size}
        run |= {"kept": arguments.kept, "centroids": 1 / KEYS_PER_CENTROID}
        machine, rows = lines[0] | run, rows + lines[1:]
    print(
        f"{machine['gpu']}, torch {machine['torch']}, {machine['date']}; copy {machine['bytes_per_s'] / 1e12:.2f} TB/s"
    )
    print(table(rows, machine))
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    if arguments.plot:
        plot(rows, arguments.plot)
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
