"""Compiles the kernels for a GPU that need not be there, by their own launches: python -m tests.kernels.compiling 90 4."""

import sys
from collections import Counter
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.kernels.conftest import build_scene
from tests.kernels.test_prompts import prompts_of, workspace_for
from vllm_squeeze.kernels import workspace
from vllm_squeeze.kernels.nearest import nearest
from vllm_squeeze.kernels.prompts import squeezed_prompts
from vllm_squeeze.kernels.shared_prefix import gather_queries, join_shared
from vllm_squeeze.kernels.squeezed_attention import squeezed_attention

MULTIPROCESSORS = 132
SHAPES = (
    ({"group": 4, "head_size": 128, "dtype": torch.bfloat16}, (1, 20)),
    ({"group": 7, "head_size": 64, "dtype": torch.float16, "page_size": 32}, (20,)),
    ({"group": 1, "head_size": 256, "dtype": torch.bfloat16}, (1,)),
    ({"group": 4, "head_size": 128, "dtype": torch.bfloat16, "cache_dtype": torch.float8_e4m3fn}, (1,)),
)
"""And numbers of tokens, for tiles of one size or of both."""


def has_prompts(shape: dict) -> bool:
    """Whether kernels of prompts are compiled for a shape, where there is FlashAttention 3."""
    return "cache_dtype" not in shape and shape["head_size"] <= 128


def kinds(capability: int, shape: dict, num_tokens: int) -> tuple[tuple[bool, float], ...]:
    """With and without the rest and a soft cap: both for the newest GPU, of the first shape, for tiles of one size."""
    both = ((True, 0.0), (False, 30.0))
    return both if (capability, shape, num_tokens) == (90, SHAPES[0][0], 1) else both[:1]


def no_library(q: torch.Tensor, **operands: object) -> torch.Tensor:
    return torch.zeros(q.shape[1], len(q))


def main(capability: int, num_shapes: int) -> None:
    """Prints how often each kernel was compiled, or found to be, of the first shapes."""
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    compiled = Counter()

    def compile_only(kernel, grid):
        def launch(*args, **options):
            compiled[kernel.fn.__name__] += kernel.warmup(*args, grid=grid, **options) is not None

        return launch

    triton.runtime.JITFunction.__getitem__ = compile_only
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
    workspace.INTERPRETED_MULTIPROCESSORS = MULTIPROCESSORS
    for shape, sizes in SHAPES[:num_shapes]:
        nearest(torch.zeros(2, 500, shape["head_size"]), torch.zeros(2, 30, shape["head_size"]))
        for num_tokens in sizes:
            scene = build_scene("cpu", slot_of=(0,) * num_tokens, **shape)
            limits = 4, scene.num_kv_heads, shape["head_size"], scene.table.sizes.shape[1], scene.keys[0].shape[1]
            for rest, soft_cap in kinds(capability, shape, num_tokens):
                scene.apply(squeezed_attention, rest, workspace.Workspace.allocate(*limits, "cpu"), soft_cap)
        gathered = gather_queries(scene.query, scene.queries, scene.group)
        lse = torch.zeros(gathered.shape[1], len(gathered))
        operands = scene.suffix_output, scene.suffix_lse, gathered, lse, scene.queries, scene.prefixes
        join_shared(*operands, scene.num_kv_heads)
        if capability >= 90 and has_prompts(shape):
            prompt = prompts_of(build_scene("cpu", slot_of=(0, 0), **shape), (0,), (2,), 0.5)
            soft_cap = 30.0 * (shape is not SHAPES[0][0])
            prompt.apply(squeezed_prompts, True, workspace_for(prompt), no_library, soft_cap)
    print(dict(compiled))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
