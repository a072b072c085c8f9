"""An engine in this process with one indexed prefix, which it serves at one budget after another, or densely."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_squeeze.attention_backend.worker import residency_of, worker_of
from vllm_squeeze.config import SqueezeConfig
from vllm_squeeze.offline_tools import forcing
from vllm_squeeze.offline_tools.timing import rows_so_far
from vllm_squeeze.prefix_index.budget import ReadCost


class TunableWorker(forcing.KeepsLogits):
    """Mixed into vLLM's workers, which may be in other processes: changes how they serve their only index."""

    def prefix_cost(self) -> ReadCost | None:
        """What reading the prefix costs; None if the index is not served."""
        residency = residency_of(self.vllm_config)
        return residency.active[0].cost if residency is not None and residency.active else None

    def pause_squeezing(self, paused: bool) -> None:
        """Has vLLM's own attention serve all rows, or no longer."""
        worker_of(self.vllm_config).paused = paused

    def set_budget(self, budget: float) -> float:
        """See ``PrefixEngine``."""
        residency = residency_of(self.vllm_config)
        residency.set_budget(budget)
        return float(residency.prefixes.log_threshold[0])

    def count_kept(self) -> tuple[int, int]:
        """Keys chosen so far, summed up over query tokens, layers and KV heads; and how many choices that were."""
        _, _, pairs, kept = residency_of(self.vllm_config).prefixes.counters[0, :4].tolist()
        return kept, pairs


class PrefixEngine:
    """An engine that squeezes every row on its prefix that it may, until it is told otherwise.

    Args:
        model: as vLLM takes it.
        index: of the prefix.
        prompts: token ids, each of the prefix and a question.
        num_tokens: most tokens of an answer.
        engine_args: more arguments for vLLM's engine, which go before those chosen here.
        prefill: as in ``SqueezeConfig``.

    Attributes:
        llm: vLLM's.
        cost: what reading the prefix costs.

    Raises:
        RuntimeError: vLLM does not serve the index; its log says why.
    """

    def __init__(
        self,
        model: str,
        index: Path,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        engine_args: dict[str, Any],
        prefill: float | str = SqueezeConfig.prefill,
    ):
        from vllm import LLM, TokensPrompt

        from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes

        (folder,) = find_indexes(index)
        settings = {"index": str(folder), "budget": 1, "mode": "squeezed", "prefill": prefill}
        chosen = {
            "max_model_len": max(map(len, prompts)) + num_tokens,
            "attention_backend": "squeeze",
            "additional_config": {"squeeze": settings},
            "enable_prefix_caching": True,
            "disable_log_stats": False,
            "worker_extension_cls": f"{__name__}.{TunableWorker.__name__}",
        }
        self.llm = LLM(model, **(chosen | forcing.ENGINE_ARGS | engine_args))
        self.cost = self._ask("prefix_cost")[0]
        if self.cost is None:
            raise RuntimeError(f"{folder} is not served, for a reason that is in vLLM's log")
        self._prefix = TokensPrompt(prompt_token_ids=PrefixIndex.open(folder).token_ids.tolist())

    def begin(self) -> None:
        """Leaves nothing but the prefix in the KV cache, computed densely."""
        from vllm import SamplingParams

        emptied = self.llm.reset_prefix_cache()
        assert emptied, "requests are still running"
        with self.squeezing_paused():
            sampling = SamplingParams(max_tokens=1, detokenize=False)
            self.llm.generate(self._prefix, sampling, use_tqdm=False)

    @contextmanager
    def squeezing_paused(self) -> Iterator[None]:
        """Has vLLM's own attention serve all rows, though the scheduler counts them as squeezed."""
        self._ask("pause_squeezing", True)
        try:
            yield
        finally:
            self._ask("pause_squeezing", False)

    def set_budget(self, budget: float) -> float:
        """Has rows read so much of the prefix from here on; returns the log threshold that does.

        Raises:
            ValueError: centroids and always attended tokens alone read more.
        """
        self.cost.kept_share(budget)
        return self._ask("set_budget", budget)[0]

    def count_kept(self) -> tuple[int, int]:
        """Keys chosen so far, summed up over query tokens, layers and KV heads; and how many choices that were."""
        kept, pairs = zip(*self._ask("count_kept"))
        return sum(kept), sum(pairs)

    def rows(self) -> dict[str, float]:
        """Rows so far, by what became of them."""
        return rows_so_far(self.llm)

    def shut_down(self) -> None:
        """Ends the engine and frees its memory."""
        self.llm.llm_engine.engine_core.shutdown()

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        return self.llm.collective_rpc(method, args=arguments)
