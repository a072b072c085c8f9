"""The wheel holds every module and data file of the package, and nothing else. See also ``tools/check_wheel.py``."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tools.check_wheel import PACKAGE, SOURCES, package_files, wrong_files

ROOT = Path(__file__).parents[1]


def test_the_wheel_is_the_package(tmp_path):
    source = tmp_path / "source"
    # A copy, since the build writes beside the sources; with what must stay out.
    for name in (PACKAGE, "benchmarks", "examples", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for name in set(SOURCES) - {PACKAGE}:
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wrong_files(wheel, ROOT) == []
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    assert f"{PACKAGE}/attention_backend/measured_times.json" in names and len(names) > len(package_files(ROOT))


def test_what_is_missing_or_too_much_is_found(tmp_path):
    wheel = tmp_path / "broken.whl"
    with zipfile.ZipFile(wheel, "w") as written:
        for name in package_files(ROOT) - {f"{PACKAGE}/config.py"} | {"tests/test_cli.py"}:
            written.writestr(name, "")
    assert wrong_files(wheel, ROOT) == [
        f"broken.whl: {PACKAGE}/config.py is missing",
        "broken.whl: LICENSE is missing",
        "broken.whl: tests/test_cli.py should not be there",
    ]
