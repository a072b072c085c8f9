"""The worker's side: tells from block tables which rows of a step attend to which indexed prefix."""

from typing import Any

import torch

from vllm_squeeze.attention_backend.matching import DENSE_SLOT, LiveBlock


def match_rows(
    block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, live: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matches rows by the physical blocks in their block tables.

    A physical block has one content while any live request holds it, and the content of a prefix's last block is
    fixed by the whole prefix. A row's block table may hold leftovers of earlier rows beyond its own blocks; the
    number of tokens that it has computed says how far it can be believed.

    Args:
        block_table: [B, max blocks] integer.
        seq_lens: [B] integer, tokens of each row, this step's queries among them.
        query_start_loc: [B + 1] integer.
        live: [A, 4] int64: slot, index, block, context of LiveBlock.

    Returns:
        slot [B] int64, DENSE_SLOT where nothing matches, and prefix length in tokens [B] int64, 0 there.
    """
    context = seq_lens - query_start_loc.diff()  # [B]
    slot, index, block, needed = live.unbind(1)
    found = block_table[:, index.clamp(max=block_table.shape[1] - 1)] == block  # [B, A]
    # Rows that hit the block which a dense row is filling in this very step have computed more than that row.
    enough = torch.where(slot == DENSE_SLOT, context[:, None] == needed, context[:, None] >= needed)
    found &= enough & (index < block_table.shape[1])
    length, best = torch.where(found, needed, -1).max(1)
    row_slot = torch.where(length >= 0, slot[best], DENSE_SLOT).clamp(min=DENSE_SLOT)
    return row_slot, torch.where(row_slot >= 0, length, 0)


class RowGroup:
    """The rows of the current step in one KV cache group. Layers of the group hold it to find their rows.

    Attributes:
        squeezing: whether layers have to squeeze rows now.
        block_table, seq_lens, query_start_loc: as in vLLM's metadata, of the step built last.
        worker: the rank's serving state that these rows belong to.
    """

    worker: Any

    def __init__(self, block_size: int, vllm_config: Any, residency: Any):
        self.squeezing = False
        self._block_size = block_size
        self._blocks_per_page = 1
        self._residency = residency
        self._device = residency.device

    def prepare(self, group: int) -> None:
        """Makes room for rows of layers with ``group`` query heads per KV head, where room is needed."""

    def note(self, metadata: Any, kernel_block_size: int) -> None:
        """Takes note of a step's metadata as vLLM built them. The tensors are vLLM's; they are only referred to."""
        self.block_table = metadata.block_table
        self.seq_lens = metadata.seq_lens
        self.query_start_loc = metadata.query_start_loc
        self.num_tokens = metadata.num_actual_tokens
        self.max_seq_len = metadata.max_seq_len
        self._kernel_block_size = kernel_block_size
        # A block of the scheduler may be several of the attention kernel's.
        self._blocks_per_page = self._block_size // kernel_block_size

    def begin_step(self, live: list[LiveBlock], num_tokens: int) -> None:
        """Matches the noted step's rows.

        Args:
            live: live blocks of this group.
            num_tokens: query tokens of squeezed rows.
        """
        pages = self._blocks_per_page
        table = torch.tensor(
            [(b.slot, (b.index + 1) * pages - 1, (b.block + 1) * pages - 1, b.context) for b in live],
            dtype=torch.int64,
            pin_memory=self._device.type == "cuda",
        ).to(self._device, non_blocking=True)
        num_rows = len(self.seq_lens)
        row_slot, prefix_len = match_rows(
            self.block_table[:num_rows], self.seq_lens, self.query_start_loc[: num_rows + 1], table
        )
        # Should the scheduler ever have reckoned with fewer squeezed tokens, the last rows go dense: the kernels'
        # work list is no longer than that.
        counts = self.query_start_loc[: num_rows + 1].diff()
        fits = torch.where(row_slot >= 0, counts, 0).cumsum(0) <= num_tokens
        self.set_rows(torch.where(fits, row_slot, DENSE_SLOT), torch.where(fits, prefix_len, 0), num_tokens)
        self.squeezing = True

    def set_rows(self, row_slot: torch.Tensor, prefix_len: torch.Tensor, num_tokens: int) -> None:
        """Keeps the matched rows in the form that this device's layers read."""
        raise NotImplementedError

    def end_step(self) -> None:
        self.squeezing = False
