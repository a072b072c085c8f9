"""What is wrong with a server's settings and indexes is told at once, all of it, without a server."""

import io
import json

import pytest
import yaml

from tests.prefix_index.small_index import write_exact_index, write_index
from tests.prefix_index.small_quality import make_quality
from vllm_squeeze.config import CONFIG_VARIABLE, INDEX_VARIABLE, SqueezeConfig
from vllm_squeeze.offline_tools.check_config import check_config
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, write_quality


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv(INDEX_VARIABLE, raising=False)
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)


@pytest.fixture
def checked(tmp_path):
    """Checks settings; returns the exit code and the lines printed."""

    def checked(**settings) -> tuple[int, list[str]]:
        path = tmp_path / "settings.json"
        path.write_text(json.dumps({"squeeze": settings}))
        out = io.StringIO()
        return check_config(path, out), out.getvalue().splitlines()

    return checked


def test_what_is_printed_is_a_file_of_all_settings(checked, tmp_path):
    index = write_index(tmp_path / "store")
    code, lines = checked(index=str(tmp_path / "store"), budget=0.5)
    assert code == 0
    assert lines[-1] == f"# {index.name}: 47 tokens, of the model tiny, at a budget of 0.5"
    told = checked(index=str(tmp_path / "store"), budget=0.5, prefill=0.33)[1][-1]
    assert told == f"{lines[-1]}, prompts at 0.33"
    (tmp_path / "printed.yaml").write_text("\n".join(lines))
    again = SqueezeConfig.resolve(None, {CONFIG_VARIABLE: str(tmp_path / "printed.yaml")})
    assert again == SqueezeConfig(index=(str(tmp_path / "store"),), budget=0.5)
    assert yaml.safe_load("\n".join(lines))["squeeze"].keys() == vars(again).keys()


def test_the_servers_index_variable_counts(checked, tmp_path, monkeypatch):
    index = write_index(tmp_path / "store")
    monkeypatch.setenv(INDEX_VARIABLE, str(index))
    code, lines = checked()
    assert code == 0 and lines[-1].startswith(f"# {index.name}: ")


def test_another_file_in_the_environment_does_not(checked, tmp_path, monkeypatch):
    (tmp_path / "other.yaml").write_text("squeeze: {budget: 1}")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "other.yaml"))
    assert "  budget: 0.5" in checked(budget=0.5)[1]


def test_all_wrong_settings_are_told(checked):
    code, lines = checked(budget=2, rest="keep", modee="auto")
    assert code == 1 and len(lines) == 3
    assert all(line.startswith("error: squeeze.") for line in lines)
    assert 'budget: 2 is not a number in (0, 1], nor "auto"' in lines[0]
    assert "rest: 'keep' is not one of value_centroids, drop" in lines[1]
    assert "modee: unknown setting; known are index" in lines[2]


def test_settings_that_do_not_go_together(checked):
    with pytest.raises(ValueError, match="squeeze.prefill: 'squeezed' is not"):
        checked(prefill="squeezed", budget="auto")


def test_each_index_that_cannot_be_served_is_told(checked, tmp_path):
    folders = [write_index(tmp_path / "store", name) for name in ("a-0", "b-0", "c-0")]
    (folders[0] / "manifest.json").write_text("{}")
    (folders[1] / "tokens.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    missing = str(tmp_path / "missing")
    code, lines = checked(index=[missing, str(tmp_path / "empty"), str(tmp_path / "store"), str(folders[2])])
    assert code == 1
    assert [line for line in lines if line.startswith("# ")] == [
        "# c-0: 47 tokens, of the model tiny, at a budget of 0.125"
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 4
    assert f"{missing}: No such file" in errors[0] and "holds no index" in errors[1]
    assert "a-0/manifest.json: the manifest has no format_version" in errors[2]
    assert "b-0/tokens.safetensors: No such file" in errors[3]


def test_damaged_figures_are_damage(checked, tmp_path):
    index = write_index(tmp_path / "store")
    (index / "quality.json").write_text("{}")
    code, lines = checked(index=str(index))
    assert code == 1 and "quality.json" in lines[-1]


def test_the_budget_that_auto_takes(checked, tmp_path):
    index = write_index(tmp_path / "store")
    code, lines = checked(index=str(index), budget="auto")
    assert code == 1 and "what budgets cost was not measured" in lines[-1]
    quality = make_quality(PrefixIndex.open(index).manifest)
    write_quality(index, quality)
    code, lines = checked(index=str(index), budget="auto", max_kl=0.1)
    assert code == 0 and lines[-1].endswith(f"at a budget of {quality.least_budget(0.1):g}")
    code, lines = checked(index=str(index), budget="auto", max_kl=1e-5)
    assert code == 1 and "squeeze.max_kl is 1e-05" in lines[-1]


@pytest.mark.parametrize("settings", [{"mode": "exact"}, {"mode": "exact", "budget": "auto"}])
def test_an_exact_server_has_no_budget(checked, tmp_path, settings):
    index = write_index(tmp_path / "store")
    code, lines = checked(index=str(index), **settings)
    assert code == 0 and lines[-1] == f"# {index.name}: 47 tokens, of the model tiny, exactly"


def test_a_server_that_is_off_looks_at_no_index(checked):
    code, lines = checked(index="/missing", mode="off")
    assert code == 0 and lines[-1] == "# squeeze.mode is off: no index is looked at"


def test_an_exact_index_has_no_budget(checked, tmp_path):
    index = write_exact_index(tmp_path / "store")
    code, lines = checked(index=str(index), budget="auto")
    assert code == 0 and lines[-1].endswith(", exactly")
