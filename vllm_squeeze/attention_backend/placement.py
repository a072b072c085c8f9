"""Which indexes an engine serves, and where each lies in its paged KV cache."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.attention_backend.model_identity import model_identity
from vllm_squeeze.config import AUTO
from vllm_squeeze.prefix_index.budget import BYTES_PER_MEMBER, ReadCost, bytes_per_cluster
from vllm_squeeze.prefix_index.calibration import log_threshold
from vllm_squeeze.prefix_index.identity import ModelIdentity
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import InvalidIndex, Manifest

OnRefusal = Callable[[str], None]


def warn(reason: str) -> None:
    logger.warning("squeeze: %s. Its prefix is served densely.", reason)


@dataclass(frozen=True)
class Options:
    """The serving connector's options, the same in all processes of an engine. An index's slot is its position."""

    indexes: list[str]
    budget: float | str
    max_kl: float
    rest: str
    mode: str
    prefill: str
    memory_limit_gib: float


@dataclass(frozen=True)
class Placement:
    """A served prefix in the KV cache.

    Attributes:
        slot: the prefix's slot.
        name: of the index.
        prefix_lens: tokens that the squeezed part covers, whole blocks, by KV cache group. What follows in the
            prefix, the observation window in it, is attended to densely with the rest of the request.
        num_sinks: first tokens of the squeezed part that are always attended to; all of them where attention is exact.
        budget: that is wanted; 1 where attention is exact.
        log_threshold: of the choice of clusters, for the budget; infinite where attention is exact.
        cost: what reading the prefix costs.
        join: how query heads are joined in the choice, one of JOINS.
    """

    slot: int
    name: str
    prefix_lens: dict[int, int]
    num_sinks: int
    budget: float
    log_threshold: float
    cost: ReadCost
    join: str = "max"

    @property
    def exact(self) -> bool:
        """Whether all keys of the prefix are attended to."""
        return self.num_sinks == self.covered

    @functools.cached_property
    def covered(self) -> int:
        """Tokens of the prefix that a request must share."""
        return max(self.prefix_lens.values())


def open_indexes(
    options: Options, vllm_config: Any, verify: bool, on_refusal: OnRefusal = warn
) -> dict[int, PrefixIndex]:
    """Opens the indexes that this engine's model and memory admit, by slot.

    Args:
        options: of the connector.
        vllm_config: of the engine.
        verify: whether to read and check the layers too.
        on_refusal: told of each index left out, and why.
    """
    try:
        identity = model_identity(vllm_config)
    except ValueError as error:
        on_refusal(f"no index can be checked against the model: {error}")
        return {}
    memory_left = options.memory_limit_gib * 2**30
    admitted = {}
    for slot, folder in enumerate(options.indexes):
        try:
            index = PrefixIndex.open(Path(folder))
            check_model(index, identity, vllm_config.model_config.max_model_len)
            needed = 0 if attends_exactly(index.manifest, options) else device_bytes(index.manifest, vllm_config)
            if needed > memory_left:
                raise InvalidIndex(
                    f"{index.folder.name}: squeeze.memory_limit_gib is {options.memory_limit_gib}, which leaves "
                    f"{memory_left / 2**20:.1f} MiB; this index needs {needed / 2**20:.1f} MiB"
                )
            # Also for an index found damaged below: the worker's side, which does not look, keeps room for it.
            memory_left -= needed
            if verify:
                index.verify()
        except InvalidIndex as error:
            on_refusal(str(error))
            continue
        admitted[slot] = index
    return admitted


def check_model(index: PrefixIndex, identity: ModelIdentity, max_model_len: int) -> None:
    """Raises InvalidIndex if the index was not made for this model, or its prefix is too long for this server."""
    if difference := index.manifest.model.difference(identity):
        raise InvalidIndex(f"{index.folder.name}: the index was made for another model: {difference}")
    if index.manifest.num_tokens >= max_model_len:
        raise InvalidIndex(
            f"{index.folder.name}: the prefix has {index.manifest.num_tokens} tokens; this server's max_model_len, "
            f"{max_model_len}, leaves no room for a question"
        )


def local_kv_heads(manifest: Manifest, tensor_parallel_size: int) -> int:
    """KV heads of one tensor-parallel rank; ranks beyond the number of heads hold copies."""
    return max(1, manifest.model.num_kv_heads // tensor_parallel_size)


def attends_exactly(manifest: Manifest, options: Options) -> bool:
    """Whether all keys of a prefix are always attended to, so that its clusters are not needed."""
    return manifest.exact or options.mode == "exact"


def num_centroids(manifest: Manifest) -> int:
    """Clusters that a head has room for, in any layer; none in an exact index."""
    return max((layer.num_centroids for layer in manifest.layers), default=0)


def device_bytes(manifest: Manifest, vllm_config: Any) -> int:
    """Bytes that an index takes on one rank's device."""
    heads = local_kv_heads(manifest, vllm_config.parallel_config.tensor_parallel_size)
    clusters = num_centroids(manifest) * bytes_per_cluster(manifest.model.head_size, rest=True)
    return len(manifest.layers) * heads * (clusters + manifest.num_members * BYTES_PER_MEMBER)


