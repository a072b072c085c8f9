"""Queries grouped by prefix: what one prefix's tokens need of it is loaded once for a whole tile of them."""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from vllm_squeeze.kernels.tables import Prefixes

MIN_TILE_ROWS, MAX_TILE_ROWS = 16, 64
"""Query rows of a tile, tokens times padded query heads: as few as a product of the tensor cores takes, or as many as
its fastest form does. 32 rows take longer than 64, and 128 no less than twice as long."""

MAX_TILE_TOKENS = 32
"""Tokens of a tile: each has a bit in an int32."""

MAX_TILES_AT_ONCE = 64

MAX_BLOCK = 128
"""Keys or clusters that a kernel takes at once, at most."""

PARTS_AT_ONCE, PART_KEYS = 128, 4
"""Parts of clusters whose keys a program chooses from at once, and keys of each of these: clusters of twenty on average
fill nine tenths of such parts."""

MAX_SUFFIX_TILES, MAX_SUFFIX_KEYS = 64, 32768
"""How many tiles can have their suffixes listed, and how many keys each. More are left to FlashAttention."""

TILE_FACTS = 8
_ROWS_BLOCK = 256
_TILES_BLOCK = 128
_PLACES_BLOCK = 1024


def padded(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def tokens_per_tile(num_tokens: int, group: int) -> int:
    """How many tokens a tile has room for when there are ``num_tokens`` of ``group`` query heads per KV head.

    Never more where there are fewer tokens, so that tiles made for some tokens fit kernels launched for more.
    """
    rows = MIN_TILE_ROWS if num_tokens * padded(group) <= MIN_TILE_ROWS else MAX_TILE_ROWS
    return min(rows // padded(group), MAX_TILE_TOKENS)


def largest_tile(group: int) -> int:
    """How many tokens a tile has room for where there are many."""
    return tokens_per_tile(MAX_TILE_ROWS, group)


def most_tiles(num_tokens: int, num_slots: int, group: int) -> int:
    """The most tiles that up to ``num_tokens`` tokens of up to ``num_slots`` prefixes can come to."""
    size = tokens_per_tile(num_tokens, group)
    return min(num_tokens, (num_tokens + num_slots * (size - 1)) // size)


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_tiles", "size"])
def _group_kernel(
    row_slot, query_start_loc, slots, tiles, tile_count, tokens, token_rows, slot_rows, starts,
    num_rows, num_slots, num_tiles, size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FACTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    i_slot = tl.program_id(0)
    o_row, o_t = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_row = o_row < num_rows
    b_slot = tl.load(row_slot + o_row, mask=m_row, other=-1)
    b_start = tl.load(query_start_loc + o_row, mask=m_row, other=0)
    b_count = tl.load(query_start_loc + o_row + 1, mask=m_row, other=0) - b_start
    first_tile = 0
    for i in range(0, i_slot):
        first_tile += tl.cdiv(tl.sum(tl.where(b_slot == i, b_count, 0), 0), size)
    tl.store(starts + i_slot, first_tile * size)
    if i_slot == num_slots:
        tl.store(tile_count, first_tile)
        # the rest of them are none
        for i_t in range(first_tile, num_tiles, BLOCK):
            m_t = i_t + o_t < num_tiles
            tl.store(tiles + (i_t + o_t) * FACTS, tl.full([BLOCK], -1, tl.int32), mask=m_t)
        return

    i_row = tl.max(tl.where(b_slot == i_slot, o_row, -1), 0)
    tl.store(slot_rows + i_slot, i_row)
    b_count = tl.where(b_slot == i_slot, b_count, 0)
    b_place = tl.cumsum(b_count, 0) - b_count
    for i_n in range(0, tl.max(b_count, 0)):
        b_tile = first_tile + (b_place + i_n) // size
        o_token = b_tile * TOKENS + (b_place + i_n) % size
        tl.store(tokens + o_token, b_start + i_n, mask=i_n < b_count)
        tl.store(token_rows + o_token, o_row, mask=i_n < b_count)
    total = tl.sum(b_count, 0)
    first_centroid, count = tl.load(slots + i_slot * 4), tl.load(slots + i_slot * 4 + 1)
    num_always, rule = tl.load(slots + i_slot * 4 + 2), tl.load(slots + i_slot * 4 + 3)
    for i_t in range(0, tl.cdiv(total, size), BLOCK):
        b_left = total - (i_t + o_t) * size
        m_t = b_left > 0
        p_facts = tiles + (first_tile + i_t + o_t) * FACTS
        tl.store(p_facts, tl.zeros_like(o_t) + i_slot, mask=m_t)
        tl.store(p_facts + 1, tl.minimum(b_left, size), mask=m_t)
        tl.store(p_facts + 2, tl.zeros_like(o_t) + i_row, mask=m_t)
        tl.store(p_facts + 3, tl.zeros_like(o_t) + first_centroid, mask=m_t)
        tl.store(p_facts + 4, tl.zeros_like(o_t) + count, mask=m_t)
        tl.store(p_facts + 5, tl.zeros_like(o_t) + num_always, mask=m_t)
        tl.store(p_facts + 6, tl.zeros_like(o_t) + rule, mask=m_t)
        tl.store(p_facts + 7, tl.zeros_like(o_t), mask=m_t)


@triton.jit(do_not_specialize=["stride_row", "max_keys"])
def _list_always_kernel(
    slot_rows, slots, block_table, always_places, stride_row, max_keys, S: tl.constexpr, BLOCK: tl.constexpr
):
    i_slot, i_b = tl.program_id(0), tl.program_id(1)
    i_row = tl.load(slot_rows + i_slot).to(tl.int64)
    num_always = tl.load(slots + i_slot * 4 + 2)
    if (i_row < 0) | (i_b * BLOCK >= num_always):
        return
    o_position = i_b * BLOCK + tl.arange(0, BLOCK)
    m_n = o_position < num_always
    b_block = tl.load(block_table + i_row * stride_row + o_position // S, mask=m_n, other=0)
    p_places = always_places + i_slot.to(tl.int64) * max_keys + o_position
    tl.store(p_places, b_block * S + o_position % S, mask=m_n)


def kinds_of_tiles(num_slots: int, group: int) -> list[int]:
    """Numbers of tokens whose tiles differ in what the kernels are compiled for: their size, and whether they are many."""
    kinds = {
        (tokens_per_tile(tokens, group), most_tiles(tokens, num_slots, group) > 1): tokens
        for tokens in range(MAX_TILE_ROWS + 1, 0, -1)
    }
    return sorted(kinds.values())


@triton.jit
def _bits_below(n):
    """The lowest ``n`` of 32 bits."""
    return tl.where(n < 32, (1 << tl.minimum(n, 31)) - 1, -1)


@triton.jit(do_not_specialize=["stride_row"])
def _list_suffixes_kernel(
    tiles, tokens, token_rows, seq_lens, prefix_lens, query_start_loc, block_table, suffix_places, suffix_bits,
    stride_row, stride_tile,
    MOST: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, FACTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    i_t, i_n = tl.program_id(0), tl.program_id(1)
    num_tokens = tl.load(tiles + i_t * FACTS + 1)
    if (tl.load(tiles + i_t * FACTS) < 0) | (i_n >= num_tokens):
        return
    o_n = tl.arange(0, TOKENS)
    m_n = o_n < num_tokens
    p_row = token_rows + i_t * TOKENS + o_n
    b_row = tl.load(p_row, mask=m_n, other=-1)
    b_first = m_n & (b_row != tl.load(p_row - 1, mask=m_n & (o_n > 0), other=-1))  # of the tile's tokens of a row
    b_len = tl.load(seq_lens + b_row, mask=b_first, other=0) - tl.load(prefix_lens + b_row, mask=b_first, other=0)
    if i_n == 0:
        tl.store(tiles + i_t * FACTS + 7, tl.minimum(tl.sum(b_len, 0), MOST).to(tl.int32))
    length = tl.sum(tl.where(o_n == i_n, b_len, 0), 0)
    begin = tl.sum(tl.where(o_n < i_n, b_len, 0), 0)
    i_row = tl.load(token_rows + i_t * TOKENS + i_n).to(tl.int64)
    end = i_n + tl.sum((b_row == i_row).to(tl.int32), 0)
    seq_len = tl.load(seq_lens + i_row)
    position = seq_len - (tl.load(query_start_loc + i_row + 1) - tl.load(tokens + i_t * TOKENS + i_n))
    p_places, p_bits = suffix_places + i_t.to(tl.int64) * stride_tile, suffix_bits + i_t.to(tl.int64) * stride_tile
    for i_k in range(0, length, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)
        m_k = (o_k < length) & (begin + o_k < MOST)
        o_position = seq_len - length + o_k
        b_block = tl.load(block_table + i_row * stride_row + o_position // S, mask=m_k, other=0)
        tl.store(p_places + begin + o_k, b_block * S + o_position % S, mask=m_k)
        # a token does not see what comes after it
        b_unseen = i_n + tl.maximum(o_position - position, 0)
        tl.store(p_bits + begin + o_k, _bits_below(end) & ~_bits_below(b_unseen), mask=m_k)


@dataclass(frozen=True)
class QueryTiles:
    """The query tokens of a step's squeezed rows, in tiles of one prefix each. The same for all layers.

    Attributes:
        num_tokens: how many tokens there may be.
        num_slots: of how many prefixes they may be.
        tiles: [most tiles, 8] int32, per tile: slot of the prefix or -1 where there is no tile, its number of tokens,
            a row of the block table that begins with the prefix, of the prefix what Prefixes.slots says, and how many
            keys of suffixes are listed.
        tile_count: [1] int32, how many of them there are.
        tokens: [most tiles, 32] int32, the query tokens of each tile.
        token_rows: [most tiles, 32] int32, and their rows, ascending.
        slot_rows: [P] int32, a row of the block table that begins with the slot's prefix, or -1.
        starts: [P + 1] int32, where each slot's tokens begin if tiles lie side by side, each with room for as many
            tokens as the largest; and where the last one's end.
        always_places: [P, T] int32, where in the KV cache the first tokens lie that are attended to whatever the
            choice: block times page size plus place in the block.
        suffix_places: [suffix tiles, keys] int32, where the keys lie that follow the prefix in each tile's rows.
        suffix_bits: the same shape, int32, a bit for each token of the tile that attends to the key.
    """

    num_tokens: int
    num_slots: int
    tiles: torch.Tensor
    tile_count: torch.Tensor
    tokens: torch.Tensor
    token_rows: torch.Tensor
    slot_rows: torch.Tensor
    starts: torch.Tensor
    always_places: torch.Tensor
    suffix_places: torch.Tensor
    suffix_bits: torch.Tensor

    @classmethod
    def allocate(
        cls, max_tokens: int, num_slots: int, max_keys: int, group: int, device: torch.device | str
    ) -> "QueryTiles":
        """Room for ``max_tokens`` tokens of prefixes of up to ``max_keys`` tokens; no tiles yet."""
        # fewer tokens may make more tiles than many: the smallest tiles are those of few tokens
        most = max(most_tiles(tokens, num_slots, group) for tokens in range(max_tokens + 1))

        def full(*shape: int) -> torch.Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        # and what the kernels look at beyond the last
        tiles = full(most + MAX_TILES_AT_ONCE, TILE_FACTS)
        suffixes = min(most, MAX_SUFFIX_TILES), MAX_SUFFIX_KEYS + MAX_BLOCK
        return cls(
            num_tokens=max_tokens,
            num_slots=num_slots,
            tiles=tiles,
            tile_count=torch.zeros(1, dtype=torch.int32, device=device),
            tokens=full(most, MAX_TILE_TOKENS),
            token_rows=full(most, MAX_TILE_TOKENS),
            slot_rows=full(num_slots),
            starts=torch.zeros(num_slots + 1, dtype=torch.int32, device=device),
            always_places=full(num_slots, max_keys),
            suffix_places=full(*suffixes),
            suffix_bits=full(*suffixes),
        )

    def first(self, num_tokens: int, num_slots: int) -> "QueryTiles":
        """The same, of a step whose tiles have no more than ``num_tokens`` tokens, of ``num_slots`` prefixes."""
        return replace(self, num_tokens=num_tokens, num_slots=num_slots)

    def clear(self) -> None:
        """Leaves no tiles."""
        self.tiles[:, 0] = -1
        self.tile_count.zero_()

    def fill(
        self,
        row_slot: torch.Tensor,
        query_start_loc: torch.Tensor,
        block_table: torch.Tensor,
        prefixes: Prefixes,
        num_tokens: int,
        group: int,
        page_size: int,
    ) -> None:
        """Groups the tokens of a step without waiting for the device. No suffixes are listed yet.

        Args:
            row_slot: [B] int32, the slot of each row's prefix, negative where it has none.
            query_start_loc: [at least B + 1] int32, the first token of each row.
            block_table: [at least B, max_blocks] int32.
            prefixes: of the slots.
            num_tokens: not below the number of tokens of rows with a slot.
            group: query heads per KV head.
            page_size: tokens of a block of the table.
        """
        num_rows, (num_slots, max_keys) = len(row_slot), self.always_places.shape
        _group_kernel[(num_slots + 1,)](
            row_slot, query_start_loc, prefixes.slots, self.tiles, self.tile_count, self.tokens, self.token_rows,
            self.slot_rows, self.starts, num_rows, num_slots, len(self.tiles), tokens_per_tile(num_tokens, group),
            ROWS=padded(max(num_rows, _ROWS_BLOCK)), BLOCK=_TILES_BLOCK, FACTS=TILE_FACTS, TOKENS=MAX_TILE_TOKENS,
        )  # fmt: skip
        _list_always_kernel[(num_slots, triton.cdiv(max_keys, _PLACES_BLOCK))](
            self.slot_rows, prefixes.slots, block_table, self.always_places, block_table.stride(0), max_keys,
            S=page_size, BLOCK=_PLACES_BLOCK,
        )  # fmt: skip

    def list_suffixes(
        self,
        prefix_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        block_table: torch.Tensor,
        num_tokens: int,
        group: int,
        page_size: int,
    ) -> None:
        """Lists what follows the prefixes, for the kernels to attend to as well. After ``fill``, of the same step.

        Args:
            prefix_lens: [B] integer, tokens of each row's prefix.
            seq_lens: [B] integer, tokens of each row, this step's queries among them.
            query_start_loc, block_table, num_tokens, group, page_size: as in ``fill``.
        """
        num_tiles = min(most_tiles(num_tokens, self.num_slots, group), len(self.suffix_places))
        _list_suffixes_kernel[(num_tiles, tokens_per_tile(num_tokens, group))](
            self.tiles, self.tokens, self.token_rows, seq_lens, prefix_lens, query_start_loc, block_table,
            self.suffix_places, self.suffix_bits, block_table.stride(0), self.suffix_places.stride(0),
            MOST=MAX_SUFFIX_KEYS, S=page_size, BLOCK=_PLACES_BLOCK, FACTS=TILE_FACTS, TOKENS=MAX_TILE_TOKENS,
        )  # fmt: skip

    def can_list_suffixes(self, num_tokens: int, longest: int, group: int) -> bool:
        """Whether there is room for the suffixes of a step.

        Args:
            num_tokens: of its rows, all of which have a slot.
            longest: keys of the longest suffix, at most.
            group: query heads per KV head.
        """
        rows_per_tile = min(num_tokens, tokens_per_tile(num_tokens, group))
        num_tiles = most_tiles(num_tokens, self.num_slots, group)
        return rows_per_tile * longest <= MAX_SUFFIX_KEYS and num_tiles <= MAX_SUFFIX_TILES
