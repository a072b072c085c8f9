"""Turns what the user calls a prefix into the token ids that every request on it will begin with."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# What a request may go on with. Tokenizers merge across the end of a text in different ways.
CONTINUATIONS = ("\n", " ", "\n\nQuestion: Why?", " and", "s", ".", "1", "\u00e9")
QUESTIONS = ("Why?", "1", "\nlist", " And")


@dataclass(frozen=True)
class PrefixTokens:
    """Token ids of a prefix.

    Attributes:
        ids: that any request on the prefix begins with.
        unstable: of tokens at the end of the text, how many were left out since what follows may change them.
        chat: whether the text is the system message of conversations.
        prompt: the token ids of the prompt that asks a question, a user message or what follows the text as it is.
    """

    ids: list[int]
    unstable: int
    chat: bool
    prompt: Callable[[str], list[int]]


def text_tokens(tokenizer: Any, text: str, chat: bool | None) -> PrefixTokens:
    """Tokens of a text that is the system message of conversations, or the start of raw prompts.

    Args:
        tokenizer: of the model.
        text: of the prefix.
        chat: whether it is the former; None: if the model has a chat template.

    Raises:
        ValueError: as ``chat_tokens``.
    """
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    return chat_tokens(tokenizer, text) if chat else raw_tokens(tokenizer, text)


def chat_tokens(tokenizer: Any, text: str) -> PrefixTokens:
    """Tokens that all conversations with this system message begin with.

    Raises:
        ValueError: the tokenizer has no chat template, or it does not take a system message as its first.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat-system: this model has no chat template; use --raw")

    def conversation(question: str) -> list[int]:
        messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    ids = common_start([conversation(question) for question in QUESTIONS])
    if text.strip()[:200] not in tokenizer.decode(ids):
        raise ValueError("--chat-system: this model's chat template does not begin with the system message; use --raw")
    return PrefixTokens(ids, 0, True, conversation)


def raw_tokens(tokenizer: Any, text: str) -> PrefixTokens:
    """Tokens that all prompts which begin with this text begin with."""

    def prompt(continuation: str) -> list[int]:
        return tokenizer(text + continuation).input_ids

    ids = common_start([prompt(continuation) for continuation in CONTINUATIONS])
    return PrefixTokens(ids, max(0, len(prompt("")) - len(ids)), False, prompt)


def read_token_ids(content: str) -> list[int]:
    """Token ids from a JSON list.

    Raises:
        ValueError: it is no list of token ids.
    """
    try:
        return checked_token_ids(json.loads(content))
    except json.JSONDecodeError as error:
        raise ValueError(f"--token-ids: not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"--token-ids: {error}") from None


def checked_token_ids(value: Any) -> list[int]:
    """A value that was read from JSON, if it is a list of token ids.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise ValueError("must be a JSON list of token ids, integers from 0 to 2147483647")
    return value


def given_tokens(tokenizer: Any, ids: list[int]) -> PrefixTokens:
    """The tokens of a prefix that is given by their ids."""

    def prompt(continuation: str) -> list[int]:
        return ids + tokenizer(continuation, add_special_tokens=False).input_ids

    return PrefixTokens(ids, 0, False, prompt)


def common_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest sequence that all begin with."""
    length = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        length += 1
    return list(sequences[0][:length])


def describe(ids: Sequence[int], tokenizer: Any, count: int = 6) -> str:
    """The first and the last tokens of a prefix, each with its text, in a line."""

    def shown(some: Sequence[int]) -> str:
        return " ".join(f"{token}={tokenizer.decode([token])!r}" for token in some)

    if len(ids) <= 2 * count:
        return shown(ids)
    return f"{shown(ids[:count])} ... {shown(ids[-count:])}"
