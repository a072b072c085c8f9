import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_index import EXACT, LAYER_NAMES, make_manifest, make_tokens

from vllm_squeeze.prefix_index.manifest import (
    FORMAT_VERSION,
    IndexParameters,
    InvalidIndex,
    LayerEntry,
    Manifest,
    with_digest,
)

NUM_BYTES = 2760


@pytest.fixture(scope="module")
def manifest():
    return make_manifest(make_tokens(), [LayerEntry(name, 7, NUM_BYTES, "ab") for name in LAYER_NAMES])


@pytest.fixture(scope="module")
def exact():
    return make_manifest(make_tokens(), [], **EXACT)


def edited(manifest, *path, value=None, remove=False):
    """The manifest's text with one value set or removed, and the digest made anew."""
    body = json.loads(manifest.to_json())
    body.pop("digest")
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return with_digest(body)


def test_round_trip(manifest, exact):
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(exact.to_json()) == exact
    assert exact.exact and not manifest.exact


def test_a_whole_number_may_stand_for_a_float(manifest):
    thresholds = ((1, -20), (0.5, -9))
    assert Manifest.from_json(dataclasses.replace(manifest, thresholds=thresholds).to_json()).thresholds == thresholds


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["surprise"], 1, "surprise is unknown"),
        (["model", "surprise"], 1, "model.surprise is unknown"),
        (["layers", 1, "file"], "../x", "layers[1].file is unknown"),
        (["num_tokens"], "47", "num_tokens is '47', must be of type int"),
        (["num_tokens"], True, "num_tokens is True, must be of type int"),
        (["num_tokens"], 48.0, "num_tokens is 48.0, must be of type int"),
        (["num_tokens"], -1, "num_tokens is -1, must be from 1 to 2147483647"),
        (["num_tokens"], 10, "num_members is 37, must be num_tokens less 10, at least 1"),
        (["num_tokens"], 10**30, "num_tokens is 1000"),
        (["num_members"], 0, "num_members is 0, must be num_tokens less 10, at least 1"),
        (["num_members"], 38, "num_members is 38, must be num_tokens less 10, at least 1"),
        (["source"], None, "source is None, must be of type str"),
        (["created"], "yesterday", "created is 'yesterday', must be a time in UTC"),
        (["created"], "2026-01-02T03:04:05", "created is '2026-01-02T03:04:05', must be a time in UTC"),
        (["model"], [], "model is [], must be an object"),
        (["model", "dtype"], "int4", "model.dtype is 'int4', must be one of float32, float16, bfloat16"),
        (["model", "dtype"], "4" * 10**6, "model.dtype is '444444444444...4444444444444', must be one of float32"),
        (["model", "num_kv_heads"], 2**40, "model.num_kv_heads is 1099511627776, must be from 1 to 65536"),
        (["model", "num_layers"], 1, "layers has 2 entries, must have from 1 to 1"),
        (["parameters", "centroids"], float("nan"), "parameters.centroids is nan, must be of type float"),
        (["parameters", "centroids"], 0.0, "parameters.centroids is 0.0, must be above 0 and at most 1"),
        (["parameters", "centroids"], 10**400, "parameters.centroids is 1000"),
        (["thresholds"], {}, "thresholds is {}, must be a list"),
        (["thresholds"], [], "thresholds is empty"),
        (["thresholds", 0], [1.0], "thresholds[0] is [1.0], must be a list"),
        (["thresholds", 0, 1], float("-inf"), "thresholds[0][1] is -inf, must be of type float"),
        (["thresholds", 0, 0], 1.5, "thresholds must be pairs of a share above 0 and at most 1"),
        (["thresholds", 0, 1], -1001, "thresholds must be pairs of a share above 0 and at most 1 and a log threshold"),
        (["thresholds", 1, 0], 1.0, "thresholds has (1.0, -20.0) and then (1.0, -9.0): shares must decrease"),
        (["thresholds", 1, 1], -21.0, "thresholds has (1.0, -20.0) and then (0.5, -21.0)"),
        (["calibration"], None, "calibration is null, must say what thresholds were calibrated on"),
        (["calibration"], "questions", "calibration is 'questions', must be an object"),
        (["calibration", "surprise"], 1, "calibration.surprise is unknown"),
        (["calibration", "calibrated_on"], "tea", "calibration.calibrated_on is 'tea', must be one of questions, obs"),
        (
            ["calibration", "calibrated_on"],
            "observation window",
            "calibration.num_questions is 16, must be from 0 to 0",
        ),
        (["calibration", "num_questions"], 0, "calibration.num_questions is 0, must be from 1"),
        (["calibration", "num_tokens"], 0, "calibration.num_tokens is 0, must be from 1"),
        (["layers"], [], "layers has 0 entries"),
        (["layers", 1, "name"], LAYER_NAMES[0], "layers has 2 entries of the name"),
        (["layers", 1, "num_bytes"], 10**15, "layers[1].num_bytes is 1000000000000000, but"),
        (["layers", 1, "num_centroids"], 38, "layers[1].num_centroids is 38, must be at most num_members"),
        (["layers", 1, "num_centroids"], 0, "layers[1].num_centroids is 0, must be from 1"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_value_that_is_not_allowed_is_named(manifest, path, value, message):
    with pytest.raises(InvalidIndex) as error:
        Manifest.from_json(edited(manifest, *path, value=value))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


IN_EXACT = "in an exact index, one whose parameters are null"


@pytest.mark.parametrize(
    ("kind", "field", "message"),
    [
        ("exact", "num_members", f"num_members is 37, must be 0 {IN_EXACT}"),
        (
            "exact",
            "thresholds",
            f"thresholds is ((1.0, -20.0), (0.5, -9.0), (0.1, -7.0), (0.01, -4.0)), must be [] {IN_EXACT}",
        ),
        ("exact", "calibration", "calibration is Calibration("),
        ("exact", "layers", "layers is (LayerEntry("),
        ("exact", "parameters", "num_members is 0, must be num_tokens less 10, at least 1"),
        ("manifest", "num_members", "num_members is 0, must be num_tokens less 10, at least 1"),
        ("manifest", "thresholds", "thresholds is empty, must have at least one pair"),
        ("manifest", "layers", "layers has 0 entries, must have from 1 to 4"),
        ("manifest", "parameters", f"num_members is 37, must be 0 {IN_EXACT}"),
    ],
)
def test_a_field_of_the_other_kind_is_refused(manifest, exact, kind, field, message):
    whole, other = (manifest, exact) if kind == "manifest" else (exact, manifest)
    value = json.loads(other.to_json())[field]
    with pytest.raises(InvalidIndex) as error:
        Manifest.from_json(edited(whole, field, value=value))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "path",
    [["num_tokens"], ["parameters", "seed"], ["calibration", "num_tokens"], ["model", "rope"], ["layers", 0, "digest"]],
    ids=str,
)
def test_a_missing_value_is_named_even_where_there_is_a_default(manifest, path):
    with pytest.raises(InvalidIndex, match=rf"{path[-1]} is missing$"):
        Manifest.from_json(edited(manifest, *path, remove=True))


