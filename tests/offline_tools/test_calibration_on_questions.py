"""Thresholds are calibrated on the queries that the engine answered questions with, so that budgets are met."""

import pytest

from tests.engine.conftest import ENGINE_ARGS, engine, generate, tokens
from tests.engine.tiny_models import make_model
from vllm_squeeze.offline_tools import index as indexing
from vllm_squeeze.offline_tools.questions import ANSWER_TOKENS
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import Calibration, IndexParameters

PREFIX = tokens(seed=1, count=900)
QUESTIONS = [tokens(seed, count=3 + seed) for seed in range(20, 32)]
KV_HEADS, LAYERS = 2, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def counted(monkeypatch):
    """Histograms that thresholds were read off."""
    histograms = []
    read = indexing.threshold_curve
    monkeypatch.setattr(indexing, "threshold_curve", lambda counts: (histograms.append(counts), read(counts))[1])
    return histograms


def make_index(model, folder, ids, **engine_args) -> PrefixIndex:
    (folder / "ids.json").write_text(str(ids))
    (folder / "questions.txt").write_text("\n".join(" ".join(f"t{id}" for id in ids) for ids in QUESTIONS))
    made = indexing.index(
        str(model),
        None,
        folder / "ids.json",
        None,
        folder / "store",
        IndexParameters(),
        {**ENGINE_ARGS, **engine_args},
        folder / "questions.txt",
    )
    return PrefixIndex.open(made)


def test_budgets_are_met_on_the_questions_that_were_asked(model, counted, tmp_path):
    index = make_index(model, tmp_path, PREFIX, max_num_batched_tokens=512)
    prompts = [PREFIX + question for question in QUESTIONS]
    with engine(model, skip_tokenizer_init=False) as llm:
        answers = generate(llm, prompts, ANSWER_TOKENS, ignore_eos=False)
    num_answered = sum(map(len, answers))
    assert index.manifest.calibration == Calibration("questions", len(QUESTIONS), num_answered)
    (histogram,) = counted
    # directions are fitted to the others
    assert int(histogram.sum()) == index.manifest.num_members * KV_HEADS * LAYERS * (num_answered // 2)

    for budget in (0.2, 0.4):
        with engine(model, index.folder, budget=budget) as llm:
            generate(llm, [PREFIX], num_tokens=1)  # brings the prefix into the KV cache
            generate(llm, prompts, ANSWER_TOKENS)
            read, dense = (prefix_bytes(llm, kind) for kind in ("alone", "dense"))
        assert read / dense == pytest.approx(budget, rel=0.05)


def prefix_bytes(llm, kind: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:squeeze_prefix_bytes_{kind}")


def test_the_observation_window_is_taken_where_there_is_no_room_for_a_question(model, counted, capsys, tmp_path):
    ids = tokens(seed=2, count=2048 - ANSWER_TOKENS)
    index = make_index(model, tmp_path, ids, max_num_batched_tokens=70)
    assert index.manifest.calibration == Calibration("observation window", 0, 100)
    (histogram,) = counted
    assert int(histogram.sum()) == index.manifest.num_members * KV_HEADS * LAYERS * 50
    printed = capsys.readouterr()
    assert "12 of 12 questions are left out" in printed.err and "the observation window, 100 tokens" in printed.out
