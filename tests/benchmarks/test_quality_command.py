"""The command ``python -m benchmarks.quality`` on a work folder whose answers are all there: no engine runs."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_answers import DENSE_ROWS, SQUEEZED, TASK, row

ROOT = Path(__file__).parents[2]
MACHINE = {"machine": "Imaginary 9000", "versions": {"vllm": "1.2.3"}}


def quality(work: Path, *arguments: str, model: str = "no-such-model") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.quality", "--model", model, "--tasks", "vt", "--questions", "2"]
    command += ["--budgets", "0.25", "--work", str(work), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def answered(work: Path, squeezed: list[dict[str, Any]]) -> None:
    """Fills a work folder as if the command had run."""
    folder = work / "vt"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(asdict(TASK)))
    for arm, rows in {"dense": DENSE_ROWS, "0.25": squeezed}.items():
        (folder / f"{arm}.jsonl").write_text("".join(json.dumps(one | MACHINE) + "\n" for one in rows))


def test_what_is_there_is_not_run_again(tmp_path: Path):
    rows = [row(0, "a", [1, 2], SQUEEZED), row(1, "nothing", [5, 4], SQUEEZED)]
    divergence = [{"kl": [0.1, 0.1], "same_top": [True, True]}, {"kl": [0.2, 0.4], "same_top": [True, False]}]
    answered(tmp_path / "work", [one | compared for one, compared in zip(rows, divergence, strict=True)])
    ran = quality(tmp_path / "work", "--out", str(tmp_path / "out.json"))
    assert ran.returncode == 0, ran.stderr
    device, command, header, dense, squeezed = ran.stdout.splitlines()
    assert device.startswith("Imaginary 9000, vllm 1.2.3, 20")
    assert command.startswith("python -m benchmarks.quality --model no-such-model")
    titles = ["task", "arm", "used", "score", "f1", "change", "from", "to", "same", "before", "KL", "+-", "top-1"]
    assert header.split() == titles
    assert dense.split() == ["vt", "dense", "-", "75.0", *["-"] * 9]
    figures = ["0.2500", "50.0", "-", "-25.0", "-50.0", "+0.0", "50", "50", "0.2000", "0.1000", "75.0"]
    assert squeezed.split() == ["vt", "0.25", *figures]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(figures["arm"], figures["score"]) for figures in rows] == [("dense", 0.75), ("0.25", 0.5)]


def test_answers_of_servers_are_compared_with_those_of_the_engine(tmp_path: Path):
    """There is no dense one of the engine."""
    folder = tmp_path / "work" / "vt"
    answered(tmp_path / "work", [row(0, "a", [1, 2], SQUEEZED), row(1, "nothing", [5, 4], SQUEEZED)])
    (folder / "dense.jsonl").rename(folder / "served-dense.jsonl")
    rows = [row(1, "b", [3, 4], SQUEEZED), row(0, "a", [1, 2], SQUEEZED)]
    (folder / "served-0.25.jsonl").write_text("".join(json.dumps(one | MACHINE) + "\n" for one in rows))
    ran = quality(tmp_path / "work", "--served")
    assert ran.returncode == 0, ran.stderr
    header, dense, squeezed = ran.stdout.splitlines()[-3:]
    assert header.split() == ["task", "arm", "used", "score", "f1", "change", "from", "to", "same", "before", "alike"]
    assert dense.split() == ["vt", "dense", "-", "75.0", *["-"] * 7]
    assert squeezed.split() == ["vt", "0.25", "0.2500", "75.0", "-", *["+0.0"] * 3, "100", "100", "50"]


def test_an_arm_with_dense_rows_has_no_figures(tmp_path: Path):
    answered(
        tmp_path / "work", [row(0, "a", [1, 2], SQUEEZED), row(1, "b", [3], {"vllm:squeeze_rowsdense: faster": 1})]
    )
    ran = quality(tmp_path / "work")
    assert ran.returncode == 1
    assert "dense: faster" in ran.stdout.splitlines()[-1]


def test_a_budget_that_cannot_be_met_is_not_tried_again(tmp_path: Path):
    answered(tmp_path / "work", [row(0, "a", [1, 2], SQUEEZED), row(1, "b", [3, 4], SQUEEZED)])
    (tmp_path / "work" / "vt" / "0.01.problem").write_text("budget: 0.01 is too little")
    ran = quality(tmp_path / "work", "--budgets", "0.01", "0.25")
    assert ran.returncode == 1
    impossible, possible = ran.stdout.splitlines()[-2:]
    assert impossible.split(maxsplit=2) == ["vt", "0.01", "budget: 0.01 is too little"]
    assert possible.split()[:4] == ["vt", "0.25", "0.2500", "75.0"]


def test_a_work_folder_is_of_one_model(tmp_path: Path):
    answered(tmp_path / "work", [row(0, "a", [1, 2], SQUEEZED), row(1, "b", [3, 4], SQUEEZED)])
    assert quality(tmp_path / "work").returncode == 0
    ran = quality(tmp_path / "work", model="another")
    assert ran.returncode == 2
    assert "model is 'another'" in ran.stderr and "was made with 'no-such-model'" in ran.stderr


@pytest.mark.skipif(find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_a_plot_needs_matplotlib(tmp_path: Path):
    ran = quality(tmp_path / "work", "--plot", str(tmp_path / "plot.svg"))
    assert ran.returncode == 2
    assert "--plot needs matplotlib, which is not installed: pip install matplotlib" in ran.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--beside", "ours"], "'ours' chooses by a threshold, which only benchmarks.quality.sweep can find"),
        (["--beside", "magic"], "'magic' is no arm; must be one of ours, paper, oracle, pages, random"),
        (
            ["--beside", "oracle"],
            "--beside: rules in torch need an engine in this process that captures no CUDA graphs",
        ),
        (["--beside", "oracle", "--served", "--engine-args", '{"enforce_eager": true}'], "so no --served"),
    ],
)
def test_rules_that_cannot_answer_beside(tmp_path: Path, arguments: list[str], message: str):
    ran = quality(tmp_path / "work", *arguments)
    assert ran.returncode == 2
    assert message in ran.stderr


@pytest.mark.parametrize("budget", ["0", "1.5", "half"])
def test_budgets_that_are_none(tmp_path: Path, budget: str):
    ran = quality(tmp_path / "work", "--budgets", budget)
    assert ran.returncode == 2
    assert f"'{budget}' is no budget; must be above 0 and at most 1" in ran.stderr
