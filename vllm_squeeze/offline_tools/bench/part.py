"""A part of a comparison in a process of its own, since an engine gives its memory back only when its process ends.

python -m vllm_squeeze.offline_tools.bench.part PLAN.json PART RESULT.json
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_squeeze.offline_tools.bench.plan import AGREEMENT, Plan

# Read by vLLM when it is imported. The engine in this process: a step is one call.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


def run_part(plan: Plan, part: str) -> dict[str, Any]:
    """Runs a part in this process; see ``run_arm`` and ``run_agreement``."""
    if part == AGREEMENT:
        from vllm_squeeze.offline_tools.bench.agreement import run_agreement

        return run_agreement(plan)
    from vllm_squeeze.offline_tools.bench.speed import run_arm

    return run_arm(plan, part)


def run_in_fresh_process(plan: Plan, part: str) -> dict[str, Any]:
    """Runs a part in another process, whose log goes to standard error.

    Returns:
        its result, or what went wrong under "error".
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "plan.json", Path(folder) / "result.json"
        given.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(given), part, str(result)]
        # A variable that is set already wins, but for the first: the timing needs it.
        environment = ENVIRONMENT | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        code = subprocess.run(command, check=False, stdout=sys.stderr, env=environment).returncode
        if not result.exists():
            return {"error": f"its process ended with exit code {code}"}
        return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    given, part, result = sys.argv[1:]
    plan = Plan(**json.loads(Path(given).read_text(encoding="utf-8")))
    try:
        found = run_part(plan, part)
    except Exception as error:  # noqa: BLE001 (whatever vLLM raises: the other parts still say something)
        traceback.print_exc()
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