@pytest.mark.parametrize(("version", "made_by"), [(FORMAT_VERSION - 1, "an older"), (FORMAT_VERSION + 1, "a newer")])
@pytest.mark.parametrize("rest", [{}, {"layers": "other"}], ids=["alone", "with other contents"])
def test_another_format_is_named_before_anything_else_is_looked_at(rest, version, made_by):
    message = rf"^made by {made_by} vllm-squeeze \(format {version}; this one reads format {FORMAT_VERSION}\)$"
    with pytest.raises(InvalidIndex, match=message):
        Manifest.from_json(json.dumps({**rest, "format_version": version}))


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"format_version": "1"}', "[" * 100_000, '{"format_version": ' + "1" * 5000 + "}"],
    ids=["nothing", "null", "list", "empty", "text version", "deep", "long number"],
)
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(InvalidIndex):
        Manifest.from_json(text)


@settings(deadline=None)
@given(data=st.data())
def test_any_other_text_is_refused(manifest, data):
    """The digest is of the contents; the layout of the text must be ours too, or a flipped blank would pass."""
    text = manifest.to_json()
    position = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.one_of(st.sampled_from(' \n\t0123456789",:'), st.characters()))
    changed = text[:position] + character + text[position + 1 :]
    if changed != text:
        with pytest.raises(InvalidIndex):
            Manifest.from_json(changed)


@pytest.mark.parametrize(
    "changes",
    [
        dict(centroids=1.01),
        dict(centroids=float("nan")),
        dict(window=0),
        dict(max_cluster=0),
        dict(iterations=0),
        dict(seed=-1),
        dict(num_sinks=-1),
        dict(observation_window=0),
        dict(rule="median"),
    ],
    ids=str,
)
def test_parameters_that_are_not_allowed_are_named(changes):
    ((field, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"^{field} is {value!r}, must be "):
        IndexParameters(**changes)
