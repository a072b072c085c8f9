"""The nearest centroid of each point in Triton: K-means' assignment, the matrix product and its arg-max in one kernel.

    nearest    grid (ceil(n / BLOCK), I)    a block of points against all centroids of its item

Distances of points to centroids are never in memory. What is multiplied is rounded to 16-bit floats, which hold a
vector of unit length to three digits; sums have 32 bits. Labels do not depend on what else is computed beside them.
"""

import torch
import triton
import triton.language as tl

from vllm_squeeze.kernels.tiles import padded

MAX_BLOCK = 128
WARPS, STAGES = 8, 2


@triton.jit
def nearest_kernel(
    points, centroids, labels, num_points, num_centroids,
    stride_item, stride_point, stride_centroid_item, stride_centroid,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, CENTROIDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_i = tl.program_id(1).to(tl.int64)
    o_n, o_c, o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, CENTROIDS), tl.arange(0, DP)
    m_n, m_d = o_n < num_points, (o_d < D)[None, :]
    p_points = points + i_i * stride_item + o_n[:, None].to(tl.int64) * stride_point + o_d[None, :]
    b_x = tl.load(p_points, mask=m_n[:, None] & m_d, other=0.0).to(tl.float16)  # [BLOCK, DP]
    p_centroids = centroids + i_i * stride_centroid_item + o_d[None, :]
    b_best = tl.full([BLOCK], float("-inf"), tl.float32)
    b_label = tl.zeros([BLOCK], tl.int32)
    for i_c in tl.range(0, num_centroids, CENTROIDS, num_stages=STAGES):
        o_row = i_c + o_c
        m_c = o_row < num_centroids
        b_c = tl.load(p_centroids + o_row[:, None] * stride_centroid, mask=m_c[:, None] & m_d, other=0.0)
        b_bias = tl.where(m_c, tl.sum(b_c * b_c, 1) / -2, float("-inf"))
        b_s = tl.dot(b_x, tl.trans(b_c.to(tl.float16))) + b_bias[None, :]  # [BLOCK, CENTROIDS]
        b_max = tl.max(b_s, 1)
        b_label = tl.where(b_max > b_best, i_c + tl.argmax(b_s, 1), b_label)
        b_best = tl.maximum(b_max, b_best)
    tl.store(labels + i_i * num_points + o_n, b_label, mask=m_n)


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The centroid of least Euclidean distance to each point, the first of those that are equally near.

    Args:
        points: [I, n, D] float32, of unit length at most.
        centroids: [I, k, D] float32, likewise.

    Returns:
        [I, n] int64, as ``nearest_reference`` but for centroids that are nearly as near.
    """
    num_items, num_points, head_size = points.shape
    width = padded(head_size)
    block = min(MAX_BLOCK, max(16384 // width, 16))
    labels = torch.empty(num_items, num_points, dtype=torch.int64, device=points.device)
    nearest_kernel[(triton.cdiv(num_points, block), num_items)](
        points, centroids, labels, num_points, centroids.shape[1],
        points.stride(0), points.stride(1), centroids.stride(0), centroids.stride(1),
        D=head_size, DP=width, BLOCK=block, CENTROIDS=block // 2, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return labels
