"""Which attention the rows of a step on indexed prefixes get: the fastest, by times that were measured on this GPU.

What counts is the whole step: the GPU's time, or where that is shorter, as with small models, the host's. The times of a
layer lie in ``measured_times.json``, which ``benchmarks/policy.py`` writes. They are of one shape of
attention and one share of kept keys. Others are reckoned by the bytes that they read and the query rows they have.
"""

import functools
import json
import math
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from vllm_squeeze.attention_backend.compat import can_share_prefixes, logger
from vllm_squeeze.attention_backend.placement import Options, Placement

MEASURED_TIMES = Path(__file__).with_name("measured_times.json")
DEFAULT_GPU = "NVIDIA H100 80GB HBM3"
_UNION_EXPONENT = 0.65
_CHOICES_KEPT = 1024


class Arm(Enum):
    """How rows attend to their prefix.

    SQUEEZED: to the keys that each chooses.
    EXACT: to all keys, each loaded once for a tile of rows.
    SHARED: to all keys, by FlashAttention of all rows at once.
    STOCK: by vLLM's own attention.
    """

    SQUEEZED = "squeezed"
    EXACT = "exact"
    SHARED = "shared"
    STOCK = "stock"


class Work(NamedTuple):
    """A step's rows on one prefix.

    Attributes:
        decoding: rows of one query token.
        prefilling: rows of several.
        tokens: query tokens of all.
    """

    decoding: int
    prefilling: int
    tokens: int

    @classmethod
    def of(cls, tokens: list[int]) -> "Work":
        """Of rows with so many query tokens each."""
        decoding = tokens.count(1)
        return cls(decoding, len(tokens) - decoding, sum(tokens))


class Rows(NamedTuple):
    """A step's rows on one prefix that have the same settings.

    Attributes:
        placement: of the prefix, as they attend to it.
        work: that they are.
        squeezed: whether they asked to be squeezed, whatever it costs.
        prompt: whether they are prompts', whose tokens choose together if they are squeezed.
    """

    placement: Placement
    work: Work
    squeezed: bool = False
    prompt: bool = False


ChooseArms = Callable[[list[Rows]], list[Arm]]
"""Takes all rows of a step that are on indexed prefixes. Where any are SHARED none are EXACT or SQUEEZED."""


def always_squeezed(step: list[Rows]) -> list[Arm]:
    """Squeezed, whatever it costs; exact where the placement is."""
    return [Arm.EXACT if rows.placement.exact else Arm.SQUEEZED for rows in step]


@dataclass(frozen=True)
class Shape:
    """The attention of a layer on one rank: KV heads, query heads of each, head size, bytes of an element."""

    kv_heads: int
    group: int
    head_size: int
    element_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's key and value."""
        return self.kv_heads * 2 * self.head_size * self.element_size

    @functools.cached_property
    def tile_tokens(self) -> int:
        """Query tokens that fit into a tile."""
        # needs Triton, which a machine without a GPU may lack
        from vllm_squeeze.kernels.tiles import largest_tile

        return largest_tile(self.group)

    @functools.cached_property
    def small_tile_tokens(self) -> int:
        """Query tokens that fit into a tile where they are few."""
        from vllm_squeeze.kernels.tiles import tokens_per_tile

        return tokens_per_tile(1, self.group)


class Times:
    """Microseconds of a layer, interpolated between measurements on logarithmic scales.

    Args:
        measured: by tokens of the prefix, of which there are at least two, and rows, of which the first is 1.
        tile: rows that are served together, if it is the number of such tiles that counts: rows that lie between
            measurements then take as long as the one that has as many tiles.
    """

    def __init__(self, measured: dict[str, dict[str, float]], tile: int = 0):
        self._tile = tile

        def logs(times: dict[str, float]) -> list[tuple[float, float]]:
            return sorted((math.log(int(rows)), math.log(us)) for rows, us in times.items())

        self._curves = sorted((math.log(int(prefix)), logs(times)) for prefix, times in measured.items())
        self._prefixes = [prefix for prefix, _ in self._curves]

    def us(self, prefix: float, rows: float) -> float:
        """The time of so many rows, at least 1, over so many tokens."""
        prefix, rows = math.log(prefix), math.log(rows)
        first = min(max(bisect(self._prefixes, prefix) - 1, 0), len(self._prefixes) - 2)
        ends = [(at, _interpolate(curve, rows, self._tile)) for at, curve in self._curves[first : first + 2]]
        return math.exp(_interpolate(ends, prefix))


