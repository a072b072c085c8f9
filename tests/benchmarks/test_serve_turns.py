"""Arms that are alive at once and measured in turn, with scripts in their place."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import serve

ROOT = Path(serve.__file__).parents[1]
# "broken" ends in its second turn, "late" before it has any
SCRIPT = f"""
import argparse, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.serve import Turns
parser = argparse.ArgumentParser()
for name in ("arm", "work", "index", "result"):
    parser.add_argument("--" + name)
parser.add_argument("--turns", nargs=2, type=int)
asked = parser.parse_args()
if asked.arm == "late":
    sys.exit(3)
turn = Turns(*asked.turns)
for repeat in range(3):
    with turn:
        with open(asked.work + "/turns", "a") as turns:
            turns.write(f"{{asked.arm}} {{repeat}}\\n")
        if (asked.arm, repeat) == ("broken", 1):
            sys.exit(4)
pathlib.Path(asked.result).write_text('{{"rows": []}}')
"""


def test_arms_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "arm.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(serve, "__file__", str(script))
    monkeypatch.setattr("sys.argv", ["serve.py"])
    arms = ["stock", "broken", "late", "auto:0.33"]
    arguments = argparse.Namespace(arms=arms, work=tmp_path, index=tmp_path / "index", timeout=60)
    runs = {run.pop("arm"): run for run in serve.in_turn(arguments)}
    turns = (tmp_path / "turns").read_text().split("\n")
    assert turns == [
        *("stock 0", "broken 0", "auto:0.33 0"),
        *("stock 1", "broken 1", "auto:0.33 1"),
        *("stock 2", "auto:0.33 2", ""),
    ]
    assert {arm: run.get("error") for arm, run in runs.items()} == {
        "stock": None,
        "broken": "exit code 4",
        "late": "exit code 3",
        "auto:0.33": None,
    }
    assert json.loads((tmp_path / "result-auto:0.33.json").read_text()) == {"rows": []}


def test_an_arm_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "arm.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(serve, "__file__", str(script))
    monkeypatch.setattr("sys.argv", ["serve.py"])
    arguments = argparse.Namespace(arms=["stock"], work=tmp_path, index=tmp_path / "index", timeout=0.5)
    (run,) = serve.in_turn(arguments)
    assert run["error"] == "took more than 0.5 s"


@pytest.mark.parametrize("name", ["stock", "auto", "auto:0.33", "squeezed:1", "ordinary-index"])
def test_arms_that_there_are(name: str):
    assert serve.arm(name) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [("dense", "is not one of stock"), ("exact:0.5", "auto or squeezed with a budget"), ("auto:2", "nor a number in")],
)
def test_arms_that_there_are_not(name: str, reason: str):
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        serve.arm(name)
