"""What a request asks of squeezing, and what its answer says: the key "squeeze" of vLLM's ``kv_transfer_params``."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_squeeze.attention_backend.placement import Placement
from vllm_squeeze.config import is_number

KEY = "squeeze"
MODES = ("auto", "squeezed", "exact", "dense")
"""As the server does it; always to the keys that each token chooses; to all keys, each loaded once for the rows that share
them; or by vLLM's own attention, whatever the prompt begins with."""
_WHERE = f"kv_transfer_params.{KEY}"


class RequestSettings(NamedTuple):
    """How the rows of a request attend to the indexed prefix that its prompt begins with.

    Attributes:
        mode: one of MODES.
        budget: at which they are squeezed, in (0, 1]; None for the server's.
    """

    mode: str = "auto"
    budget: float | None = None

    @classmethod
    def of(cls, settings: Any) -> "RequestSettings":
        """Reads what a request says.

        Raises:
            ValueError: an unknown setting, or a value that is not allowed.
        """
        if not isinstance(settings, dict):
            raise ValueError(f"{_WHERE}: {settings!r} is not an object of settings")  # noqa: TRY004 (a user's error)
        if unknown := [name for name in settings if name not in cls._fields]:
            raise ValueError(f"{_WHERE}.{unknown[0]}: unknown setting; known are {', '.join(cls._fields)}")
        found = cls(**settings)
        if found.mode not in MODES:
            raise ValueError(f"{_WHERE}.mode: {found.mode!r} is not one of {', '.join(MODES)}")
        if found.budget is not None:
            if not (is_number(found.budget) and 0 < found.budget <= 1):
                raise ValueError(f"{_WHERE}.budget: {found.budget!r} is not a number in (0, 1]")
            if found.mode not in ("auto", "squeezed"):
                raise ValueError(f"{_WHERE}.budget: {found.budget!r} is for mode auto or squeezed, not {found.mode}")
        return found

    def on(self, placement: Placement) -> tuple["RequestSettings", Placement]:
        """What they come to on a prefix, if they are not dense.

        Returns:
            the settings, equal ones where rows may attend together, those of a server's own without any; and the
            prefix as it is attended to.

        Raises:
            ValueError: the prefix's index does not allow for them.
        """
        if placement.exact:
            for name, value in (("budget", self.budget), ("mode", self.mode)):
                if value not in (None, "auto", "exact"):
                    raise ValueError(
                        f"{_WHERE}.{name}: {value!r} needs clusters, which this server has none of for "
                        f"{placement.name}; allowed are the modes auto, exact and dense"
                    )
            return RequestSettings(), placement
        if self.mode == "exact":
            return self, placement.attended_exactly()
        budget = placement.budget if self.budget is None else self.budget
        if (self.mode, budget) == ("auto", placement.budget):
            return RequestSettings(), placement
        try:
            return RequestSettings(self.mode, budget), placement.at_budget(budget)
        except ValueError as error:
            raise ValueError(f"{_WHERE}.{error}") from None


@dataclass
class RequestReport:
    """What became of a request that had settings, which its answer says under the same key.

    Attributes:
        settings: that it asked for; dense ones where they were wrong.
        error: what was wrong with them, in a line.
        index: that the prompt begins with, if it is served.
        budget: at which its rows are squeezed; 1 where they are exact, None where they are dense.
        rows: the steps that the request was in, by what became of its row.
    """

    settings: RequestSettings
    error: str | None = None
    index: str | None = None
    budget: float | None = None
    rows: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, kv_transfer_params: Any) -> "RequestReport | None":
        """That of a request which begins; None if it has no settings."""
        if not isinstance(kv_transfer_params, dict) or KEY not in kv_transfer_params:
            return None
        report = cls(RequestSettings())
        try:
            report.settings = RequestSettings.of(kv_transfer_params[KEY])
        except ValueError as error:
            report.refuse(error)
        return report

    def refuse(self, error: ValueError) -> None:
        """Has the request be dense, as its settings are wrong."""
        self.settings, self.error = RequestSettings("dense"), str(error)

    def params(self) -> dict[str, Any]:
        """As ``kv_transfer_params`` of the answer."""
        told = {"index": self.index, "mode": self.settings.mode, "budget": self.budget, "rows": dict(self.rows)}
        return {KEY: told if self.error is None else {**told, "error": self.error}}