def _interpolate(points: list[tuple[float, float]], x: float, tile: int = 0) -> float:
    """On the line through the points around ``x``; below the first, that of the first two. In proportion above all."""
    if x >= points[-1][0]:
        return points[-1][1] + x - points[-1][0]
    right = max(bisect(points, (x, math.inf)), 1)
    (x0, y0), (x1, y1) = points[right - 1 : right + 1]
    if tile:
        # less than a millionth of a tile is a logarithm's rounding
        before, tiles, after = (math.ceil(math.exp(at) / tile - 1e-6) for at in (x0, x, x1))
        if before < after and tiles in (before, after):
            return y0 if tiles == before else y1
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def beyond_small_tiles(measured: dict[str, dict[str, float]], shape: Shape) -> dict[str, dict[str, float]]:
    """Times, as ``Times`` takes them, where one row more than a small tile takes as long as the next measured rows."""
    stepped = {}
    for prefix, times in measured.items():
        larger = [int(rows) for rows in times if int(rows) > shape.small_tile_tokens]
        step = {str(shape.small_tile_tokens + 1): times[str(min(larger))]} if larger else {}
        stepped[prefix] = step | times
    return stepped


def squeezed_times(rest: str, by_key: bool) -> str:
    """What the times of squeezed attention are called, among a GPU's."""
    return rest if by_key else f"clusters_{rest}"


def union(kept: float, tokens: int) -> float:
    """The share of a prefix's keys that any of ``tokens`` query tokens chooses, each of them the share ``kept``.

    Choices overlap. Of 2, 8, 16, 32 questions on a text, 0.1 kept, .20, .38, .48, .56 were measured together; this
    gives .15, .33, .47, .63.
    """
    return 1 - (1 - kept) ** (tokens**_UNION_EXPONENT)


