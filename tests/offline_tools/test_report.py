"""The page on what budgets cost, and the commands that write and name it."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.prefix_index.small_index import write_exact_index, write_index
from tests.prefix_index.small_quality import make_quality
from vllm_squeeze.cli import main
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, write_quality

VOID = {"meta", "br", "img", "link", "use", "path", "rect"}


class Page(HTMLParser):
    """Text of a page's elements; fails on tags that do not match, and on anything that is loaded from elsewhere."""

    def __init__(self, path: Path):
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open

    def handle_starttag(self, tag, attrs):
        assert tag != "script" and all(not (value or "").startswith(("http:", "https:", "//")) for name, value in attrs
                                       if name in ("src", "href", "xlink:href"))  # fmt: skip
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    folder = write_index(tmp_path / "store", source="<script>alert(1)</script>.txt")
    index = PrefixIndex.open(folder)
    write_quality(folder, make_quality(index.manifest))
    return folder


def test_a_page_of_an_index(measured, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", str(measured), "--out", str(out), "--max-kl", "0.02"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = Page(out)
    assert page.texts["h1"] == ["<script>alert(1)</script>.txt"], "what a manifest says is text"
    assert "Suggested budget: 0.203, for a KL of 0.02" in page.texts["p"]
    cells = page.texts["td"]
    assert cells[:7] == ["0.500", "0.495", "0.0010", "0.0003", "95.0%", "87.5%", "85.0%"]
    assert cells[21:24] == ["model.layers.3.self_attn.attn", "1", "80.0%"], "the head that keeps least comes first"
    assert len(page.texts["svg"]) == 3
    again = tmp_path / "again.html"
    main(["report", str(measured), "--out", str(again), "--max-kl", "0.02"])
    assert again.read_bytes() == out.read_bytes()


def test_what_costs_too_much_is_said_loudly(measured, tmp_path):
    main(["report", str(measured), "--out", str(tmp_path / "report.html"), "--max-kl", "0.0001"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<p class="warning">Suggested budget: NONE: a budget of 0.5 already costs a KL of 0.001' in text


def test_heads_that_keep_little_are_pointed_out(measured, tmp_path):
    index = PrefixIndex.open(measured)
    quality = make_quality(index.manifest)
    little = tuple(tuple(share / 2 for share in layer) for layer in quality.budgets[0].recall)
    budgets = tuple(type(budget)(*list(vars(budget).values())[:-1], little) for budget in quality.budgets)
    write_quality(measured, make_quality(index.manifest, budgets=budgets))
    main(["report", str(measured), "--out", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "4 of 4 heads keep less than 50% of their attention" in text


def test_a_page_of_a_folder_has_all_its_indexes(measured, tmp_path):
    write_index(measured.parent, "other-000000000000", seed=1)
    write_exact_index(measured.parent, "exact-000000000000")
    assert main(["report", str(measured.parent), "--out", str(tmp_path / "report.html")]) == 0
    page = Page(tmp_path / "report.html")
    assert len(page.texts["h1"]) == 3
    assert sum("was not measured" in text for text in page.texts["p"]) == 1
    assert sum("nothing is lost" in text for text in page.texts["p"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-index"], "no-such-index: No such file"),
        ([".", "--max-kl", "0"], "--max-kl: 0.0 is not above 0"),
        ([".", "--max-kl", "nan"], "--max-kl: nan is not above 0"),
        (["."], "holds no index"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments, "--out", "report.html"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-squeeze report: error: ") and message in line
    assert not Path("report.html").exists()


def test_a_damaged_index_has_no_page(measured, tmp_path, capsys):
    path = measured / "layer-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert main(["report", str(measured), "--out", str(tmp_path / "report.html")]) == 1
    assert re.search(r"layer-0001.safetensors: damaged", capsys.readouterr().err)


def test_it_needs_neither_vllm_nor_a_gpu(measured, tmp_path):
    script = (
        "import sys; from vllm_squeeze.cli import main; code = main(['report', sys.argv[1], '--out', sys.argv[2]]);"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('vllm', 'transformers', 'triton')));"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", script, str(measured), str(tmp_path / "report.html")]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"
