"""One engine indexes one prefix after another, each as an engine of its own would."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.conftest import ENGINE_ARGS, tokens
from vllm_squeeze.offline_tools.documents import Document
from vllm_squeeze.offline_tools.index import Indexer
from vllm_squeeze.prefix_index.index_folder import MANIFEST_FILE, PrefixIndex
from vllm_squeeze.prefix_index.manifest import IndexParameters

PREFIX = tokens(seed=1, count=200)
QUESTIONS = ["t10 t11", "t12"]


def make_indexer(model: Path, many: bool = True, questions: list[str] = QUESTIONS, **parameters) -> Indexer:
    return Indexer(str(model), None, IndexParameters(**parameters), ENGINE_ARGS, questions, False, many)


def contents(index: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in index.iterdir() if file.name != MANIFEST_FILE}


@pytest.fixture
def engines(monkeypatch):
    """The engines that are started."""
    import vllm

    started, start = [], vllm.LLM
    monkeypatch.setattr(vllm, "LLM", lambda *args, **kwargs: started.append(start(*args, **kwargs)) or started[-1])
    return started


def test_an_index_does_not_depend_on_those_before(models, engines, tmp_path):
    model = models("llama")
    documents = {
        "other": Document("other", token_ids=tokens(seed=2, count=150)),
        "no room for a question": Document("long", token_ids=tokens(seed=3, count=2040)),
        "prefix": Document("prefix", token_ids=PREFIX),
    }
    indexer = make_indexer(model)
    made = {}
    for name, document in documents.items():
        asked = indexer.prepare(document)
        assert not indexer.is_indexed(asked, tmp_path)
        made[name] = indexer.write(asked, tmp_path)
        assert indexer.is_indexed(asked, tmp_path)
        PrefixIndex.open(made[name].folder).verify()
    (engine,) = engines
    engine.llm_engine.engine_core.shutdown()  # in a process one lives at a time
    calibrated_on = [index.manifest.calibration.calibrated_on for index in made.values()]
    assert calibrated_on == ["questions", "observation window", "questions"]

    one = make_indexer(model, many=False)
    alone = one.write(one.prepare(documents["prefix"]), tmp_path / "alone")
    assert contents(made["prefix"].folder) == contents(alone.folder)
    assert replace(made["prefix"].manifest, created=alone.manifest.created) == alone.manifest

    # What else the same prefix could be indexed with.
    for settings in ({"seed": 1}, {"questions": ["t10"]}):
        another = make_indexer(model, **settings)
        assert not another.is_indexed(another.prepare(documents["prefix"]), tmp_path)