@dataclass(frozen=True)
class CostModel:
    """What a layer's attention costs on one GPU.

    Attributes:
        shape: that was measured.
        kept: share of the keys that each row kept in what was measured.
        centroids: per token of the prefix.
        tflops: of vLLM's attention where there are many query tokens.
        step_us: microseconds that a step with our kernels spends beside layers: it finds rows and makes their tiles.
        stock, exact: times of these arms.
        squeezed: times, by ``squeezed_times``.
        shared: times of this arm; None if it was not measured.
    """

    shape: Shape
    kept: float
    centroids: float
    tflops: float
    step_us: float
    stock: Times
    exact: Times
    squeezed: dict[str, Times]
    shared: Times | None = None

    @classmethod
    def of(cls, measured: dict[str, Any]) -> "CostModel":
        """From a GPU's entry in ``measured_times.json``."""
        shape = Shape(**measured["shape"])
        arms = dict(measured["us"])
        stock, exact = Times(arms.pop("stock")), Times(arms.pop("exact"), shape.tile_tokens)
        shared = Times(arms.pop("shared")) if "shared" in arms else None
        squeezed = {name: Times(beyond_small_tiles(by_prefix, shape)) for name, by_prefix in arms.items()}
        numbers = (measured[name] for name in ("kept", "centroids", "tflops", "step_us"))
        return cls(shape, *numbers, stock, exact, squeezed, shared)

    def stock_us(self, shape: Shape, num_tokens: int, work: Work) -> float:
        """Microseconds of vLLM's own attention: each row reads the prefix; many tokens of one are bound by products."""
        prefix = self._equal_prefix(shape, num_tokens)
        us = self.stock.us(prefix, work.decoding) if work.decoding else 0.0
        if work.prefilling:
            products = (work.tokens - work.decoding) * num_tokens * shape.kv_heads * shape.group * shape.head_size
            us += max(self.stock.us(prefix, work.prefilling), 4 * products / self.tflops / 1e6)
        return us

    def exact_us(self, shape: Shape, num_tokens: int, work: Work) -> float:
        """Microseconds where each tile reads the prefix once."""
        return self.exact.us(self._equal_prefix(shape, num_tokens), self._equal_rows(shape, work))

    def shared_us(self, shape: Shape, num_tokens: int, work: Work) -> float:
        """Microseconds where FlashAttention reads the prefix for all rows at once."""
        rows = max(work.tokens * shape.group / self.shape.group, 1.0)
        return self.shared.us(self._equal_prefix(shape, num_tokens), rows)

    def squeezed_us(
        self, shape: Shape, num_tokens: int, work: Work, kept: float, centroids: float, rest: str, by_key: bool = True
    ) -> float:
        """Microseconds where each tile reads centroids and the keys that its tokens chose.

        What is read beyond the measured share costs as much as exact attention to it, and less saves as much.

        Args:
            shape: of the layer.
            num_tokens: of the prefix.
            work: of the step.
            kept: share of the keys that each token keeps.
            centroids: per token of the prefix.
            rest: what becomes of the others, as in SqueezeConfig.
            by_key: whether keys of clusters are chosen for themselves.
        """
        prefix, rows = self._equal_prefix(shape, num_tokens), self._equal_rows(shape, work)
        full, left = divmod(work.tokens, shape.tile_tokens)

        def loaded(share: float) -> float:
            tiles = full * union(share, shape.tile_tokens) + (union(share, left) if left else 0.0)
            return tiles / (full + (left > 0))

        # a centroid is a key of half a byte an element, and with the value's half a token of one byte
        tokens_of_centroid = (0.5 if rest == "value_centroids" else 0.25) / shape.element_size
        more = loaded(kept) - loaded(self.kept) + (centroids - self.centroids) * tokens_of_centroid
        return self.squeezed[squeezed_times(rest, by_key)].us(prefix, rows) + more * self.exact.us(prefix, rows)

    def prompt_us(self, shape: Shape, num_tokens: int, work: Work, kept: float, centroids: float, rest: str) -> float:
        """Microseconds where tokens of prompts choose clusters together; with the arguments of ``squeezed_us``.

        Products of queries with kept keys and with centroids count, in the time of dense keys.
        """
        rows = work.tokens * shape.kv_heads * shape.group
        looked_up = (centroids * PARTS_OF_CENTROID[rest] * num_tokens + PROMPT_KEYS) * max(PROMPT_FULL_ROWS / rows, 1.0)
        keys = kept / GATHERED_RATE * num_tokens + looked_up
        return max(PROMPT_US + 4 * keys * rows * shape.head_size / self.tflops / 1e6, PROMPT_HOST_US)

    def _equal_prefix(self, shape: Shape, num_tokens: int) -> float:
        """Tokens of a prefix of the measured shape with as many bytes."""
        return num_tokens * shape.token_bytes / self.shape.token_bytes

    def _equal_rows(self, shape: Shape, work: Work) -> float:
        """Tokens of the measured shape that take as many tiles."""
        return max(work.tokens * self.shape.tile_tokens / shape.tile_tokens, 1.0)


HOST_US, HOST_US_OF_ROW, HOST_US_OF_KERNELS = 2300.0, 38.0, 500.0
"""What the host needs for a step: at the least, more for each request, and more where our kernels have rows. Measured with
Qwen2.5-Coder-0.5B, whose steps are the host's: 2.3 ms with one request, 3.5 ms with 32, and .5 to .7 ms more with ours."""
WEIGHT_BYTES_OF_US = 3e6
"""Bytes of weights that a GPU loads in a microsecond, about."""


