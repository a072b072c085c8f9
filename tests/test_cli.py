"""The command: bad input costs one line and exit code 1, or 2 where the command line itself is wrong."""

import argparse
import os
import subprocess
import sys

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.engine.tiny_models import make_model
from tests.prefix_index.small_index import write_index
from vllm_squeeze.cli import main, prefill


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "llama")


def words(count: int) -> str:
    return " ".join(f"t{10 + i % 400}" for i in range(count))


def refused(capsys, *arguments) -> str:
    """Runs ``vllm-squeeze index``, which has to fail; returns its error, one line."""
    assert main(["index", *map(str, arguments)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-squeeze index: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("vllm-squeeze index: error: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"\xff\xfe\x00t10", "utf-8"),
        (words(116).encode(), "--prefix: 115 tokens; an index needs at least 117"),
        (words(3000).encode(), "--prefix: 2999 tokens; the model takes at most 2048"),
    ],
    ids=["missing", "empty", "blank", "not-utf-8", "too-short", "too-long"],
)
def test_a_prefix_that_cannot_be_indexed(capsys, model, tmp_path, content, message):
    prefix = tmp_path / "prefix.txt"
    if content is not None:
        prefix.write_bytes(content)
    error = refused(capsys, "--model", model, "--prefix", prefix, "--raw", "--out", tmp_path / "store")
    assert message in error
    assert str(prefix) in error or error.startswith("--prefix")
    assert not (tmp_path / "store").exists(), "something was written"


def test_a_folder_is_no_prefix(capsys, model, tmp_path):
    assert str(tmp_path) in refused(capsys, "--model", model, "--prefix", tmp_path, "--out", tmp_path / "store")


def test_a_system_message_needs_a_chat_template(capsys, model, tmp_path):
    (tmp_path / "prefix.txt").write_text(words(300))
    arguments = ["--model", model, "--prefix", tmp_path / "prefix.txt", "--chat-system", "--out", tmp_path / "store"]
    assert refused(capsys, *arguments) == "--chat-system: this model has no chat template; use --raw"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "--token-ids: not JSON"),
        ("{}", "--token-ids: must be a JSON list"),
        ("[1, 2.5]", "--token-ids: must be a JSON list"),
        ("[true]", "--token-ids: must be a JSON list"),
        ('["1"]', "--token-ids: must be a JSON list"),
        ("[-1]", "--token-ids: must be a JSON list"),
        ("[2147483648]", "--token-ids: must be a JSON list"),
        ("[]", "0 tokens; an index needs at least 117"),
        (str([512] * 200), "--token-ids: 512 is not in the model's vocabulary"),
    ],
    ids=["not-json", "object", "fraction", "boolean", "string", "negative", "too-big", "empty", "not-a-token"],
)
def test_token_ids_that_are_none(capsys, model, tmp_path, content, message):
    (tmp_path / "ids.json").write_text(content)
    arguments = ["--model", model, "--token-ids", tmp_path / "ids.json", "--out", tmp_path / "store"]
    assert message in refused(capsys, *arguments)


def test_questions_that_are_none(capsys, model, tmp_path):
    (tmp_path / "prefix.txt").write_text(words(300))
    (tmp_path / "questions").write_text('{"question": "Who?"}\n{"question": []}')
    arguments = ["--model", model, "--prefix", tmp_path / "prefix.txt", "--out", tmp_path / "store", "--questions"]
    error = refused(capsys, *arguments, tmp_path / "questions")
    assert error == f'--questions: {tmp_path}/questions, line 2: must be a JSON object with a text "question"'
    error = refused(capsys, *arguments, tmp_path / "questions", "--exact")
    assert error == "--questions: not together with --exact, which has no budget to calibrate"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--centroids", "0"], "centroids is 0.0, must be above 0 and at most 1"),
        (["--centroids", "nan"], "centroids is nan"),
        (["--window", "0"], "window is 0"),
        (["--num-sinks", "-1"], "num_sinks is -1"),
        (["--observation-window", "0"], "observation_window is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--rule", "median"], "rule is 'median', must be one of keys, clusters, paper"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else None,
)
def test_parameters_out_of_range(capsys, model, tmp_path, flags, message):
    arguments = ["--model", model, "--prefix", "-", "--out", tmp_path / "store"]
    assert message in refused(capsys, *arguments, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--centroids", "0.05"],
        ["--window", "8192"],
        ["--num-sinks", "16"],
        ["--observation-window", "100"],
        ["--seed", "0"],
        ["--rule", "clusters"],
        ["--extend", "old"],
    ],
    ids=lambda f: f[0],
)
def test_an_exact_index_has_no_clustering_to_set(capsys, model, tmp_path, flags):
    arguments = ["--model", model, "--prefix", "-", "--out", tmp_path / "store", "--exact", *flags]
    assert refused(capsys, *arguments) == f"{flags[0]}: not together with --exact, which clusters nothing"


