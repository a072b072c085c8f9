"""What a check of ``vllm-squeeze doctor`` found."""

from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """A line of the checklist: OK, WARN or FAIL, what was looked at, and what was found."""

    state: str
    what: str
    text: str
