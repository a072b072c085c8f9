"""Times one attention layer of a prompt over an indexed prefix, against FlashAttention.

    python benchmarks/prompts.py --prefixes 32 128 512 --tokens 256 512 2048 --kept 0.1 0.3 --out prompts.json

A question of so many tokens follows a prefix that is in the KV cache. Each case is checked before it is timed, against
the oracle in float32, its first and its last tokens; a wrong one is not timed. All is included: look-up, choice, what
is not chosen, the question's own keys, merge. Times are those of launches one after the other, as in a server, where
steps with prompts replay no CUDA graphs of attention.

    stock      vLLM's FlashAttention over prefix and question
    drop       each tile of the question's tokens over what it chose, the clusters that were not chosen dropped
    squeezed   the same, with value centroids for them
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kernels import KEYS_PER_CENTROID, TOLERANCE, Layer, Shape, make_layer

REPEATS = 5


class Prompt:
    """A question on a layer's prefix.

    Args:
        shape: of the layer, with the question as the suffix of its one row.
        layer: with its prefix.
        kept: share of the keys that a tile chooses.
    """

    def __init__(self, shape: Shape, layer: Layer, kept: float):
        import torch

        from vllm_squeeze.kernels.prompts import PromptTiles, PromptWorkspace
        from vllm_squeeze.kernels.tables import PROMPT_SLOTS

        self.shape, self.layer, tokens = shape, layer, shape.suffix
        self.scale = shape.head_size**-0.5
        heads = shape.kv_heads * shape.group
        self.query = torch.randn(tokens, heads, shape.head_size, dtype=layer.query.dtype, device="cuda")
        self.output = torch.empty_like(self.query)
        self.starts = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        layer.prefixes.kept_shares.fill_(kept)
        prompts = PromptTiles.allocate(tokens, 1, shape.group, shape.head_size, "cuda")
        length = shape.prefix + tokens
        self.prompts = prompts.of([tokens], length)
        slots, lens, prefix_lens = torch.tensor([[PROMPT_SLOTS], [length], [shape.prefix]]).int().cuda()
        self.prompts.fill(slots, self.starts, lens, prefix_lens)
        limits = layer.table.sizes.shape[1], shape.prefix, length
        self.workspace = PromptWorkspace.allocate(layer.table, shape.group, *limits, self.query.dtype)

    def flash(self, **operands: Any) -> Any:
        """FlashAttention; returns the log-sum-exp."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        options = {"softmax_scale": self.scale, "causal": True, "fa_version": 3, "return_softmax_lse": True}
        return flash_attn_varlen_func(**operands, **options)[1]

    def stock(self) -> None:
        """Attends to all."""
        import torch

        num_keys = self.shape.prefix + self.shape.suffix
        self.flash(
            q=self.query,
            k=self.layer.key_cache,
            v=self.layer.value_cache,
            out=self.output,
            cu_seqlens_q=self.starts,
            max_seqlen_q=self.shape.suffix,
            seqused_k=torch.full((1,), num_keys, dtype=torch.int32, device="cuda"),
            max_seqlen_k=num_keys,
            block_table=self.layer.block_table,
        )

    def squeezed(self, rest: bool) -> None:
        """Attends to what is chosen of the prefix, and to the question."""
        from vllm_squeeze.kernels.prompts import squeezed_prompts

        caches = self.layer.key_cache, self.layer.value_cache, self.layer.block_table
        operands = self.prompts, self.layer.table, self.layer.prefixes, self.scale, rest, self.workspace
        squeezed_prompts(self.query, self.output, *caches, *operands, self.flash)

    def error(self, rest: bool) -> float:
        """How far the first and the last tile are from the oracle, relative, after ``squeezed``."""
        import torch

        from vllm_squeeze.kernels.reference import squeezed_prompts_reference

        tiles = self.prompts.tiles
        some = tiles[[0, int((tiles[:, 0] >= 0).sum()) - 1]]
        caches = self.layer.key_cache, self.layer.value_cache, self.layer.block_table
        operands = replace(self.prompts, tiles=some), self.layer.table, self.layer.prefixes, self.scale, rest
        expected = torch.empty_like(self.query, dtype=torch.float32)
        squeezed_prompts_reference(self.query, expected, *caches, *operands)
        tokens = torch.cat(
            [torch.arange(start, start + size, device="cuda") for _, _, start, size, *_ in some.tolist()]
        )
        actual, expected = self.output[tokens].float(), expected[tokens]
        return ((actual - expected).norm() / expected.norm()).item() if actual.isfinite().all() else float("nan")


def timed(call: Callable[[], None]) -> float:
    """Microseconds of a call, the fastest of some."""
    import torch

    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPEATS):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / REPEATS)
    return min(times)


def run_case(shape: Shape, kept: float) -> list[dict[str, Any]]:
    """The times of a prefix, a question's length and a share of kept keys, of each arm."""
    import torch

    torch.manual_seed(shape.prefix + shape.suffix)
    prompt = Prompt(shape, make_layer(shape, kept, 0.0, True), kept)
    case = {"prefix": shape.prefix // 1024, "tokens": shape.suffix, "kept": kept}
    prompt.stock()
    rows = [case | {"arm": "stock", "us": timed(prompt.stock)}]
    counters = prompt.layer.prefixes.counters
    for arm, rest in (("drop", False), ("squeezed", True)):
        prompt.output.fill_(torch.nan)
        counters.zero_()
        prompt.squeezed(rest)
        really = float(counters[0, 3] / counters[0, 2]) / shape.prefix
        if not (error := prompt.error(rest)) < TOLERANCE:
            rows.append(case | {"arm": arm, "error": f"relative error {error:.1e}: wrong, and not timed"})
            continue
        us = timed(lambda: prompt.squeezed(rest))  # noqa: B023
        rows.append(case | {"arm": arm, "us": us, "really": really, "over_stock": rows[0]["us"] / us})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[32, 128, 512], help="units of 1024 tokens")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 2048], help="of the question")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.1, 0.3], help="share of the keys in clusters")
    parser.add_argument("--heads", type=int, nargs=2, default=(8, 4), help="KV heads, and query heads for each")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    import torch

    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": str(date.today())}
    print(", ".join(machine.values()))
    machine |= {"kv_heads": arguments.heads[0], "group": arguments.heads[1], "head_size": arguments.head_size}
    machine |= {"centroids": 1 / KEYS_PER_CENTROID}
    print(f"{'prefix':>7} {'tokens':>6} {'kept':>5} {'arm':9} {'us':>8} {'x stock':>8} {'really':>7}")
    rows = []
    for prefix in arguments.prefixes:
        for tokens in arguments.tokens:
            for kept in arguments.kept:
                shape = Shape(prefix * 1024, tokens, 1, *arguments.heads, arguments.head_size, arguments.page_size)
                for row in run_case(shape, kept):
                    rows.append(row)
                    start = f"{prefix:>6}K {tokens:>6} {kept:>5} {row['arm']:9}"
                    figures = row.get("error") or f"{row['us']:8.1f}"
                    if "really" in row:
                        figures += f" {row['over_stock']:8.2f} {row['really']:7.3f}"
                    print(start, figures, flush=True)
                torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine | {"command": " ".join(sys.argv)}, "rows": rows}))
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