def test_one_index_is_extended_at_a_time(capsys, model, tmp_path):
    error = refused(capsys, "--model", model, "--documents", tmp_path, "--out", tmp_path / "store", "--extend", "old")
    assert error == "--extend: not together with --documents"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "--token-ids: 0 tokens; an index needs at least 1"),
        (str([9] * 2048), "--token-ids: 2048 tokens; the model takes at most 2048"),
        ("[512]", "--token-ids: 512 is not in the model's vocabulary"),
    ],
    ids=["empty", "too-long", "not-a-token"],
)
def test_a_prefix_that_cannot_be_an_exact_index(capsys, model, tmp_path, content, message):
    (tmp_path / "ids.json").write_text(content)
    arguments = ["--exact", "--model", model, "--token-ids", tmp_path / "ids.json", "--out", tmp_path / "store"]
    assert message in refused(capsys, *arguments)
    assert not (tmp_path / "store").exists(), "something was written"


def test_the_store_must_be_a_folder_of_indexes(capsys, model, tmp_path):
    (tmp_path / "prefix.txt").write_text(words(300))
    (tmp_path / "file").touch()
    index = write_index(tmp_path / "store")
    for out, message in ((tmp_path / "file", "is not a folder"), (index, "is an index itself")):
        arguments = ["--model", model, "--prefix", tmp_path / "prefix.txt", "--raw", "--out", out]
        assert refused(capsys, *arguments) == f"{out} {message}" + (", must be a folder of indexes" * (out == index))


def test_a_store_that_cannot_be_made(capsys, model, tmp_path):
    (tmp_path / "prefix.txt").write_text(words(300))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "store"
    assert str(out) in refused(capsys, "--model", model, "--prefix", tmp_path / "prefix.txt", "--raw", "--out", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["serve"], "invalid choice"),
        (["index"], "--model"),
        (["index", "--model", "m", "--out", "o"], "--prefix --token-ids"),
        (["index", "--model", "m", "--out", "o", "--prefix", "p", "--token-ids", "t"], "not allowed with"),
        (["index", "--model", "m", "--out", "o", "--prefix", "p", "--raw", "--chat-system"], "not allowed with"),
        (["index", "--model", "m", "--out", "o", "--prefix", "p", "--budget", "0.1"], "--budget"),
        (["index", "--model", "m", "--out", "o", "--prefix", "p", "--centroids", "many"], "--centroids"),
        (["index", "--model", "m", "--out", "o", "--prefix", "p", "--engine-args", "{"], "--engine-args: not JSON"),
        (["index", "--model", "m", "--out", "o", "--prefix", "p", "--engine-args", "[]"], "must be a JSON object"),
        (["inspect"], "index"),
        (["inspect", "a", "b"], "unrecognized"),
        (["config"], "--check"),
        (["doctor", "--raw", "--chat-system"], "not allowed with"),
        (["doctor", "--engine-args", "3"], "must be a JSON object"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_wrong_command_lines(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_nothing_to_inspect(capsys, tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / name)]) == 1
    out = capsys.readouterr().out
    assert str(tmp_path / name) in out and out.startswith("error: ") and out.count("\n") == 1


def test_a_file_without_settings(capsys, tmp_path):
    (tmp_path / "settings.yaml").write_text("budget: 0.1")
    assert main(["config", "--check", str(tmp_path / "settings.yaml")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"vllm-squeeze config: error: {tmp_path}/settings.yaml: has the keys budget; ")
    assert captured.err.count("\n") == 1 and not captured.out


def test_inspecting_imports_neither_vllm_nor_a_gpu(tmp_path):
    """The command as installed, in a process of its own."""
    write_index(tmp_path)
    script = (
        "import sys; from vllm_squeeze.cli import main; code = main(['inspect', sys.argv[1]]);"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('vllm', 'transformers', 'triton')));"
        "import torch; print(torch.cuda.is_initialized()); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["[]", "False"]


def test_prefill_as_a_command_has_it():
    assert [prefill(text) for text in ("dense", "squeezed", "0.33", "1")] == ["dense", "squeezed", 0.33, 1]
    for text, told in (("dens", "'dens'"), ("0", "0.0"), ("1.5", "1.5"), ("nan", "nan")):
        with pytest.raises(
            argparse.ArgumentTypeError, match=rf"^squeeze.prefill: {told} is not one of dense, squeezed, nor"
        ):
            prefill(text)
