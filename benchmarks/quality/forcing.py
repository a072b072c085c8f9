"""Answers of vLLM's engine in this process with the logits of each token, chosen by the model or forced on it.

The logits are seen by a custom logits processor, which vLLM's V1 runner has, and its V2 runner lacks in some versions.
"""

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

import torch
from vllm import SamplingParams, TokensPrompt
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


@dataclass
class Lesson:
    """What happens to the answer of one request.

    Attributes:
        forced: its token ids; None lets the model choose.
        logits: [V] of each token, by its place in the answer.
    """

    forced: Sequence[int] | None
    logits: dict[int, torch.Tensor] = field(default_factory=dict)


LESSONS: dict[int, Lesson] = {}
NUMBERS = itertools.count()


class Teacher(AdapterLogitsProcessor):
    """Keeps the logits of requests with a lesson, in the model's dtype, and forces tokens on those that have any."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        super().__init__(vllm_config, device, is_pin_memory)
        self._dtype = vllm_config.model_config.dtype

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        number = (params.extra_args or {}).get("lesson")
        return None if number is None else functools.partial(self._teach, LESSONS[number])

    def _teach(self, lesson: Lesson, output_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        # A prompt that is computed in parts has logits after each part; those of the last stay.
        place = len(output_ids)
        lesson.logits[place] = logits.to(self._dtype, copy=True)
        if lesson.forced is not None:
            logits.fill_(-torch.inf)[lesson.forced[place]] = 0
        return logits


ENGINE_ARGS = {"logits_processors": [Teacher], "async_scheduling": False}
"""Arguments that an engine needs for the functions below."""


def answer(llm: Any, prompts: list[list[int]], num_tokens: int) -> list[tuple[Any, torch.Tensor]]:
    """Lets the model answer greedily, all prompts together.

    Args:
        llm: vLLM's, with ENGINE_ARGS.
        prompts: token ids.
        num_tokens: most tokens of an answer.

    Returns:
        of each prompt vLLM's output, and logits [tokens of the answer, V] in the model's dtype.
    """
    return _run(llm, prompts, [SamplingParams(temperature=0, max_tokens=num_tokens) for _ in prompts], None)


def force(llm: Any, prompts: list[list[int]], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Forces an answer's token ids on each prompt, all together, one token a step as a server decodes them.

    Returns:
        logits of each answer, [its tokens, V] in the model's dtype.
    """
    sampling = [
        SamplingParams(temperature=0, max_tokens=len(tokens), ignore_eos=True, detokenize=False) for tokens in answers
    ]
    return [logits for _, logits in _run(llm, prompts, sampling, answers)]


def _run(
    llm: Any, prompts: list[list[int]], sampling: list[SamplingParams], forced: Sequence[Sequence[int]] | None
) -> list[tuple[Any, torch.Tensor]]:
    lessons = {next(NUMBERS): Lesson(tokens) for tokens in forced or [None] * len(prompts)}
    LESSONS.update(lessons)
    for number, parameters in zip(lessons, sampling, strict=True):
        parameters.extra_args = {"lesson": number}
    tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    outputs = [result.outputs[0] for result in llm.generate(tokens, sampling, use_tqdm=False)]
    for number in lessons:
        del LESSONS[number]
    return [
        (output, torch.stack([lesson.logits[place] for place in range(len(output.token_ids))]))
        for output, lesson in zip(outputs, lessons.values(), strict=True)
    ]
