"""Ways to choose what of a prefix is read, in plain torch: our rule, its variants, and what to hold it against.

All choose among units of keys: clusters, pages, or keys alone. A rule gives each unit a rank, for each query token and
KV head; units whose rank exceeds one threshold, the same for all tokens, heads and layers, are attended to exactly.
Top-k and top-p are such rules too: their ranks are minus the keys, or the mass, that come before a unit.

    ours      keys by predicted attention probability, as their residuals tell, times the weight of their cluster; of
              clusters that fall short of the threshold by no more than MARGIN, by that of their mean key, raised for
              the spread of their keys. Other keys of these clusters contribute nothing, other clusters through their
              mean value
    paper     whole clusters by that of their mean key, without raise and weights, with query heads joined by their
              mean, and nothing of the others
    oracle    single keys by true attention probability, as many for each token and head
    pages     pages of 16 keys by an upper bound from their least and largest key elements (Quest), as many for each
    random    whole clusters drawn by lot; all else as in ours

Options follow a plus: ``ours+mean+drop``. With mean, topk, topp, variance, wide and tile clusters are chosen whole too.

    whole              clusters with all of their keys, if they exceed the threshold themselves
    mean, max          how query heads of a KV head are joined
    drop               nothing of what is not chosen
    threshold          what exceeds a predicted probability
    topk               as many keys for each token and head
    topp               as much predicted mass for each token and head, within FLOOR and CAP of the keys wanted
    flat               without raise
    variance           raised without bound, and probabilities made from raised scores: as if logits of a cluster's keys
                       were spread normally
    plain              without weights
    wide               centroids in 16 bits, not in 4
    tile               one choice for all tokens of a tile of the kernels
    each               probabilities held against what all clusters attract, not what groups of them do

R counts query tokens, H KV heads, G query heads of each, D the head size, T tokens of the prefix, of which K are in
units, U units.
"""

import math
from dataclasses import dataclass, replace

import torch

from vllm_squeeze.kernels.reference import (
    capped,
    joined,
    log_mass,
    raises,
    residual_scores,
    scores_of,
    softmax_weighted,
)
from vllm_squeeze.kernels.tables import (
    MARGIN,
    MOST_RAISE,
    MOST_REST_RAISE,
    ClusterTable,
    group_means,
    unpacked_keys,
)
from vllm_squeeze.kernels.tiles import tokens_per_tile
from vllm_squeeze.prefix_index.budget import (
    BYTES_PER_MEMBER,
    BYTES_PER_VARIANCE,
    BYTES_PER_WEIGHT,
    KeyCost,
    ReadCost,
    bytes_of_groups,
    packed_bytes,
)

PAGE = 16
FLOOR, CAP = 0.25, 4.0


@dataclass(frozen=True)
class Arm:
    """A way to choose; see above."""

    units: str = "clusters"
    lot: bool = False
    choice: str = "threshold"
    join: str = "max"
    rest: bool = True
    spread: str = "raise"
    plain: bool = False
    wide: bool = False
    tile: bool = False
    each: bool = False
    whole: bool = False

    @property
    def by_key(self) -> bool:
        """Whether keys of clusters are chosen for themselves; none with centroids that residuals do not belong to."""
        of_each = self.units == "clusters" and self.choice == "threshold" and self.join == "max"
        return of_each and self.spread != "variance" and not (self.lot or self.tile or self.wide or self.whole)

    @property
    def rule(self) -> str:
        """The server's that says how query heads are joined, and whether keys are chosen for themselves."""
        return "paper" if self.join == "mean" else "keys" if self.by_key else "clusters"

    @property
    def grouped(self) -> bool:
        """Whether probabilities are held against what groups of clusters attract."""
        return self.units == "clusters" and self.join == "max" and self.spread != "variance" and not self.each


