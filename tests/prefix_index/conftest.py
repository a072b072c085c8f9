import tempfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def memory_path():
    """A folder in memory where the system has one: hundreds of indexes are written, and no power fails here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)
