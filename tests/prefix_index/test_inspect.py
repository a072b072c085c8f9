import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_index import make_identity, write_exact_index, write_index

import vllm_squeeze
from vllm_squeeze.offline_tools.inspect import inspect


def inspected(path) -> tuple[int, dict[str, list[str]], str]:
    """The exit code, the values printed after each label, and the whole text."""
    out = io.StringIO()
    code = inspect(path, out)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("  ")]
    values: dict[str, list[str]] = {}
    for line in lines:
        values.setdefault(line[:20].strip(), []).append(line[20:])
    return code, values, out.getvalue()


def test_an_index_is_described(tmp_path):
    folder = write_index(tmp_path)
    code, values, text = inspected(tmp_path)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    dense = 2 * 47 * 2 * 8 * 4 * 2
    assert code == 0
    assert text.splitlines()[0] == folder.name
    assert values["source"] == ["contract.txt"]
    assert values["tokens"] == ["47, of which 37 are clustered"]
    assert values["layers"] == ["2 of 4 indexed"]
    assert values["heads"] == ["2 KV heads of size 8, 6 query heads"]
    assert values["centroids"] == ["7 per layer and KV head, 5.3 keys each"]
    assert f"{num_bytes / dense:.1%} of the dense KV" in values["on disk"][0]
    assert "max_cluster 12" in values["parameters"][0]
    assert values["calibrated on"] == ["answers to 16 questions, 512 tokens"]
    assert values["keys kept"][0].split() == ["50%", "20%", "10%", "5%", "2%", "1%"]
    assert values["log threshold"][0].split()[::5] == ["-9.00", "-4.00"]
    assert values["verification"] == ["all 4 files verified"]
    for name, value in make_identity().compared().items():
        assert values[name] == [str(value)]


def test_an_exact_index_is_described(tmp_path):
    folder = write_exact_index(tmp_path)
    code, values, text = inspected(folder)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    assert code == 0
    assert text.splitlines()[0] == folder.name
    assert values["source"] == ["contract.txt"]
    assert values["tokens"] == ["47, all attended to exactly"]
    assert values["on disk"] == [f"{num_bytes / 2**10:.1f} KiB"]
    assert values["verification"] == ["all 2 files verified"]
    for name, value in make_identity().compared().items():
        assert values[name] == [str(value)]


def test_a_damaged_exact_index_is_noticed(tmp_path):
    folder = write_exact_index(tmp_path)
    content = bytearray((folder / "tokens.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tokens.safetensors").write_bytes(content)
    code, values, _ = inspected(folder)
    assert code == 1 and "tokens.safetensors: damaged" in values["verification"][0]


def test_a_damaged_index_does_not_hide_the_others(tmp_path):
    folders = [write_index(tmp_path, name) for name in ("a-0", "b-0", "c-0")]
    (folders[0] / "manifest.json").write_text("{}")
    os.truncate(folders[1] / "layer-0001.safetensors", 100)
    code, values, text = inspected(tmp_path)
    assert code == 1
    assert [line for line in text.splitlines() if not line.startswith(" ")] == ["a-0", "b-0", "c-0"]
    first, second, third = values["verification"]
    assert first.startswith("error: ") and first.endswith("a-0/manifest.json: the manifest has no format_version")
    assert "layer-0001.safetensors: the file has 100 bytes" in second
    assert third == "all 4 files verified"


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_a_path_without_an_index_is_an_error_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    code, _, text = inspected(tmp_path / name)
    assert code == 1 and text.startswith(f"error: {tmp_path / name}") and text.count("\n") == 1


def test_what_a_manifest_says_cannot_upset_the_terminal(tmp_path):
    write_index(tmp_path, source="a\x1b[2Jb\nc\ud800")
    code, values, _ = inspected(tmp_path)
    assert code == 0 and values["source"] == [r"a\x1b[2Jb\nc\ud800"]


def test_vllm_is_not_imported(tmp_path):
    write_index(tmp_path)
    script = (
        "import sys, pathlib; from vllm_squeeze.offline_tools.inspect import inspect;"
        f"code = inspect(pathlib.Path({str(tmp_path)!r}));"
        "sys.exit(code or 'vllm' in sys.modules)"
    )
    root = Path(vllm_squeeze.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(root)})
