"""Plots of figures against budgets. Needs matplotlib, which nothing else does."""

from importlib.util import find_spec
from pathlib import Path

KL = "KL from dense, nats"
Lines = dict[str, list[tuple[float, float]]]
"""Points (budget, figure) of each line, by what it is called."""


def check() -> None:
    """Raises ValueError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def plot(path: Path, panels: dict[str, Lines], logarithmic: frozenset[str] = frozenset()) -> None:
    """Draws panels side by side, each with its figure against the budget.

    Args:
        path: to write, in the format that its ending says.
        panels: lines of each, by what the figure is called.
        logarithmic: panels whose figures are drawn on a logarithmic axis; those that are not positive are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=name)
        axes.set(xlabel="bytes read, of dense attention's", ylabel=title, xscale="log")
        if title in logarithmic:
            axes.set_yscale("log", nonpositive="mask")
        axes.grid(which="both", alpha=0.3)
        if lines:
            axes.legend()
    figure.savefig(path)
