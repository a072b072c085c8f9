"""Squeezed attention on the GPU: three kernels, the formulas of ``reference``.

look_up          ``look_up``    which keys each tile of queries needs
attend, merge    ``attend``     attention over those keys, joined to the rest and to the suffix
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_squeeze.kernels.attend import attend_kernel, merge_kernel
from vllm_squeeze.kernels.look_up import look_up_kernel
from vllm_squeeze.kernels.tables import MAX_GROUP, ClusterTable, Prefixes
from vllm_squeeze.kernels.tiles import MIN_TILE_ROWS, QueryTiles, most_tiles, padded, tokens_per_tile
from vllm_squeeze.kernels.workspace import LOOK_UPS_PER_MULTIPROCESSOR, Workspace

REGISTERS = 65536
"""Of a multiprocessor."""


@dataclass(frozen=True)
class Tuning:
    """Rows per block and warps per program.

    Attributes:
        look_up: clusters scored at once, pipeline stages of that, clusters chosen from at once, blocks of so many
            keys that are listed at once, and warps.
        attend: keys attended to at once, clusters of the rest, warps, pipeline stages, and programs for each
            multiprocessor.
        merge: parts merged at once, columns of the output, and warps.
    """

    look_up: tuple[int, int, int, int, int]
    attend: tuple[int, int, int, int, int]
    merge: tuple[int, int, int]


def tuning(head_size: int, element_size: int, tile_rows: int) -> Tuning:
    """The blocks for D = ``head_size``, elements of so many bytes and M = ``tile_rows``."""
    look_up = 32, 3, 128, 8, 4
    width = padded(head_size) * element_size
    block = min(max(16384 // width, 16), 64)
    if tile_rows > MIN_TILE_ROWS:
        return Tuning(look_up, attend=(block, min(block, 32), 4, 3, 2), merge=(64, 64, 2))
    block = min(block, 32)
    return Tuning(look_up, attend=(block, block, 4, 3, 3), merge=(64, 32, 2))


def registers_of(per_multiprocessor: int, warps: int) -> int:
    """All registers that each thread of so many programs can have; by itself the compiler leaves some of them."""
    return min(REGISTERS // (per_multiprocessor * warps * 32) // 8 * 8, 255)


def squeezed_attention(
    query: torch.Tensor,
    output: torch.Tensor,
    suffix_lse: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    queries: QueryTiles,
    table: ClusterTable,
    prefixes: Prefixes,
    scale: float,
    rest: bool,
    workspace: Workspace,
    soft_cap: float = 0.0,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    suffix_done: torch.cuda.Event | None = None,
) -> None:
    """Joins attention over indexed prefixes to the dense attention over what follows them, in place.

    Neither allocates nor waits for the device, so a CUDA graph may capture it and replay it over new contents.

    Args:
        query: [N, H * G, D].
        output: [N, H * G, D], attention over the suffix; merged for the tokens in ``queries``, untouched for others.
        suffix_lse: [H * G, N] float32, natural log-sum-exp of the attention over the suffix. None where ``queries`` list
            the suffixes: then ``output`` is only written.
        key_cache: [num_blocks, S, H, D], a view of the paged cache.
        value_cache: the same, with the same strides.
        block_table: [B, max_blocks] int32.
        queries: the tokens to squeeze, in tiles.
        table: the clusters of all prefixes.
        prefixes: none with more clusters or tokens than the workspace has room for.
        scale: softmax scale.
        rest: whether clusters that were not chosen contribute through their mean value.
        workspace: of the same H and D.
        soft_cap: bound on the logits, by a hyperbolic tangent; 0 for none.
        key_scale: [1] float32, what the keys of an 8-bit cache are multiplied by.
        value_scale: the same of its values.
        suffix_done: where another stream computes ``output`` and ``suffix_lse``: what to wait for before merging.
    """
    num_kv_heads, *_, head_size = table.frames.shape
    group = query.shape[1] // num_kv_heads
    page_size = key_cache.shape[1]
    assert workspace.logits.shape[1] == num_kv_heads and workspace.partial_output.shape[2] == head_size
    assert query.shape == output.shape and query.shape[1:] == (num_kv_heads * group, head_size)
    assert page_size & (page_size - 1) == 0
    assert table.centroids.dtype == table.value_centroids.dtype == table.group_centroids.dtype == torch.int32
    assert key_cache.dtype == value_cache.dtype and (key_cache.dtype == query.dtype or key_cache.itemsize == 1)
    assert key_cache.stride() == value_cache.stride() and all(s % head_size == 0 for s in key_cache.stride()[:2])
    # where a key lies is told in 32 bits, in units of D elements
    assert key_cache.shape[0] * key_cache.stride(0) < 2**31 * head_size
    facts = table.log_sizes, table.starts, table.log_weights, table.variances
    per_cluster = *facts, table.centroid_scales, table.value_scales
    assert all(tensor.stride() == table.sizes.stride() for tensor in per_cluster)
    assert table.group_centroids.stride()[1:] == table.centroids.stride()[1:]
    assert table.group_scales.stride() == table.group_sizes.stride()
    assert all(tensor[0].is_contiguous() for tensor in (table.frames, table.directions, table.residuals))
    contiguous = (queries.tokens, queries.tiles, prefixes.log_threshold, prefixes.frames, prefixes.counters)
    assert all(tensor.is_contiguous() for tensor in contiguous)
    rows = (query, output, key_cache, block_table, table.sizes, table.members, table.group_sizes)
    vectors = (table.centroids, table.value_centroids)
    assert all(tensor.stride(-1) == 1 for tensor in rows + vectors)
    assert group <= MAX_GROUP

    num_tokens = queries.num_tokens
    tile, head, tuned, launch = _common(query, queries, num_kv_heads)
    num_tiles = most_tiles(num_tokens, queries.num_slots, group)
    max_keys, max_centroids = workspace.list_places.shape[-1], workspace.logits.shape[-1]
    for first_tile in range(0, num_tiles, workspace.max_tiles):
        tiles_now = min(num_tiles - first_tile, workspace.max_tiles)
        look_up(
            query, block_table, page_size, queries, table, prefixes, scale, workspace, soft_cap, first_tile, tiles_now
        )
        key_block, rest_block, key_warps, key_stages, per_multiprocessor = tuned.attend
        programs = workspace.num_programs(per_multiprocessor)
        # one of two variants, so that few are compiled
        plan_tiles = 1 if tiles_now == 1 else padded(workspace.max_tiles)
        plan = {"TILES": plan_tiles, "HP": padded(num_kv_heads), "REST": rest}
        attend_kernel[(programs,)](
            query, queries.tokens, queries.tiles, queries.tile_count,
            queries.always_places, queries.suffix_places, queries.suffix_bits,
            key_cache, value_cache, key_scale, value_scale, table.value_centroids, table.value_scales,
            workspace.logits, workspace.chosen, workspace.list_places, workspace.list_bits, workspace.listed,
            workspace.kept_pairs, prefixes.counters, workspace.partial_output, workspace.partial_lse,
            first_tile, tiles_now, num_kv_heads, scale, soft_cap,
            *query.stride()[:2], *key_cache.stride()[:3], *table.value_centroids.stride()[:2], table.sizes.stride(0),
            queries.always_places.stride(0), queries.suffix_places.stride(0), max_centroids, max_keys,
            SPLITS=workspace.num_splits, SP=padded(workspace.num_splits), BLOCK=key_block, REST_BLOCK=rest_block,
            S=page_size, STAGES=key_stages, SOFT_CAP=soft_cap > 0, num_warps=key_warps,
            maxnreg=registers_of(per_multiprocessor, key_warps), **tile, **head, **plan, **launch,
        )  # fmt: skip
        if suffix_done is not None and first_tile == 0:
            torch.cuda.current_stream().wait_event(suffix_done)
        block, columns, warps = tuned.merge
        rows = min(tile["ROWS"], num_tokens)  # of a tile, at most
        merge_kernel[(tiles_now * rows, num_kv_heads * group, -(-head_size // columns))](
            output, suffix_lse, queries.tokens, queries.tiles, workspace.listed,
            workspace.partial_output, workspace.partial_lse,
            first_tile, tiles_now, rows, programs, num_kv_heads,
            *output.stride()[:2], *((0, 0) if suffix_lse is None else suffix_lse.stride()),
            D=head_size, KEY_BLOCK=key_block, BLOCK=block, COLUMNS=columns, num_warps=warps, **tile, **plan,
            # not ahead of time where it has to wait for two streams
            **(launch if suffix_done is None else {"PDL": False}),
        )  # fmt: skip


def look_up(
    query: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    queries: QueryTiles,
    table: ClusterTable,
    prefixes: Prefixes,
    scale: float,
    workspace: Workspace,
    soft_cap: float = 0.0,
    first_tile: int = 0,
    tiles_now: int = 1,
) -> None:
    """The part of ``squeezed_attention`` that says which keys some of the tiles need, into the workspace.

    Args:
        page_size: tokens of a block of the table.
        first_tile, tiles_now: the tiles; no more of them than the workspace has room for.
        others: as in ``squeezed_attention``.
    """
    if not table.sizes.shape[1]:
        return  # all prefixes are exact
    num_kv_heads = len(table.centroids)
    tile, head, tuned, launch = _common(query, queries, num_kv_heads)
    splits, (*_, masses, mass_rows) = workspace.num_splits, workspace.masses.shape
    max_keys, max_centroids = workspace.list_places.shape[-1], workspace.logits.shape[-1]
    scored, stages, block, listed, warps = tuned.look_up
    look_up_kernel[(masses + splits, num_kv_heads, tiles_now)](
        query, queries.tokens, queries.tiles, queries.tile_count, prefixes.log_threshold, prefixes.frames,
        table.centroids, table.centroid_scales, table.sizes, table.log_sizes, table.starts, table.log_weights,
        table.variances, table.group_centroids, table.group_scales, table.group_sizes, table.frames,
        table.members, table.residuals, table.directions, block_table, queries.always_places,
        workspace.logits, workspace.row_facts, workspace.chosen, workspace.bases, workspace.picked,
        workspace.found,
        workspace.list_places, workspace.list_bits, workspace.listed, workspace.turns, workspace.masses, workspace.kept,
        workspace.kept_pairs,
        first_tile, scale, soft_cap,
        *query.stride()[:2], *table.centroids.stride()[:2], table.sizes.stride(0),
        table.group_centroids.stride(0), table.group_sizes.stride(0), table.frames.stride(0), table.members.stride(0),
        table.residuals.stride(0), table.directions.stride(0), block_table.stride(0), queries.always_places.stride(0),
        max_centroids, workspace.picked.shape[2], max_keys,
        SPLITS=splits, SP=padded(splits), MASSES=masses, MP=padded(masses), MASS_ROWS=mass_rows,
        SCORED=scored, STAGES=stages, BLOCK=block, LISTED=listed, S=page_size, SOFT_CAP=soft_cap > 0,
        num_warps=warps, maxnreg=registers_of(LOOK_UPS_PER_MULTIPROCESSOR, warps), **tile, **head, **launch,
    )  # fmt: skip


class _Common(NamedTuple):
    """What launches have in common: constants of tiles and of heads, blocks, and how they are launched."""

    tile: dict[str, int]
    head: dict[str, int]
    tuned: Tuning
    launch: dict[str, bool]


def _common(query: torch.Tensor, queries: QueryTiles, num_kv_heads: int) -> _Common:
    early = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (9, 0)
    group, head_size = query.shape[1] // num_kv_heads, query.shape[2]
    return _constants(tokens_per_tile(queries.num_tokens, group), group, head_size, query.element_size(), early)


@functools.lru_cache
def _constants(size: int, group: int, head_size: int, element_size: int, early: bool) -> _Common:
    return _Common(
        tile={"GROUP": group, "GP": padded(group), "ROWS": size},
        head={"D": head_size, "DP": max(16, padded(head_size))},
        tuned=tuning(head_size, element_size, size * padded(group)),
        # ahead of time, while the kernel before still runs
        launch={"PDL": True, "launch_pdl": True} if early else {"PDL": False},
    )