GATHERED_RATE, PROMPT_US, PROMPT_HOST_US = 0.86, 33.0, 400.0
PARTS_OF_CENTROID, PROMPT_KEYS = {"drop": 2.2, "value_centroids": 4.2}, 4000
PROMPT_FULL_ROWS = 13900
"""Of FlashAttention's rate, what is left over keys that lie anywhere; what prompts whose tokens choose together take
beside products, and what a slow host takes to launch it; what a centroid costs them, in the time of a dense key; keys whose
time a tile takes beside that; and query rows for whose look-up it takes as long if there are fewer, as not all of 132
multiprocessors have a tile then. These give within 12% what was measured on an H200 with prefixes of 128K and 512K, and 256
to 2,048 tokens of 32 heads of 128 elements, .1 or .3 of the keys kept."""


_PLANS = ((Arm.STOCK,), (Arm.STOCK, Arm.SHARED), (Arm.STOCK, Arm.EXACT, Arm.SQUEEZED))
"""Arms that the rows of one step may have, each the fastest of these."""


class _Facts(NamedTuple):
    """What counts of a step's rows on one prefix: its tokens, the work, shares of kept keys and of centroids, None
    without clusters, whether keys are chosen for themselves, whether they asked to be squeezed, and whether they are
    prompts' whose tokens choose together."""

    num_tokens: int
    work: Work
    shares: tuple[float, float] | None
    by_key: bool
    squeezed: bool
    prompt: bool


@dataclass(frozen=True)
class Policy:
    """Chooses the arms by which a step takes least. Of equal ones it takes the more exact.

    Attributes:
        model: of the GPU.
        shape: of a layer's attention.
        num_layers: of the model.
        rest: as in SqueezeConfig.
        weights_us: microseconds that loading the model's weights takes in a step.
        mode: as in SqueezeConfig.
        can_share: whether there is FlashAttention to share prefixes by.
    """

    model: CostModel
    shape: Shape
    num_layers: int
    rest: str
    weights_us: float
    mode: str = "auto"
    can_share: bool = True

    def __call__(self, step: list[Rows]) -> list[Arm]:
        return list(self._chosen(tuple(self._facts(rows) for rows in step)))

    @staticmethod
    def _facts(rows: Rows) -> _Facts:
        placement, shares, by_key = rows.placement, None, rows.placement.cost.by_key
        if not placement.exact:
            cost = placement.cost
            kept = placement.prompt_share if rows.prompt else cost.kept_share(placement.budget)
            shares = kept, cost.num_centroids / cost.num_tokens
        return _Facts(placement.covered, rows.work, shares, by_key, rows.squeezed, rows.prompt)

    @functools.cached_property
    def _chosen(self) -> Callable[[tuple[_Facts, ...]], tuple[Arm, ...]]:
        """``_fastest``, which remembers: most steps are like those before them."""
        return functools.lru_cache(_CHOICES_KEPT)(self._fastest)

    def _fastest(self, step: tuple[_Facts, ...]) -> tuple[Arm, ...]:
        """The arms of the plan that takes least."""
        costs = [self._layer_us(facts) for facts in step]
        plans = []
        for among in _PLANS:
            allowed = [[arm for arm in among if arm in us] for us in costs]
            if not all(allowed):
                continue
            arms = tuple(min(some, key=us.__getitem__) for some, us in zip(allowed, costs, strict=True))
            # graphs of shared steps are those of more tokens than fit into a tile
            shared = sum(facts.work.tokens for facts, arm in zip(step, arms, strict=True) if arm is Arm.SHARED)
            if not 0 < shared <= self.shape.tile_tokens:
                plans.append((self._step_us(step, arms, costs), arms))
        return min(plans, key=lambda plan: plan[0])[1]

    def _layer_us(self, facts: _Facts) -> dict[Arm, float]:
        """Microseconds of a layer by each arm that the rows may have."""
        work = self.shape, facts.num_tokens, facts.work
        us = {}
        if facts.prompt:
            us[Arm.SQUEEZED] = self.model.prompt_us(*work, *facts.shares, self.rest)
        elif facts.shares is not None:
            us[Arm.SQUEEZED] = self.model.squeezed_us(*work, *facts.shares, self.rest, facts.by_key)
        if not (facts.squeezed or facts.prompt) and (facts.shares is None or self.mode == "auto"):
            us[Arm.EXACT] = self.model.exact_us(*work)
            if self.can_share and self.model.shared is not None:
                us[Arm.SHARED] = self.model.shared_us(*work)
        if not facts.squeezed and self.mode == "auto":
            us[Arm.STOCK] = self.model.stock_us(*work)
        return us

    def _step_us(self, step: tuple[_Facts, ...], arms: tuple[Arm, ...], costs: list[dict[Arm, float]]) -> float:
        """Microseconds of the whole step, the GPU's or the host's."""
        ours = any(arm is not Arm.STOCK for arm in arms)
        layer_us = sum(us[arm] for us, arm in zip(costs, arms, strict=True))
        num_rows = sum(facts.work.decoding + facts.work.prefilling for facts in step)
        return max(
            self.weights_us + self.num_layers * layer_us + (self.model.step_us if ours else 0.0),
            HOST_US + HOST_US_OF_ROW * num_rows + (HOST_US_OF_KERNELS if ours else 0.0),
        )


