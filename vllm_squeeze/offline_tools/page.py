"""What the pages that commands write share: one file each, which loads nothing from elsewhere."""

import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }}
th:first-child, td:first-child {{ text-align: left }}
.suggestion {{ font-size: 1.3rem; padding: .7rem 1rem; background: #e8f3ec; border-left: .4rem solid #2a7d4f }}
.warning {{ background: #fbeaea; border-left: .4rem solid #b3261e; padding: .7rem 1rem }}
.facts th, .facts td {{ text-align: left }}
.facts td {{ font-size: .9rem; overflow-wrap: anywhere }}
figure {{ margin: 1.5rem 0 }}
svg {{ max-width: 100%; height: auto }}
</style>
</head>
<body>
{sections}
</body>
</html>
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        sections: of its body, HTML.
    """
    return PAGE.format(title=escape(title), sections="\n".join(sections))


def cells(tag: str, values: Iterable[str]) -> str:
    """A row of a table."""
    return f"<tr>{''.join(f'<{tag}>{escape(value)}</{tag}>' for value in values)}</tr>"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure of matplotlib's, and its panels side by side."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(1, panels, squeeze=False)[0]


def as_svg(drawn: Any) -> str:
    """A figure as an element of a page; the same figure gives the same text."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "vllm-squeeze", "svg.fonttype": "none"}):
        drawn.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
