"""That kernels agree with their oracle in Triton's interpreter does not say that a GPU can have them."""

import ast
import os
import subprocess
import sys

import pytest

from tests.kernels.compiling import SHAPES, has_prompts, kinds


@pytest.mark.long
@pytest.mark.parametrize(("capability", "num_shapes"), [(80, 1), (90, len(SHAPES))])
def test_kernels_compile(capability: int, num_shapes: int, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.compiling", str(capability), str(num_shapes)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    compiled = ast.literal_eval(child.stdout.splitlines()[-1])
    launches = sum(len(kinds(capability, shape, num)) for shape, sizes in SHAPES[:num_shapes] for num in sizes)
    for kernel in ("look_up_kernel", "attend_kernel", "merge_kernel"):
        assert compiled[kernel] >= launches, kernel
    for kernel in ("nearest_kernel", "_gather_kernel", "_join_kernel"):
        assert compiled[kernel] == num_shapes, kernel
    prompts = sum(has_prompts(shape) for shape, _ in SHAPES[:num_shapes]) if capability >= 90 else 0
    for kernel in ("_tile_kernel", "_unpack_kernel", "_choose_kernel", "_list_kernel", "_merge_kernel"):
        assert compiled.get(kernel, 0) == prompts, kernel
    assert compiled["_group_kernel"] and compiled["_list_always_kernel"]
