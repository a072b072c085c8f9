"""Requests that begin as an indexed prefix does, but not with the whole of it: counted by cause, and told in the log."""

import math
import time
from collections import Counter
from collections.abc import Callable

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.attention_backend.placement import Placement

TOO_SHORT, DIFFERS = "too short", "differs"
_SECONDS_BETWEEN = 60


class Misses:
    """Misses of an engine.

    Args:
        now: gives the time in seconds.

    Attributes:
        counts: since they were last taken, by the index's name and cause.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self.counts: Counter[tuple[str, str]] = Counter()
        self._now = now
        self._told: set[str] = set()
        self._told_at = -math.inf

    def add(self, placement: Placement, agreed: int, num_tokens: int) -> None:
        """Counts a request; the first on an index goes into the log, if none has for a minute.

        Args:
            placement: of the prefix with which it agrees longest.
            agreed: its leading tokens that do.
            num_tokens: of its prompt.
        """
        cause = TOO_SHORT if agreed == num_tokens else DIFFERS
        self.counts[placement.name, cause] += 1
        if placement.name in self._told or self._now() < self._told_at + _SECONDS_BETWEEN:
            return
        self._told.add(placement.name)
        self._told_at = self._now()
        logger.info(
            "squeeze: a prompt agrees with %s in its first %d tokens, %d must: %s. `vllm-squeeze doctor --prompt` says "
            "more; later prompts that miss this index are only counted.",
            placement.name,
            agreed,
            placement.covered,
            "it is too short" if cause == TOO_SHORT else f"token {agreed} (from 0) differs",
        )
