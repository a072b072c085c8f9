"""What ``vllm-squeeze bench`` is to measure, checked before any engine starts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vllm_squeeze.config import OFF, SqueezeConfig
from vllm_squeeze.offline_tools.prefix_text import PrefixTokens, given_tokens, read_token_ids, text_tokens
from vllm_squeeze.offline_tools.questions import GENERAL, GENERAL_HELD_BACK, general_questions, read_questions, spread
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes

DENSE, EXACT, AGREEMENT = "dense", "exact", "agreement"
"""Parts: vLLM's own backend; all keys of the prefix, by ours; how far distributions are apart. Others are budgets."""
MOST_COMPARED = 32
"""Questions given whose answers are compared; all are asked while requests are timed."""
SET_HERE = ("model", "attention_backend", "additional_config", "max_num_seqs", "enable_prefix_caching")


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        model: as vLLM takes it.
        index: an index, or a folder of them, of which the one is taken that the prompts begin with.
        prefix: text file; or None, with ``token_ids``.
        token_ids: file with a JSON list of token ids.
        chat: whether the text is a system message; None: if the model has a chat template.
        questions: file of questions; None for general ones.
        budgets: that the prefix is served at; None for the one in the environment's settings, else the default.
        mode: of the server; None in the same way.
        batches: numbers of requests that run together.
        tokens: of each answer.
        repeats: of each timing.
        engine_args: more arguments for vLLM's engine.
    """

    model: str
    index: Path
    prefix: Path | None
    token_ids: Path | None
    chat: bool | None
    questions: Path | None
    budgets: Sequence[float] | None
    mode: str | None
    batches: Sequence[int]
    tokens: int
    repeats: int
    engine_args: dict[str, Any]

    def __post_init__(self) -> None:
        least = {"--batch": (min(self.batches), 1), "--tokens": (self.tokens, 2), "--repeats": (self.repeats, 1)}
        for option, (value, allowed) in least.items():
            if value < allowed:
                raise ValueError(f"{option}: {value} is less than {allowed}")
        if taken := sorted(set(self.engine_args) & set(SET_HERE)):
            raise ValueError(f"--engine-args: {taken[0]!r} is set by bench itself")


@dataclass(frozen=True)
class Plan:
    """What all parts of a comparison need; plain data, which goes to their processes as JSON.

    Attributes:
        model: as vLLM takes it.
        index: folder of the index.
        source: of the prefix.
        prefix: its token ids.
        questions: that are asked on it.
        prompts: token ids, of the prefix and each question.
        compared: of the first so many the answers are compared.
        arms: what is compared with vLLM's own backend: budgets as text, or EXACT.
        mode, batches, tokens, repeats, engine_args: as asked for.
    """

    model: str
    index: str
    source: str
    prefix: list[int]
    questions: list[str]
    prompts: list[list[int]]
    compared: int
    arms: list[str]
    mode: str
    batches: list[int]
    tokens: int
    repeats: int
    engine_args: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        """What runs, each in a process of its own, in this order."""
        return [DENSE, *self.arms, *([] if self.arms == [EXACT] else [AGREEMENT])]


def make_plan(asked: Asked) -> Plan:
    """Reads and checks everything that a comparison needs.

    Raises:
        ValueError: something is missing, does not fit, or the index is not of this prefix or model.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers import get_tokenizer

    from vllm_squeeze.attention_backend.model_identity import model_identity
    from vllm_squeeze.attention_backend.placement import attends_exactly, check_model, place
    from vllm_squeeze.offline_tools.documents import read_input
    from vllm_squeeze.offline_tools.prompt_match import match_prompt

    if unknown := sorted(set(asked.engine_args) - {field.name for field in fields(EngineArgs)}):
        raise ValueError(f"--engine-args: {unknown[0]!r} is not an argument of vLLM's engine")
    indexes = [PrefixIndex.open(folder) for folder in find_indexes(asked.index)]
    content = read_input(asked.prefix or asked.token_ids)
    given = read_questions(asked.questions) if asked.questions else None
    engine = EngineArgs(model=asked.model, **asked.engine_args).create_engine_config()
    tokenizer = get_tokenizer(engine.model_config.tokenizer, trust_remote_code=engine.model_config.trust_remote_code)
    tokens = (
        given_tokens(tokenizer, read_token_ids(content))
        if asked.token_ids
        else text_tokens(tokenizer, content, asked.chat)
    )
    questions, compared = choose_questions(given, tokens.chat)
    prompts = [tokens.prompt(question) for question in questions]

    config = SqueezeConfig.resolve(None)
    config = replace(config, index=(), mode=asked.mode or config.mode)
    if config.mode == OFF:
        raise ValueError("squeeze.mode: off, by the server's settings; --mode says how to serve here")
    block_sizes = {0: engine.cache_config.block_size}
    matches = []
    for index in indexes:
        # where a prefix lies does not depend on the budget, and this one can always be met
        placement = place(index, replace(config, budget=1), block_sizes)
        matches.append((match_prompt(prompts[0], index, placement, tokenizer), index))
    match, index = max(matches, key=lambda pair: pair[0])
    if not match.matches:
        raise ValueError(f"--prefix: {asked.prefix or asked.token_ids}: no index is of it; {match.explanation}")
    index.verify()
    check_model(index, model_identity(engine), engine.model_config.max_model_len)
    check_room(tokens, prompts, asked.tokens, engine.model_config.max_model_len)
    exact = attends_exactly(index.manifest, config)
    if exact and asked.budgets is not None:
        raise ValueError("--budgets: not together with an exact index or --mode exact, which have none")
    arms = [EXACT]
    if not exact:
        wanted = asked.budgets or [config.budget]
        arms = [f"{place(index, replace(config, budget=budget), block_sizes).budget:g}" for budget in wanted]
    return Plan(
        model=asked.model,
        index=str(index.folder),
        source=index.manifest.source,
        prefix=index.token_ids.tolist(),
        questions=questions,
        prompts=prompts,
        compared=compared,
        arms=list(dict.fromkeys(arms)),
        mode=config.mode,
        batches=sorted(set(asked.batches)),
        tokens=asked.tokens,
        repeats=asked.repeats,
        engine_args=asked.engine_args,
    )


def choose_questions(given: list[str] | None, chat: bool) -> tuple[list[str], int]:
    """The questions that are asked, and of how many of them, the first, the answers are compared.

    Of general ones these are those that no index is calibrated on.
    """
    if given is None:
        return general_questions(chat, GENERAL_HELD_BACK + GENERAL), len(GENERAL_HELD_BACK)
    return spread(given), min(len(given), MOST_COMPARED)


def check_room(tokens: PrefixTokens, prompts: list[list[int]], num_tokens: int, max_model_len: int) -> None:
    """Raises ValueError if a prompt does not begin with the prefix, or leaves no room for its answer."""
    longest = max(map(len, prompts)) + num_tokens
    if longest > max_model_len:
        raise ValueError(f"--tokens: a prompt and its answer of {num_tokens} take {longest}; the model {max_model_len}")
    if any(prompt[: len(tokens.ids)] != tokens.ids for prompt in prompts):
        raise ValueError("--questions: one changes the tokens of the prefix, so that its request would be dense")
