"""Measures what budgets of an index cost: the server's own attention, forced on dense answers to questions."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from vllm_squeeze.offline_tools import forcing
from vllm_squeeze.offline_tools.fidelity import divergence, mean_and_error
from vllm_squeeze.offline_tools.prefix_engine import PrefixEngine

BUDGETS = (1 / 2, 1 / 3, 1 / 5, 1 / 8, 1 / 16, 1 / 32)


class Cost(NamedTuple):
    """What a budget costs, as in ``BudgetQuality``."""

    budget: float
    bytes_read: float
    kl: float
    kl_error: float
    same_top: float


def measure(
    engine: PrefixEngine, prompts: Sequence[Sequence[int]], num_tokens: int, budgets: Iterable[float] = BUDGETS
) -> tuple[list[Cost], int]:
    """What budgets cost in answers to all prompts together.

    Args:
        engine: that serves the index.
        prompts: token ids, each of the prefix and a question.
        num_tokens: most tokens of an answer.
        budgets: those are left out that centroids and always attended tokens alone exceed.

    Returns:
        the costs, and the tokens of all dense answers, at which distributions were compared.

    Raises:
        RuntimeError: some row was not squeezed.
    """
    engine.begin()
    with engine.squeezing_paused():
        found = forcing.answer(engine.llm, prompts, num_tokens)
    answers, dense = [list(output.token_ids) for output, _ in found], [logits for _, logits in found]
    costs = []
    for budget in tqdm(list(budgets), desc="Measuring", unit="budget"):
        try:
            engine.set_budget(budget)
        except ValueError:
            continue
        engine.begin()
        kept_before, pairs_before, rows_before = *engine.count_kept(), engine.rows()
        other = forcing.force(engine.llm, prompts, answers)
        kept, pairs, rows = *engine.count_kept(), engine.rows()
        grown = {name for name, value in rows.items() if value > rows_before.get(name, 0)}
        if grown != {"squeezed"}:
            raise RuntimeError(f"rows are {sorted(grown)}, not only squeezed")
        costs.append(
            cost_of(budget, dense, other, engine.cost.budget_used((kept - kept_before) / (pairs - pairs_before)))
        )
    return costs, sum(map(len, answers))


def cost_of(budget: float, dense: Sequence[Any], other: Sequence[Any], bytes_read: float) -> Cost:
    """Compares the logits of answers, [places, V] each, at a budget."""
    kl, same_top = zip(*(divergence(*pair) for pair in zip(dense, other, strict=True)))
    mean, error = mean_and_error(kl)
    return Cost(budget, bytes_read, mean, 0.0 if math.isnan(error) else error, mean_and_error(same_top)[0])
