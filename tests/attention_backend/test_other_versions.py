"""What we build on, in vLLM versions beside the installed one: the contract on the Python files of their wheels.

Only with SQUEEZE_TEST_VERSIONS, which names them, as in CI: each is a download of some 300 MB.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.attention_backend.test_compat import run_contract

VERSIONS = os.environ.get("SQUEEZE_TEST_VERSIONS", "").split()


def unpack(wheel: Path, folder: Path) -> None:
    """The Python files and the metadata of a wheel; the latter says that it is a CPU build, else vLLM finds no device."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name]
        archive.extractall(folder, names)
    (metadata,) = folder.glob("*.dist-info/METADATA")
    head, body = metadata.read_text(encoding="utf-8").split("\nVersion: ", 1)
    version, body = body.split("\n", 1)
    metadata.write_text(f"{head}\nVersion: {version}+cpu\n{body}", encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
def test_what_we_build_on_is_there(version: str, tmp_path: Path):
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 35)]
    wheel = ["--only-binary=:all:", "--no-deps", "--python-version=3.12", *platforms, f"vllm=={version}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--dest", tmp_path, *wheel]
    download = subprocess.run(command, capture_output=True, text=True, check=False)
    if download.returncode:
        pytest.skip(f"vLLM {version} cannot be downloaded: {download.stderr.strip().splitlines()[-1]}")
    (path,) = tmp_path.glob("*.whl")
    unpack(path, tmp_path / "vllm")
    path.unlink()
    assert run_contract(tmp_path / "vllm") == f"OK {version}+cpu"
