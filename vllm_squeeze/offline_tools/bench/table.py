"""A comparison as a table, and in sentences."""

from collections.abc import Iterable
from datetime import UTC, datetime

from vllm_squeeze.attention_backend.matching import EXACT as EXACT_ROWS
from vllm_squeeze.attention_backend.matching import SQUEEZED
from vllm_squeeze.config import SqueezeConfig
from vllm_squeeze.offline_tools.bench.comparison import RATE, TIMES, Agreement, Comparison, Speed, name_of
from vllm_squeeze.offline_tools.bench.plan import DENSE

REFUSED = "refused"
MISSING = "-"

Row = tuple[str, ...]
"""A label, the figure of vLLM's own backend, and of each other arm the figure and the ratio. The label alone: a title."""


def header(found: Comparison) -> Row:
    columns = (column for arm in found.plan.arms for column in (name_of(arm), "times faster"))
    return ("", name_of(DENSE), *columns)


def rows(found: Comparison) -> list[Row]:
    """All rows below the header."""
    table: list[Row] = []
    for batch, requests in enumerate(found.plan.batches):
        table.append((f"{requests} request{'s' if requests > 1 else ''} at a time",))
        table += [timing(found, batch, figure, label) for figure, label in (TIMES | RATE).items()]
        speeds = [found.speeds[arm][batch] if arm in found.speeds else None for arm in found.plan.arms]
        table.append(per_arm("budget used", [budget_used(speed) for speed in speeds]))
        table += rows_by_outcome(speeds)
    count = found.plan.compared
    table.append((f"agreement, {count} question{'s' if count > 1 else ''}",))
    agreements = [found.agreements.get(arm) for arm in found.plan.arms]
    for label, text in AGREEMENT_ROWS.items():
        table.append(per_arm(label, [text(one) if one else MISSING for one in agreements]))
    return table


def timing(found: Comparison, batch: int, figure: str, label: str) -> Row:
    """A figure of all arms, and how many times faster than vLLM's own backend each is."""

    def of(arm: str) -> str:
        return f"{found.speeds[arm][batch].medians[figure]:.1f}" if arm in found.speeds else MISSING

    cells = [of(DENSE)]
    for arm in found.plan.arms:
        ratio = found.ratio(arm, batch, figure)
        cells += [of(arm), REFUSED if ratio is None else f"{ratio:.2f}"]
    return (label, *cells)


def per_arm(label: str, values: Iterable[str]) -> Row:
    """A row of what only arms have that are not vLLM's own backend."""
    return (label, "", *(cell for value in values for cell in (value, "")))


def budget_used(speed: Speed | None) -> str:
    return MISSING if speed is None or speed.budget_used is None else f"{speed.budget_used:.3f}"


def rows_by_outcome(speeds: list[Speed | None]) -> list[Row]:
    outcomes = {outcome for speed in speeds if speed for outcome in speed.rows}
    named = sorted(outcomes | {SQUEEZED}, key=lambda outcome: (outcome not in (SQUEEZED, EXACT_ROWS), outcome))
    return [
        per_arm(f"rows {outcome}", [f"{speed.rows.get(outcome, 0):.0f}" if speed else MISSING for speed in speeds])
        for outcome in named
    ]


def differ_at(one: Agreement) -> str:
    """Where answers first differ: the earliest, and the last."""
    places = sorted(place + 1 for place in one.first_differences if place is not None)
    return " to ".join(dict.fromkeys(map(str, (places[0], places[-1])))) if places else "none"


AGREEMENT_ROWS = {
    "same greedy answers": lambda one: f"{one.same} of {len(one.first_differences)}",
    "others differ from token": differ_at,
    "same best token": lambda one: MISSING if one.same_top is None else f"{one.same_top:.1%}",
    "KL from dense, nats": lambda one: MISSING if one.kl is None else f"{one.kl:.4f}",
    "  +-": lambda one: MISSING if one.kl_error is None else f"{one.kl_error:.4f}",
}


def as_text(header: Row, rows: list[Row]) -> str:
    """The table in columns."""
    widths = [max(len(row[i]) for row in [header, *rows] if len(row) > i) for i in range(len(header))]
    widths[0] = max(len(row[0]) for row in rows) + 2
    lines = []
    for row in [header, *rows]:
        if len(row) == 1:
            lines.append(row[0])
            continue
        label = f"  {row[0]}".ljust(widths[0])
        lines.append(label + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:])))
    return "\n".join(line.rstrip() for line in lines)


def told(found: Comparison) -> str:
    """What was measured, and on what."""
    plan = found.plan
    versions = ", ".join(f"{name} {version}" for name, version in found.machine.get("versions", {}).items())
    where = f"{found.machine['machine']}, {versions}, {datetime.now(UTC):%Y-%m-%d}. " if found.machine else ""
    return (
        f"{where}{plan.model} on {plan.source}, {len(plan.prefix)} tokens, in the KV cache before each timing. Answers of "
        f"{plan.tokens} tokens, mode {plan.mode}; times are medians of {plan.repeats}, of an engine without HTTP."
    )


def conclusions(found: Comparison) -> list[str]:
    """A sentence for each arm and batch whose ratio was not refused, on the time between tokens."""
    sentences = []
    for arm in found.plan.arms:
        for batch, requests in enumerate(found.plan.batches):
            ratio = found.ratio(arm, batch, "tpot_ms")
            if ratio is not None:
                how = f"{ratio:.2f} times faster than" if ratio >= 1 else f"{1 / ratio:.2f} times SLOWER than"
                sentences.append(f"{name_of(arm)}, {requests} at a time: tokens come {how} from vLLM's own backend")
    return sentences


def cautions(found: Comparison) -> list[str]:
    """What the figures do not say."""
    most = max(found.plan.batches)
    said = [
        f"{name_of(arm)}: a KL of {one.kl:.3g} is more than {SqueezeConfig.max_kl:g}, what a budget of auto may cost"
        for arm, one in found.agreements.items()
        if one.kl is not None and one.kl > SqueezeConfig.max_kl
    ]
    if most > len(found.plan.questions):
        said.append(
            f"{len(found.plan.questions)} questions repeat in batches of {most}; give more for times to the first"
        )
    return said
