"""Keeps the KV of pinned prefixes from being evicted, as if a request that never ends were on each."""

from collections.abc import Callable
from typing import Any

from vllm_squeeze.attention_backend.compat import before_reset, logger
from vllm_squeeze.attention_backend.placement import Options, Placement


class Pins:
    """The blocks held for pinned prefixes, on the scheduler's side.

    Args:
        options: of the connector.
        vllm_config: of the engine.
        kv_cache_config: of the engine.

    Attributes:
        changed: whether blocks were pinned or released since ``num_blocks`` was last asked for.
    """

    def __init__(self, options: Options, vllm_config: Any, kv_cache_config: Any):
        self.changed = False
        self._share = options.pin_share
        self._caching = vllm_config.cache_config.enable_prefix_caching
        sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
        # of the longest request, which must never wait for ever
        self._reserve = sum(-(-vllm_config.model_config.max_model_len // size) for size in sizes) + 1
        self._pool: Any = None
        self._held: dict[Placement, list[Any]] = {}
        self._refused: set[Placement] = set()

    def bind(self, pool: Any) -> None:
        """Says whose blocks they are: vLLM's BlockPool."""
        self._pool = pool
        before_reset(pool, self.release_all)

    def pin(self, placement: Placement, block_ids: Callable[[], list[int]]) -> None:
        """Holds the blocks of a computed prefix, unless they are held already, or there would be too many.

        Args:
            placement: of the prefix.
            block_ids: gives the ids of its blocks, in order, of a row that has them.
        """
        if placement in self._held or placement in self._refused:
            return
        blocks = [self._pool.blocks[block_id] for block_id in block_ids()]
        if reason := self._why_not(len(blocks)):
            self._refused.add(placement)
            logger.warning("squeeze: %s is not pinned: %s.", placement.name, reason)
            return
        self._pool.touch(blocks)
        self._held[placement], self.changed = blocks, True

    def release_unpinned(self) -> None:
        """Lets go of the prefixes that are no longer to be pinned, or no longer served."""
        for placement in [placement for placement in self._held if not placement.pinned]:
            self._release(placement)
        self._refused = {placement for placement in self._refused if placement.pinned}

    def release_all(self) -> None:
        """Lets go of all. They are pinned again once a request has computed them."""
        for placement in list(self._held):
            self._release(placement)

    def num_blocks(self) -> dict[str, int]:
        """Blocks held for each prefix, by the name of its index."""
        self.changed = False
        return {placement.name: len(blocks) for placement, blocks in self._held.items()}

    def _release(self, placement: Placement) -> None:
        # the first tokens are the last to be evicted
        self._pool.free_blocks(reversed(self._held.pop(placement)))
        self.changed = True

    def _why_not(self, count: int) -> str | None:
        """What keeps so many blocks more from being held, in a line, or None."""
        if not self._caching:
            return "vLLM's prefix caching is off"
        total, held = self._pool.num_gpu_blocks, sum(map(len, self._held.values()))
        most = min(int(self._share * total), total - self._reserve)
        if held + count > most:
            return (
                f"it takes {count} blocks of the KV cache, {held} of {total} are pinned already, and "
                f"squeeze.pin_share, {self._share}, and the longest request leave {max(most, 0)} for that"
            )
        return None
