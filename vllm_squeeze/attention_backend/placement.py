"""Which indexes an engine serves, and where each lies in its paged KV cache."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_squeeze.attention_backend.compat import can_share_prefixes, logger
from vllm_squeeze.attention_backend.model_identity import model_identity
from vllm_squeeze.config import AUTO, PREFILLS
from vllm_squeeze.kernels.tables import NEIGHBOURS, num_groups
from vllm_squeeze.prefix_index.budget import BYTES_HELD_OF_MEMBER, ReadCost, bytes_of_clusters, bytes_of_prefix
from vllm_squeeze.prefix_index.calibration import Curve, log_threshold
from vllm_squeeze.prefix_index.identity import ModelIdentity
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import InvalidIndex, Manifest

FEWEST_PROMPT_TOKENS = 16
"""Of a prompt's in a step, that choose together. Fewer have nothing to gain, and steps of few replay CUDA graphs."""

OnRefusal = Callable[[str], None]


def warn(reason: str) -> None:
    logger.warning("squeeze: %s. Its prefix is served densely.", reason)


@dataclass(frozen=True)
class Options:
    """The serving connector's options, the same in all processes of an engine.

    Attributes:
        indexes: folders of the indexes that there are at the start.
        folders: where others may appear.
        watch: seconds between two looks at ``folders``; 0 for none.
    """

    indexes: list[str]
    folders: list[str]
    watch: float
    budget: float | str
    max_kl: float
    rest: str
    mode: str
    prefill: float | str
    memory_limit_gib: float
    pin_share: float


@dataclass(eq=False)
class Placement:
    """A served prefix in the KV cache.

    Attributes:
        name: of the index.
        prefix_lens: tokens that the squeezed part covers, whole blocks, by KV cache group. What follows in the
            prefix, the observation window in it, is attended to densely with the rest of the request.
        num_sinks: first tokens of the squeezed part that are always attended to; all of them where attention is exact.
        budget: that is wanted; 1 where attention is exact.
        log_threshold: of the choice of clusters, for the budget; infinite where attention is exact.
        cost: what reading the prefix costs.
        rule: by which keys are chosen, one of RULES.
        thresholds: of shares of kept keys, as in the manifest.
        prompt_share: of the clustered keys, which tokens of a prompt choose together; None where each chooses, or none is
            squeezed.
        slot: that the index has on the devices; None while it does not lie there.
        pinned: whether the prefix's KV is to stay once it is computed.
    """

    name: str
    prefix_lens: dict[int, int]
    num_sinks: int
    budget: float
    log_threshold: float
    cost: ReadCost
    rule: str = "keys"
    thresholds: Curve = ()
    prompt_share: float | None = None
    slot: int | None = None
    pinned: bool = False

    @property
    def exact(self) -> bool:
        """Whether all keys of the prefix are attended to."""
        return self.num_sinks == self.covered

    @functools.cached_property
    def covered(self) -> int:
        """Tokens of the prefix that a request must share."""
        return max(self.prefix_lens.values())

    def at_budget(self, budget: float) -> "Placement":
        """The same prefix, of an index with clusters, at another budget.

        Raises:
            ValueError: centroids and always attended tokens alone read more.
        """
        threshold = log_threshold(self.thresholds, self.cost.kept_share(budget))
        return replace(self, budget=budget, log_threshold=threshold)

    def attended_exactly(self) -> "Placement":
        """The same prefix, where all of its keys are attended to."""
        return replace(self, num_sinks=self.covered, budget=1.0, log_threshold=math.inf, prompt_share=None)


class Admission:
    """Opens indexes that this engine's model and memory admit.

    Args:
        options: of the connector.
        vllm_config: of the engine.
    """

    def __init__(self, options: Options, vllm_config: Any):
        self._options, self._vllm_config = options, vllm_config
        self._max_model_len = vllm_config.model_config.max_model_len

    def open(self, folder: Path) -> PrefixIndex:
        """Opens an index. Its layers are neither read nor checked.

        Raises:
            InvalidIndex: it is damaged, or is for another model, or too large.
        """
        index = PrefixIndex.open(folder)
        check_model(index, self._identity, self._max_model_len)
        needed, limit = device_bytes(index.manifest, self._options, self._vllm_config), self._options.memory_limit_gib
        if needed > limit * 2**30:
            raise InvalidIndex(
                f"{index.folder.name}: squeeze.memory_limit_gib is {limit}; this index needs {needed / 2**20:.1f} MiB"
            )
        return index

    def open_all(self, on_refusal: OnRefusal) -> list[PrefixIndex]:
        """Opens the indexes that there are at the start; tells ``on_refusal`` of those left out, and why."""
        admitted = []
        try:
            self._identity  # noqa: B018 (one reason for all)
        except InvalidIndex as error:
            on_refusal(str(error))
            return admitted
        for folder in self._options.indexes:
            try:
                admitted.append(self.open(Path(folder)))
            except InvalidIndex as error:
                on_refusal(str(error))
        return admitted

    @functools.cached_property
    def _identity(self) -> ModelIdentity:
        try:
            return model_identity(self._vllm_config)
        except ValueError as error:
            raise InvalidIndex(f"no index can be checked against the model: {error}") from None


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
    """Clusters of a head, the most of any layer; none in an exact index."""
    return max((layer.num_centroids for layer in manifest.layers), default=0)


