"""Choices that have to be made before anything imports torch or Triton."""

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from types import SimpleNamespace

    import triton.language as tl
    from triton.runtime import interpreter

    # All of Triton's language is patched when a kernel starts, so functions need not do that whenever they are called.
    patched, patch = SimpleNamespace(__globals__={"tl": tl, "core": tl.core}), interpreter._patch_lang
    interpreter._patch_lang = lambda kernel: patch(patched)
    interpreter.InterpretedFunction.__call__ = lambda function, *args, **kwargs: function.rewrite()(*args, **kwargs)


def pytest_collection_modifyitems(items):
    """Long tests run first, so that at the end no process has one left while the others have nothing."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
