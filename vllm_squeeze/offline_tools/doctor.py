"""What works on this machine and what does not, as a checklist: ``vllm-squeeze doctor``."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from vllm_squeeze.config import OFF, SqueezeConfig
from vllm_squeeze.offline_tools import installation
from vllm_squeeze.offline_tools.finding import FAIL, OK, WARN, Finding
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import InvalidIndex, printable


@dataclass(frozen=True)
class Subject:
    """What to look at beside the installation.

    Attributes:
        index: an index, or a folder of them; None for those that the environment names for a server.
        model: that will be served, as vLLM takes it; None if it is not to be looked at.
        prompt: file of a prompt, if it is to be compared with the indexes: text, or a JSON list of token ids.
        chat: whether that text is a system message; None: if the model has a chat template.
        engine_args: more arguments for vLLM, as the server has them.
    """

    index: Path | None
    model: str | None
    prompt: Path | None
    chat: bool | None
    engine_args: dict[str, Any]


def doctor(subject: Subject, out: TextIO = sys.stdout) -> int:
    """Checks the installation, the device, and the indexes, and prints a line for each finding as it comes.

    Returns:
        the exit code: 1 if any check failed, else 0.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": installation.versions,
        "device": installation.device,
        "plugin": installation.plugin,
        "hooks": installation.hooks,
        "measured times": installation.times,
        "extras": installation.extras,
        "kernels": installation.kernels,
        "index": lambda: check_indexes(subject),
    }
    failed = False
    for what, check in checks.items():
        for finding in guarded(what, check):
            failed |= finding.state == FAIL
            print(printable(f"{finding.state:<4}  {finding.what:<14}  {finding.text}"), file=out, flush=True)
    return 1 if failed else 0


def guarded(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check, in which whatever breaks is one too."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 (a broken installation may raise anything)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        yield Finding(FAIL, what, kind + " ".join(str(error).split()))


def check_indexes(subject: Subject) -> Iterator[Finding]:
    """Verifies indexes, asks whether a server of the model would serve them, and matches the prompt to them."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_squeeze.attention_backend.model_identity import model_identity
    from vllm_squeeze.attention_backend.placement import Placement, check_model, place

    config = SqueezeConfig.resolve(None)
    if subject.index is not None:
        config = replace(config, index=(str(subject.index),))
    engine, identity = VllmConfig(), None
    if subject.model is not None:
        engine = EngineArgs(model=subject.model, **subject.engine_args).create_engine_config()
        identity = model_identity(engine)
    block_sizes = {0: engine.cache_config.block_size}
    placed: list[tuple[PrefixIndex, Placement]] = []
    for folder in config.index_folders():
        try:
            index = PrefixIndex.open(folder)
            index.verify()
            placement = place(index, config, block_sizes)
            placed.append((index, placement))
            how = "exactly" if placement.exact else f"at a budget of {placement.budget:g}"
            tokens = f"{index.manifest.num_tokens} tokens, {placement.covered} squeezed {how}"
            yield Finding(OK, "index", f"{folder.name}: verified, {tokens}")
            if identity is not None:
                check_model(index, identity, engine.model_config.max_model_len)
                yield Finding(OK, "model", f"{folder.name} was made for it")
        except InvalidIndex as error:
            yield Finding(FAIL, "index", str(error))
    if config.mode == OFF:
        yield Finding(WARN, "settings", "squeeze.mode is off: a server with these settings squeezes nothing")
    if not config.index:
        yield Finding(WARN, "index", "none is named, neither by --index nor in the environment")
    if subject.prompt is not None:
        yield check_prompt(subject, placed)


def check_prompt(subject: Subject, placed: list[tuple[PrefixIndex, Any]]) -> Finding:
    """Which index the prompt begins with, or how far it agrees with the nearest.

    Args:
        subject: with the prompt.
        placed: indexes, and their placements.

    Raises:
        ValueError: the prompt or a tokenizer cannot be read.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers import get_tokenizer

    from vllm_squeeze.offline_tools.documents import read_input
    from vllm_squeeze.offline_tools.prompt_match import match_prompt, prompt_tokens

    content = read_input(subject.prompt)

    @functools.cache
    def tokenized(model: str) -> tuple[Any, list[int]]:
        try:
            model_config = EngineArgs(model=model, **subject.engine_args).create_model_config()
            tokenizer = get_tokenizer(model_config.tokenizer, trust_remote_code=model_config.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model: the tokenizer of {model} cannot be loaded: {error}") from None
        return tokenizer, prompt_tokens(tokenizer, content, subject.chat)

    matches = []
    for index, placement in placed:
        tokenizer, prompt = tokenized(subject.model or index.manifest.model.model)
        matches.append(match_prompt(prompt, index, placement, tokenizer))
    if not matches:
        return Finding(FAIL, "prompt", "there is no index to match it with")
    nearest = max(matches)
    return Finding(OK if nearest.matches else FAIL, "prompt", nearest.explanation)
