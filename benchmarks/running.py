"""What the benchmarks share that run vLLM's engine in this process: prompts, and what the kernels counted."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_squeeze.offline_tools.timing import steps

# The engine in this process: a step is one call, and workers can be asked what their kernels counted.
IN_THIS_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
for variable, value in IN_THIS_PROCESS.items():
    os.environ.setdefault(variable, value)

# Of the engine's arguments, those that the indexer chooses for itself.
INDEXER_SETS = ("enforce_eager", "enable_prefix_caching", "async_scheduling", "max_model_len", "max_num_seqs")


@dataclass(frozen=True)
class Counts:
    """What kernels counted on the one indexed prefix, summed up over layers, KV heads and ranks.

    Attributes:
        passes: reads of a choice by one KV head, each for all query tokens that share its loads.
        loaded: keys loaded in those passes: the union of what their query tokens chose.
        pairs: query tokens, each times KV heads.
        kept: keys chosen, summed up over those pairs.
        members: keys that there are to choose from, per KV head.
    """

    passes: int
    loaded: int
    pairs: int
    kept: int
    members: int

    def __add__(self, more: "Counts") -> "Counts":
        return Counts(
            self.passes + more.passes,
            self.loaded + more.loaded,
            self.pairs + more.pairs,
            self.kept + more.kept,
            self.members,
        )

    def __sub__(self, before: "Counts") -> "Counts":
        return self + Counts(-before.passes, -before.loaded, -before.pairs, -before.kept, before.members)

    @property
    def kept_share(self) -> float:
        """Keys that a query token chooses, as a share of all; NaN where nothing was counted."""
        return self.kept / self.pairs / self.members if self.pairs and self.members else float("nan")

    @property
    def union_share(self) -> float:
        """Keys that a pass loads for its query tokens together, as a share of all; NaN where nothing was counted."""
        return self.loaded / self.passes / self.members if self.passes and self.members else float("nan")

    @property
    def tokens_per_pass(self) -> float:
        """Query tokens that share loads; NaN where nothing was counted."""
        return self.pairs / self.passes if self.passes else float("nan")


def indexer_args(engine_args: dict[str, Any]) -> dict[str, Any]:
    """A server's arguments that its indexer should have too."""
    return {name: value for name, value in engine_args.items() if name not in INDEXER_SETS}


def conversation(text: str, question: str, earlier: Sequence[tuple[str, str]] = ()) -> list[dict[str, str]]:
    """The messages that ask a question about a text, which is the system message, after earlier ones with answers."""
    roles = itertools.chain(["system"], itertools.cycle(["user", "assistant"]))
    contents = [text, *itertools.chain(*earlier), question]
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def raw_prompt(text: str, question: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
    """The same for models without a chat template."""
    before = [f"{asked}\nAnswer: {answer}" for asked, answer in earlier]
    return "\n".join([text, *before, f"{question}\nAnswer:"])


def chat_prompts(
    tokenizer: Any, text: str, questions: Sequence[str], earlier: Sequence[Sequence[tuple[str, str]]] | None = None
) -> list[list[int]]:
    """Token ids of conversations that ask questions about a text, which is their system message.

    Args:
        tokenizer: with a chat template.
        text: what is asked about.
        questions: that each conversation ends with.
        earlier: questions and answers that each conversation has before that.
    """
    return [
        tokenizer.apply_chat_template(conversation(text, *pair), add_generation_prompt=True, return_dict=False)
        for pair in zip(questions, earlier or [()] * len(questions), strict=True)
    ]


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def question_prompts(
    tokenizer: Any, text: str, questions: Sequence[str], earlier: Sequence[Sequence[tuple[str, str]]] | None = None
) -> list[list[int]]:
    """Token ids of what asks questions about a text: conversations, or without a chat template raw prompts."""
    if has_chat_template(tokenizer):
        return chat_prompts(tokenizer, text, questions, earlier)
    pairs = zip(questions, earlier or [()] * len(questions), strict=True)
    return [tokenizer(raw_prompt(text, *pair)).input_ids for pair in pairs]


def counters_of(worker: Any) -> tuple[list[int], int] | None:
    """The counters of a worker's only prefix, and its keys to choose from; None without one. Waits for the device."""
    from vllm_squeeze.attention_backend.worker import residency_of

    residency = residency_of(worker.vllm_config)
    if residency is None or 0 not in residency.active:
        return None
    return residency.prefixes.counters[0, :4].tolist(), residency.active[0].cost.num_clustered


def count(llm: Any) -> Counts | None:
    """What was counted so far; None on a server without an index."""
    workers = [found for found in llm.collective_rpc(counters_of) if found is not None]
    if not workers:
        return None
    return Counts(*(sum(column) for column in zip(*(counters for counters, _ in workers))), members=workers[0][1])


def count_decoding(llm: Any, prompts: list[list[int]], num_tokens: int) -> Counts | None:
    """What is counted while requests run together, from when each has its first token; None without an index."""
    before = None
    for arrivals in steps(llm, prompts, num_tokens):
        if before is None and all(arrivals):
            before = count(llm)
    return None if before is None else count(llm) - before
