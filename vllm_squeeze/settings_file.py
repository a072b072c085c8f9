"""A file of the server's settings: where in it they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PLACES = (("squeeze",), ("additional-config", "squeeze"), ("additional_config", "squeeze"))
"""Keys that lead to the settings: in an object as it is given to vLLM's --additional-config, or in a file for vLLM's
--config, which takes an option's name in both spellings."""


def read_settings(path: Path) -> Mapping[str, Any]:
    """The object that a file has under the key "squeeze", at one of PLACES. Other keys are not looked at.

    Args:
        path: JSON if its name ends in .json, else YAML.

    Raises:
        ValueError: the file cannot be read, or does not have the key at exactly one place, or no object there.
    """
    try:
        content = path.read_text(encoding="utf-8")
        body = json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    found = [settings for place in PLACES for settings in value_at(body, place)]
    if len(found) != 1:
        keys = f"has the keys {', '.join(map(str, body))}" if isinstance(body, Mapping) and body else "has no keys"
        raise ValueError(f"{path}: {keys}; settings must be under either squeeze or additional-config.squeeze")
    if not isinstance(found[0], Mapping):
        raise ValueError(f"{path}: squeeze: {found[0]!r} is not an object of settings")  # noqa: TRY004 (a user's error)
    return found[0]


def value_at(body: Any, place: tuple[str, ...]) -> list[Any]:
    """The value that keys lead to, one after the other, in a list; an empty one where there is none."""
    for key in place:
        if not isinstance(body, Mapping) or key not in body:
            return []
        body = body[key]
    return [body]
