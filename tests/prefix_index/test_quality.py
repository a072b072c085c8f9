"""What budgets cost, as it is kept in an index, and the budget that follows from it."""

import json
from pathlib import Path

import pytest

from tests.prefix_index.small_index import write_index
from tests.prefix_index.small_quality import make_quality
from vllm_squeeze.prefix_index.index_folder import QUALITY_FILE, PrefixIndex, write_quality
from vllm_squeeze.prefix_index.manifest import InvalidIndex, with_digest
from vllm_squeeze.prefix_index.quality import BudgetQuality, Quality


@pytest.fixture
def index(tmp_path: Path) -> PrefixIndex:
    return PrefixIndex.open(write_index(tmp_path))


def test_an_index_has_none_until_it_is_written(index):
    assert index.quality() is None
    quality = make_quality(index.manifest)
    write_quality(index.folder, quality)
    assert index.quality() == quality
    index.verify()
    again = make_quality(index.manifest, {0.3: 0.02})
    write_quality(index.folder, again)
    assert index.quality() == again
    assert sorted(path.name for path in index.folder.iterdir() if path.name.startswith(".")) == []


def test_a_new_index_of_the_prefix_has_none(index):
    write_quality(index.folder, make_quality(index.manifest))
    assert PrefixIndex.open(write_index(index.folder.parent, index.folder.name)).quality() is None


def test_that_of_another_index_is_refused(index, tmp_path):
    other = PrefixIndex.open(write_index(tmp_path / "other", seed=1))
    write_quality(index.folder, make_quality(other.manifest))
    with pytest.raises(InvalidIndex, match=r"quality.json: manifest_digest is that of another index$"):
        index.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(num_places=0), "num_places is 0, must be from 1"),
        (lambda body: body.update(num_places=7.5), "num_places is 7.5, must be of type int"),
        (lambda body: body.update(own_questions=1), "own_questions is 1, must be of type bool"),
        (lambda body: body.update(format_version=2), "format_version is 2, must be from 1 to 1"),
        (lambda body: body.update(budgets=[]), "budgets are .* must decrease"),
        (lambda body: body["budgets"].reverse(), "budgets are .* must decrease"),
        (lambda body: body["budgets"][1].update(same_top=1.01), "same_top is 1.01, must be from 0 to 1"),
        (lambda body: body["budgets"][2].update(budget=0), "budget is 0.0, must be from"),
        (lambda body: body["budgets"][1].update(kl="0"), r"budgets\[1\].kl is '0', must be of type float"),
        (lambda body: body["budgets"][0]["recall"][1].pop(), r"budgets\[0\].recall must be of 2 layers"),
        (lambda body: body["budgets"][0]["recall"][1].__setitem__(0, -0.1), "recall has shares that are not from 0"),
        (lambda body: body.update(more=1), "more is unknown"),
        (lambda body: body.pop("budgets"), "budgets is missing"),
    ],
)
def test_what_cannot_be_is_refused(index, change, message):
    body = json.loads(make_quality(index.manifest).to_json())
    del body["digest"]
    change(body)
    (index.folder / QUALITY_FILE).write_text(with_digest(body))
    with pytest.raises(InvalidIndex, match=message):
        index.quality()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\u00e9", '"quality"'])
def test_what_is_no_quality_is_refused(index, content):
    (index.folder / QUALITY_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(InvalidIndex, match=QUALITY_FILE):
        index.quality()


def test_any_change_is_noticed(index):
    text = make_quality(index.manifest).to_json()
    (index.folder / QUALITY_FILE).write_text(text.replace('"kl": 0.1', '"kl": 0.2'))
    with pytest.raises(InvalidIndex, match="changed after it was written"):
        index.quality()


def test_a_link_is_not_followed(index, tmp_path):
    (tmp_path / "elsewhere.json").write_text(make_quality(index.manifest).to_json())
    (index.folder / QUALITY_FILE).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InvalidIndex, match="symbolic links are not followed"):
        index.quality()


@pytest.mark.parametrize(
    ("max_kl", "budget"),
    [
        (0.01, 0.25),
        (0.1, 0.125),
        (1.0, 0.125),  # no smaller one was measured
        (0.001, 0.5),
        (0.0009, None),
        (0.001 * 10**0.5, 0.354),  # halfway in the logarithms
        (0.01 * 10**0.5, 0.177),
        (0.001 * 10**0.3, 0.407),  # rounded up, from .4061
    ],
)
def test_the_least_budget(index, max_kl, budget):
    assert make_quality(index.manifest).least_budget(max_kl) == budget


def test_no_budget_below_one_that_costs_too_much(index):
    """Scatter may make a small budget look better than a larger one."""
    quality = make_quality(index.manifest, {0.5: 0.001, 0.25: 0.04, 0.125: 0.005})
    assert 0.25 < quality.least_budget(0.02) < 0.5
    assert quality.least_budget(0.05) == 0.125


def test_no_loss_at_all(index):
    """Rounding may make KL zero, or a little less."""
    quality = make_quality(index.manifest, {0.5: 0.0, 0.25: -1e-9, 0.125: 0.1})
    assert 0.125 < quality.least_budget(0.05) < 0.25


def test_the_mean_of_attention_kept(index):
    measured = make_quality(index.manifest).budgets[0]
    assert isinstance(measured, BudgetQuality)
    count = sum(map(len, measured.recall))
    assert measured.mean_recall == pytest.approx(0.9 - 0.1 / count)


def test_what_is_written_is_plain(index):
    text = make_quality(index.manifest).to_json()
    assert Quality.from_json(text, index.manifest).to_json() == text and text.isascii()
