"""Compares ways to choose what of a prefix is read, at equal bytes, by next-token distributions on the dense answers.

    python -m benchmarks.quality.sweep --model M --work folder/ --task vt --arms ours:0.125 oracle:0.125 served:0.125 \\
        --length 4096 --questions 20

One engine with one indexed prefix runs all arms one after the other. The task and its index are made as by
``python -m benchmarks.quality``, with the same further arguments, where the work folder has none. First vLLM's own
attention answers all questions together; then each arm has these answers forced on it, all together, token by token as
they would be decoded, every layer really attending as the arm does, with ``--prefill squeezed`` in the prompts' ends
too; with a budget there, these are squeezed as the server does it, whatever the arm, and count among what is served. An
arm is ``rule+option:budget``, see ``selection.py``; they run in torch, except

    served    the server's own kernels, with the threshold of the index

Before each run the KV cache is emptied and the prefix computed anew, densely. Budgets are met by what is really read:
in a first run an arm whose rule does not say how much it chooses takes everything, and ranks of keys drawn by lot are
noted, which say what threshold would have chosen the wanted share of them; it is found again in each run until bytes
are within a tolerance. Served rows have the threshold of their index, and read what they read.

    bytes     read over those of dense attention, of all query tokens that are squeezed, each alone
    KL        of dense to other next-token distributions, nats, mean over the places of all answers, and its standard
              error if questions are drawn anew
    top-1     percent of places where both have the same most likely token
    recall    percent of the attention probability, prefix and what follows, that falls on keys attended to exactly,
              mean over layers, heads and query tokens; and in the layer where it is least
    kept      percent of the keys that there are to choose from, in the layer with the least, on average, with the most

Results are appended to ``folder/task/sweep.jsonl``, with all figures of each question.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.quality import plots
from benchmarks.quality.answers import read
from benchmarks.quality.selection import cost_of, parse, threshold_of

# Sets the environment before vLLM is imported.
from benchmarks.running import count
from vllm_squeeze.cli import prefill
from vllm_squeeze.config import SqueezeConfig
from vllm_squeeze.offline_tools.fidelity import mean_and_error
from vllm_squeeze.offline_tools.timing import machine

SERVED = "served"


class Sweep:
    """An engine with one indexed prefix, and the dense answers to questions on it.

    Args:
        model: as vLLM takes it.
        index: of the prefix.
        prompts: token ids, each of the prefix and a question.
        num_tokens: most tokens of an answer.
        engine_args: more arguments for vLLM's engine.
        prefill: as in ``SqueezeConfig``.

    Attributes:
        llm: vLLM's.
        answers: the dense answers, token ids.
    """

    def __init__(
        self,
        model: str,
        index: Path,
        prompts: list[list[int]],
        num_tokens: int,
        engine_args: dict[str, Any],
        prefill: float | str = SqueezeConfig.prefill,
    ):
        from benchmarks.quality import arms
        from vllm_squeeze.offline_tools import measure
        from vllm_squeeze.offline_tools.prefix_engine import PrefixEngine

        self._arms, self._measure = arms, measure
        chosen = {"max_num_seqs": len(prompts)} | engine_args | {"enforce_eager": True}
        self._engine = PrefixEngine(model, index, prompts, num_tokens, chosen, prefill)
        self.llm = self._engine.llm
        self._prompts = prompts
        self.answers, self._dense = measure.answer_densely(self._engine, prompts, num_tokens)

    def _compare(self) -> dict[str, Any]:
        """Forces the dense answers on the engine as it is; returns how its distributions differ."""
        kl, same = self._measure.divergences(self._engine, self._prompts, self.answers, self._dense)
        mean, error = mean_and_error(kl)
        return {
            "kl": mean,
            "kl_error": error,
            "top1": mean_and_error(same)[0],
            "kl_of_questions": kl,
            "same_top_of_questions": same,
        }

    def measure(self, name: str, threshold: float, share: float = 1.0) -> tuple[dict[str, Any], Any]:
        """The figures of an arm at a threshold, and its ``Reads``; ``share`` of the keys is wanted."""
        with self._arms.attending(self.llm, parse(name), threshold, share) as reads:
            figures = self._compare()
        kept, recall = reads.kept_shares(), reads.recalls()
        figures |= {
            "bytes": reads.budget_used(),
            "kept": sum(kept) / len(kept),
            "recall": sum(recall) / len(recall),
            "kept_of_layers": kept,
            "recall_of_layers": recall,
            "threshold": threshold,
        }
        return figures, reads

    def run(self, name: str, budget: float, tolerance: float = 0.02, most_runs: int = 4) -> dict[str, Any]:
        """The figures of an arm that reads so much, within a tolerance relative to it, if it is met in so many runs.

        Raises:
            ValueError: the arm reads more in any case.
        """
        arm = parse(name)
        cost = cost_of(arm, self._engine.cost)
        share = cost.share(budget)
        threshold = threshold_of(arm, share, cost.num_keys)
        runs, (figures, reads) = 1, self.measure(name, -math.inf if threshold is None else threshold, share)
        while share < 1 and runs < most_runs and (runs == 1 or abs(figures["bytes"] / budget - 1) > tolerance):
            runs, (figures, reads) = runs + 1, self.measure(name, reads.threshold(share), share)
        return figures | {"runs": runs}

    def run_served(self, budget: float) -> dict[str, Any]:
        """The figures of the server's own kernels at a budget.

        Raises:
            ValueError: centroids and always attended tokens alone read more.
        """
        cost, threshold = self._engine.cost, self._engine.set_budget(budget)
        before = count(self.llm)
        figures = self._compare()
        kept = (count(self.llm) - before).kept_share
        used = cost.budget_used(kept * cost.num_clustered)
        return figures | {"bytes": used, "kept": kept, "threshold": threshold, "runs": 1}


COLUMNS = (
    ("bytes", lambda row: row["bytes"], ".4f"),
    ("KL", lambda row: row["kl"], ".5f"),
    ("+-", lambda row: row["kl_error"], ".5f"),
    ("top-1", lambda row: row["top1"] * 100, ".1f"),
    ("recall", lambda row: row["recall"] * 100, ".1f"),
    ("least", lambda row: min(row["recall_of_layers"]) * 100, ".1f"),
    ("kept", lambda row: row["kept"] * 100, ".2f"),
    ("least", lambda row: min(row["kept_of_layers"]) * 100, ".2f"),
    ("most", lambda row: max(row["kept_of_layers"]) * 100, ".2f"),
    ("runs", lambda row: row["runs"], "d"),
    ("s", lambda row: row["seconds"], ".1f"),
)


def table_line(row: dict[str, Any]) -> str:
    """An arm's line of the table."""
    if "problem" in row:
        return f"{row['arm']:<28}{row['budget']:>8g}  {row['problem']}"
    cells = []
    for _, figure, form in COLUMNS:
        try:
            cells.append(format(figure(row), form))
        except KeyError:
            cells.append("-")
    return f"{row['arm']:<28}{row['budget']:>8g}" + "".join(f"{cell:>9}" for cell in cells)


