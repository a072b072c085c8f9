"""An engine in this process with one indexed prefix, which it serves at one budget after another, or densely."""

from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt

from benchmarks.quality import arms
from vllm_squeeze.offline_tools import forcing
from vllm_squeeze.prefix_index.calibration import log_threshold


class PrefixEngine:
    """An engine that squeezes every row on its prefix, until it is told otherwise.

    Args:
        model: as vLLM takes it.
        index: of the prefix.
        prompts: token ids, each of the prefix and a question.
        num_tokens: most tokens of an answer.
        engine_args: more arguments for vLLM's engine, which go before those chosen here.

    Attributes:
        llm: vLLM's.
        cost: what reading the prefix costs.

    Raises:
        RuntimeError: vLLM does not serve the index; its log says why.
    """

    def __init__(self, model: str, index: Path, prompts: list[list[int]], num_tokens: int, engine_args: dict[str, Any]):
        chosen = {
            "max_model_len": max(map(len, prompts)) + num_tokens,
            "attention_backend": "squeeze",
            "additional_config": {"squeeze": {"index": str(index), "budget": 1, "mode": "squeezed"}},
            "enable_prefix_caching": True,
            "disable_log_stats": False,
        }
        self.llm = LLM(model, **(chosen | forcing.ENGINE_ARGS | engine_args))
        if not arms.squeezed_impls(self.llm) or not arms.residency_in(self.llm).active:
            raise RuntimeError(f"{index} is not served, for a reason that is in vLLM's log")
        self._residency = arms.residency_in(self.llm)
        self._index = self._residency.indexes[0]
        self._prefix = TokensPrompt(prompt_token_ids=prompts[0][: len(self._index.token_ids) + 1])
        self.cost = self._residency.active[0].cost

    def begin(self) -> None:
        """Leaves nothing but the prefix in the KV cache, computed densely."""
        emptied = self.llm.reset_prefix_cache()
        assert emptied, "requests are still running"
        with arms.attending_densely(self.llm):
            self.llm.generate(self._prefix, SamplingParams(max_tokens=1), use_tqdm=False)

    def set_budget(self, budget: float) -> float:
        """Has rows read so much of the prefix from here on; returns the log threshold that does.

        Raises:
            ValueError: centroids and always attended tokens alone read more.
        """
        threshold = log_threshold(self._index.manifest.thresholds, self.cost.kept_share(budget))
        self._residency.prefixes.log_threshold.fill_(threshold)
        return threshold
