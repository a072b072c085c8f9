"""Kernels are found by their keys, and launched as Triton would launch them."""

import torch

from vllm_squeeze.kernels.launches import Launches, alignment


class Kernel:
    """Is compiled in each launch, for the options that it has then; None stands for one that is interpreted."""

    def __init__(self, compiles: bool = True):
        self.launched: list[tuple] = []
        self._compiles = compiles

    def __getitem__(self, grid: tuple[int, int, int]):
        def launch(*arguments, **options):
            form = Kernel()
            form.launched = self.launched
            self.launched.append((grid, arguments, options))
            return form if self._compiles else None

        return launch


def test_a_kernel_is_compiled_once_for_each_key():
    launch, kernel, other = Launches(), Kernel(), Kernel()
    launch(kernel, (1, 2, 3), ("key", True), 5, num_warps=8)
    launch(kernel, (4, 2, 3), ("key", True), 6, num_warps=8)
    launch(kernel, (4, 2, 3), ("key", False), 7, num_warps=8)
    launch(other, (1, 1, 1), ("key", True), 8, num_warps=1)
    options = {"num_warps": 8}
    assert kernel.launched == [((1, 2, 3), (5,), options), ((4, 2, 3), (6,), {}), ((4, 2, 3), (7,), options)]
    assert other.launched == [((1, 1, 1), (8,), {"num_warps": 1})]


def test_an_interpreted_kernel_is_launched_as_ever():
    launch, kernel = Launches(), Kernel(compiles=False)
    for _ in range(2):
        launch(kernel, (1, 1, 1), "key", 5, num_warps=8)
    assert kernel.launched == [((1, 1, 1), (5,), {"num_warps": 8})] * 2


def test_alignment():
    numbers = torch.zeros(64, dtype=torch.int16)
    assert alignment(numbers, numbers[1:], numbers[4:], numbers[8:]) == (True, False, False, True)
