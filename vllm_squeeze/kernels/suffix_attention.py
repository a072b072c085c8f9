"""Dense attention over what follows indexed prefixes, by xformers: for GPUs on which vLLM has no FlashAttention.

Of xformers' kernels only those run on all such GPUs that want a row's keys side by side, not in pages. So the keys of
squeezed rows are packed first, which costs little where squeezing pays: most of a row's keys are its prefix's.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_squeeze.kernels.tiles import padded

_PACK_BLOCK = 64
# Said where xformers' own binary does not fit torch's version. This kernel needs none of it: it comes with torch.
_WITHOUT_ITS_BINARY = "xFormers wasn't build with CUDA support"


def why_unsupported(head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What keeps xformers from attending with heads of this size and dtype on this device, in a line, or None."""
    try:
        from xformers.ops import fmha
    except ImportError:
        return "xformers is not installed"
    probe = torch.empty(1, 1, 1, head_size, dtype=dtype, device=device)
    reasons = fmha.cutlass.FwOp.not_supported_reasons(fmha.Inputs(probe, probe, probe))
    return next((reason for reason in reasons if reason != _WITHOUT_ITS_BINARY), None)


@triton.jit
def _pack_kernel(
    key_cache, value_cache, places, total, keys, values,
    stride_block, stride_token, stride_head,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0), tl.program_id(1)
    num_keys = tl.load(total)
    if i_n * BLOCK >= num_keys:
        return
    o_n, o_d = i_n * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    m_n = o_n < num_keys
    m_kv = m_n[:, None] & (o_d < D)[None, :]
    b_place = tl.load(places + o_n, mask=m_n, other=0)
    b_from = (b_place // S).to(tl.int64) * stride_block + (b_place % S) * stride_token + i_h.to(tl.int64) * stride_head
    o_from = b_from[:, None] + o_d[None, :]
    o_to = (o_n[:, None] * H + i_h) * D + o_d[None, :]  # [BLOCK, DP]
    tl.store(keys + o_to, tl.load(key_cache + o_from, mask=m_kv), mask=m_kv)
    tl.store(values + o_to, tl.load(value_cache + o_from, mask=m_kv), mask=m_kv)


@dataclass(frozen=True)
class Suffixes:
    """Where the keys that follow the prefixes of a step's squeezed rows lie. The same for all layers.

    Attributes:
        starts: [max rows + 1] int32, the first of each row's packed keys; the last is the number of all.
        lens: [max rows + 1] int32, how many each row has; 0 for other rows, and for what is no row.
        places: [max keys] int32, where in the KV cache each packed key lies: block times page size plus place in the
            block.
        rows: [max tokens] int64, the row of each query token; for what is no token, the number of rows.
        positions: [max tokens] int64, which of its row's query tokens it is.
    """

    starts: torch.Tensor
    lens: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def allocate(cls, max_rows: int, max_tokens: int, max_keys: int, device: torch.device | str) -> "Suffixes":
        """Room for so many; no keys yet."""

        def zeros(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        rows = zeros(max_rows + 1, torch.int32), zeros(max_rows + 1, torch.int32)
        return cls(*rows, zeros(max_keys, torch.int32), zeros(max_tokens, torch.int64), zeros(max_tokens, torch.int64))

    def fill(
        self,
        squeezed: torch.Tensor,
        prefix_len: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        block_table: torch.Tensor,
        page_size: int,
    ) -> None:
        """Takes in a step without waiting for the device.

        Args:
            squeezed: [B] bool, whether a row is squeezed; their suffixes have no more keys than there is room for.
            prefix_len: [B] integer, tokens of the row's prefix.
            seq_lens: [B] integer, tokens of each row, this step's queries among them.
            query_start_loc: [B + 1] int32, the first token of each row; the last is the number of tokens.
            block_table: [B, max blocks] int32.
            page_size: tokens of a block of the table.
        """
        num_rows, device = len(squeezed), squeezed.device
        lens = torch.where(squeezed, seq_lens - prefix_len, 0)
        until = lens.cumsum(0)
        self.lens[:num_rows], self.lens[num_rows:] = lens, 0
        self.starts[1 : num_rows + 1], self.starts[num_rows + 1 :] = until, until[-1]

        key = torch.arange(len(self.places), device=device)
        row = torch.searchsorted(until, key, right=True)
        found = row < num_rows
        row = torch.where(found, row, 0)
        position = torch.where(found, key - (until - lens)[row] + prefix_len[row], 0)
        block = block_table[row, position // page_size]
        self.places.copy_(block * page_size + position % page_size)

        token = torch.arange(len(self.rows), dtype=query_start_loc.dtype, device=device)
        self.rows.copy_(torch.searchsorted(query_start_loc[1:], token, right=True))
        self.positions.copy_(token - query_start_loc[self.rows])


def attend_suffix(
    query: torch.Tensor,
    output: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    suffixes: Suffixes,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
    packed: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of squeezed rows over what follows their prefixes.

    Does not wait for the device, so a CUDA graph may capture it and replay it over new contents.

    Args:
        query: [N, H * G, D].
        output: [N, H * G, D]; written for tokens of squeezed rows, untouched for others.
        key_cache: [num_blocks, S, H, D], a view of the paged cache.
        value_cache: the same, with the same strides.
        suffixes: of the rows.
        query_start_loc: [B + 1] int32, the first token of each row.
        max_query_len: the most query tokens of a row.
        scale: softmax scale.
        packed: [2, max keys, H, D], room for packed keys and values.

    Returns:
        natural log-sum-exp [H * G, N] float32; anything for tokens of other rows.
    """
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import _PaddedSeqLenInfo, _SeqLenInfo

    num_tokens, num_heads, head_size = query.shape
    _, max_keys, num_kv_heads, _ = packed.shape
    assert key_cache.stride() == value_cache.stride() and key_cache.stride(-1) == 1
    assert key_cache.dtype == packed.dtype == query.dtype and packed.is_contiguous()
    keys, values = packed
    _pack_kernel[(triton.cdiv(max_keys, _PACK_BLOCK), num_kv_heads)](
        key_cache, value_cache, suffixes.places, suffixes.starts[-1:], keys, values,
        *key_cache.stride()[:3],
        H=num_kv_heads, D=head_size, DP=padded(head_size), S=key_cache.shape[1], BLOCK=_PACK_BLOCK,
    )  # fmt: skip

    num_rows = len(query_start_loc) - 1
    # made by hand, as the constructors want all lengths on the CPU; the lists are for xformers' own debugging
    mask = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask(
        _SeqLenInfo(query_start_loc, max_seqlen=max_query_len, min_seqlen=0, seqstart_py=[]),
        _PaddedSeqLenInfo(
            suffixes.starts[: num_rows + 1],
            max_seqlen=max_keys,
            min_seqlen=0,
            seqstart_py=[0],
            seqlen=suffixes.lens[:num_rows],
            seqlen_py=[],
            padding=max_keys,
        ),
    )
    row, position = suffixes.rows[:num_tokens], suffixes.positions[:num_tokens]
    attended = (suffixes.lens[row] > 0)[:, None, None]
    row = row.clamp(max=num_rows - 1)
    suffix_lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)
    for head in range(num_kv_heads):
        # xformers' own loop over KV heads starts a stream for each
        group = slice(head * num_heads // num_kv_heads, (head + 1) * num_heads // num_kv_heads)
        shape = (1, max_keys, group.stop - group.start, head_size)
        inputs = fmha.Inputs(
            query[None, :, group],
            keys[None, :, head, None].expand(shape),
            values[None, :, head, None].expand(shape),
            mask,
            scale=scale,
        )
        # not by way of xformers' functions for users, which want its binary; "gradient" is for the log-sum-exp
        attention, context = fmha.cutlass.FwOp.apply(inputs, needs_gradient=True)
        lse = context.lse
        output[:, group] = torch.where(attended, attention[0], output[:, group])
        # by rows: [B, G, the most queries, padded]
        suffix_lse[group] = lse[row, :, position.clamp(max=lse.shape[-1] - 1)].T.float()
    return suffix_lse