def arm_and_budget(text: str) -> tuple[str, float]:
    """An arm's name and budget.

    Raises:
        argparse.ArgumentTypeError: there is no such arm.
    """
    name, _, budget = text.partition(":")
    try:
        if name != SERVED:
            parse(name)
        if not 0 < float(budget) <= 1:
            raise ValueError("a budget must be above 0 and at most 1")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return name, float(budget)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps tasks and indexes")
    parser.add_argument("--task", required=True)
    parser.add_argument("--arms", nargs="+", type=arm_and_budget, required=True, metavar="RULE+OPTION:BUDGET")
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of an answer")
    parser.add_argument("--tolerance", type=float, default=0.02, help="how far bytes may be from the budget, relative")
    parser.add_argument("--most-runs", type=int, default=4, help="of an arm, to meet its budget")
    parser.add_argument(
        "--prefill", type=prefill, default=SqueezeConfig.prefill, help="what prompts' ends attend to, as the setting"
    )
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw KL against bytes, of all arms so far")
    arguments, further = parser.parse_known_args()
    if arguments.plot:
        try:
            plots.check()
        except ValueError as error:
            parser.error(str(error))
    folder = arguments.work / arguments.task
    if not (folder / "task.json").exists():
        arguments.work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.quality", "--model", arguments.model]
        command += ["--work", str(arguments.work), "--task", arguments.task, *further]
        command += ["--engine-args", json.dumps(arguments.engine_args)]
        if code := subprocess.run(command, check=False, stdout=sys.stderr).returncode:
            return code

    from benchmarks.quality.__main__ import prompts_of, read_task

    task = read_task(arguments.work, arguments.task)
    prompts = prompts_of(task, arguments.model)
    sweep = Sweep(
        arguments.model, folder / "index", prompts, arguments.tokens, arguments.engine_args, arguments.prefill
    )
    places = sum(map(len, sweep.answers))
    print(f"{machine()}, {arguments.model}, {task.name}, {len(prompts)} questions, {places} places of answers")
    print(f"{'arm':<28}{'budget':>8}" + "".join(f"{title:>9}" for title, *_ in COLUMNS), flush=True)
    with (folder / "sweep.jsonl").open("a", encoding="utf-8") as file:
        for name, budget in arguments.arms:
            row = {"task": task.name, "arm": name, "budget": budget, "model": arguments.model} | machine()
            started = time.monotonic()
            try:
                if name == SERVED:
                    row |= sweep.run_served(budget)
                else:
                    row |= sweep.run(name, budget, arguments.tolerance, arguments.most_runs)
            except ValueError as error:
                row["problem"] = str(error)
            row["seconds"] = round(time.monotonic() - started, 2)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(table_line(row), flush=True)
    if arguments.plot:
        lines: plots.Lines = {}
        for row in read(folder / "sweep.jsonl"):
            if "kl" in row:
                lines.setdefault(row["arm"], []).append((row["bytes"], row["kl"]))
        plots.plot(arguments.plot, {plots.KL: lines}, logarithmic=frozenset({plots.KL}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
