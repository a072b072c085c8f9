"""Measures what budgets of an index cost: the server's own attention, forced on dense answers to questions."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
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
    answers, dense = answer_densely(engine, prompts, num_tokens)
    costs = []
    for budget in tqdm(list(budgets), desc="Measuring", unit="budget"):
        try:
            engine.set_budget(budget)
        except ValueError:
            continue
        kept_before, pairs_before = engine.count_kept()
        kl, same_top = divergences(engine, prompts, answers, dense)
        kept, pairs = engine.count_kept()
        mean, error = mean_and_error(kl)
        bytes_read = engine.cost.budget_used((kept - kept_before) / (pairs - pairs_before))
        error = 0.0 if math.isnan(error) else error
        costs.append(Cost(budget, bytes_read, mean, error, mean_and_error(same_top)[0]))
    return costs, sum(map(len, answers))


def answer_densely(
    engine: PrefixEngine, prompts: Sequence[Sequence[int]], num_tokens: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The dense answers to all prompts together: token ids, and logits [tokens, V], of each."""
    engine.begin()
    with engine.squeezing_paused():
        found = forcing.answer(engine.llm, prompts, num_tokens)
    return [list(output.token_ids) for output, _ in found], [logits for _, logits in found]


def divergences(
    engine: PrefixEngine,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    dense: Sequence[torch.Tensor],
) -> tuple[list[list[float]], list[list[bool]]]:
    """Forces dense answers on an engine as it serves now, with nothing but the prefix in its KV cache.

    Args:
        engine: that serves the index.
        prompts: token ids, each of the prefix and a question.
        answers, dense: from ``answer_densely``.

    Returns:
        of each answer what ``divergence`` says of its places.

    Raises:
        RuntimeError: some row was not squeezed.
    """
    engine.begin()
    before = engine.rows()
    other = forcing.force(engine.llm, prompts, answers)
    grown = {name for name, value in engine.rows().items() if value > before.get(name, 0)}
    if grown - {"dense: prefill"} != {"squeezed"}:
        raise RuntimeError(f"rows are {sorted(grown)}, not only squeezed and, where prompts end, dense")
    kl, same_top = zip(*(divergence(*pair) for pair in zip(dense, other, strict=True)))
    return list(kl), list(same_top)