RULES = {
    "ours": Arm(),
    "paper": Arm(join="mean", rest=False, spread="", plain=True),
    "oracle": Arm(units="keys", choice="topk", rest=False, spread=""),
    "pages": Arm(units="pages", choice="topk", rest=False, spread=""),
    "random": Arm(lot=True),
}
OPTIONS = {
    "max": {"join": "max"},
    "mean": {"join": "mean"},
    "drop": {"rest": False},
    "threshold": {"choice": "threshold"},
    "topk": {"choice": "topk"},
    "topp": {"choice": "topp"},
    "flat": {"spread": ""},
    "variance": {"spread": "variance"},
    "plain": {"plain": True},
    "wide": {"wide": True},
    "tile": {"tile": True},
    "each": {"each": True},
    "whole": {"whole": True},
}


def parse(name: str) -> Arm:
    """The arm of a name such as ``ours+mean``.

    Raises:
        ValueError: there is none.
    """
    rule, *options = name.split("+")
    if rule not in RULES or not set(options) <= OPTIONS.keys():
        raise ValueError(f"{name!r} is no arm; must be one of {', '.join(RULES)}, and +option of {', '.join(OPTIONS)}")
    arm = RULES[rule]
    for option in options:
        arm = replace(arm, **OPTIONS[option])
    if arm.units != "clusters" and (arm.spread or arm.wide):
        raise ValueError(f"{name!r} is no arm; {arm.units} have no centroids")
    return arm


def threshold_of(arm: Arm, share: float, num_keys: int) -> float | None:
    """The threshold on ranks that chooses a share of the keys; None where the rule alone does not say.

    Args:
        arm: how to choose.
        share: of the keys that is wanted; all have ranks above minus infinity.
        num_keys: that there are to choose from.
    """
    if share >= 1:
        return -math.inf
    if arm.lot:
        return 1 - share
    return -share * num_keys if arm.choice == "topk" else None


@dataclass(frozen=True)
class Cost:
    """Bytes that one KV head reads for one query token, counted as ``ReadCost`` counts them.

    Attributes:
        dense_bytes: of a dense pass.
        fixed_bytes: whatever is chosen.
        keys: what chosen ones cost.
        num_keys: that there are to choose from.
    """

    dense_bytes: int
    fixed_bytes: int
    keys: KeyCost
    num_keys: int

    def budget_used(self, share: float) -> float:
        """The budget that reading a share of the keys comes to."""
        return (self.fixed_bytes + self.keys.read_bytes(share * self.num_keys)) / self.dense_bytes

    def share(self, budget: float) -> float:
        """The share of the keys to choose for a budget; all for a budget of 1, although that reads more than all keys.

        Raises:
            ValueError: what is read whatever is chosen takes more.
        """
        if budget >= 1:
            return 1.0
        spare_bytes = budget * self.dense_bytes - self.fixed_bytes
        if spare_bytes < 0:
            raise ValueError(f"budget: {budget} is less than the {self.budget_used(0):.3f} that is read in any case")
        return min(self.keys.most_keys(spare_bytes) / self.num_keys, 1.0)