def room_for_centroids(manifest: Manifest) -> int:
    """Clusters of a head that a table is to have room for: whole groups."""
    return num_groups(num_centroids(manifest)) * NEIGHBOURS


def device_bytes(manifest: Manifest, options: Options, vllm_config: Any) -> int:
    """Bytes that an index takes on one rank's device."""
    if attends_exactly(manifest, options):
        return 0
    heads = local_kv_heads(manifest, vllm_config.parallel_config.tensor_parallel_size)
    size = manifest.model.head_size
    clusters = bytes_of_clusters(room_for_centroids(manifest), size, rest=True) + bytes_of_prefix(size)
    return len(manifest.layers) * heads * (clusters + manifest.num_members * BYTES_HELD_OF_MEMBER)


def token_bytes(centroids: float, vllm_config: Any) -> float:
    """Bytes that a token of a prefix takes on one rank's device, of an index with so many centroids for each."""
    of_group = bytes_of_clusters(NEIGHBOURS, vllm_config.model_config.get_head_size(), rest=True)
    return _num_tables(vllm_config) * (centroids * of_group / NEIGHBOURS + BYTES_HELD_OF_MEMBER)


def prefix_bytes(vllm_config: Any) -> int:
    """Bytes that a prefix takes on one rank's device beside those of its tokens."""
    return _num_tables(vllm_config) * bytes_of_prefix(vllm_config.model_config.get_head_size())


def _num_tables(vllm_config: Any) -> int:
    """KV heads in all layers of one rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = math.ceil(model.hf_text_config.num_hidden_layers / parallel.pipeline_parallel_size)
    return layers * model.get_num_kv_heads(parallel)


def full_attention_groups(kv_cache_config: Any) -> dict[int, int]:
    """Block size of each KV cache group in which layers attend to the whole context, by group."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = {}
    for group, spec in enumerate(group.kv_cache_spec for group in kv_cache_config.kv_cache_groups):
        specs = getattr(spec, "kv_cache_specs", {"": spec}).values()
        if all(isinstance(s, FullAttentionSpec) and s.sliding_window is None for s in specs):
            groups[group] = spec.block_size
    return groups


def place(index: PrefixIndex, options: Options, block_sizes: dict[int, int]) -> Placement:
    """Places a prefix into the KV cache and turns the budget into a threshold. Exact attention has no budget.

    Args:
        index: of the prefix.
        options: of the connector.
        block_sizes: by KV cache group.

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
    rule = "keys" if manifest.exact else parameters.rule
    cost = ReadCost(
        num_tokens=manifest.num_tokens,
        num_always=num_sinks + manifest.num_tokens - covered,
        num_clustered=covered - num_sinks,
        num_centroids=0 if exact else num_centroids(manifest),
        head_size=manifest.model.head_size,
        element_size=manifest.model.cache_element_size,
        rest=options.rest == "value_centroids",
        by_key=rule == "keys",
    )
    lens = dict.fromkeys(block_sizes, covered)
    placement = Placement(index.folder.name, lens, num_sinks, 1.0, math.inf, cost, rule, manifest.thresholds)
    if exact:
        return placement
    budget = budget_of(index, options)
    try:
        setting = "prefill"
        if options.prefill not in PREFILLS:
            placement.prompt_share = cost.kept_share(options.prefill)
        setting = "budget"
        return placement.at_budget(budget)
    except ValueError as error:
        reason = str(error).replace("budget", setting, 1)
        raise InvalidIndex(f"{index.folder.name}: squeeze.{reason}") from None


def tiled_prompts(options: Options, vllm_config: Any) -> bool:
    """Whether tokens of prompts choose together: if they have a budget of their own, and attention that can do it."""
    if options.prefill in PREFILLS:
        return False
    from vllm.platforms import current_platform

    speculative = vllm_config.speculative_config
    drafts = 0 if speculative is None else speculative.num_speculative_tokens
    in_16_bits = vllm_config.model_config.dtype.itemsize == 2 and "8" not in vllm_config.cache_config.cache_dtype
    if drafts + 1 < FEWEST_PROMPT_TOKENS and (not current_platform.is_cuda() or (can_share_prefixes() and in_16_bits)):
        return True
    logger.warning_once(
        "squeeze: prefill is %s, which needs FlashAttention 3, keys and values in 16 bits, and fewer than %s drafts; "
        "prompts are dense.",
        options.prefill,
        FEWEST_PROMPT_TOKENS - 1,
    )
    return False


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