def full_attention_groups(kv_cache_config: Any) -> dict[int, int]:
    """Block size of each KV cache group in which layers attend to the whole context, by group."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = {}
    for group, spec in enumerate(group.kv_cache_spec for group in kv_cache_config.kv_cache_groups):
        specs = getattr(spec, "kv_cache_specs", {"": spec}).values()
        if all(isinstance(s, FullAttentionSpec) and s.sliding_window is None for s in specs):
            groups[group] = spec.block_size
    return groups


def place(index: PrefixIndex, slot: int, options: Options, block_sizes: dict[int, int], element_size: int) -> Placement:
    """Places a prefix into the KV cache and turns the budget into a threshold. Exact attention has no budget.

    Args:
        index: of the prefix.
        slot: of the prefix.
        options: of the connector.
        block_sizes: by KV cache group.
        element_size: bytes of one element of the KV cache.

    Raises:
        InvalidIndex: there is nothing to squeeze at this block size, or it is one that our kernels do not take; or the
            budget cannot be met.
    """
    manifest = index.manifest
    parameters = manifest.parameters
    exact = attends_exactly(manifest, options)
    first, last = (0, 0) if exact else (parameters.num_sinks, parameters.observation_window)
    if odd := [size for size in block_sizes.values() if size & (size - 1)]:
        raise InvalidIndex(f"{index.folder.name}: blocks hold {odd[0]} tokens, which is not a power of two")
    # Whole blocks of every group: else a row could match in one group and not in another.
    size = max(block_sizes.values(), default=1)
    covered = (manifest.num_tokens - last) // size * size if block_sizes else 0
    if covered <= first:
        always = "" if exact else f"the first {first} and the last {last} are always attended to, and "
        raise InvalidIndex(
            f"{index.folder.name}: the prefix has {manifest.num_tokens} tokens, too few to squeeze: {always}blocks "
            f"hold {list(block_sizes.values())} tokens"
        )
    num_sinks = covered if exact else first
    cost = ReadCost(
        num_tokens=manifest.num_tokens,
        num_always=num_sinks + manifest.num_tokens - covered,
        num_clustered=covered - num_sinks,
        num_centroids=0 if exact else num_centroids(manifest),
        head_size=manifest.model.head_size,
        element_size=element_size,
        rest=options.rest == "value_centroids",
    )
    budget, threshold = 1.0, math.inf
    if not exact:
        budget = budget_of(index, options)
        try:
            threshold = threshold_of(manifest, cost, budget)
        except ValueError as error:
            raise InvalidIndex(f"{index.folder.name}: squeeze.{error}") from None
    join = "max" if manifest.exact else parameters.join
    return Placement(
        slot, index.folder.name, dict.fromkeys(block_sizes, covered), num_sinks, budget, threshold, cost, join
    )


def budget_of(index: PrefixIndex, options: Options) -> float:
    """The budget of a clustered index.

    Raises:
        InvalidIndex: it is to be found, but was not measured, or all that were measured cost too much.
    """
    if options.budget != AUTO:
        return options.budget
    quality = index.quality()
    if quality is None:
        raise InvalidIndex(
            f"{index.folder.name}: squeeze.budget is {AUTO}, but what budgets cost was not measured when this index was "
            "made; index the prefix again, or set a budget"
        )
    if (budget := quality.least_budget(options.max_kl)) is None:
        most = quality.budgets[0]
        raise InvalidIndex(
            f"{index.folder.name}: squeeze.max_kl is {options.max_kl}, but a budget of {most.budget:g} already costs a "
            f"KL of {most.kl:.3g}"
        )
    return budget


def threshold_of(manifest: Manifest, cost: ReadCost, budget: float) -> float:
    """The log threshold of the choice for a budget.

    Raises:
        ValueError: centroids and always attended tokens alone read more.
    """
    return log_threshold(manifest.thresholds, cost.kept_share(budget))


def place_all(
    indexes: dict[int, PrefixIndex],
    options: Options,
    vllm_config: Any,
    kv_cache_config: Any,
    on_refusal: OnRefusal = warn,
) -> dict[int, Placement]:
    """Places all opened indexes, by slot; tells ``on_refusal`` of those that cannot be."""
    groups = full_attention_groups(kv_cache_config)
    placements = {}
    for slot, index in indexes.items():
        try:
            placements[slot] = place(index, slot, options, groups, index.manifest.model.cache_element_size)
        except InvalidIndex as error:
            on_refusal(str(error))
    return placements
