"""Mean keys and values in 4 bits an element, as the kernels read them. ``tables`` says how they are packed.

Words are taken apart into eight parts of vectors, of their elements 0, 8, 16 and so on, of 1, 9, 17, to 7, 15, 23. A
thread has all elements of a word, so nothing is moved to have parts, and much to have vectors.
"""

import triton
import triton.language as tl

from vllm_squeeze.kernels.tables import LEAST_PACKED
from vllm_squeeze.kernels.tiles import MIN_TILE_ROWS

FEW_ROWS = tl.constexpr(MIN_TILE_ROWS)
LEAST = tl.constexpr(LEAST_PACKED)
WHOLE = tl.constexpr(-float(LEAST_PACKED))
"""By what 4-bit elements are at most 1."""


@triton.jit
def _pair(b_words, FIRST: tl.constexpr, dtype: tl.constexpr):
    """Elements ``FIRST`` and the next of words."""
    # in the last bits of a number whose other bits are known, so that nothing need be converted
    narrow: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    ONE: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
    ZERO: tl.constexpr = (128 if dtype == tl.bfloat16 else 1024) - LEAST
    b_both = ((b_words >> (2 * FIRST)) & 0x000F000F) | (ONE * 0x10001)
    b_first = (b_both & 0xFFFF).to(tl.int16).to(narrow, bitcast=True)
    b_second = ((b_both >> 16) & 0xFFFF).to(tl.int16).to(narrow, bitcast=True)
    return (b_first - ZERO).to(dtype), (b_second - ZERO).to(dtype)


@triton.jit
def _parts_of(b_words, dtype: tl.constexpr):
    """The eight parts of packed vectors [N, W], not yet scaled."""
    b_0, b_1 = _pair(b_words, 0, dtype)
    b_2, b_3 = _pair(b_words, 2, dtype)
    b_4, b_5 = _pair(b_words, 4, dtype)
    b_6, b_7 = _pair(b_words, 6, dtype)
    return b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7


@triton.jit
def _load_words(p_vectors, o_row, stride, D: tl.constexpr, W: tl.constexpr):
    """The words [N, W] of the packed vectors ``o_row`` [N]; anything beyond D."""
    o_word = tl.arange(0, W)
    p_words = p_vectors + o_row[:, None].to(tl.int64) * stride + o_word[None, :]
    return tl.load(p_words, mask=(o_word < D // 8)[None, :], other=0)


@triton.jit
def load_packed(p_vectors, o_row, stride, dtype: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The packed vectors ``o_row`` [N] as [N, DP], not yet scaled; anything beyond D."""
    b_v = _parts_of(_load_words(p_vectors, o_row, stride, D, DP // 8), dtype)
    b_even = tl.interleave(tl.interleave(b_v[0], b_v[4]), tl.interleave(b_v[2], b_v[6]))
    b_odd = tl.interleave(tl.interleave(b_v[1], b_v[5]), tl.interleave(b_v[3], b_v[7]))
    return tl.interleave(b_even, b_odd)


@triton.jit
def operand_of(b_q):
    """Queries [M, DP] as ``packed_products`` takes them: in parts, or whole."""
    M: tl.constexpr = b_q.shape[0]
    W: tl.constexpr = b_q.shape[1] // 8
    # Of many rows, tensor cores take the other operand from shared memory, where it is moved whole; and a product is over
    # 16 elements or more.
    if (M > FEW_ROWS) | (W < 16):
        return (b_q,)
    else:
        b_even, b_odd = tl.split(b_q.reshape(M, W * 4, 2))
        b_04, b_26 = tl.split(b_even.reshape(M, W * 2, 2))
        b_15, b_37 = tl.split(b_odd.reshape(M, W * 2, 2))
        b_0, b_4 = tl.split(b_04.reshape(M, W, 2))
        b_1, b_5 = tl.split(b_15.reshape(M, W, 2))
        b_2, b_6 = tl.split(b_26.reshape(M, W, 2))
        b_3, b_7 = tl.split(b_37.reshape(M, W, 2))
        return b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7


@triton.jit
def packed_products(b_q, p_vectors, o_row, stride, D: tl.constexpr):
    """Products [M, N] of queries, an ``operand_of`` them, and the packed vectors ``o_row`` [N], not yet scaled."""
    dtype: tl.constexpr = b_q[0].dtype
    width: tl.constexpr = b_q[0].shape[1]
    if len(b_q) == 1:
        return tl.dot(b_q[0], tl.trans(load_packed(p_vectors, o_row, stride, dtype, D, width)), input_precision="ieee")
    else:
        b_v = _parts_of(_load_words(p_vectors, o_row, stride, D, width), dtype)
        b_s = tl.dot(b_q[0], tl.trans(b_v[0]), input_precision="ieee")
        for i in tl.static_range(1, 8):
            b_s = tl.dot(b_q[i], tl.trans(b_v[i]), b_s, input_precision="ieee")
        return b_s
