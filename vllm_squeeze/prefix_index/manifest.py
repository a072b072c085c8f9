"""The manifest of an index: what it was made from and for, and what its files must hold. JSON, strictly read."""

import dataclasses
import functools
import hashlib
import json
import math
import reprlib
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from vllm_squeeze.kernels.tables import RULES
from vllm_squeeze.prefix_index.budget import (
    BYTES_HELD_OF_MEMBER,
    BYTES_PER_LOG_SIZE,
    BYTES_PER_PLACE,
    bytes_of_prefix,
    bytes_per_cluster,
)
from vllm_squeeze.prefix_index.identity import ModelIdentity, check_ranges

FORMAT_VERSION = 8
MAX_HEADER_BYTES = 4096
"""Bytes that a safetensors file of an index may have beyond its tensors."""


MOST_NATS = 1000.0
"""That a log threshold or a log weight may be, either way: all are finite in float32, and so are their differences."""
LONGEST_REASON = 2000
"""Characters of a reason for which an index is refused; an index may hold texts of any length."""


class InvalidIndex(ValueError):
    """An index, or a part of one, that cannot be used. One line, which names the file or the field."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason[:LONGEST_REASON]))


@dataclass(frozen=True)
class IndexParameters:
    """How a prefix is clustered.

    Attributes:
        centroids: centroids per token of the prefix, before large clusters are split.
        window: tokens that are clustered together, at most.
        max_cluster: keys that a cluster may have, at most.
        iterations: of k-means.
        seed: of the first centroids.
        num_sinks: the first tokens, which are not clustered but always attended to.
        observation_window: the last tokens, which are not clustered either.
        rule: by which keys are chosen, one of RULES.
    """

    centroids: float = 0.05
    window: int = 8192
    max_cluster: int = 512
    iterations: int = 12
    seed: int = 0
    num_sinks: int = 16
    observation_window: int = 100
    rule: str = "keys"

    def __post_init__(self) -> None:
        if not 0 < self.centroids <= 1:
            raise ValueError(f"centroids is {self.centroids}, must be above 0 and at most 1")
        if self.rule not in RULES:
            raise ValueError(f"rule is {reprlib.repr(self.rule)}, must be one of {', '.join(RULES)}")
        check_ranges(
            self,
            window=(1, 2**31 - 1),
            max_cluster=(1, 2**31 - 1),
            iterations=(1, 10_000),
            seed=(0, 2**63 - 1),
            num_sinks=(0, 2**31 - 1),
            observation_window=(1, 2**31 - 1),
        )


QUERIES = ("questions", "observation window")
"""Whose queries thresholds can be calibrated on."""


@dataclass(frozen=True)
class Calibration:
    """Which queries the thresholds were calibrated on.

    Attributes:
        calibrated_on: "questions": those that answers to questions on the prefix came from; or "observation window":
            those of the prefix's last tokens, where no question could be asked.
        num_questions: that were asked.
        num_tokens: whose queries were taken, in each layer.
    """

    calibrated_on: str
    num_questions: int
    num_tokens: int

    def __post_init__(self) -> None:
        if self.calibrated_on not in QUERIES:
            raise ValueError(
                f"calibrated_on is {reprlib.repr(self.calibrated_on)}, must be one of {', '.join(QUERIES)}"
            )
        asked = (1, 2**31 - 1) if self.calibrated_on == "questions" else (0, 0)
        check_ranges(self, num_questions=asked, num_tokens=(1, 2**62))


@dataclass(frozen=True)
class LayerEntry:
    """One indexed layer.

    Attributes:
        name: of the layer in the model. Never part of a path.
        num_centroids: C, of each KV head.
        num_bytes: size of its file.
        digest: of its file's bytes.
    """

    name: str
    num_centroids: int
    num_bytes: int
    digest: str

    def __post_init__(self) -> None:
        check_ranges(self, num_centroids=(1, 2**31 - 1), num_bytes=(1, 2**62))


@dataclass(frozen=True)
class Manifest:
    """All that is known of an index without its tensors.

    The clustered tokens are all those between the sinks and the observation window. An exact index has no clusters:
    all tokens of its prefix are attended to.

    Attributes:
        format_version: of the files.
        tool_version: version of vllm-squeeze that made the index.
        created: ISO 8601, UTC.
        source: where the prefix came from. Free text.
        num_tokens: T, of the whole prefix.
        tokens_digest: of the token ids.
        num_members: M, tokens that are clustered; 0 in an exact index.
        model: the model that the keys are of.
        parameters: how they were clustered; None in an exact index.
        thresholds: pairs (share of the clustered keys kept, natural log of the threshold that keeps it), by
            decreasing share. Empty in an exact index.
        calibration: what the thresholds were calibrated on; None in an exact index.
        layers: the clustered layers, in the model's order. Empty in an exact index.
    """

    format_version: int
    tool_version: str
    created: str
    source: str
    num_tokens: int
    tokens_digest: str
    num_members: int
    model: ModelIdentity
    parameters: IndexParameters | None
    thresholds: tuple[tuple[float, float], ...]
    calibration: Calibration | None
    layers: tuple[LayerEntry, ...]

    def __post_init__(self) -> None:
        check_ranges(self, format_version=(FORMAT_VERSION, FORMAT_VERSION), num_tokens=(1, 2**31 - 1))
        check_created(self.created)
        if self.exact:
            self._check_exact()
        else:
            self._check_clustered()

    @property
    def exact(self) -> bool:
        """Whether the index has no clusters."""
        return self.parameters is None

    def _check_exact(self) -> None:
        for name, nothing in (("num_members", 0), ("thresholds", ()), ("calibration", None), ("layers", ())):
            if (value := getattr(self, name)) != nothing:
                must = f"must be {json.dumps(nothing)} in an exact index, one whose parameters are null"
                raise ValueError(f"{name} is {reprlib.repr(value)}, {must}")

    def _check_clustered(self) -> None:
        always_kept = self.parameters.num_sinks + self.parameters.observation_window
        # A token that is neither clustered nor always kept would be lost to every query.
        if not 1 <= self.num_members == self.num_tokens - always_kept:
            found = reprlib.repr(self.num_members)
            raise ValueError(f"num_members is {found}, must be num_tokens less {always_kept}, at least 1")
        check_thresholds(self.thresholds)
        if self.calibration is None:
            raise ValueError("calibration is null, must say what thresholds were calibrated on")
        if not 1 <= len(self.layers) <= self.model.num_layers:
            raise ValueError(f"layers has {len(self.layers)} entries, must have from 1 to {self.model.num_layers}")
        name, count = Counter(layer.name for layer in self.layers).most_common(1)[0]
        if count > 1:
            raise ValueError(f"layers has {count} entries of the name {reprlib.repr(name)}, must have 1")
        for i, layer in enumerate(self.layers):
            if layer.num_centroids > self.num_members:
                raise ValueError(f"layers[{i}].num_centroids is {layer.num_centroids}, must be at most num_members")
            needed = self.tensor_bytes(layer)
            if not needed < layer.num_bytes <= needed + MAX_HEADER_BYTES:
                raise ValueError(f"layers[{i}].num_bytes is {layer.num_bytes}, but the layer's tensors take {needed}")

    def tensor_bytes(self, layer: LayerEntry) -> int:
        """Bytes of a layer's tensors, those of LayerClusters."""
        # all that a server reads of a cluster, but where its members start and the logarithm of its size: others tell
        per_cluster = bytes_per_cluster(self.model.head_size, rest=True) - BYTES_PER_PLACE - BYTES_PER_LOG_SIZE
        of_head = layer.num_centroids * per_cluster + self.num_members * BYTES_HELD_OF_MEMBER
        return self.model.num_kv_heads * (of_head + bytes_of_prefix(self.model.head_size))

    @functools.cached_property
    def digest(self) -> str:
        """Tells it from the manifest of any other index."""
        return content_digest(self.to_json().encode())

    def to_json(self) -> str:
        """The manifest as text, closed by a digest of all the rest."""
        return with_digest(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads what ``to_json`` wrote.

        Raises:
            InvalidIndex: another format, a value that is missing, unknown, of a wrong type or not allowed, or any
                change of the text.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidIndex("the manifest is not JSON") from None
        version = body.get("format_version") if type(body) is dict else None
        if type(version) is not int:
            raise InvalidIndex("the manifest has no format_version")
        if version != FORMAT_VERSION:
            formats = f"format {reprlib.repr(version)}; this one reads format {FORMAT_VERSION}"
            made_by = "a newer" if version > FORMAT_VERSION else "an older"
            raise InvalidIndex(f"made by {made_by} vllm-squeeze ({formats})")
        body.pop("digest", None)
        manifest = decode(cls, body, "")
        if text != with_digest(body):
            raise InvalidIndex("digest: the manifest was changed after it was written")
        return manifest


def check_created(created: str) -> None:
    try:
        is_utc = datetime.fromisoformat(created).utcoffset() == timedelta(0)
    except ValueError:
        is_utc = False
    if not is_utc:
        raise ValueError(f"created is {reprlib.repr(created)}, must be a time in UTC, as ISO 8601")


def check_thresholds(thresholds: tuple[tuple[float, float], ...]) -> None:
    if not thresholds:
        raise ValueError("thresholds is empty, must have at least one pair")
    if not all(0 < share <= 1 and abs(threshold) <= MOST_NATS for share, threshold in thresholds):
        must = f"a share above 0 and at most 1 and a log threshold from {-MOST_NATS:g} to {MOST_NATS:g}"
        raise ValueError(f"thresholds must be pairs of {must}")
    for (share, threshold), (next_share, next_threshold) in pairwise(thresholds):
        if next_share >= share or next_threshold < threshold:
            pairs = f"{(share, threshold)} and then {(next_share, next_threshold)}"
            raise ValueError(f"thresholds has {pairs}: shares must decrease, and log thresholds must not")


def printable(text: str) -> str:
    """The text with escapes for what could upset a terminal or a log, since an index may say anything."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def content_digest(content: bytes) -> str:
    """32 hexadecimal digits, of any bytes of an index."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def with_digest(body: dict[str, Any]) -> str:
    digest = content_digest(json.dumps(body).encode())
    return json.dumps({**body, "digest": digest}, indent=1) + "\n"


def decode(kind: Any, value: Any, field: str) -> Any:
    """Makes a value of a type from JSON: a dataclass or None, a tuple, str, int or float, and nothing but these.

    Args:
        kind: the type.
        value: what the JSON parser made of it.
        field: name of the value in error messages, empty for the whole.

    Raises:
        InvalidIndex: the value is of another type, not finite, or refused by its dataclass.
    """
    if get_origin(kind) is UnionType:
        kind, _ = get_args(kind)
        return None if value is None else decode(kind, value, field)
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if type(value) is not list or (items[-1] is not Ellipsis and len(value) != len(items)):
            raise InvalidIndex(f"{field} is {reprlib.repr(value)}, must be a list")
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return tuple(decode(item, value[i], f"{field}[{i}]") for i, item in enumerate(items))
    if dataclasses.is_dataclass(kind):
        return decode_dataclass(kind, value, field)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise InvalidIndex(f"{field} is {reprlib.repr(value)}, must be of type {kind.__name__}")
    return value


def decode_dataclass(kind: Any, value: Any, field: str) -> Any:
    if type(value) is not dict:
        raise InvalidIndex(f"{field} is {reprlib.repr(value)}, must be an object")
    prefix = f"{field}." if field else ""
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise InvalidIndex(f"{prefix}{reprlib.repr(name)[1:-1]} is unknown")
    for name in hints:
        if name not in value:
            raise InvalidIndex(f"{prefix}{name} is missing")
    decoded = {name: decode(hint, value[name], f"{prefix}{name}") for name, hint in hints.items()}
    try:
        return kind(**decoded)
    except ValueError as error:
        raise InvalidIndex(f"{prefix}{error}") from None
