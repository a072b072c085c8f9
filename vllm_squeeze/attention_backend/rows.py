"""The worker's side: tells from block tables which rows of a step attend to which indexed prefix."""

from typing import Any

import torch

from vllm_squeeze.attention_backend.matching import LiveBlock
from vllm_squeeze.kernels.reference import match_rows_reference
from vllm_squeeze.kernels.tables import PROMPT_SLOTS


class RowGroup:
    """The rows of the current step in one KV cache group. Layers of the group hold it to find their rows.

    Attributes:
        squeezing: whether layers have to squeeze rows now.
        alone: whether they do without vLLM's attention then, as all rows are squeezed.
        crowded: whether rows are on more slots than there are for prefixes, as some have settings of their own.
        shared: whether they attend to their prefixes by FlashAttention of all rows at once.
        block_table, seq_lens, query_start_loc: as in vLLM's metadata, of the step built last.
        row_slot, prefix_len: [B] int32, the slot of each row's prefix, negative where it has none, and its tokens.
            PROMPT_SLOTS is added where its tokens choose together.
        worker: the rank's serving state that these rows belong to.
    """

    worker: Any
    _match_rows = staticmethod(match_rows_reference)

    def __init__(self, block_size: int, vllm_config: Any, residency: Any):
        self.squeezing = self.alone = self.crowded = self.shared = False
        self._block_size = block_size
        self._blocks_per_page = 1
        self._residency = residency
        self._device = residency.device
        self._max_rows = vllm_config.scheduler_config.max_num_seqs
        self._live: list[tuple[int, ...]] = []
        self._found = torch.zeros(2, self._max_rows, dtype=torch.int32, device=self._device)
        self.row_slot, self.prefix_len = self._found

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

    def can_be_alone(self, num_tokens: int, longest_suffix: int) -> bool:
        """Whether layers can do without vLLM's attention in a step whose rows are all squeezed.

        Args:
            num_tokens: query tokens of the rows.
            longest_suffix: tokens that follow the prefix in the longest of them, at most.
        """
        return False

    def can_be_shared(self, num_tokens: int) -> bool:
        """Whether layers can attend to prefixes by FlashAttention of all rows at once in a step of so many tokens."""
        return False

    def begin_step(
        self,
        live: list[LiveBlock],
        num_tokens: int,
        alone: bool = False,
        crowded: bool = False,
        shared: bool = False,
        prompts: tuple[int, ...] = (),
    ) -> None:
        """Matches the noted step's rows.

        Args:
            live: live blocks of this group.
            num_tokens: query tokens of squeezed rows. Should the scheduler ever have reckoned with fewer, the last
                rows go dense: the kernels' work list is no longer than that.
            alone: whether layers do without vLLM's attention in this step.
            crowded: whether the rows are on more slots than there are for prefixes.
            shared: whether they attend to their prefixes by FlashAttention of all rows at once.
            prompts: query tokens of each prompt whose tokens choose together.
        """
        self.alone, self.crowded, self.shared = alone, crowded, shared
        if len(self.row_slot) != (num_rows := len(self.seq_lens)):
            self.row_slot, self.prefix_len = self._found[:, :num_rows]
        self._match_rows(
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            self._on_device(live),
            num_tokens + sum(prompts),
            self.row_slot,
            self.prefix_len,
        )
        self.set_rows(num_tokens)
        self.set_prompts(prompts)
        self.squeezing = True

    def _on_device(self, live: list[LiveBlock]) -> torch.Tensor:
        """Live blocks as ``match_rows`` takes them, [A, 6] int32. In most steps they are those of the step before."""
        pages = self._blocks_per_page
        table = [
            (
                b.slot + PROMPT_SLOTS * b.prompt,
                (b.index + 1) * pages - 1,
                (b.block + 1) * pages - 1,
                b.context,
                b.most,
                b.length,
            )
            for b in live
        ]
        if table != self._live:
            on_host = torch.tensor(table, dtype=torch.int32, pin_memory=self._device.type == "cuda")
            self._live, self._live_on_device = table, on_host.to(self._device, non_blocking=True)
        return self._live_on_device

    def set_rows(self, num_tokens: int) -> None:
        """Keeps the matched rows in the form that this device's layers read."""
        raise NotImplementedError

    def set_prompts(self, counts: tuple[int, ...]) -> None:
        """The same of prompts whose tokens choose together."""

    def end_step(self) -> None:
        self.squeezing = self.alone = self.crowded = self.shared = False
