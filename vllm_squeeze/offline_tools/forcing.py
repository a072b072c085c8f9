"""Answers of vLLM's engine with the logits of each token, chosen by the model or forced on it.

The logits are seen by a custom logits processor, which vLLM's V1 runner has, and its V2 runner lacks in some versions.
They stay in the worker's process until a worker extension hands them over.
"""

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

# Read by vLLM when an engine is configured.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

import torch
from vllm import SamplingParams, TokensPrompt
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

# Logits [V] of each token of an answer by its place, by the number of the answer, in a worker's process.
KEPT: dict[int, dict[int, torch.Tensor]] = {}
NUMBERS = itertools.count()


class Teacher(AdapterLogitsProcessor):
    """Keeps the logits of numbered answers, in the model's dtype, and forces tokens on those that are given."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        super().__init__(vllm_config, device, is_pin_memory)
        self._dtype = vllm_config.model_config.dtype

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        lesson = (params.extra_args or {}).get("lesson")
        if lesson is None:
            return None
        return functools.partial(self._teach, KEPT.setdefault(lesson["number"], {}), lesson["forced"])

    def _teach(
        self,
        kept: dict[int, torch.Tensor],
        forced: Sequence[int] | None,
        output_ids: Sequence[int],
        logits: torch.Tensor,
    ) -> torch.Tensor:
        # A prompt that is computed in parts has logits after each part; those of the last stay.
        place = len(output_ids)
        kept[place] = logits.to(self._dtype, copy=True)
        if forced is not None:
            logits.fill_(-torch.inf)[forced[place]] = 0
        return logits


class KeepsLogits:
    """Mixed into vLLM's workers: hands over what the processor kept."""

    def take_logits(self, lengths: dict[int, int]) -> list[torch.Tensor] | None:
        """Logits [length, V] of each answer, by its number and the length that counts; None where no token is sampled.

        They are forgotten here.
        """
        taken = [KEPT.pop(number, {}) for number in lengths]
        if not all(taken):
            return None
        return [
            torch.stack([logits[i] for i in range(length)]).cpu() for logits, length in zip(taken, lengths.values())
        ]


ENGINE_ARGS = {"logits_processors": [Teacher], "async_scheduling": False}
"""Arguments that an engine in this process needs for the functions below, beside a ``worker_extension_cls`` that extends
KeepsLogits. Its workers may be in other processes."""


def answer(llm: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[tuple[Any, torch.Tensor]]:
    """Lets the model answer greedily, all prompts together.

    Args:
        llm: vLLM's, made for this.
        prompts: token ids.
        num_tokens: most tokens of an answer.

    Returns:
        of each prompt vLLM's output, and logits [tokens of the answer, V] in the model's dtype, on the CPU.
    """
    return _run(llm, prompts, [SamplingParams(temperature=0, max_tokens=num_tokens) for _ in prompts], None)


def force(llm: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Forces an answer's token ids on each prompt, all together, one token a step as a server decodes them.

    Returns:
        logits of each answer, [its tokens, V] in the model's dtype, on the CPU.
    """
    sampling = [
        SamplingParams(temperature=0, max_tokens=len(tokens), ignore_eos=True, detokenize=False) for tokens in answers
    ]
    return [logits for _, logits in _run(llm, prompts, sampling, answers)]


def _run(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    sampling: list[SamplingParams],
    forced: Sequence[Sequence[int]] | None,
) -> list[tuple[Any, torch.Tensor]]:
    numbers = [next(NUMBERS) for _ in prompts]
    for number, parameters, tokens in zip(numbers, sampling, forced or [None] * len(prompts), strict=True):
        parameters.extra_args = {"lesson": {"number": number, "forced": tokens and list(tokens)}}
    tokens = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
    outputs = [result.outputs[0] for result in llm.generate(tokens, sampling, use_tqdm=False)]
    lengths = {number: len(output.token_ids) for number, output in zip(numbers, outputs, strict=True)}
    of_workers = llm.collective_rpc("take_logits", args=(lengths,))
    return list(zip(outputs, next(found for found in of_workers if found is not None), strict=True))
