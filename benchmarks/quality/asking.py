"""Asks the questions on a prefix of one engine in this process, densely and at each budget, one arm after the other.

Rules of ``selection.py`` that say by themselves how much they choose can answer too, in torch: arms called
``rule:budget``.

An arm begins with nothing but the prefix in the KV cache, computed densely: vLLM would else take the keys and values of
a question from another arm's answer to it.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.agreement import BYTES_ALONE, BYTES_DENSE, server_counters
from benchmarks.quality.answers import DENSE, answers_path, go_on, problem_path
from benchmarks.quality.arms import attending
from benchmarks.quality.selection import Arm, cost_of, parse, threshold_of
from vllm_squeeze.offline_tools import forcing
from vllm_squeeze.offline_tools.fidelity import divergence
from vllm_squeeze.offline_tools.prefix_engine import PrefixEngine
from vllm_squeeze.offline_tools.timing import machine

# Of an answer, that distributions are compared at: the logits of each take as much disk as the vocabulary is large.
FORCED_TOKENS = 32


class Asker:
    """Answers questions of a task's folder.

    Args:
        folder: of the task, with the index of its prefix; keeps the logits of dense answers.
        model: as vLLM takes it.
        prompts: token ids, each of the prefix and a question.
        num_tokens: most tokens of an answer.
        engine_args: more arguments for vLLM's engine.

    Attributes:
        engine: that answers, one question at a time.
    """

    def __init__(
        self, folder: Path, model: str, prompts: list[list[int]], num_tokens: int, engine_args: dict[str, Any]
    ):
        self.engine = PrefixEngine(model, folder / "index", prompts, num_tokens, {"max_num_seqs": 1} | engine_args)
        self._folder, self._prompts, self._num_tokens = folder, prompts, num_tokens
        self._logits = folder / "logits"
        self._logits.mkdir(exist_ok=True)

    def ask(self, arms: Sequence[str]) -> None:
        """Answers the questions that arms have no answer to; notes why a budget cannot be met."""
        for arm in arms:
            try:
                answer = self._answering(arm)
            except ValueError as error:
                problem_path(self._folder, arm).write_text(str(error), encoding="utf-8")
                continue
            self.engine.begin()
            with self.engine.squeezing_paused() if arm == DENSE else nullcontext():
                go_on(answers_path(self._folder, arm), len(self._prompts), answer, f"{self._folder.name}, {arm}")

    def _answering(self, arm: str) -> Callable[[int], dict[str, Any]]:
        """What answers a question, given its number, as an arm does.

        Raises:
            ValueError: the budget cannot be met.
        """
        if arm == DENSE:
            return self._answer_densely
        rule, _, budget = arm.rpartition(":")
        if rule:
            by = parse(rule)
            cost = cost_of(by, self.engine.cost)
            share = cost.share(float(budget))
            return functools.partial(self._answer_by, by, threshold_of(by, share, cost.num_keys), share)
        self.engine.set_budget(float(budget))
        return self._answer_and_compare

    def _answer_densely(self, number: int) -> dict[str, Any]:
        found, logits = self._answer(number)
        # The scheduler does not know that no row is squeezed.
        found["counters"] = {name: grown for name, grown in found["counters"].items() if "rows" not in name}
        places = {"logits": logits[:FORCED_TOKENS].contiguous(), "tokens": torch.tensor(found["tokens"])}
        save_file(places, self._logits / f"{number}.safetensors")
        return found

    def _answer_and_compare(self, number: int) -> dict[str, Any]:
        found, _ = self._answer(number)
        return found | self._differences(number)

    def _answer_by(self, arm: Arm, threshold: float, share: float, number: int) -> dict[str, Any]:
        with attending(self.engine.llm, arm, threshold, share) as reads:
            found, _ = self._answer(number)
            # Those of the server are its kernels'.
            found["counters"] |= dict(zip((BYTES_ALONE, BYTES_DENSE), reads.bytes()))
            return found | self._differences(number)

    def _differences(self, number: int) -> dict[str, Any]:
        """How distributions differ from those of a dense answer, which is forced; nothing without one."""
        path = self._logits / f"{number}.safetensors"
        if not path.exists():
            return {}
        dense = load_file(path)
        tokens = dense["tokens"][:FORCED_TOKENS].tolist()
        (forced,) = forcing.force(self.engine.llm, [self._prompts[number]], [tokens])
        kl, same_top = divergence(dense["logits"], forced)
        return {"kl": kl, "same_top": same_top}

    def _answer(self, number: int) -> tuple[dict[str, Any], torch.Tensor]:
        llm = self.engine.llm
        before = server_counters(llm)
        ((output, logits),) = forcing.answer(llm, [self._prompts[number]], self._num_tokens)
        growth = {name: value - before.get(name, 0) for name, value in server_counters(llm).items()}
        counters = {name: grown for name, grown in growth.items() if grown}
        return {"text": output.text, "tokens": list(output.token_ids), "counters": counters} | machine(), logits
