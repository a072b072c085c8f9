"""All that the Triton kernels compute in plain torch and float32: their oracle, and the CPU's path.

For one KV head with G query heads and a prefix in clusters i of N_i keys, centroid c_i and mean value v_i:

    p_i = exp(s q.c_i) / sum_g N_g exp(s q.c_g)      predicted attention probability of each key of cluster i
    r_i = |s q|^2 u_i / 2                            for the keys that lie nearer to the query than their centroid
    cluster i is looked at  <=>  w_i times the max over the G query heads of p_i exp(r_i) > threshold / e^MARGIN
    its key j is chosen     <=>  and w_i times the max over the G query heads of p_i exp(s q.d_j) > threshold

with d_j, how the key lies beside its centroid, as far as a few directions tell, a weight w_i and a variance u_i for
each cluster, from the index, and r_i at most MOST_RAISE. Of logits that are spread normally the mean exponential is that
of their mean and half their variance. The sum is over groups g of some clusters that are alike, of N_g keys together
with the mean key c_g. It is smaller than over clusters, the more so where a query tells clusters apart that are alike:
there a wrong choice costs most, and more is chosen.

That is the rule ``keys``. By ``clusters`` all keys of the clusters are chosen that exceed the threshold themselves. So
they are by ``paper``, with the mean over the G query heads for the largest, and with a sum over clusters.

The chosen keys and the first tokens (attention sinks) are attended to exactly. A cluster that was not looked at
contributes N_i exp(s q.c_i + r_i) times v_i, r_i here at most MOST_REST_RAISE; or nothing where ``rest`` is off.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_squeeze.kernels.tables import (
    DENSE_SLOT,
    MARGIN,
    MOST_PRODUCT,
    MOST_RAISE,
    MOST_REST_RAISE,
    PROMPT_SLOTS,
    RULES,
    SAMPLE,
    ClusterTable,
    Prefixes,
    elements_of,
    unpacked,
)

if TYPE_CHECKING:
    from vllm_squeeze.kernels.prompts import PromptTiles
    from vllm_squeeze.kernels.tiles import QueryTiles

ReadTokens = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes positions [H, M] in the prefix; returns their keys and values, [H, M, D] each, any dtype."""


class Choice(NamedTuple):
    """What R query tokens choose of a prefix.

    Attributes:
        scores: [R, H, G, C] float32, s q.c_i.
        log_mass: [R, H, G, 1] float32, natural log of what all clusters attract.
        clusters: [R, H, C] bool, those that are chosen; or, where keys are chosen for themselves, that are looked at.
    """

    scores: torch.Tensor
    log_mass: torch.Tensor
    clusters: torch.Tensor