def cost_of(arm: Arm, cost: ReadCost) -> Cost:
    """What an arm reads, from what the server's own rule reads. Keys alone and pages need no list of members."""
    cost = replace(cost, rest=arm.rest, by_key=arm.by_key)
    if arm.units == "clusters":
        more = -BYTES_PER_WEIGHT * arm.plain - BYTES_PER_VARIANCE * (not arm.spread)
        if arm.wide:
            more += (1 + arm.rest) * (2 * cost.head_size - packed_bytes(cost.head_size))
        fixed, keys = cost.fixed_bytes + cost.num_centroids * more, cost.keys
        if not arm.grouped:
            fixed -= bytes_of_groups(cost.num_centroids, cost.head_size)
    else:
        fixed = replace(cost, num_centroids=0).fixed_bytes
        keys = replace(cost.keys, per_key=cost.keys.per_key - BYTES_PER_MEMBER)
        if arm.units == "pages":
            fixed += -(-cost.num_clustered // PAGE) * 2 * cost.head_size * cost.element_size
    return Cost(cost.dense_bytes, fixed, keys, cost.num_clustered)


@dataclass(frozen=True)
class Prefix:
    """The squeezed part of a prefix in one layer.

    Attributes:
        keys, values: [H, T, D] float32.
        table: its clusters, and no other prefix's.
        num_always: T - K, first tokens that are always attended to.
        scale: softmax scale.
        soft_cap: bound on the logits; 0 for none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: ClusterTable
    num_always: int
    scale: float
    soft_cap: float = 0.0


@dataclass(frozen=True)
class Units:
    """What an arm chooses among in one layer.

    Attributes:
        of_key: [H, K] int64, the unit of each key.
        sizes: [H, U] float32, keys of each unit.
        low, high: [H, U, D] float32, bounds on its keys' elements; where equal, their mean.
        values: [H, U, D] float32, its mean value; None where what is not chosen contributes nothing.
        variances: [H, U] float32, as in ``ClusterTable``; None where the arm needs none.
        log_weights: [H, U] float32, log of what probabilities are multiplied by; None for 1.
        groups: [H, groups, D] float32, mean keys of groups of clusters, and
        group_sizes: [H, groups], keys of each.
        residuals: [H, K, NUM_DIRECTIONS / 8] int32, of each key, and
        directions: [H, NUM_DIRECTIONS, D] float32, as in ``ClusterTable``; None where keys are not chosen for
            themselves.
    """

    of_key: torch.Tensor
    sizes: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    values: torch.Tensor | None = None
    variances: torch.Tensor | None = None
    log_weights: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    group_sizes: torch.Tensor | None = None
    residuals: torch.Tensor | None = None
    directions: torch.Tensor | None = None


def units_of(arm: Arm, prefix: Prefix) -> Units:
    """The units that an arm chooses among."""
    keys, values = (vectors[:, prefix.num_always :] for vectors in (prefix.keys, prefix.values))
    heads, count, size = keys.shape
    if arm.units == "clusters":
        table = prefix.table
        clustered = slice(prefix.num_always, prefix.num_always + count)
        of_key, sizes = at_positions(table, cluster_of_member(table))[:, clustered], table.sizes.float()
        index = of_key[..., None].expand(-1, -1, size)

        def mean(of_keys: torch.Tensor) -> torch.Tensor:
            sums = of_keys.new_zeros(*sizes.shape, of_keys.shape[-1])
            return sums.scatter_add_(1, index[..., : of_keys.shape[-1]], of_keys) / sizes.clamp(min=1)[..., None]

        if arm.wide:
            centroids, means = (mean(vectors).bfloat16().float() for vectors in (keys, values))
            frame = table.frames[:, 0]
            *packed_groups, group_sizes = group_means(centroids, table.sizes, frame)
            groups = unpacked_keys(*packed_groups, frame), group_sizes
        else:
            centroids, means = table.mean_keys(), table.mean_values()
            groups = table.group_keys(), table.group_sizes
        variances = table.variances if arm.spread else None
        log_weights = None if arm.plain else table.log_weights
        of_units = centroids, centroids, means if arm.rest else None, variances, log_weights
        beside = (at_positions(table, table.residuals)[:, clustered], table.directions[:, 0]) if arm.by_key else ()
        return Units(of_key, sizes, *of_units, *groups, *beside)
    of_key = torch.arange(count, device=keys.device).expand(heads, -1)
    if arm.units == "keys":
        return Units(of_key, torch.ones_like(keys[..., 0]), keys, keys, values if arm.rest else None)
    of_key = of_key // PAGE
    index, num_pages = of_key[..., None].expand_as(keys), -(-count // PAGE)
    low, high, means = (
        keys.new_zeros(heads, num_pages, size).scatter_reduce(1, index, vectors, how, include_self=False)
        for vectors, how in ((keys, "amin"), (keys, "amax"), (values, "mean"))
    )
    sizes = keys.new_zeros(heads, num_pages).scatter_add_(1, of_key, torch.ones_like(keys[..., 0]))
    return Units(of_key, sizes, low, high, means if arm.rest else None)


def cluster_of_member(table: ClusterTable) -> torch.Tensor:
    """The cluster of each member, [H, M] int64; any of one that has none."""
    heads, num_members = table.members.shape
    place = torch.arange(num_members, device=table.members.device, dtype=torch.int32).expand(heads, -1).contiguous()
    return torch.searchsorted(table.starts.contiguous(), place, right=True) - 1


def at_positions(table: ClusterTable, of_members: torch.Tensor) -> torch.Tensor:
    """What members [H, M, ...] have, at their positions in the prefix, [H, positions, ...]; 0 where there are none."""
    positions = table.members.long()
    found = of_members.new_zeros(len(positions), int(positions.max()) + 1, *of_members.shape[2:])
    found[torch.arange(len(positions), device=positions.device)[:, None], positions] = of_members
    return found


def unit_scores(query: torch.Tensor, units: Units, prefix: Prefix) -> torch.Tensor:
    """The logits of units [R, H, G, U] for queries [R, H, G, D]; upper bounds of them where units have bounds."""
    if units.low is units.high:
        return scores_of(query, units.low, prefix.scale, prefix.soft_cap)
    products = torch.einsum("rhgd,hud->rhgu", query.clamp(min=0), units.high)
    products += torch.einsum("rhgd,hud->rhgu", query.clamp(max=0), units.low)
    return capped(products * prefix.scale, prefix.soft_cap)


def rank(
    arm: Arm,
    query: torch.Tensor,
    scores: torch.Tensor,
    units: Units,
    prefix: Prefix,
    share: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """The rank of each unit, [R, H, U]: what is higher is chosen sooner.

    Args:
        arm: how to choose.
        query: [R, H, G, D] float32.
        scores: of units, [R, H, G, U].
        units, prefix: of the layer.
        share: of the keys that are wanted.
        generator: of lots.
    """
    if arm.lot:
        shape = scores[:, :, 0].shape
        return torch.rand(shape, generator=generator, device=scores.device)
    raised = 0.0
    if arm.spread:
        raised = raises(query, units.variances, prefix.scale, math.inf if arm.spread == "variance" else MOST_RAISE)
    if arm.spread == "variance":
        scores, raised = scores + raised, 0.0
    mass = mass_of(arm, query, scores, units, prefix)
    log_p = joined((scores - mass + raised).masked_fill((units.sizes == 0)[:, None], -torch.inf), arm.rule)
    if units.log_weights is not None:
        log_p = log_p + units.log_weights[None]
    if arm.tile:
        log_p = largest_of_tile(log_p, tokens_per_tile(len(query), query.shape[2]))
    if arm.choice == "threshold":
        return log_p
    order = log_p.argsort(dim=-1, descending=True)
    keys_before = before(units.sizes.expand_as(log_p).gather(-1, order))
    ranks = -keys_before
    if arm.choice == "topp":
        probability = (log_p.exp() * units.sizes).gather(-1, order)
        ranks = -before(probability) / probability.sum(-1, keepdim=True)
        wanted = share * units.of_key.shape[1]
        ranks = ranks.masked_fill(keys_before < FLOOR * wanted, torch.inf)
        ranks = ranks.masked_fill(keys_before >= CAP * wanted, -torch.inf)
    return torch.empty_like(ranks).scatter_(-1, order, ranks)


def mass_of(arm: Arm, query: torch.Tensor, scores: torch.Tensor, units: Units, prefix: Prefix) -> torch.Tensor:
    """Log of what all units attract, [R, H, G, 1], of ``scores`` [R, H, G, U] or of groups of clusters."""
    if arm.grouped:
        return log_mass(scores_of(query, units.groups, prefix.scale, prefix.soft_cap), units.group_sizes)
    return log_mass(scores, units.sizes)


def rank_of_keys(arm: Arm, query: torch.Tensor, scores: torch.Tensor, units: Units, prefix: Prefix) -> torch.Tensor:
    """The rank that each key has for itself, [R, H, K], where keys of clusters do; else as ``rank``."""
    log_p = scores - mass_of(arm, query, scores, units, prefix)
    log_p = log_p.gather(-1, units.of_key[:, None].expand(len(query), -1, query.shape[2], -1))
    log_p += residual_scores(query, units.directions, units.residuals, prefix.scale)
    ranks = joined(log_p, arm.rule)
    return ranks if units.log_weights is None else ranks + units.log_weights.gather(1, units.of_key)


def before(amounts: torch.Tensor) -> torch.Tensor:
    """Sums of what comes before each along the last dimension."""
    return amounts.cumsum(-1) - amounts


def largest_of_tile(log_p: torch.Tensor, size: int) -> torch.Tensor:
    """The largest of each unit [R, H, U] over tiles of ``size`` tokens, for every token of the tile."""
    return torch.cat([tile.amax(0, keepdim=True).expand_as(tile) for tile in log_p.split(size)])


@dataclass(frozen=True)
class Attention:
    """Attention of R query tokens over a prefix.

    Attributes:
        output: [R, H, G, D] float32.
        lse: [R, H, G], its log-sum-exp.
        kept: [R, H], keys chosen.
        exact_lse, whole_lse: [R, H, G], log-sum-exp over the keys that are attended to exactly, and over all.
        ranks: [R, H, K], of the keys: the thresholds up to which they are chosen.
    """

    output: torch.Tensor
    lse: torch.Tensor
    kept: torch.Tensor
    exact_lse: torch.Tensor
    whole_lse: torch.Tensor
    ranks: torch.Tensor


def attend(
    arm: Arm,
    query: torch.Tensor,
    prefix: Prefix,
    units: Units,
    threshold: float,
    share: float,
    generator: torch.Generator,
) -> Attention:
    """Attention over what an arm chooses of a prefix.

    Args:
        arm: how to choose.
        query: [R, H, G, D] float32.
        prefix: of the layer.
        units: of the arm and the layer.
        threshold: on ranks. Minus infinity chooses all.
        share: of the keys that are wanted.
        generator: of lots.
    """
    scores = unit_scores(query, units, prefix)
    of_units = rank(arm, query, scores, units, prefix, share, generator)
    if arm.by_key:
        of_units = of_units + MARGIN
    ranks = of_units.gather(-1, units.of_key.expand(len(query), -1, -1))
    if arm.by_key:
        ranks = torch.minimum(ranks, rank_of_keys(arm, query, scores, units, prefix))
    chosen, keys_chosen = (
        found > threshold if threshold > -math.inf else torch.ones_like(found, dtype=torch.bool)
        for found in (of_units, ranks)
    )
    attended = torch.nn.functional.pad(keys_chosen, (prefix.num_always, 0), value=True)

    logits = capped(torch.einsum("rhgd,htd->rhgt", query, prefix.keys) * prefix.scale, prefix.soft_cap)
    whole_lse = logits.logsumexp(-1)
    logits = logits.masked_fill(~attended[:, :, None], -torch.inf)
    exact_lse, values = logits.logsumexp(-1), prefix.values
    if arm.rest:
        lumped = scores + units.sizes.log()[:, None]
        if arm.spread:
            lumped = lumped + raises(query, units.variances, prefix.scale, MOST_REST_RAISE)
        logits = torch.cat([logits, lumped.masked_fill(chosen[:, :, None], -torch.inf)], -1)
        values = torch.cat([values, units.values], 1)
    output, lse = softmax_weighted(logits, values)
    return Attention(output, lse, keys_chosen.sum(-1), exact_lse, whole_lse, ranks)
