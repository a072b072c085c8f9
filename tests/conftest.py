"""Choices that have to be made before anything imports torch or Triton."""

import os
from pathlib import Path

import tests.every_process.sitecustomize  # noqa: F401

# where Python looks for sitecustomize as a process starts
folders = str(Path(__file__).parent / "every_process"), os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.quick_interpreter import make_quick

    make_quick()


def pytest_collection_modifyitems(items):
    """Long tests run first, so that at the end no process has one left while the others have nothing."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
