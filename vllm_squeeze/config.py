"""The server's settings, and the only place that reads them."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_squeeze.settings_file import read_settings

INDEX_VARIABLE = "SQUEEZE_INDEX"
CONFIG_VARIABLE = "SQUEEZE_CONFIG"
REST_MODES = ("value_centroids", "drop")
SERVING_MODES = ("auto", "squeezed", "exact")
OFF = "off"
PREFILLS = ("dense", "squeezed")
AUTO = "auto"


@dataclass(frozen=True)
class SqueezeConfig:
    """What a server squeezes, and how much.

    Attributes:
        index: folders of indexes, or single indexes. Empty: nothing is squeezed.
        budget: bytes read over the bytes that a dense pass over the prefix reads, in (0, 1].
            1 attends to every key, exactly. Or "auto": for each index the smallest that costs no more than ``max_kl``,
            as measured when it was made.
        max_kl: what a budget of "auto" may cost: KL from dense to squeezed next-token distributions, in nats.
        rest: what clusters that are not chosen contribute: "value_centroids", their mean value with the weight that
            their centroid predicts, or "drop", nothing (the paper's way).
        mode: "auto": in each step what is fastest for the rows on a prefix, of "squeezed", "exact", and vLLM's own
            attention; on the CPU "squeezed". Or always "squeezed". Or always "exact": all keys of an indexed prefix
            are attended to, each loaded once for all rows that share the prefix, whatever the budget. Or "off": no
            index is looked at, and all attention is vLLM's own.
        prefill: what the tokens of a prompt that follow its prefix attend to: "dense", all of the prefix, by vLLM's own
            attention, so that an answer begins as a dense one does and only its tokens are squeezed. Or a budget of
            their own, in (0, 1], as ``budget`` counts it: some tokens together choose what they all attend to. Or
            "squeezed": each as an answer's. An exact prefix is attended to exactly either way.
        memory_limit_gib: device memory that the indexes may take on each GPU (or on the CPU), in GiB. If they need
            more together, they take turns: one that a request wants takes the place of those not wanted for longest.
            One that does not fit alone is left out, and its prefix is served densely.
        watch: seconds between two looks at the index folders for indexes that are added, replaced or removed while the
            server runs, all of ``memory_limit_gib`` being kept for them; 0: only those at the start are served.
        pin_share: share of the KV cache's blocks that pinned prefixes may hold, in [0, 1).
    """

    index: tuple[str, ...] = ()
    budget: float | str = 0.125
    max_kl: float = 0.05
    rest: str = "value_centroids"
    mode: str = "auto"
    prefill: float | str = "dense"
    memory_limit_gib: float = 4.0
    watch: float = 0.0
    pin_share: float = 0.5

    def __post_init__(self) -> None:
        if not all(isinstance(path, str) and path for path in self.index):
            raise ValueError(f"squeeze.index: {self.index!r} is not a folder's path or a list of them")
        if self.budget != AUTO and not (is_number(self.budget) and 0 < self.budget <= 1):
            raise ValueError(f'squeeze.budget: {self.budget!r} is not a number in (0, 1], nor "{AUTO}"')
        if not is_number(self.max_kl) or not self.max_kl > 0:
            raise ValueError(f"squeeze.max_kl: {self.max_kl!r} is not a number above 0")
        if self.rest not in REST_MODES:
            raise ValueError(f"squeeze.rest: {self.rest!r} is not one of {', '.join(REST_MODES)}")
        if self.mode not in (*SERVING_MODES, OFF):
            raise ValueError(f"squeeze.mode: {self.mode!r} is not one of {', '.join(SERVING_MODES)}, {OFF}")
        if self.prefill not in PREFILLS and not (is_number(self.prefill) and 0 < self.prefill <= 1):
            raise ValueError(
                f"squeeze.prefill: {self.prefill!r} is not one of {', '.join(PREFILLS)}, nor a number in (0, 1]"
            )
        if self.prefill != "dense" and self.budget == AUTO:
            raise ValueError(
                f'squeeze.prefill: {self.prefill!r} is not "dense", which a squeeze.budget of "{AUTO}" was measured with'
            )
        if not is_number(self.memory_limit_gib) or not self.memory_limit_gib >= 0:
            raise ValueError(f"squeeze.memory_limit_gib: {self.memory_limit_gib!r} is not a number of at least 0")
        if not is_number(self.watch) or not 0 <= self.watch < math.inf:
            raise ValueError(f"squeeze.watch: {self.watch!r} is not a number of seconds, of at least 0")
        if not is_number(self.pin_share) or not 0 <= self.pin_share < 1:
            raise ValueError(f"squeeze.pin_share: {self.pin_share!r} is not a number in [0, 1)")

    @classmethod
    def resolve(cls, additional_config: Any, environ: Mapping[str, str] = os.environ) -> "SqueezeConfig":
        """Reads the settings from vLLM's --additional-config, key "squeeze", and from the environment.

        SQUEEZE_CONFIG names a file of settings; those that the former names win. SQUEEZE_INDEX names the index where
        neither does.

        Raises:
            ValueError: an unknown key, a value that is not allowed, or a file that cannot be read.
        """
        given = additional_config.get("squeeze", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f"additional_config.squeeze: {given!r} is not an object of settings")
        file = environ.get(CONFIG_VARIABLE)
        settings = {**(read_settings(Path(file)) if file else {}), **given}
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(name) for name in settings if name not in known):
            raise ValueError(f"squeeze.{unknown[0]}: unknown setting; known are {', '.join(known)}")
        if settings.get("mode") is False:
            settings["mode"] = OFF  # in YAML, off is false
        index = settings.get("index", environ.get(INDEX_VARIABLE, ()) or ())
        if isinstance(index, str | os.PathLike):
            index = (os.fspath(index),)
        if not isinstance(index, list | tuple):
            raise ValueError(f"squeeze.index: {index!r} is not a folder's path or a list of them")
        return cls(**{**settings, "index": tuple(index)})

    def index_folders(self) -> list[Path]:
        """The folders of all indexes named, absolute, each once.

        Raises:
            ValueError: a folder is missing, or holds no index and is not watched.
        """
        from vllm_squeeze.prefix_index.index_folder import find_indexes, list_indexes

        find = list_indexes if self.watch else find_indexes

        folders = []
        for path in self.index:
            try:
                folders += [folder.resolve() for folder in find(Path(path))]
            except ValueError as error:
                raise ValueError(f"squeeze.index (or {INDEX_VARIABLE}): {error}") from None
        return list(dict.fromkeys(folders))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
