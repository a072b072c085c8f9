"""What the parts of a comparison say together: figures, ratios, and why a ratio is refused."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_squeeze.attention_backend.matching import EXACT as EXACT_ROWS
from vllm_squeeze.attention_backend.matching import FASTER, PREFILL, SQUEEZED
from vllm_squeeze.offline_tools.bench.plan import AGREEMENT, DENSE, Plan
from vllm_squeeze.offline_tools.fidelity import first_difference

TIMES = {"ttft_ms": "time to first token, ms", "tpot_ms": "time between tokens, ms"}
RATE = {"tokens_per_s": "tokens per second"}


@dataclass(frozen=True)
class Speed:
    """Requests of one arm that run together.

    Attributes:
        requests: that ran together.
        medians: of each figure of ``timed``, over the repeats.
        rows: by what became of them, all repeats; none for vLLM's own backend.
        budget_used: bytes needed of the prefix, over those that dense attention would have read; None where no row
            was squeezed or exact.
        problems: why these figures cannot be compared.
    """

    requests: int
    medians: dict[str, float]
    rows: dict[str, float]
    budget_used: float | None
    problems: list[str]


@dataclass(frozen=True)
class Agreement:
    """Answers of one arm beside the dense ones.

    Attributes:
        same: answers that are the same.
        first_differences: tokens before the first that differs, of each answer; None where it is the same.
        kl: from dense next-token distributions on dense answers, nats; None where it was not measured.
        kl_error: its standard error; 0 with a single question.
        same_top: share of places with the same most likely token.
        complete: whether all was measured that should be.
    """

    same: int
    first_differences: list[int | None]
    kl: float | None = None
    kl_error: float | None = None
    same_top: float | None = None
    complete: bool = True


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        plan: that was carried out.
        machine: what it was measured on; empty if no engine ran.
        speeds: of each arm that ran, vLLM's own among them.
        agreements: of each other arm.
        answers: texts, of each arm that ran.
        refusals: why there are ratios missing, a line each; none if all are there.
    """

    plan: Plan
    machine: dict[str, Any]
    speeds: dict[str, list[Speed]]
    agreements: dict[str, Agreement]
    answers: dict[str, list[str]]
    refusals: list[str]

    def ratio(self, arm: str, batch: int, figure: str) -> float | None:
        """How many times faster than vLLM's own backend an arm is; None if that is refused.

        Args:
            arm: that is compared.
            batch: its place among the plan's.
            figure: of ``timed``.
        """
        if arm not in self.agreements or not self.agreements[arm].complete:
            return None
        if any(self.speeds[name][batch].problems for name in (DENSE, arm)):
            return None
        dense, ours = (self.speeds[name][batch].medians[figure] for name in (DENSE, arm))
        return ours / dense if figure in RATE else dense / ours

    def as_json(self) -> dict[str, Any]:
        """All figures and ratios."""
        ratios = {
            arm: [
                {figure: self.ratio(arm, batch, figure) for figure in TIMES | RATE}
                for batch in range(len(self.plan.batches))
            ]
            for arm in self.plan.arms
        }
        return asdict(self) | {"ratios": ratios}


def compare(plan: Plan, results: dict[str, dict[str, Any]]) -> Comparison:
    """Puts the results of a plan's parts together.

    Args:
        plan: that was carried out.
        results: by part: of ``run_arm`` and ``run_agreement``, or {"error": why there is none}.
    """
    refusals = [f"{part}: {result['error']}" for part, result in results.items() if "error" in result]
    ran = {arm: result for arm, result in results.items() if "batches" in result}
    speeds = {
        arm: [speed(plan, arm, found, result["block_size"]) for found in result["batches"]]
        for arm, result in ran.items()
    }
    for arm, found in speeds.items():
        refusals += [f"{name_of(arm)}, {one.requests} together: {why}" for one in found for why in one.problems]
    agreements = {}
    for arm in [arm for arm in plan.arms if arm in ran and DENSE in ran]:
        distance = results[AGREEMENT].get(arm) if AGREEMENT in plan.parts else {}
        agreements[arm] = agreement([result["answers"] for result in (ran[DENSE], ran[arm])], distance)
        if distance is None:
            refusals.append(f"{name_of(arm)}: how far answers are from dense ones was not measured")
    answers = {arm: [answer["text"] for answer in result["answers"]] for arm, result in ran.items()}
    machine = next(({name: r[name] for name in ("machine", "versions")} for r in ran.values()), {})
    return Comparison(plan, machine, speeds, agreements, answers, refusals)


def name_of(arm: str) -> str:
    """An arm as it is called in sentences."""
    return f"budget {arm}" if arm[0].isdigit() else arm


def speed(plan: Plan, arm: str, found: dict[str, Any], block_size: int) -> Speed:
    repeats, rows, read = found["repeats"], found["rows"], found["bytes"]
    medians = {name: statistics.median(repeat[name] for repeat in repeats) for name in repeats[0]}
    problems = []
    for name in ("least_tokens", "most_tokens"):
        if any(repeat[name] != plan.tokens for repeat in repeats):
            problems.append(f"{name.replace('_', ' ')} of an answer are not {plan.tokens}")
    if any(repeat["least_cached"] <= len(plan.prefix) - block_size for repeat in repeats):
        problems.append("the prefix was not found in the KV cache")
    if any(math.isnan(repeat["tpot_ms"]) for repeat in repeats):
        problems.append("no two tokens came while all requests were being answered; ask for more --tokens")
    if arm != DENSE:
        problems += wrong_rows(rows)
    used = read["alone"] / read["dense"] if read.get("dense") else None
    return Speed(found["requests"], medians, rows, used, problems)


def wrong_rows(rows: dict[str, float]) -> list[str]:
    """What is wrong with an arm in which these rows became of requests on the prefix."""
    told = ", ".join(f"{count:.0f} {outcome}" for outcome, count in sorted(rows.items())) or "none was counted"
    if not rows.keys() & {SQUEEZED, EXACT_ROWS}:
        why = "; --mode squeezed would show what squeezing costs" if FASTER in rows else ""
        return [f"NOTHING WAS SQUEEZED (rows: {told}){why}"]
    if others := rows.keys() - {SQUEEZED, EXACT_ROWS, PREFILL, FASTER}:
        return [f"some rows were {sorted(others)[0]} (rows: {told})"]
    return []


def agreement(answers: Sequence[Sequence[dict[str, Any]]], distance: dict[str, float] | None) -> Agreement:
    """Compares an arm's answers with the dense ones.

    Args:
        answers: the dense ones, and the arm's.
        distance: what ``run_agreement`` says of the arm; empty where nothing is approximated, None where it failed.
    """
    first = [first_difference(*(answer["tokens"] for answer in pair)) for pair in zip(*answers, strict=True)]
    measured = {name: distance[name] for name in ("kl", "kl_error", "same_top")} if distance else {}
    return Agreement(first.count(None), first, **measured, complete=distance is not None)
