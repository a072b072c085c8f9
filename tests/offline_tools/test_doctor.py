"""The checklist says what is wrong with indexes and prompts, and in which model, and fails then only."""

import io
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm.config import VllmConfig

from tests.engine.tiny_models import make_model
from tests.prefix_index.small_index import write_index
from vllm_squeeze.cli import main
from vllm_squeeze.config import CONFIG_VARIABLE, INDEX_VARIABLE
from vllm_squeeze.offline_tools import doctor as module
from vllm_squeeze.offline_tools.doctor import Subject, check_indexes, doctor
from vllm_squeeze.offline_tools.finding import FAIL, OK, WARN, Finding
from vllm_squeeze.prefix_index.index_folder import find_indexes

NUM_WORDS = 400
# Of 399, the last of which may merge with what follows, in whole blocks.
COVERED = (NUM_WORDS - 1) // VllmConfig().cache_config.block_size * VllmConfig().cache_config.block_size
ENGINE_ARGS = {"dtype": "float32"}


def words(count: int, first: int = 10) -> str:
    return " ".join(f"t{first + i % 400}" for i in range(count))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv(INDEX_VARIABLE, raising=False)
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def store(tmp_path_factory, model) -> Path:
    """Two exact indexes of a real model: of the words from t10, and of those from t110."""
    store = tmp_path_factory.mktemp("store")
    for name, first in (("a", 10), ("b", 110)):
        text = store / f"{name}.txt"
        text.write_text(words(NUM_WORDS, first))
        arguments = ["index", "--exact", "--model", model, "--prefix", str(text), "--raw", "--out", str(store)]
        assert main([*arguments, "--engine-args", json.dumps(ENGINE_ARGS)]) == 0
    return store


def findings(index=None, model=None, prompt=None, chat=False) -> list[Finding]:
    return list(check_indexes(Subject(index, model, prompt, chat, ENGINE_ARGS)))


@pytest.fixture
def asked(store, tmp_path):
    """What is found of a prompt, the last finding."""

    def asked(content: str, **options) -> Finding:
        (tmp_path / "prompt").write_text(content)
        *_, finding = findings(store, prompt=tmp_path / "prompt", **options)
        assert finding.what == "prompt"
        return finding

    return asked


