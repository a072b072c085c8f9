import math

import pytest

from vllm_squeeze.config import INDEX_VARIABLE, SqueezeConfig


def resolve(settings, **environ) -> SqueezeConfig:
    return SqueezeConfig.resolve({"squeeze": settings}, environ)


@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}, {"squeeze": {}}, object()])
def test_nothing_is_squeezed_by_default(additional_config):
    config = SqueezeConfig.resolve(additional_config, {})
    assert config == SqueezeConfig() and config.index == () and config.index_folders() == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"budgett": 0.1},
            ["squeeze.budgett", "unknown", "index, budget, max_kl, rest, mode, prefill, memory_limit_gib"],
        ),
        ({"budget": 0}, ["squeeze.budget", "0", "(0, 1]"]),
        ({"budget": 0.0}, ["squeeze.budget", "0.0", "(0, 1]"]),
        ({"budget": -1}, ["squeeze.budget", "-1", "(0, 1]"]),
        ({"budget": 1.5}, ["squeeze.budget", "1.5", "(0, 1]"]),
        ({"budget": math.nan}, ["squeeze.budget", "nan", "(0, 1]"]),
        ({"budget": math.inf}, ["squeeze.budget", "inf", "(0, 1]"]),
        ({"budget": True}, ["squeeze.budget", "True", "(0, 1]"]),
        ({"budget": "0.1"}, ["squeeze.budget", "'0.1'", "(0, 1]"]),
        ({"budget": None}, ["squeeze.budget", "None", "(0, 1]"]),
        ({"budget": [0.1]}, ["squeeze.budget", "[0.1]", "(0, 1]"]),
        ({"budget": "automatic"}, ["squeeze.budget", "'automatic'", "(0, 1]", '"auto"']),
        ({"max_kl": 0}, ["squeeze.max_kl", "0", "above 0"]),
        ({"max_kl": math.nan}, ["squeeze.max_kl", "nan", "above 0"]),
        ({"max_kl": "0.1"}, ["squeeze.max_kl", "'0.1'", "above 0"]),
        ({"rest": "keep"}, ["squeeze.rest", "'keep'", "value_centroids, drop"]),
        ({"prefill": "exact"}, ["squeeze.prefill", "'exact'", "dense, squeezed"]),
        ({"prefill": 0}, ["squeeze.prefill", "0", "dense, squeezed", "(0, 1]"]),
        ({"prefill": 1.5}, ["squeeze.prefill", "1.5", "(0, 1]"]),
        ({"prefill": True}, ["squeeze.prefill", "True", "(0, 1]"]),
        ({"prefill": ["dense"]}, ["squeeze.prefill", "['dense']", "(0, 1]"]),
        ({"prefill": 0.33, "budget": "auto"}, ["squeeze.prefill", "0.33", '"dense"', '"auto"']),
        ({"prefill": "squeezed", "budget": "auto"}, ["squeeze.prefill", "'squeezed'", '"dense"', '"auto"']),
        ({"mode": "dense"}, ["squeeze.mode", "'dense'", "auto, squeezed, exact, off"]),
        ({"rest": None}, ["squeeze.rest", "None", "value_centroids, drop"]),
        ({"rest": ["drop"]}, ["squeeze.rest", "['drop']", "value_centroids, drop"]),
        ({"memory_limit_gib": -0.1}, ["squeeze.memory_limit_gib", "-0.1", "at least 0"]),
        ({"memory_limit_gib": math.nan}, ["squeeze.memory_limit_gib", "nan", "at least 0"]),
        ({"memory_limit_gib": False}, ["squeeze.memory_limit_gib", "False", "at least 0"]),
        ({"memory_limit_gib": "4"}, ["squeeze.memory_limit_gib", "'4'", "at least 0"]),
        ({"index": 3}, ["squeeze.index", "3", "folder's path or a list of them"]),
        ({"index": None}, ["squeeze.index", "None", "folder's path or a list of them"]),
        ({"index": ""}, ["squeeze.index", "''", "folder's path or a list of them"]),
        ({"index": ["a", 3]}, ["squeeze.index", "3", "folder's path or a list of them"]),
        ({"index": {"a": 1}}, ["squeeze.index", "{'a': 1}", "folder's path or a list of them"]),
        (3, ["additional_config.squeeze", "3", "object of settings"]),
        ("index", ["additional_config.squeeze", "'index'", "object of settings"]),
        (["index"], ["additional_config.squeeze", "['index']", "object of settings"]),
        (None, ["additional_config.squeeze", "None", "object of settings"]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value),
)
def test_what_is_not_allowed_is_refused_in_one_line(settings, words):
    with pytest.raises(ValueError) as error:
        resolve(settings)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.startswith(words[0]) and "\n" not in message


@pytest.mark.parametrize(
    "settings",
    [{"prefill": "squeezed"}, {"prefill": 1}, {"prefill": 1e-9}, {"budget": 1}, {"budget": 1.0}, {"budget": 1e-9}, {"budget": "auto"}, {"max_kl": 1e-9},
     {"memory_limit_gib": 0}, {"memory_limit_gib": math.inf}, {"rest": "drop"}],
    ids=repr,
)  # fmt: skip
def test_the_limits_of_what_is_allowed(settings):
    ((name, value),) = settings.items()
    assert getattr(resolve(settings), name) == value


@pytest.mark.parametrize(
    ("settings", "variable", "index"),
    [
        ({"index": "a"}, None, ("a",)),
        ({"index": ["a", "b"]}, None, ("a", "b")),
        ({}, "a", ("a",)),
        ({}, "", ()),
        ({"index": "a"}, "b", ("a",)),
        ({"index": []}, "b", ()),
    ],
    ids=["path", "list", "variable", "empty-variable", "setting-first", "no-index-in-spite-of-the-variable"],
)
def test_where_the_index_is_named(settings, variable, index):
    environ = {} if variable is None else {INDEX_VARIABLE: variable}
    assert resolve(settings, **environ).index == index


def test_path_objects_are_paths(tmp_path):
    assert resolve({"index": tmp_path}).index == (str(tmp_path),)


def test_settings_cannot_be_changed_later():
    with pytest.raises(AttributeError):
        SqueezeConfig().budget = 0.5


def test_each_index_is_named_once_by_its_absolute_path(tmp_path, monkeypatch):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    config = resolve({"index": ["b", ".", str(tmp_path / "b")]})
    assert config.index_folders() == [tmp_path / "b", tmp_path / "a"]
