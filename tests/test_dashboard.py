"""The Grafana dashboard names only metrics, labels and outcomes that a server has."""

import inspect
import json
import re
from pathlib import Path

import vllm.v1.metrics.loggers

from vllm_squeeze.attention_backend import matching, stats

DASHBOARD = json.loads((Path(__file__).parents[1] / "examples" / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPOSED = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def exposed(module) -> set[str]:
    """Names on /metrics of what a module registers."""
    registered = re.findall(r'self\._(\w+)_cls\(\s*name="(vllm:\w+)"', inspect.getsource(module))
    return {name + ending for kind, name in registered for ending in EXPOSED[kind]}


def test_every_metric_exists():
    used = set(re.findall(r"vllm:\w+", " ".join(EXPRESSIONS)))
    ours = {name for name in used if name.startswith("vllm:squeeze_")}
    assert ours == exposed(stats)  # all of ours are shown, and no others
    assert used - ours <= exposed(vllm.v1.metrics.loggers)
    assert {"vllm:time_to_first_token_seconds_bucket", "vllm:request_time_per_output_token_seconds_bucket"} < used


def test_every_outcome_exists():
    outcomes = {value for name, value in vars(matching).items() if name.isupper() and isinstance(value, str)}
    named = re.findall(r'outcome=~"([^"]+)"', " ".join(EXPRESSIONS))
    assert named and {outcome for pattern in named for outcome in pattern.split("|")} - {".*"} <= outcomes


def test_it_can_be_imported():
    """Grafana asks for the data source at the import; nothing names another."""
    (asked,) = DASHBOARD["__inputs"]
    assert (asked["name"], asked["pluginId"]) == ("DS_PROMETHEUS", "prometheus")
    variables = DASHBOARD["templating"]["list"]
    sources = [thing["datasource"]["uid"] for panel in DASHBOARD["panels"] for thing in (panel, *panel["targets"])]
    assert {*sources, *(variable["datasource"]["uid"] for variable in variables)} == {"${DS_PROMETHEUS}"}
    assert DASHBOARD["schemaVersion"] >= 36 and DASHBOARD["id"] is None
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all('{model_name=~"$model"' in expression for expression in EXPRESSIONS)
