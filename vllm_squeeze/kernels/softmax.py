"""Softmax in parts, shared by the kernels: M rows of queries against blocks of N keys.

Inside the kernels, logits and log-sum-exps are to the base 2, in which exponentials are one instruction.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def finite_or_zero(b_max):
    """What to subtract from logits whose maximum is ``b_max``: minus infinity less itself would be NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def capped(b_s, cap):
    """Logits bound to plus and minus ``cap`` by a hyperbolic tangent."""
    # by exponentials: 1 and -1 where they overflow
    return cap * (1 - 2 / (tl.exp2(b_s * (2 * LOG2_E / cap)) + 1))


@triton.jit
def logits_of(b_q, b_k, scale, soft_cap, SOFT_CAP: tl.constexpr):
    """Logits [M, N] of queries [M, D] and keys [N, D], and their unit."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    unit = scale * LOG2_E
    if SOFT_CAP:
        b_s = capped(b_s * scale, soft_cap)
        unit = LOG2_E
    return b_s, unit


@triton.jit
def accumulate(b_s, unit, b_v, b_max, b_sum, b_o, b_scale=1.0):
    """Online softmax: takes logits [M, N] in a unit, minus infinity where masked, and values [N, D] into the state.

    Values count ``b_scale`` times, 1 or [1, N].
    """
    b_next = tl.maximum(b_max, tl.max(b_s, 1) * unit)
    b_shift = finite_or_zero(b_next)
    b_p = tl.exp2(b_s * unit - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_o = b_o * b_decay[:, None] + tl.dot((b_p * b_scale).to(b_v.dtype), b_v, input_precision="ieee")
    return b_next, b_sum, b_o