def test_nothing_is_wrong_here(store, model, tmp_path, capsys):
    """The whole command, on whatever machine the tests run."""
    (tmp_path / "prompt").write_text(words(NUM_WORDS) + " Why?")
    arguments = ["doctor", "--index", str(store), "--model", model, "--prompt", str(tmp_path / "prompt"), "--raw"]
    assert main([*arguments, "--engine-args", json.dumps(ENGINE_ARGS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {OK, WARN}
    for what in ("Python", "torch", "Triton", "vLLM", "plugin", "CUDA graphs", "FlashAttention", "kernels", "prompt"):
        assert any(line[6:].startswith(f"{what} ") for line in lines), what
    assert sum("  index  " in line for line in lines) == 2 == sum("  model  " in line for line in lines)


def test_a_prompt_that_goes_on_with_a_prefix_matches_it(asked, store):
    for folder, first in zip(find_indexes(store), (10, 110), strict=True):
        state, _, text = asked(words(NUM_WORDS, first) + " t5 t6")
        assert state == OK and text == f"{NUM_WORDS - 1} leading tokens agree with {folder.name}, {COVERED} must"


def test_whole_blocks_of_the_prefix_are_enough(asked):
    assert asked(words(COVERED) + " t5").state == OK
    assert asked(words(COVERED - 1) + " t5").state == FAIL


def test_the_first_differing_token_is_told_with_its_text_on_both_sides(asked, store):
    """Of the index that comes nearest."""
    prompt = words(NUM_WORDS).replace("t59", "t7")
    state, _, text = asked(prompt)
    assert state == FAIL
    assert f"49 leading tokens agree with {find_indexes(store)[0].name}, " in text
    assert "the prompt has 7='t7', the index 59='t59'" in text
    assert "after 't51 t52 t53 t54 t55 t56 t57 t58'" in text


def test_the_very_first_token(asked):
    assert "0 leading tokens agree" in asked("t5 t6").text


def test_a_prompt_that_is_too_short(asked):
    state, _, text = asked(words(30))
    assert state == FAIL and text.startswith("too short: all its 30 leading tokens agree with ")


def test_a_prompt_of_token_ids(asked):
    ids = [10 + i % 400 for i in range(NUM_WORDS)]
    assert asked(json.dumps(ids)).state == OK
    assert asked(json.dumps(ids[:20])).text.startswith("too short: all its 20 ")
    assert "after 't10' the prompt has 7='t7', the index 11='t11'" in asked(json.dumps([10] + [7] * 20)).text


def test_a_chat_template_that_is_not_there(store, tmp_path):
    (tmp_path / "prompt").write_text(words(30))
    with pytest.raises(ValueError, match="--chat-system: this model has no chat template"):
        findings(store, prompt=tmp_path / "prompt", chat=True)


def test_another_model(asked, store, tmp_path):
    other = make_model(tmp_path / "other", "llama", seed=1)
    found = findings(store, model=str(other))
    assert [finding.state for finding in found] == [OK, FAIL] * 2
    assert all("made for another model: weights: the index has " in finding.text for finding in found[1::2])
    # its tokens are the same, whatever its weights
    assert asked(words(NUM_WORDS), model=str(other)).state == OK


def test_a_damaged_index_does_not_hide_the_others(tmp_path):
    folders = [write_index(tmp_path, name) for name in ("a-0", "b-0")]
    content = bytearray((folders[0] / "layer-0001.safetensors").read_bytes())
    content[-1] ^= 1
    (folders[0] / "layer-0001.safetensors").write_bytes(content)
    damaged, small = findings(tmp_path)
    assert damaged.state == FAIL and "layer-0001.safetensors: damaged" in damaged.text
    assert small.state == FAIL and "b-0: the prefix has 47 tokens, too few to squeeze" in small.text


def test_the_environment_names_indexes_and_settings(store, tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text(f"squeeze: {{index: {store}, budget: 3}}")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "settings.yaml"))
    with pytest.raises(ValueError, match="squeeze.budget: 3"):
        findings()
    (tmp_path / "settings.yaml").write_text(f"squeeze: {{index: {store}, budget: 0.5}}")
    assert [finding.state for finding in findings()] == [OK, OK]
    (tmp_path / "settings.yaml").write_text(f"squeeze: {{index: {store}, mode: off}}")
    *verified, off = findings()
    assert [finding.state for finding in verified] == [OK, OK] and off.state == WARN
    assert off.text == "squeeze.mode is off: a server with these settings squeezes nothing"


def test_no_index(tmp_path):
    assert [finding.state for finding in findings()] == [WARN]
    (tmp_path / "prompt").write_text("t5")
    assert [finding.state for finding in findings(prompt=tmp_path / "prompt")] == [WARN, FAIL]


def test_a_tokenizer_that_is_not_there(tmp_path):
    """The index names the model that it was made with, which was moved since."""
    model = make_model(tmp_path / "model", "llama")
    (tmp_path / "prompt").write_text(words(NUM_WORDS))
    arguments = ["--model", str(model), "--prefix", str(tmp_path / "prompt"), "--out", str(tmp_path / "store")]
    assert main(["index", "--exact", "--raw", *arguments]) == 0
    model.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"^--model: the tokenizer of {model} cannot be loaded: "):
        findings(tmp_path / "store", prompt=tmp_path / "prompt")
    found = findings(tmp_path / "store", model=str(tmp_path / "moved"), prompt=tmp_path / "prompt")
    assert [finding.state for finding in found] == [OK, FAIL, OK], "the dtype is another, the tokens are not"


def test_a_check_that_breaks_fails_and_the_others_go_on(monkeypatch):
    def breaks():
        yield Finding(OK, "GPU 0", "there")
        raise RuntimeError("no\ndriver")

    for check in ("versions", "plugin", "hooks", "times", "extras", "kernels"):
        monkeypatch.setattr(module.installation, check, lambda: iter([Finding(OK, "x", "y")]))
    monkeypatch.setattr(module.installation, "device", breaks)
    out = io.StringIO()
    assert doctor(Subject(Path("/missing"), None, None, None, {}), out) == 1
    lines = [line.split(maxsplit=1) for line in out.getvalue().splitlines()]
    assert [state for state, _ in lines] == [OK, OK, FAIL, OK, OK, OK, OK, OK, FAIL]
    assert lines[2][1].endswith("RuntimeError: no driver") and "/missing: No such file" in lines[-1][1]