def choose_clusters(
    query: torch.Tensor,
    table: ClusterTable,
    log_threshold: float,
    scale: float,
    soft_cap: float = 0.0,
    rule: str = "keys",
    kept_share: float | None = None,
) -> Choice:
    """Scores the clusters and chooses those that matter, once per KV head.

    Args:
        query: [R, H, G, D]. In 16 bits, its product with the spreads of the frame is rounded to them as well, as the
            kernels' is.
        table: the clusters of one prefix.
        log_threshold: natural log of the threshold.
        scale: softmax scale.
        soft_cap: bound on the logits; 0 for none.
        rule: one of RULES.
        kept_share: of the keys in clusters, which all tokens choose together, by the largest of their values of any head
            whatever threshold and rule are; None where each token chooses for itself.
    """
    of_mean, spread = (vectors[:, 0] for vectors in table.frames.split(1, 2))  # [H, 1, D] each
    framed, query = (query * spread).to(query.dtype).float(), query.float()

    def scores_of_packed(words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        products = torch.einsum("rhgd,hcd->rhgc", framed, unpacked(words, scales))
        return capped((products + torch.einsum("rhgd,hcd->rhgc", query, of_mean)) * scale, soft_cap)

    scores = scores_of_packed(table.centroids, table.centroid_scales)
    if rule != "paper" or kept_share is not None:
        mass = log_mass(scores_of_packed(table.group_centroids, table.group_scales), table.group_sizes)
    else:
        mass = log_mass(scores, table.sizes)
    of_clusters = mass, table.log_weights, table.variances, table.sizes
    if kept_share is not None:
        ranks = log_ranks(of_equal_length(query), scores, *of_clusters, scale, "clusters").amax(0)  # [H, C]
        chosen = ranks > sampled_thresholds(ranks, table.sizes, kept_share)
        return Choice(scores, mass, chosen.expand(len(query), -1, -1))
    ranks = log_ranks(query, scores, *of_clusters, scale, rule)
    return Choice(scores, mass, ranks > log_threshold - (MARGIN if rule == "keys" else 0.0))


def residual_scores(
    query: torch.Tensor, directions: torch.Tensor, residuals: torch.Tensor, scale: float
) -> torch.Tensor:
    """How far logits of keys lie above those of their clusters' mean keys.

    Args:
        query: [..., H, G, D]. In 16 bits, so are directions, as the kernels' are; their products are in 8.
        directions: [H, NUM_DIRECTIONS, D].
        residuals: [H, M, NUM_DIRECTIONS / 8] int32, of the keys.
        scale: softmax scale.

    Returns:
        [..., H, G, M] float32.
    """
    directions = directions.to(query.dtype).float()
    aimed = torch.einsum("...hgd,hnd->...hgn", query.float(), directions)
    unit = aimed.abs().amax(-1, keepdim=True) / MOST_PRODUCT
    aimed = (aimed * unit.reciprocal().where(unit > 0, 0) + 0.5).floor() * unit
    return torch.einsum("...hgn,hmn->...hgm", aimed, elements_of(residuals)) * scale


def of_equal_length(query: torch.Tensor) -> torch.Tensor:
    """Vectors [R, H, G, D] float32 all of one KV head's mean squared length: what counts where tokens choose together."""
    return query.square().mean((0, 2, 3), keepdim=True).sqrt().expand_as(query)


def evenly(count: int, most: int, device: torch.device) -> torch.Tensor:
    """``most`` of the numbers below ``count``, at equal distances, or all if these are fewer: int64."""
    return torch.arange(min(count, most), device=device) * count // min(count, most)


def sampled_thresholds(ranks: torch.Tensor, sizes: torch.Tensor, kept_share: float) -> torch.Tensor:
    """What the ranks of clusters must exceed so that those that do have a share of all keys, told by SAMPLE of them.

    Args:
        ranks: [H, C].
        sizes: [H, C], keys of each.
        kept_share: of the keys.

    Returns:
        [H, 1]: of the sampled clusters, the largest rank that does not fit in; minus infinity where all do.
    """
    num_heads, count = ranks.shape
    if kept_share >= 1 or not count:
        return ranks.new_full((num_heads, 1), -torch.inf)
    sampled = evenly(count, SAMPLE, ranks.device)
    ranks, order = ranks[:, sampled].sort(dim=-1, descending=True)
    kept = sizes[:, sampled].gather(1, order).cumsum(1)
    left_out = kept > kept_share * kept[:, -1:]
    return ranks.masked_fill(~left_out, -torch.inf).amax(-1, keepdim=True)


def log_ranks(
    query: torch.Tensor,
    scores: torch.Tensor,
    mass: torch.Tensor,
    log_weights: torch.Tensor,
    variances: torch.Tensor,
    sizes: torch.Tensor,
    scale: float,
    rule: str,
) -> torch.Tensor:
    """What the choice of clusters compares with the threshold, log of w_i p_i exp(r_i), joined over query heads.

    Args:
        query: [R, H, G, D] float32.
        scores: of the clusters, [R, H, G, C].
        mass: [R, H, G, 1], natural log of what all clusters attract.
        log_weights, variances, sizes: of the clusters, [H, C].
        scale, rule: as in ``choose_clusters``.

    Returns:
        [R, H, C], minus infinity for empty clusters.
    """
    log_p = joined(scores - mass + raises(query, variances, scale), rule)
    return (log_p + log_weights).masked_fill(sizes == 0, -torch.inf)


def scores_of(query: torch.Tensor, centroids: torch.Tensor, scale: float, soft_cap: float = 0.0) -> torch.Tensor:
    """Scores s q.c [R, H, G, C] of centroids [H, C, D] for queries [R, H, G, D], bound by ``soft_cap``, 0 for none."""
    return capped(torch.einsum("rhgd,hcd->rhgc", query, centroids) * scale, soft_cap)


def log_mass(scores: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Log of the sum of N exp(s q.c) over clusters or groups, [..., H, G, 1].

    Args:
        scores: [..., H, G, C], s q.c.
        sizes: [H, C], or anything that it is broadcast with.
    """
    return (scores + sizes.float().log()[..., None, :]).logsumexp(-1, keepdim=True)


def raises(query: torch.Tensor, variances: torch.Tensor, scale: float, most: float = MOST_RAISE) -> torch.Tensor:
    """What the spread of their keys adds to the log probabilities of clusters, r_i.

    Args:
        query: [..., H, G, D] float32.
        variances: [H, C], or anything that it is broadcast with.
        scale: softmax scale.
        most: nats.

    Returns:
        [..., H, G, C], nats.
    """
    squares = (query * scale).square().sum(-1, keepdim=True)
    return (squares * variances[..., None, :] / 2).clamp(max=most)


def joined(log_p: torch.Tensor, rule: str) -> torch.Tensor:
    """Log probabilities [..., G, C] of a KV head's query heads as one, [..., C]: the largest, or that of the mean."""
    return log_p.amax(-2) if rule != "paper" else log_p.logsumexp(-2) - math.log(log_p.shape[-2])


def attend_prefix(
    query: torch.Tensor,
    table: ClusterTable,
    read_tokens: ReadTokens,
    log_threshold: float,
    num_sinks: int,
    scale: float,
    rest: bool,
    soft_cap: float = 0.0,
    rule: str = "keys",
    kept_share: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of R query tokens over one indexed prefix. Each chosen key is read once for all R.

    Args:
        query: [R, H, G, D].
        table: the clusters of the prefix.
        read_tokens: reads keys and values of the prefix.
        log_threshold: natural log of the threshold on w_i p_i exp(r_i).
        num_sinks: the first tokens of the prefix, attended to whatever the choice.
        scale: softmax scale.
        rest: whether clusters that were not chosen contribute through their mean value.
        soft_cap: bound on the logits, by a hyperbolic tangent; 0 for none.
        rule: one of RULES.
        kept_share: as in ``choose_clusters``.

    Returns:
        output [R, H, G, D] float32, log-sum-exp [R, H, G] float32 (natural log; minus infinity and a zero output
        where nothing was attended to), cluster members kept by each token [R, H] int64, and read for all [H] int64.
    """
    num_heads, device = len(table.members), query.device
    # members elsewhere belong to clusters of other prefixes
    first, last = (int(table.starts.min()), int((table.starts + table.sizes).max())) if table.sizes.shape[1] else (0, 0)
    members = table.members[:, first:last]
    scores, mass, chosen = choose_clusters(query, table, log_threshold, scale, soft_cap, rule, kept_share)
    slots = torch.arange(first, last, device=device, dtype=torch.int32).expand(num_heads, -1).contiguous()
    cluster = torch.searchsorted(table.starts.contiguous(), slots, right=True) - 1  # [H, M], -1 before the first
    owned = cluster >= 0
    cluster = cluster.clamp(min=0)
    owned &= slots < (table.starts + table.sizes).gather(1, cluster)
    looked_at = owned & chosen.any(0).gather(1, cluster)
    width = int(looked_at.sum(-1).max()) if last > first else 0
    picked = looked_at.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :width]
    cluster = cluster.gather(1, picked)
    of_key = cluster.expand(len(query), -1, -1)
    attended = chosen.gather(2, of_key) & looked_at.gather(1, picked)
    if rule == "keys" and kept_share is None:
        residuals = table.residuals[:, first:last]
        residuals = residuals.gather(1, picked[..., None].expand(-1, -1, residuals.shape[-1]))
        log_p = scores.gather(3, of_key[:, :, None].expand(-1, -1, query.shape[2], -1)) - mass
        log_p += residual_scores(query, table.directions[:, 0], residuals, scale)
        attended &= joined(log_p, rule) + table.log_weights.gather(1, cluster) > log_threshold
    query, kept, loaded = query.float(), attended.sum(-1), attended.any(0).sum(-1)
    needed = attended.any(0).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    needed = needed[:, : int(loaded.max())]
    attended = attended.gather(2, needed.expand(len(query), -1, -1))

    sinks = torch.arange(num_sinks, device=device).expand(num_heads, -1)
    positions = members.gather(1, picked.gather(1, needed)).long().masked_fill(~attended.any(0), 0)
    positions = torch.cat([sinks, positions], 1)
    keys, values = read_tokens(positions)
    attended = torch.cat([attended.new_ones(len(query), num_heads, num_sinks), attended], 2)

    logits = capped(torch.einsum("rhgd,hmd->rhgm", query, keys.float()) * scale, soft_cap)
    logits = logits.masked_fill(~attended[:, :, None], -torch.inf)
    values = values.float()
    if rest:
        measured = query if kept_share is None else of_equal_length(query)
        lumped = scores + table.sizes.float().log()[:, None] + raises(measured, table.variances, scale, MOST_REST_RAISE)
        logits = torch.cat([logits, lumped.masked_fill(chosen[:, :, None], -torch.inf)], -1)
        values = torch.cat([values, table.mean_values()], 1)
    output, lse = softmax_weighted(logits, values)
    return output, lse, kept, loaded


def attend_causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, soft_cap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of the last R of L tokens over all L, each up to itself.

    Args:
        query: [R, H, G, D]; keys, values: [H, L, D]; scale: softmax scale; soft_cap: bound on the logits, 0 for none.

    Returns:
        output [R, H, G, D] float32 and log-sum-exp [R, H, G] float32.
    """
    num_queries, length = len(query), keys.shape[1]
    token = torch.arange(length, device=query.device)
    return attend_seen(query, keys, values, token <= token[length - num_queries :, None], scale, soft_cap)


def attend_seen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of R tokens over those of L that each sees, ``seen`` [R, L] bool; else as ``attend_causal``."""
    logits = capped(torch.einsum("rhgd,hld->rhgl", query.float(), keys.float()) * scale, soft_cap)
    return softmax_weighted(logits.masked_fill(~seen[:, None, None], -torch.inf), values.float())


def capped(logits: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """Logits bound to plus and minus ``soft_cap``, or as they are where it is 0."""
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def dequantised(vectors: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Keys or values read from a cache: float32 and scaled where they are 8-bit floats, else as they are."""
    return vectors if scale is None else vectors.float() * scale


def softmax_weighted(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of logits [R, H, G, M] over M times values [H, M, D]: output [R, H, G, D], log-sum-exp [R, H, G]."""
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return torch.einsum("rhgm,hmd->rhgd", weights, values), lse


def merge(output: torch.Tensor, lse: torch.Tensor, other_output: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Joins attention over two disjoint sets of keys: outputs [..., D], log-sum-exps [...]; not both sets empty."""
    weight = torch.sigmoid(other_lse - lse)[..., None]
    return output * (1 - weight) + other_output * weight


def squeezed_attention_reference(
    query: torch.Tensor,
    output: torch.Tensor,
    suffix_lse: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    queries: "QueryTiles",
    table: ClusterTable,
    prefixes: Prefixes,
    scale: float,
    rest: bool,
    soft_cap: float = 0.0,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """The oracle of ``squeezed_attention``, with its arguments and its effect on ``output`` and ``counters``."""
    num_kv_heads, block_size = len(table.centroids), key_cache.shape[1]
    read = functools.partial(_read_paged, key_cache, value_cache, key_scale, value_scale)

    for tile, (slot, size, row, first, count, num_always, rule, num_suffix) in enumerate(queries.tiles.tolist()):
        if slot < 0:
            continue
        tokens = queries.tokens[tile, :size].long()
        grouped = query[tokens].unflatten(1, (num_kv_heads, -1))

        prefix_output, prefix_lse, kept, loaded = attend_prefix(
            grouped,
            table.prefix(first, count, int(prefixes.frames[slot])),
            lambda positions: read(*_places(block_table[row], positions, block_size)),  # noqa: B023
            float(prefixes.log_threshold[slot]),
            num_always,
            scale,
            rest,
            soft_cap,
            RULES[rule],
        )
        if suffix_lse is None:
            places, bits = queries.suffix_places[tile, :num_suffix].long(), queries.suffix_bits[tile, :num_suffix]
            seen = bits >> torch.arange(size, device=bits.device)[:, None] & 1 == 1  # [R, L]
            suffix = read(places // block_size, places % block_size)
            suffix_output, lse = attend_seen(grouped, *suffix, seen, scale, soft_cap)
        else:
            suffix_output = output[tokens].unflatten(1, (num_kv_heads, -1)).float()
            lse = suffix_lse[:, tokens].T.unflatten(1, (num_kv_heads, -1))
        merged = merge(suffix_output, lse, prefix_output, prefix_lse).flatten(1, 2)
        output[tokens] = merged.to(output.dtype)
        count_reads(prefixes.counters[slot], count > 0, kept, loaded)


def squeezed_prompts_reference(
    query: torch.Tensor,
    output: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    prompts: "PromptTiles",
    table: ClusterTable,
    prefixes: Prefixes,
    scale: float,
    rest: bool,
    soft_cap: float = 0.0,
) -> None:
    """The oracle of ``squeezed_prompts``, with its arguments and its effect on ``output`` and ``counters``."""
    num_kv_heads, block_size = len(table.centroids), key_cache.shape[1]
    for slot, row, start, size, prefix_len, num_suffix in prompts.tiles.tolist():
        if slot < 0:
            continue

        def read(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            places = _places(block_table[row], positions, block_size)  # noqa: B023
            return _read_paged(key_cache, value_cache, None, None, *places)

        tokens = slice(start, start + size)
        first, count, num_always, rule = prefixes.slots[slot].tolist()
        grouped = query[tokens].unflatten(1, (num_kv_heads, -1))
        attended, lse, kept, loaded = attend_prefix(
            grouped,
            table.prefix(first, count, int(prefixes.frames[slot])),
            read,
            math.inf,
            num_always,
            scale,
            rest,
            soft_cap,
            RULES[rule],
            float(prefixes.kept_shares[slot]),
        )
        suffix = read(prefix_len + torch.arange(num_suffix, device=query.device))
        merged = merge(*attend_causal(grouped, *suffix, scale, soft_cap), attended, lse)
        output[tokens] = merged.flatten(1, 2).to(output.dtype)
        count_reads(prefixes.counters[slot], count > 0, kept, loaded)


def _places(blocks: torch.Tensor, positions: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of a row, and places in them, of tokens at positions."""
    return blocks.long()[positions // block_size], positions % block_size


def _read_paged(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    blocks: torch.Tensor,
    places: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [H, M, D] of a cache [num_blocks, S, H, D], at places in blocks, [H, M] or [M] both."""
    heads = torch.arange(key_cache.shape[2], device=blocks.device)[:, None]
    caches = (key_cache, key_scale), (value_cache, value_scale)
    return tuple(dequantised(cache[blocks, places, heads], scale) for cache, scale in caches)


def count_reads(counters: torch.Tensor, has_clusters: bool, kept: torch.Tensor, loaded: torch.Tensor) -> None:
    """Adds one tile of R tokens to a prefix's counters [6]: members kept [R, H] and loaded [H]."""
    if has_clusters:
        counters[:4] += counters.new_tensor([len(loaded), loaded.sum(), kept.numel(), kept.sum()])
    else:
        counters[4:] += counters.new_tensor([len(loaded), kept.numel()])


def places_of_tokens(queries: "QueryTiles") -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of each slot that has any: the tokens in tiles, and where they lie side by side with those of other slots."""
    tokens: dict[int, list[int]] = {}
    for (slot, size, *_), held in zip(queries.tiles.tolist(), queries.tokens.tolist()):
        if slot >= 0:
            tokens.setdefault(slot, []).extend(held[:size])
    device = queries.tokens.device
    return {
        slot: (torch.tensor(mine, device=device), queries.starts[slot] + torch.arange(len(mine), device=device))
        for slot, mine in tokens.items()
    }


def gather_queries_reference(query: torch.Tensor, queries: "QueryTiles", group: int) -> torch.Tensor:
    """The oracle of ``shared_prefix.gather_queries``, with its arguments; zero where no token is, and no longer than that."""
    gathered = query.new_zeros(int(queries.starts[-1]), *query.shape[1:])
    for tokens, places in places_of_tokens(queries).values():
        gathered[places] = query[tokens]
    return gathered


def join_shared_reference(
    output: torch.Tensor,
    suffix_lse: torch.Tensor,
    shared_output: torch.Tensor,
    shared_lse: torch.Tensor,
    queries: "QueryTiles",
    prefixes: Prefixes,
    num_kv_heads: int,
) -> None:
    """The oracle of ``shared_prefix.join_shared``, with its arguments and its effect."""
    for slot, (tokens, places) in places_of_tokens(queries).items():
        states = output[tokens].float(), suffix_lse[:, tokens].T, shared_output[places].float(), shared_lse[:, places].T
        output[tokens] = merge(*states).to(output.dtype)
        prefixes.counters[slot, 4:] += num_kv_heads * prefixes.counters.new_tensor([1, len(tokens)])


def nearest_reference(points: torch.Tensor, centroids: torch.Tensor, memory_bytes: int = 1 << 30) -> torch.Tensor:
    """As ``nearest.nearest``, within so much temporary memory for one point of each item or more."""
    bias = centroids.square().sum(-1)[:, None] / -2
    step = max(memory_bytes // (4 * bias.numel()), 1)
    return torch.cat([torch.baddbmm(bias, part, centroids.mT).argmax(-1) for part in points.split(step, 1)], 1)


def match_rows_reference(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    live: torch.Tensor,
    num_tokens: int,
    row_slot: torch.Tensor,
    prefix_len: torch.Tensor,
) -> None:
    """Matches the B rows of a step to prefixes, by the physical blocks in their block tables.

    A physical block has one content while any live request holds it, and the content of a prefix's last block is
    fixed by the whole prefix. A row's block table may hold leftovers of earlier rows beyond its own blocks; the
    number of tokens that it has computed says how far it can be believed.

    Args:
        block_table: [at least B, max blocks] int32.
        seq_lens: [B] int32, tokens of each row, this step's queries among them.
        query_start_loc: [at least B + 1] int32, the first token of each row.
        live: [A, 6] int32, what is known of rows that hold a block: slot, place in the block table, block, the tokens
            that a row must have computed for this to hold of it, the most that it may have, and those of its prefix.
            Of several that a row matches, the one which needs the most tokens wins, and of equals the first.
        num_tokens: query tokens of squeezed rows that there is room for. Rows beyond it go dense.
        row_slot: [B] int32, written: the slot of each row's prefix, or DENSE_SLOT.
        prefix_len: [B] int32, written: tokens of its prefix, 0 without one.
    """
    num_rows, width = len(seq_lens), block_table.shape[1]
    counts = query_start_loc[: num_rows + 1].diff()
    context = (seq_lens - counts)[:, None]
    slot, index, block, needed, most, length = live.unbind(1)
    found = block_table[:num_rows, index.clamp(max=width - 1)] == block  # [B, A]
    found &= (context >= needed) & (context <= most) & (index < width)
    computed, best = torch.where(found, needed, -1).max(1)
    squeezed = (computed >= 0) & (slot[best] >= 0)
    squeezed &= torch.where(squeezed, counts, 0).cumsum(0) <= num_tokens
    row_slot.copy_(torch.where(squeezed, slot[best], DENSE_SLOT))
    prefix_len.copy_(torch.where(squeezed, length[best], 0))


def skip_prefixes_reference(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    row_slot: torch.Tensor,
    prefix_len: torch.Tensor,
    page_size: int,
    max_seq_len: int,
    suffix_lens: torch.Tensor,
    suffix_blocks: torch.Tensor,
) -> None:
    """Lengths and block tables of what follows the prefixes of B rows, for attention that knows of no prefixes.

    Args:
        block_table: [at least B, W] int32.
        seq_lens: [B] int32, tokens of each row.
        row_slot: [B] int32, of each row whose tokens are a prompt's that choose together PROMPT_SLOTS or more: nothing
            follows its prefix here, as it attends to that elsewhere.
        prefix_len: [B] int32, tokens of its prefix, in whole blocks; 0 without one.
        page_size: tokens of a block of the table.
        max_seq_len: tokens of the longest row.
        suffix_lens: [at least B] int32; written for the B rows.
        suffix_blocks: [at least B, W] int32; written for as many blocks of the B rows as the longest has. Beyond a
            row's own blocks is anything that the block table holds.
    """
    num_rows, width = len(seq_lens), block_table.shape[1]
    suffix_lens[:num_rows] = torch.where(row_slot < PROMPT_SLOTS, seq_lens - prefix_len, 0)
    column = torch.arange(min(-(-max_seq_len // page_size), width), device=seq_lens.device)
    shifted = (column + prefix_len[:, None] // page_size).clamp(max=width - 1)
    suffix_blocks[:num_rows, : len(column)] = block_table[:num_rows].gather(1, shifted)
