"""Makes the times by which a server chooses between squeezed, exact and stock attention, and says how good choices are.

    python benchmarks/kernels.py --arms stock exact shared drop squeezed clusters_drop clusters \\
        --prefixes 1 2 4 8 16 32 64 128 256 512 \\
        --batches 1 2 3 4 6 8 12 16 24 32 64 128 256 --out kernels.json
    python benchmarks/kernels.py --arms stock exact shared drop squeezed clusters_drop clusters \\
        --prefixes 3 12 48 192 --batches 1 5 10 20 48 100 --out between.json
    python benchmarks/prompts.py --prefixes 8 16 32 64 128 256 --tokens 128 256 512 1024 --out prompts.json
    python benchmarks/policy.py kernels.json --check between.json --prompts prompts.json

The first file becomes the GPU's entry in ``vllm_squeeze/attention_backend/measured_times.json``. For every case in it,
and in those of --check, the arm that the policy picks is compared with what was measured there. "left out" is the same
for a case of the first file without its own times. The exit code is 1 if a pick takes 3% longer than the fastest of
stock, exact and shared; cases left out do not count, as what was measured is then twice as sparse as what is served.
The same of prompts whose tokens choose together, which are squeezed or stock.

Long questions are served by vLLM's attention where that is faster. Its speed there is measured by this command, on the
GPU; --tflops says it where there is none.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_squeeze.attention_backend.policy import MEASURED_TIMES, Arm, CostModel, Shape, Work, squeezed_times

RESTS = {"drop": "drop", "squeezed": "value_centroids"}
"""What becomes of clusters that were not chosen, in arms of both benchmarks."""
EXACT = ("stock", "exact", "shared")
ARMS = {arm: arm for arm in EXACT} | RESTS
ARMS |= {"clusters_drop": squeezed_times("drop", False), "clusters": squeezed_times("value_centroids", False)}
"""Of ``benchmarks/kernels.py``, and what they are called among the times."""
MOST_SLOWER = 0.03
QUESTION = 512

Cases = dict[tuple[int, int], dict[str, float]]
"""By tokens of the prefix and rows: microseconds of each arm."""


def read(path: Path, arms: Collection[str]) -> tuple[dict[str, Any], Cases]:
    """What ``benchmarks/kernels.py --out`` wrote: the machine and the cases in which at least these arms were timed.

    Raises:
        SystemExit: none was.
    """
    content = json.loads(path.read_text())
    cases: Cases = {}
    for row in content["rows"]:
        if row["arm"] in ARMS and "us" in row:
            cases.setdefault((row["prefix"] * 1024, row["batch"]), {})[ARMS[row["arm"]]] = row["us"]
    complete = {case: us for case, us in cases.items() if us.keys() >= set(arms)}
    if not complete:
        sys.exit(f"{path}: no case with times of all of {', '.join(arms)}")
    return content["machine"], complete


def entry_of(machine: dict[str, Any], cases: Cases, tflops: float, step_us: float) -> dict[str, Any]:
    """The GPU's entry.

    Raises:
        SystemExit: too few cases to interpolate between.
    """
    prefixes = {prefix for prefix, _ in cases}
    if len(prefixes) < 2 or any((prefix, 1) not in cases for prefix in prefixes):
        sys.exit("times of at least two prefixes are needed, and of each that of one row")
    times: dict[str, dict[str, dict[str, float]]] = {}
    for (prefix, rows), case in sorted(cases.items()):
        for arm, us in case.items():
            times.setdefault(arm, {}).setdefault(str(prefix), {})[str(rows)] = round(us, 1)
    return {
        "measured": f"{machine['date']}, torch {machine['torch']}",
        "shape": {name: machine[name] for name in ("kv_heads", "group", "head_size")} | {"element_size": 2},
        "kept": machine["kept"],
        "centroids": machine["centroids"],
        "tflops": round(tflops),
        "step_us": round(step_us),
        "us": times,
    }


def verdict(us: dict[Arm, float], times: dict[Arm, float], never: frozenset[Arm] = frozenset()) -> str:
    """The end of a case's line, which ends in "SLOW" where the pick is too slow.

    Args:
        us: what the policy goes by.
        times: what was measured.
        never: arms that cannot be picked.
    """
    errors = " ".join(f"{us[arm] / times[arm] - 1:+6.1%}" for arm in Arm if arm in us)
    allowed = [arm for arm in us if arm not in never]
    pick = min(allowed, key=us.__getitem__)
    slower = times[pick] / min(times[arm] for arm in allowed if arm is not Arm.SQUEEZED) - 1
    behind = times[pick] / min(times[arm] for arm in allowed) - 1
    return f"{pick.value:8} {slower:+7.1%} {behind:+7.1%}   {errors}{' SLOW' if slower > MOST_SLOWER else ''}"


def picks(model: CostModel, machine: dict[str, Any], cases: Cases) -> Iterator[str]:
    """A line on each case and way to treat the rest."""
    for (prefix, rows), measured in sorted(cases.items()):
        step = model.shape, prefix, Work(rows, 0, rows)
        for by_key, rest in product((True, False), RESTS.values()):
            name = squeezed_times(rest, by_key)
            if name not in measured:
                continue
            us = {
                Arm.STOCK: model.stock_us(*step),
                Arm.EXACT: model.exact_us(*step),
                Arm.SHARED: model.shared_us(*step),
                Arm.SQUEEZED: model.squeezed_us(*step, machine["kept"], machine["centroids"], rest, by_key),
            }
            times = {arm: measured[name if arm is Arm.SQUEEZED else arm.value] for arm in Arm}
            never = frozenset({Arm.SHARED} if rows <= model.shape.tile_tokens else ())
            yield f"{prefix:>7} {rows:>4} {name:24} {verdict(us, times, never)}"


def prompt_picks(model: CostModel, path: Path) -> Iterator[str]:
    """The same of each case that ``benchmarks/prompts.py --out`` wrote into a file.

    Raises:
        SystemExit: it says nothing of the layer's shape.
    """
    content = json.loads(path.read_text())
    machine = content["machine"]
    if missing := {"kv_heads", "group", "head_size", "centroids"} - machine.keys():
        sys.exit(f"{path}: no {', '.join(sorted(missing))} of the machine, as benchmarks/prompts.py has written since")
    shape = Shape(machine["kv_heads"], machine["group"], machine["head_size"], model.shape.element_size)
    for row in content["rows"]:
        if "over_stock" in row:
            step, rest = (shape, row["prefix"] * 1024, Work.of([row["tokens"]])), RESTS[row["arm"]]
            squeezed = model.prompt_us(*step, row["kept"], machine["centroids"], rest)
            us = {Arm.STOCK: model.stock_us(*step), Arm.SQUEEZED: squeezed}
            times = {Arm.STOCK: row["us"] * row["over_stock"], Arm.SQUEEZED: row["us"]}
            yield f"{row['prefix']:>6}K {row['tokens']:>6} {row['kept']:>4} {rest:15} {verdict(us, times)}"


def left_out(entry: dict[str, Any], machine: dict[str, Any], cases: Cases) -> Iterator[str]:
    """The same for each case between others of its prefix, without its own times."""
    for prefix, rows in sorted(cases):
        if 1 < rows < max(other for at, other in cases if at == prefix):
            others = deepcopy(entry)
            for times in others["us"].values():
                del times[str(prefix)][str(rows)]
            yield from picks(CostModel.of(others), machine, {(prefix, rows): cases[prefix, rows]})


def measure_tflops(machine: dict[str, Any]) -> float:
    """Of vLLM's attention of a question's tokens to 32K keys, on this GPU.

    Raises:
        SystemExit: this is not the GPU that the times are of.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_name() != machine["gpu"]:
        sys.exit(f"this machine has no {machine['gpu']}, of which the times are: say --tflops")
    from kernels import REPLAYS
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, heads = 32768, machine["kv_heads"]
    query = torch.randn(QUESTION, heads * machine["group"], machine["head_size"], dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, keys, heads, machine["head_size"], dtype=torch.bfloat16, device="cuda")
    starts = (torch.tensor([0, length], dtype=torch.int32, device="cuda") for length in (QUESTION, keys))
    query_starts, key_starts = starts
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        flash_attn_varlen_func(
            q=query, k=key, v=value, cu_seqlens_q=query_starts, cu_seqlens_k=key_starts, max_seqlen_q=QUESTION,
            max_seqlen_k=keys, causal=True, fa_version=3,
        )  # fmt: skip
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    seconds = sorted(times[3:])[REPLAYS // 2] / 1000
    return 4 * QUESTION * keys * query[0].numel() / seconds / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=Path, help="JSON that benchmarks/kernels.py wrote")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="+",
        default=[],
        help="the same, of other prefixes and batches, of any arms that squeeze",
    )
    parser.add_argument("--prompts", type=Path, help="JSON that benchmarks/prompts.py wrote, to be checked")
    parser.add_argument("--tflops", type=float, help="of vLLM's attention in a long question's prefill")
    parser.add_argument(
        "--step-us",
        type=float,
        default=20,
        help="that a step with our kernels takes beside them: four small kernels, once for all layers",
    )
    parser.add_argument("--out", type=Path, default=MEASURED_TIMES, help="file of all GPUs' times to write into")
    arguments = parser.parse_args()
    machine, cases = read(arguments.kernels, ARMS.values())
    entry = entry_of(machine, cases, arguments.tflops or measure_tflops(machine), arguments.step_us)
    others = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    arguments.out.write_text(json.dumps(others | {machine["gpu"]: entry}, indent=1) + "\n")

    model = CostModel.of(entry)
    print(f"{machine['gpu']}: wrote {len(cases)} cases into {arguments.out}")
    print(f"{'prefix':>7} {'rows':>4} {'squeezed':24} {'pick':8} {'slower than':>15}   error of the time of")
    print(f"{'':7} {'':4} {'':24} {'':8} {'exact':>7} {'best':>7}   {' '.join(f'{arm.value:>6.6}' for arm in Arm)}")
    checks = [read(path, EXACT) for path in arguments.check]
    lines = [line for at, of in [(machine, cases), *checks] for line in picks(model, at, of)]
    print("\n".join(lines))
    if between := list(left_out(entry, machine, cases)):
        print("left out", *between, sep="\n")
    if arguments.prompts:
        print(
            f"{'prefix':>7} {'tokens':>6} {'kept':>4} {'rest':15} {'pick':8} {'slower than':>15}   error of the time of"
        )
        print(f"{'':35} {'':8} {'stock':>7} {'best':>7}   {Arm.SQUEEZED.value:>6.6} {Arm.STOCK.value:>6}")
        lines += (of_prompts := list(prompt_picks(model, arguments.prompts)))
        print("\n".join(of_prompts))
    slow = sum(line.endswith("SLOW") for line in lines)
    print(f"{slow} of {len(lines)} picks take over {MOST_SLOWER:.0%} longer than the fastest that is exact")
    sys.exit(slow > 0)


if __name__ == "__main__":
    main()
