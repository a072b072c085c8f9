"""Checks a file of the server's settings without a server: ``vllm-squeeze config --check``."""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from vllm_squeeze.config import AUTO, CONFIG_VARIABLE, OFF, PREFILLS, SqueezeConfig
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import InvalidIndex, printable
from vllm_squeeze.settings_file import read_settings


def check_config(path: Path, out: TextIO = sys.stdout) -> int:
    """Prints the settings that a server given this file uses, and what is wrong with them and with the indexes.

    The settings are printed as such a file, in which indexes are comments. Of an index, the manifest, the tokens and
    what budgets cost are read.

    Args:
        path: of the file.
        out: where to print.

    Returns:
        the exit code: 1 if such a server would not start, or would leave an index out, else 0.

    Raises:
        ValueError: the file holds no settings, or some that do not go together.
    """
    errors = wrong_settings(read_settings(path))
    if not errors:
        config = SqueezeConfig.resolve(None, {**os.environ, CONFIG_VARIABLE: str(path)})
        settings = {**asdict(config), "index": list(config.index)}
        print(yaml.safe_dump({"squeeze": settings}, sort_keys=False, allow_unicode=True), end="", file=out)
        errors = check_indexes(config, out)
    for error in errors:
        print(printable(f"error: {error}"), file=out)
    return 1 if errors else 0


def wrong_settings(settings: Mapping[str, Any]) -> list[str]:
    """An error in a line for each setting that is not allowed, whatever the others are."""
    errors = []
    for name, value in settings.items():
        try:
            SqueezeConfig.resolve({"squeeze": {name: value}}, {})
        except ValueError as error:
            errors.append(str(error))
    return errors


def check_indexes(config: SqueezeConfig, out: TextIO) -> list[str]:
    """Prints a line on each index that a server with these settings opens; returns an error for each that it cannot."""
    folders, errors = [], []
    if config.mode == OFF:
        print("# squeeze.mode is off: no index is looked at", file=out)
        return errors
    for path in config.index:
        try:
            folders += replace(config, index=(path,)).index_folders()
        except ValueError as error:
            errors.append(str(error))
    for folder in dict.fromkeys(folders):
        try:
            print(printable(f"# {folder.name}: {described(folder, config)}"), file=out)
        except InvalidIndex as error:
            errors.append(str(error))
    return errors


def described(folder: Path, config: SqueezeConfig) -> str:
    """What a server with these settings makes of an index, in a line.

    Raises:
        InvalidIndex: the index is damaged, or leaves open which budget to take.
    """
    index = PrefixIndex.open(folder)
    index.quality()
    told = f"{index.manifest.num_tokens} tokens, of the model {index.manifest.model.model}"
    if index.manifest.exact or config.mode == "exact":
        return f"{told}, exactly"
    if config.budget != AUTO:
        prompts = "" if config.prefill in PREFILLS else f", prompts at {config.prefill:g}"
        return f"{told}, at a budget of {config.budget:g}{prompts}"
    # imports vLLM, which a machine that settings are checked on may lack
    from vllm_squeeze.attention_backend.placement import budget_of

    return f"{told}, at a budget of {budget_of(index, config):g}"