@functools.cache
def measured_times() -> dict[str, Any]:
    """Entries of ``measured_times.json``, by the GPU's name."""
    return json.loads(MEASURED_TIMES.read_text(encoding="utf-8"))


def arms_of(options: Options, vllm_config: Any, num_layers: int) -> ChooseArms:
    """How an engine chooses between arms: on a GPU by cost, where ``mode`` leaves a choice.

    Args:
        options: of the connector.
        vllm_config: of the engine.
        num_layers: that attend to the whole context.
    """
    from vllm.platforms import current_platform

    gpu, measured = current_platform.get_device_name(), measured_times()
    if gpu not in measured:
        if not current_platform.is_cuda():
            return always_squeezed
        if options.mode == "auto":
            logger.warning(
                "squeeze: there are no times of attention on %s to choose by; those of %s are taken. "
                "benchmarks/policy.py makes them.",
                gpu,
                DEFAULT_GPU,
            )
        gpu = DEFAULT_GPU
    if options.mode == "auto":
        logger.info("squeeze: choosing between squeezed, exact and vLLM's attention by times on %s.", gpu)
    shape = shape_of(vllm_config)
    weights_us = weight_bytes(shape, vllm_config) / WEIGHT_BYTES_OF_US
    how = options.rest, weights_us, options.mode, can_share_prefixes()
    return Policy(CostModel.of(measured[gpu]), shape, num_layers, *how)


def shape_of(vllm_config: Any) -> Shape:
    """The attention of an engine's layers on one rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    kv_heads = model.get_num_kv_heads(parallel)
    group = model.get_num_attention_heads(parallel) // kv_heads
    return Shape(kv_heads, group, model.get_head_size(), model.dtype.itemsize)


def weight_bytes(shape: Shape, vllm_config: Any) -> float:
    """About how many bytes of weights a rank loads in a step: those of a decoder with gated feed-forward layers.

    Args:
        shape: of a layer's attention on the rank.
        vllm_config: of the engine.
    """
    text, ranks = vllm_config.model_config.hf_text_config, vllm_config.parallel_config.tensor_parallel_size
    attention = 2 * shape.kv_heads * (shape.group + 1) * shape.head_size
    others = (
        3 * getattr(text, "intermediate_size", 4 * text.hidden_size) * text.num_hidden_layers + text.vocab_size
    ) / ranks
    return text.hidden_size * (attention * text.num_hidden_layers + others) * shape.element_size
