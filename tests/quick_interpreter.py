"""Triton's interpreter, quicker: much of its time goes into saying anew of what type each value is."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def make_quick() -> None:
    """Has the interpreter remember what it looks up again and again. Results are the same."""
    _patch_once()
    _remember_numpy_types()
    _remember_block_types()
    _remember_shapes()


def _patch_once() -> None:
    """All of Triton's language is patched when a kernel starts, so functions need not do that at every call."""
    patched, patch = SimpleNamespace(__globals__={"tl": tl, "core": tl.core}), interpreter._patch_lang
    interpreter._patch_lang = lambda kernel: patch(patched)
    interpreter.InterpretedFunction.__call__ = lambda function, *args, **kwargs: function.rewrite()(*args, **kwargs)


def _remember_numpy_types() -> None:
    found: dict[str, np.dtype] = {}
    find = interpreter._get_np_dtype

    def remembered(dtype: tl.dtype) -> np.dtype:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if scalar.name not in found:
            found[scalar.name] = find(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = remembered


def _remember_block_types() -> None:
    made: dict[tuple, dict[str, Any]] = {}
    make = tl.block_type.__init__

    def remembered(block: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        known = (element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
        if known in made:
            vars(block).update(made[known], element_ty=element_ty)
        else:
            make(block, element_ty, shape)
            made[known] = dict(vars(block))

    tl.block_type.__init__ = remembered


def _remember_shapes() -> None:
    made: dict[tuple[int, ...], tuple[Any, tl.constexpr]] = {}

    def remembered(tensor: tl.tensor, handle: Any, type: tl.dtype) -> None:
        shape = tuple(type.shape.values) if type.is_block() else ()  # as numbers, which are quick to compare
        if shape not in made:
            made[shape] = tl.core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        tensor.shape, tensor.numel = made[shape]

    tl.tensor.__init__ = remembered
