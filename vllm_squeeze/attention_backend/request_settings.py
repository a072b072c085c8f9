"""What a request asks of squeezing, and what its answer says: the key "squeeze" of vLLM's ``kv_transfer_params``."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

KEY = "squeeze"
MODES = ("auto", "dense")
"""As the server does it; or by vLLM's own attention, whatever the prompt begins with."""


@dataclass
class RequestReport:
    """What became of a request that had settings, which its answer says under the same key.

    Attributes:
        mode: that was asked for, one of MODES; "dense" where the settings were wrong.
        error: what was wrong with them, in a line.
        index: that the prompt begins with, if it is served.
        budget: of that.
        rows: the steps that the request was in, by what became of its row.
    """

    mode: str
    error: str | None = None
    index: str | None = None
    budget: float | None = None
    rows: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, kv_transfer_params: Any) -> "RequestReport | None":
        """That of a request which begins; None if it has no settings."""
        if not isinstance(kv_transfer_params, dict) or KEY not in kv_transfer_params:
            return None
        try:
            return cls(mode_of(kv_transfer_params[KEY]))
        except ValueError as error:
            return cls("dense", str(error))

    def params(self) -> dict[str, Any]:
        """As ``kv_transfer_params`` of the answer."""
        error = {} if self.error is None else {"error": self.error}
        return {KEY: {"index": self.index, "budget": self.budget, "rows": dict(self.rows), **error}}


def mode_of(settings: Any) -> str:
    """The mode that a request's settings ask for.

    Raises:
        ValueError: an unknown setting, or a value that is not allowed.
    """
    where = f"kv_transfer_params.{KEY}"
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: {settings!r} is not an object of settings")  # noqa: TRY004 (a user's error)
    if unknown := [name for name in settings if name != "mode"]:
        raise ValueError(f"{where}.{unknown[0]}: unknown setting; known is mode")
    mode = settings.get("mode", "auto")
    if mode not in MODES:
        raise ValueError(f"{where}.mode: {mode!r} is not one of {', '.join(MODES)}")
    return mode
