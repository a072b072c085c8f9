"""An engine in this process that records one prefix after another: answers questions on it, and clusters its keys."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_squeeze.offline_tools.questions import ANSWER_TOKENS
from vllm_squeeze.prefix_index.manifest import IndexParameters

# Of the device's memory for the model and the prefix' KV cache; clustering needs room beside them.
MEMORY_UTILIZATION = 0.6
# Questions answered at the same time.
CONCURRENT_QUESTIONS = 16
AS_LONG_AS_FITS = -1
"""As ``max_model_len``: as many tokens as the model takes and the KV cache has room for."""


class RecordingEngine:
    """An engine that records.

    Args:
        model: as vLLM takes it.
        parameters: of the indexes.
        max_model_len: tokens of a prompt and its answer, at most.
        engine_args: more arguments for vLLM's engine, which go before those chosen here.

    Attributes:
        vllm_config: of the engine.
    """

    def __init__(self, model: str, parameters: IndexParameters, max_model_len: int, engine_args: dict[str, Any]):
        # The engine in this process: errors and the progress bar come out here.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        from vllm_squeeze.attention_backend.wiring import RECORD, connector

        self._llm = LLM(
            model,
            attention_backend="squeeze",
            enforce_eager=True,
            # Else a step is under way, and observed, when an answer turns out to have ended.
            async_scheduling=False,
            max_model_len=max_model_len,
            max_num_seqs=CONCURRENT_QUESTIONS,
            kv_transfer_config=connector(RECORD, asdict(parameters)),
            **{"gpu_memory_utilization": MEMORY_UTILIZATION, **engine_args},
        )
        self.vllm_config = self._llm.llm_engine.vllm_config

    def record(
        self,
        ids: Sequence[int],
        prompts: Sequence[Sequence[int]],
        held_back: Sequence[Sequence[int]],
        parts: Path,
        former: Path | None = None,
    ) -> None:
        """Answers prompts on a prefix, then runs it alone, which clusters its keys.

        Args:
            ids: of the prefix.
            prompts: token ids of questions on the prefix, to calibrate thresholds on; without any, the queries of the
                observation window are taken.
            held_back: token ids of other questions, only with prompts, by which it is seen where attention falls.
            parts: folder that the clusters go to.
            former: folder of an index of the prefix' beginning, whose clusters are kept.

        Raises:
            ValueError: the engine has no room for a prompt.
        """
        from vllm import SamplingParams, TokensPrompt

        from vllm_squeeze.attention_backend.recorder import RECORDING, Recording

        kept = str(former.resolve()) if former is not None else None
        recording = asdict(Recording(str(parts.resolve()), len(ids), len(prompts), kept))

        def answer(some: Sequence[Sequence[int]], num_tokens: int) -> None:
            extra = {"kv_transfer_params": {RECORDING: recording}}
            sampling = SamplingParams(max_tokens=num_tokens, temperature=0, detokenize=False, extra_args=extra)
            self._llm.generate([TokensPrompt(prompt_token_ids=list(p)) for p in some], sampling, use_tqdm=False)

        # So that an index does not depend on those made before.
        emptied = self._llm.reset_prefix_cache()
        assert emptied, "requests are still running"
        if prompts:
            answer(prompts[:1], ANSWER_TOKENS)  # brings the prefix into the KV cache
            answer(prompts[1:], ANSWER_TOKENS)
            answer(held_back, ANSWER_TOKENS)
        answer([ids], 1)

    def shut_down(self) -> None:
        """Ends the engine and frees its memory."""
        self._llm.llm_engine.engine_core.shutdown()
