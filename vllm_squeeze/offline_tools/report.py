"""What budgets of indexes cost in answers, as a page: ``vllm-squeeze report``. Needs matplotlib, not vLLM nor a GPU."""

import math
from collections import Counter
from html import escape
from importlib.util import find_spec
from pathlib import Path

from vllm_squeeze.offline_tools.inspect import facts, suggestion
from vllm_squeeze.offline_tools.page import as_svg, cells, figure, new_figure, page
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes
from vllm_squeeze.prefix_index.quality import BudgetQuality, Quality

# Layers and heads shown that keep least of the attention.
SHOWN = 10
# Of the attention to the prefix: a head that keeps less of it, at the budget that is suggested, is pointed out.
LITTLE_KEPT = 0.5

METHOD = (
    "which were forced on the model at each budget. Thresholds were calibrated on other questions. KL is in nats, from "
    "dense next-token distributions; its standard error is for questions drawn anew. Attention kept is the share of the "
    "attention to the prefix that falls on keys attended to exactly."
)
HARMLESS = "That need not harm answers, as the rest contributes by its mean values; the KL above says whether it does."


def report(path: Path, out: Path, max_kl: float) -> None:
    """Writes the page of the index at a path, or of each index in a folder of them.

    Args:
        path: an index, or a folder of indexes.
        out: HTML file to write.
        max_kl: what a suggested budget may cost: KL from dense next-token distributions, nats.

    Raises:
        ValueError: there is no index, one cannot be used, or matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("report: needs matplotlib, which is not installed: pip install vllm-squeeze[report]")
    sections = [section(PrefixIndex.open(folder), max_kl) for folder in find_indexes(path)]
    out.write_text(page("What squeezing costs", sections), encoding="utf-8")


def section(index: PrefixIndex, max_kl: float) -> str:
    """What the page says of one index.

    Raises:
        InvalidIndex: it is damaged.
    """
    manifest, quality = index.manifest, index.quality()
    parts = [f"<h1>{escape(manifest.source)}</h1>"]
    if manifest.exact:
        parts.append('<p class="suggestion">All of this prefix is attended to: nothing is lost.</p>')
    elif quality is None:
        parts.append('<p class="warning">What budgets cost was not measured when this index was made.</p>')
    else:
        parts += costs(index, quality, max_kl)
    if not manifest.exact:
        parts += [figure(plot_sizes(cluster_sizes(index)), "Keys by the size of the cluster that they are in.")]
    rows = (cells("td", (label.strip(), value)) for label, value in facts(index))
    return "\n".join([*parts, "<h2>The index</h2>", f'<table class="facts">{"".join(rows)}</table>'])


def costs(index: PrefixIndex, quality: Quality, max_kl: float) -> list[str]:
    """What is said of an index whose budgets were measured."""
    budget = quality.least_budget(max_kl)
    kind = "warning" if budget is None else "suggestion"
    asked = "questions given" if quality.own_questions else "general questions about a text"
    header = ("budget", "bytes read", "KL from dense", "+-", "same best token", "attention kept", "least in a layer")
    rows = (
        cells(
            "td",
            (
                f"{measured.budget:.3f}",
                f"{measured.bytes_read:.3f}",
                f"{measured.kl:.4f}",
                f"{measured.kl_error:.4f}",
                f"{measured.same_top:.1%}",
                f"{measured.mean_recall:.1%}",
                f"{min(sum(layer) / len(layer) for layer in measured.recall):.1%}",
            ),
        )
        for measured in quality.budgets
    )
    nearest = min(quality.budgets, key=lambda measured: abs(math.log(measured.budget / (budget or 1))))
    return [
        f'<p class="{kind}">Suggested budget: {escape(suggestion(quality, max_kl))}</p>',
        f"<p>Measured on {quality.num_questions} {asked}, {quality.num_places} tokens of dense answers, {METHOD}</p>",
        f"<table>{cells('th', header)}{''.join(rows)}</table>",
        figure(plot_costs(quality, budget, max_kl), "What budgets cost, and what they keep of the attention."),
        figure(plot_recall(nearest), f"Attention kept by each layer and KV head at a budget of {nearest.budget:.3g}."),
        *worst(index, nearest),
    ]


def worst(index: PrefixIndex, measured: BudgetQuality) -> list[str]:
    """The heads that keep least of the attention, and a warning if that is little."""
    names = [layer.name for layer in index.manifest.layers]
    kept = sorted(
        (share, name, head)
        for name, layer in zip(names, measured.recall, strict=True)
        for head, share in enumerate(layer)
    )
    few = sum(share < LITTLE_KEPT for share, *_ in kept)
    said = f"{few} of {len(kept)} heads keep less than {LITTLE_KEPT:.0%} of their attention to the prefix. {HARMLESS}"
    rows = "".join(cells("td", (name, str(head), f"{share:.1%}")) for share, name, head in kept[:SHOWN])
    table = f"<table>{cells('th', ('layer', 'KV head', 'attention kept'))}{rows}</table>"
    return [f'<p class="warning">{said}</p>' if few else "", "<h2>Heads that keep least</h2>", table]


def cluster_sizes(index: PrefixIndex) -> Counter[int]:
    """How many clusters of all layers and heads have how many keys, those without any left out."""
    sizes: Counter[int] = Counter()
    for i in range(len(index.manifest.layers)):
        sizes.update(index.layer(i).sizes.flatten().tolist())
    del sizes[0]
    return sizes


def plot_costs(quality: Quality, budget: float | None, max_kl: float) -> str:
    from matplotlib.ticker import NullLocator

    drawn, (kl, kept) = new_figure(10, 4, panels=2)
    read = [measured.bytes_read for measured in quality.budgets]
    errors = [measured.kl_error for measured in quality.budgets]
    kl.errorbar(read, [max(measured.kl, 1e-6) for measured in quality.budgets], errors, marker="o", capsize=3)
    kl.axhline(max_kl, color="gray", linestyle="--", label=f"wanted: {max_kl:g}")
    if budget is not None:
        kl.axvline(budget, color="#2a7d4f", linestyle=":", label=f"suggested: {budget:g}")
    kl.set(xscale="log", yscale="log", xlabel="bytes read, of dense attention's", ylabel="KL from dense, nats")
    kl.legend()
    for label, shares in (
        ("same best token", [measured.same_top for measured in quality.budgets]),
        ("attention kept", [measured.mean_recall for measured in quality.budgets]),
    ):
        kept.plot(read, [100 * share for share in shares], marker="o", label=label)
    kept.set(xscale="log", xlabel="bytes read, of dense attention's", ylabel="percent")
    kept.legend()
    for axes in (kl, kept):
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(read, labels=[f"{share:.3g}" for share in read])
        axes.grid(alpha=0.3)
    return as_svg(drawn)


def plot_recall(measured: BudgetQuality) -> str:
    shares = [[100 * share for share in heads] for heads in zip(*measured.recall)]
    drawn, (axes,) = new_figure(10, 1.6 + 0.25 * len(shares))
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=100, cmap="viridis")
    axes.set(xlabel="layer", ylabel="KV head", yticks=range(len(shares)))
    drawn.colorbar(image, label="percent kept")
    return as_svg(drawn)


def plot_sizes(sizes: Counter[int]) -> str:
    drawn, (axes,) = new_figure(10, 3)
    weights = [size * count for size, count in sizes.items()]
    axes.hist(list(sizes), bins=min(max(sizes), 64), weights=weights)
    axes.set(xlabel="keys in the cluster", ylabel="keys")
    axes.grid(alpha=0.3)
    return as_svg(drawn)
