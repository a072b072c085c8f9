"""``vllm-squeeze index --exact``: the tokens and the model's identity, and no engine."""

import pytest

from tests.engine.conftest import ENGINE_ARGS, tokens
from tests.engine.tiny_models import make_model
from vllm_squeeze.attention_backend.model_identity import model_identity
from vllm_squeeze.cli import main
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def no_engine(monkeypatch):
    """Makes the start of an engine an error."""
    import vllm

    monkeypatch.setattr(vllm, "LLM", None)


def run(model, tmp_path, ids, engine_args: str) -> int:
    (tmp_path / "ids.json").write_text(str(ids))
    arguments = ["--model", model, "--token-ids", tmp_path / "ids.json", "--out", tmp_path / "store"]
    return main(["index", "--exact", "--engine-args", engine_args, *map(str, arguments)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_and_identity_without_an_engine(capsys, no_engine, model, tmp_path, dtype):
    from vllm.engine.arg_utils import EngineArgs

    ids = tokens(seed=1, count=70)
    assert run(model, tmp_path, ids, f'{{"dtype": "{dtype}"}}') == 0
    printed = capsys.readouterr().out.splitlines()[-4:]  # vLLM may log before
    (folder,) = find_indexes(tmp_path / "store")
    index = PrefixIndex.open(folder)
    served = EngineArgs(str(model), **{**ENGINE_ARGS, "dtype": dtype}, attention_backend="squeeze")
    assert index.token_ids.tolist() == ids and index.manifest.exact
    assert index.manifest.model == model_identity(served.create_engine_config())
    assert index.manifest.model.dtype == dtype

    size = sum(file.stat().st_size for file in folder.iterdir())
    assert printed[:3] == [str(folder), "  tokens           70", f"  size             {size / 2**10:.1f} KiB"]
    assert printed[3].startswith("  time  ")


def test_nothing_is_left_where_it_fails(capsys, no_engine, model, tmp_path):
    """Found while the identity is read, after all that is checked before."""
    assert run(model, tmp_path, [9] * 70, '{"tensor_parallel_size": 0}') == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("vllm-squeeze index: error: ")
    assert not (tmp_path / "store").exists()
