"""A file of settings: both of its forms, what is refused, and what wins over it."""

import json

import pytest

from vllm_squeeze.config import CONFIG_VARIABLE, INDEX_VARIABLE, SqueezeConfig
from vllm_squeeze.settings_file import read_settings

SETTINGS = {"index": ["a", "b"], "budget": 0.25, "mode": "squeezed"}


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "settings.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def resolve(path, given=None, **environ) -> SqueezeConfig:
    additional_config = None if given is None else {"squeeze": given}
    return SqueezeConfig.resolve(additional_config, {CONFIG_VARIABLE: str(path), **environ})


@pytest.mark.parametrize("outer", [None, "additional-config", "additional_config"])
@pytest.mark.parametrize("name", ["settings.yaml", "settings.json", "settings"])
def test_both_forms_in_yaml_and_json(write, outer, name):
    body = {"squeeze": SETTINGS, "other": 1} if outer is None else {"model": "m", outer: {"squeeze": SETTINGS}}
    path = write(json.dumps(body, indent="\t" if name.endswith("json") else 1), name)
    assert read_settings(path) == SETTINGS
    assert resolve(path) == SqueezeConfig(index=("a", "b"), budget=0.25, mode="squeezed")


def test_vllms_own_configuration(write):
    path = write("model: m\nport: 8000\nadditional-config:\n  squeeze:\n    index: a\n    budget: auto\n")
    assert resolve(path) == SqueezeConfig(index=("a",), budget="auto")


def test_no_settings_are_settings(write):
    assert resolve(write("squeeze: {}")) == SqueezeConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no keys; settings must be under either squeeze or additional-config.squeeze"),
        ("[]", "has no keys"),
        ("budget: 0.1", "has the keys budget; settings must be under"),
        ("additional-config: {budget: 0.1}", "has the keys additional-config; settings must be under"),
        ("additional-config: squeeze", "has the keys additional-config; settings must be under"),
        ("squeeze: {}\nadditional-config: {squeeze: {}}", "has the keys squeeze, additional-config; settings must be"),
        ("squeeze:", "squeeze: None is not an object of settings"),
        ("additional-config: {squeeze: [1]}", "squeeze: [1] is not an object of settings"),
        ("squeeze: {", "expected the node content"),
        ("squeeze: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"\xff\xfe", "utf-8"),
    ],
    ids=["empty", "list", "no-key", "no-inner-key", "text", "both", "null", "inner-list", "cut", "a-call", "not-utf-8"],
)
def test_files_without_settings_are_refused_in_one_line(write, content, message):
    path = write(content)
    with pytest.raises(ValueError) as error:
        resolve(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content"), [("settings.json", "squeeze: {}"), ("settings.json", "[" * 10**5)])
def test_json_by_name_must_be_json(write, name, content):
    with pytest.raises(ValueError, match=f"{name}: "):
        read_settings(write(content, name))


def test_a_missing_file_is_an_error_and_not_a_default(tmp_path):
    with pytest.raises(ValueError, match="missing.yaml: .*No such file"):
        resolve(tmp_path / "missing.yaml")


def test_without_the_variable_no_file_is_read():
    assert SqueezeConfig.resolve(None, {CONFIG_VARIABLE: ""}) == SqueezeConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{budgett: 0.1}", "squeeze.budgett: unknown setting; known are index, budget, "),
        ("{1: 2, budgett: 0.1}", "squeeze.1: unknown setting; known are index, budget, "),
        ("{budget: 2}", r"squeeze.budget: 2 is not a number in \(0, 1\]"),
        ("{budget: 1e-3}", r"squeeze.budget: '1e-3' is not a number in \(0, 1\]"),
    ],
)
def test_values_are_checked_like_those_on_the_command_line(write, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        resolve(write(f"squeeze: {settings}"))


def test_what_is_given_to_the_server_wins_setting_by_setting(write):
    path = write(json.dumps({"squeeze": SETTINGS}))
    assert resolve(path, {"budget": 0.5}) == SqueezeConfig(index=("a", "b"), budget=0.5, mode="squeezed")
    assert resolve(path, {"index": []}).index == ()


def test_the_index_is_taken_from_the_file_before_the_variable(write):
    assert resolve(write("squeeze: {index: a}"), **{INDEX_VARIABLE: "b"}).index == ("a",)
    assert resolve(write("squeeze: {budget: 1}"), **{INDEX_VARIABLE: "b"}).index == ("b",)
