"""A comparison as a page. With matplotlib it has plots."""

from collections.abc import Iterator
from html import escape
from importlib.util import find_spec

from vllm_squeeze.offline_tools.bench.comparison import RATE, TIMES, Comparison, name_of
from vllm_squeeze.offline_tools.bench.plan import DENSE
from vllm_squeeze.offline_tools.bench.table import Row, cautions, conclusions, header, rows, told
from vllm_squeeze.offline_tools.page import as_svg, cells, figure, new_figure, page

NOTE = (
    "Times faster: the time of vLLM's own backend over ours, or our tokens per second over its; below 1 ours is slower. "
    "Budget used: bytes needed of the prefix by the server's own counters, over those of dense attention. A row is one "
    "request in one step. KL, and the share of places with the same best token, are from dense next-token distributions "
    "on dense answers that were forced, with every row squeezed. Greedy answers part for good at the first token that "
    "differs, which two nearly equal tokens suffice for."
)


def web_page(found: Comparison) -> str:
    """The whole page, HTML."""
    return page("Dense against squeezed", sections(found))


def sections(found: Comparison) -> Iterator[str]:
    yield f"<h1>Dense against squeezed: {escape(found.plan.source)}</h1>"
    for refusal in found.refusals:
        yield f'<p class="warning">No speed-up is stated. {escape(refusal)}</p>'
    for sentence in conclusions(found):
        yield f'<p class="{"warning" if "SLOWER" in sentence else "suggestion"}">{escape(sentence)}</p>'
    for caution in cautions(found):
        yield f'<p class="warning">{escape(caution)}</p>'
    yield f"<p>{escape(told(found))}</p>"
    head = header(found)
    yield f"<table>{cells('th', head)}{''.join(table_row(row, len(head)) for row in rows(found))}</table>"
    yield f"<p>{NOTE}</p>"
    if DENSE in found.speeds and find_spec("matplotlib"):
        yield figure(plot(found), "Medians. Shorter bars are better, but of tokens per second longer ones.")
    yield "<h2>Answers</h2>"
    yield answers(found)


def table_row(row: Row, width: int) -> str:
    if len(row) == 1:
        return f'<tr><th colspan="{width}">{escape(row[0])}</th></tr>'
    return cells("td", row)


def answers(found: Comparison) -> str:
    """All greedy answers, side by side."""
    arms = [arm for arm in (DENSE, *found.plan.arms) if arm in found.answers]
    head = cells("th", ("question", *map(name_of, arms)))
    texts = zip(found.plan.questions, *(found.answers[arm] for arm in arms))
    return f'<table class="facts">{head}{"".join(cells("td", row) for row in texts)}</table>'


def plot(found: Comparison) -> str:
    drawn, panels = new_figure(10, 3.5, panels=3)
    arms = list(found.speeds)
    for axes, (name, label) in zip(panels, (TIMES | RATE).items()):
        for place, arm in enumerate(arms):
            at = [batch + (place - (len(arms) - 1) / 2) * 0.8 / len(arms) for batch in range(len(found.plan.batches))]
            heights = [speed.medians[name] for speed in found.speeds[arm]]
            axes.bar(at, heights, 0.8 / len(arms), label=name_of(arm))
        axes.set(title=label, xlabel="requests at a time")
        axes.set_xticks(range(len(found.plan.batches)), labels=map(str, found.plan.batches))
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend()
    return as_svg(drawn)
