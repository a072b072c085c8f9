"""What the watcher makes of a folder."""

import os

from tests.prefix_index.small_index import write_index
from vllm_squeeze.attention_backend.watcher import Watcher
from vllm_squeeze.prefix_index.index_folder import MANIFEST_FILE, PrefixIndex


def test_an_index_is_replaced_by_one_that_seems_older(tmp_path):
    """As where a clock was set back, here or on the machine that made it."""
    folder = write_index(tmp_path / "store")
    made = write_index(tmp_path / "elsewhere", seed=1)
    os.utime(made / MANIFEST_FILE, (0, 0))
    watcher = Watcher([tmp_path / "store"], 0.01, [folder], PrefixIndex.open)
    try:
        folder.rename(tmp_path / "former")
        made.rename(folder)
        while (seen := watcher.seen.get(timeout=30)).index is None:
            pass  # there was none for a moment
        assert seen.index.manifest.digest == PrefixIndex.open(folder).manifest.digest
    finally:
        watcher.end()
