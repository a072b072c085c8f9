"""What budgets of an index cost in answers, measured when the index was made. JSON, strictly read."""

import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass
from itertools import pairwise

from vllm_squeeze.prefix_index.identity import check_ranges
from vllm_squeeze.prefix_index.manifest import InvalidIndex, Manifest, content_digest, decode, with_digest

QUALITY_VERSION = 1
# KL below it counts as this: it is not told from the rounding of logits, and has a logarithm.
_LEAST_KL = 1e-6


@dataclass(frozen=True)
class BudgetQuality:
    """What a budget costs.

    Attributes:
        budget: that was asked for.
        bytes_read: of the prefix over those of a dense pass, by what query tokens of questions and answers chose.
        kl: of dense to squeezed next-token distributions on the dense answers, nats, mean over their places.
        kl_error: its standard error, if questions are drawn anew; 0 with a single question, of which it is not known.
        same_top: share of places where both have the same most likely token.
        recall: of each layer and KV head, the share of the attention to the prefix that falls on keys attended to
            exactly, mean over the queries of answers and the query heads.
    """

    budget: float
    bytes_read: float
    kl: float
    kl_error: float
    same_top: float
    recall: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_ranges(self, budget=(1e-6, 1), bytes_read=(0, 2), kl=(-1, 1000), kl_error=(0, 1000), same_top=(0, 1))
        if not all(0 <= share <= 1 for layer in self.recall for share in layer):
            raise ValueError("recall has shares that are not from 0 to 1")

    @property
    def mean_recall(self) -> float:
        """Mean over layers and heads."""
        return sum(map(sum, self.recall)) / sum(map(len, self.recall))


@dataclass(frozen=True)
class Quality:
    """What an index's budgets cost, on questions that its thresholds were not calibrated on.

    Attributes:
        format_version: of this.
        manifest_digest: of the index.
        own_questions: whether the questions are the user's, or general ones.
        num_questions: that were asked.
        num_places: tokens of their dense answers.
        budgets: by decreasing budget.
    """

    format_version: int
    manifest_digest: str
    own_questions: bool
    num_questions: int
    num_places: int
    budgets: tuple[BudgetQuality, ...]

    def __post_init__(self) -> None:
        count = (1, 2**31 - 1)
        check_ranges(self, format_version=(QUALITY_VERSION, QUALITY_VERSION), num_questions=count, num_places=count)
        if not self.budgets or any(less.budget >= more.budget for more, less in pairwise(self.budgets)):
            raise ValueError(f"budgets are {reprlib.repr([b.budget for b in self.budgets])}, must decrease")

    def least_budget(self, max_kl: float) -> float | None:
        """The smallest budget that is expected to cost no more than so much KL.

        Between measured budgets it is interpolated, linear in the logarithms; smaller ones than were measured are not
        suggested. It goes by the largest budget that costs too much: none below is, even if it was measured to cost
        less.

        Returns:
            the budget, rounded up to three digits after the point; None if the largest measured one costs more.
        """
        points = [(math.log(b.budget), math.log(max(b.kl, _LEAST_KL))) for b in self.budgets]
        wanted = math.log(max(max_kl, _LEAST_KL))
        if points[0][1] > wanted:
            return None
        least = points[-1][0]
        for (budget, kl), (smaller, more_kl) in pairwise(points):
            if more_kl > wanted:
                least = budget + (smaller - budget) * (wanted - kl) / (more_kl - kl)
                break
        return min(math.ceil(math.exp(least) * 1000 - 1e-6) / 1000, self.budgets[0].budget)

    def to_json(self) -> str:
        """As text, closed by a digest of all the rest."""
        return with_digest(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, manifest: Manifest) -> "Quality":
        """Reads what ``to_json`` wrote of the index that has this manifest.

        Raises:
            InvalidIndex: a value that is missing, unknown, of a wrong type or not allowed, any change of the text, or
                another index's.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidIndex("not JSON") from None
        if manifest.exact:
            raise InvalidIndex("an exact index has no budgets")
        if type(body) is dict:
            body.pop("digest", None)
        quality = decode(cls, body, "")
        if text != with_digest(body):
            raise InvalidIndex("digest: changed after it was written")
        if quality.manifest_digest != manifest_digest(manifest):
            raise InvalidIndex("manifest_digest is that of another index")
        shape = [manifest.model.num_kv_heads] * len(manifest.layers)
        for i, measured in enumerate(quality.budgets):
            if [len(layer) for layer in measured.recall] != shape:
                raise InvalidIndex(f"budgets[{i}].recall must be of {len(shape)} layers and their KV heads")
        return quality


def manifest_digest(manifest: Manifest) -> str:
    """What tells an index's quality from another's."""
    return content_digest(manifest.to_json().encode())
