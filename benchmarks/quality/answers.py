"""Answers of an arm to a task's questions: kept one a line, so that a run that was stopped goes on where it was."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from benchmarks.agreement import budget_used, rows_of
from benchmarks.quality.paired import compare
from benchmarks.quality.questions import Task
from vllm_squeeze.offline_tools.fidelity import mean_and_error

DENSE = "dense"
SERVED = "served-"
"""What the names of arms begin with that a server answered."""


def read(path: Path) -> list[dict[str, Any]]:
    """Answers that were written whole; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def answers_path(folder: Path, arm: str) -> Path:
    """Where the folder of a task keeps an arm's answers."""
    return folder / f"{arm}.jsonl"


def problem_path(folder: Path, arm: str) -> Path:
    """Where it says why an arm cannot answer."""
    return folder / f"{arm}.problem"


def go_on(path: Path, count: int, answer: Callable[[int], dict[str, Any]], title: str = "") -> None:
    """Answers those of ``count`` questions that have no answer yet, and writes each as soon as it is there.

    Args:
        path: of the answers, JSON lines.
        count: questions there are.
        answer: answers a question, given its number.
        title: of the progress bar.
    """
    known = read(path)
    # A line that was broken off would swallow the next.
    path.write_text("".join(json.dumps(row) + "\n" for row in known), encoding="utf-8")
    missing = sorted(set(range(count)) - {row["question"] for row in known})
    with path.open("a", encoding="utf-8") as file:
        for number in tqdm(missing, desc=title, total=count, initial=count - len(missing)):
            file.write(json.dumps({"question": number} | answer(number)) + "\n")
            file.flush()


def problem_of(arm: str, rows: list[dict[str, Any]], count: int) -> str | None:
    """Why an arm has no figures; None if it has."""
    if len(rows) != count:
        return f"{len(rows)} of {count} questions were answered"
    counters = total(rows)
    outcomes, expected = rows_of(counters), [] if arm == DENSE else ["dense: prefill", "squeezed"]
    if sorted(outcomes) != expected:
        return f"rows are {outcomes}, not only {expected}"
    if (budget_used(counters) is None) != (arm == DENSE):
        return f"{'some' if arm == DENSE else 'nothing'} of the prefix was read by what squeezes"
    return None


def total(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The server's counters, summed up over answers."""
    summed: Counter[str] = Counter()
    for row in rows:
        summed.update(row["counters"])
    return dict(summed)


def same_tokens(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> float | None:
    """The share of answers that are the same token for token, of questions that both answered; None without any."""
    known = {row["question"]: row["tokens"] for row in others}
    same = [row["tokens"] == known[row["question"]] for row in rows if row["question"] in known]
    return sum(same) / len(same) if same else None


def summarise(
    task: Task, arms: dict[str, list[dict[str, Any]]], problems: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The figures of a task's arms, the dense one first; an arm with a problem has that instead.

    Args:
        task: with the questions.
        arms: each arm's answers.
        problems: why arms cannot answer.
    """
    sorted_arms = {arm: sorted(rows, key=lambda row: row["question"]) for arm, rows in arms.items()}
    summaries: list[dict[str, Any]] = []
    scores: dict[str, list[float]] = {}
    for arm, rows in sorted_arms.items():
        summary: dict[str, Any] = {"task": task.name, "arm": arm}
        summaries.append(summary)
        if problem := problems.get(arm) or problem_of(arm, rows, len(task.questions)):
            summary["problem"] = problem
            continue
        scores[arm] = [question.score(row["text"]) for question, row in zip(task.questions, rows, strict=True)]
        summary |= {"budget_used": budget_used(total(rows)), "score": sum(scores[arm]) / len(rows)}
        if all(question.metric == "part" for question in task.questions):
            f1 = [question.f1(row["text"]) for question, row in zip(task.questions, rows, strict=True)]
            summary["f1"] = sum(f1) / len(rows)
        if arm != DENSE and DENSE in scores:
            tokens = [[row["tokens"] for row in sorted_arms[name]] for name in (DENSE, arm)]
            found = compare(scores[DENSE], scores[arm], *tokens)
            summary |= {"difference": found.difference, "low": found.low, "high": found.high}
            summary |= {"same": found.same, "before_difference": found.before_difference}
            if all("kl" in row for row in rows):
                summary["kl"], summary["kl_error"] = mean_and_error([row["kl"] for row in rows])
                summary["top1"], _ = mean_and_error([row["same_top"] for row in rows])
    return summaries
