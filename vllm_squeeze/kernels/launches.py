"""Launches of kernels over and over, as in the layers of a step that replays no CUDA graph."""

from collections.abc import Hashable
from typing import Any


class Launches:
    """Kernels as they were compiled for launches that differ in little.

    Triton tells by each argument of a launch which of a kernel's compiled forms it needs, which takes the host longer
    than all else. Here a key tells it.
    """

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, kernel: Any, grid: tuple[int, int, int], key: Hashable, *arguments: Any, **options: Any) -> None:
        """Launches a kernel.

        Args:
            kernel: that Triton compiles.
            grid: its programs.
            key: all that arguments of its launches may differ in and that it is compiled for: constants, types, which
                numbers are 1 or multiples of 16, and which tensors begin at these.
            arguments: all of the kernel's, constants too, in its order.
            options: of the compiler.
        """
        compiled = self._compiled.get((kernel, key))
        if compiled is None:
            # nothing where it is interpreted
            self._compiled[kernel, key] = kernel[grid](*arguments, **options)
        else:
            compiled[grid](*arguments)


def alignment(*tensors: Any) -> tuple[bool, ...]:
    """Which of the tensors begin at a multiple of 16 bytes."""
    return tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
