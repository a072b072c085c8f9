"""Why a prompt begins with an indexed prefix, or why it does not: the server's own matching, explained."""

from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm_squeeze.attention_backend.matching import SQUEEZED, PrefixMatcher
from vllm_squeeze.attention_backend.placement import Placement
from vllm_squeeze.offline_tools.prefix_text import (
    QUESTIONS,
    common_start,
    describe,
    read_token_ids,
    text_tokens,
)
from vllm_squeeze.prefix_index.index_folder import PrefixIndex

TOKENS_BEFORE = 8
"""Tokens whose text is shown before the first that differs, so that it can be found."""


class PromptMatch(NamedTuple):
    """What becomes of a prompt on one index. The greatest is that of the index that comes nearest.

    Attributes:
        matches: whether its rows may be squeezed.
        agreed: leading tokens that are those of the prefix.
        explanation: in a line.
    """

    matches: bool
    agreed: int
    explanation: str


def prompt_tokens(tokenizer: Any, content: str, chat: bool | None) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: of the model.
        content: a JSON list of token ids; or text, which is tokenized as that of an index.
        chat: whether the text is a system message, which some question then follows, or the whole prompt; None: the
            former if the model has a chat template.

    Raises:
        ValueError: the model has no chat template, or one that does not begin with the system message.
    """
    try:
        return read_token_ids(content)
    except ValueError:
        tokens = text_tokens(tokenizer, content, chat)
    return tokens.prompt(QUESTIONS[0] if tokens.chat else "")


def match_prompt(prompt: list[int], index: PrefixIndex, placement: Placement, tokenizer: Any) -> PromptMatch:
    """Matches a prompt to one index.

    Args:
        prompt: token ids.
        index: of the prefix.
        placement: of the prefix, which says how many of its tokens a prompt must begin with.
        tokenizer: of the model.
    """
    ids, name = index.token_ids.tolist(), index.folder.name
    plain = dict.fromkeys(("prompt_embeds", "lora_request", "cache_salt", "mm_features"))
    request = SimpleNamespace(prompt_token_ids=prompt, **plain)
    _, outcome = PrefixMatcher([(placement, ids)]).match(request)
    agreed = len(common_start([prompt, ids]))
    needed = f"{agreed} leading tokens agree with {name}, {placement.covered} must"
    if outcome == SQUEEZED:
        return PromptMatch(True, agreed, needed)
    if agreed == len(prompt):
        return PromptMatch(False, agreed, f"too short: all its {needed}")
    before = tokenizer.decode(prompt[max(agreed - TOKENS_BEFORE, 0) : agreed])
    differing = (describe(tokens[agreed : agreed + 1], tokenizer) for tokens in (prompt, ids))
    explanation = "{}; after {!r} the prompt has {}, the index {}".format(needed, before, *differing)
    return PromptMatch(False, agreed, explanation)
