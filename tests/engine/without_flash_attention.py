"""Serves a model with and without an index in a process whose vLLM has no FlashAttention, and prints what it answers.

    python -m tests.engine.without_flash_attention MODEL [--graphs]

One line of JSON: the backends' layers, per request dense and squeezed answers and, at each dense token, how much more
likely it was than the next best, in nats; and the outcomes of rows. Prompts are token ids below 512.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.engine.conftest import ENGINE_ARGS, engine, outcomes, tokens

PREFIX_TOKENS, REQUESTS, ANSWER_TOKENS = 600, 20, 8
HALF_PRECISION = {**ENGINE_ARGS, "dtype": "float16"}


def switch_off_flash_attention() -> None:
    """As vLLM itself finds on GPUs below compute capability 8.0."""
    from vllm.v1.attention.backends import fa_utils

    fa_utils.get_flash_attn_version = lambda *args, **kwargs: None


def answer(llm: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy answers, and how clear each of their tokens was."""
    from vllm import SamplingParams, TokensPrompt

    parameters = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False, logprobs=2)
    results = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=False)
    answers = [result.outputs[0] for result in results]
    margins = []
    for completion in answers:
        best = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in completion.logprobs]
        margins.append([first - second for first, second, *_ in best])
    return [list(completion.token_ids) for completion in answers], margins


def layers(llm: Any) -> list[str]:
    """Classes of the model's attention layers."""
    config = llm.llm_engine.vllm_config.compilation_config
    return sorted({type(layer.impl).__name__ for layer in config.static_forward_context.values()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs")
    options = parser.parse_args()
    switch_off_flash_attention()
    from vllm_squeeze.offline_tools.index import index
    from vllm_squeeze.prefix_index.manifest import IndexParameters

    settings = {**HALF_PRECISION, "enforce_eager": not options.graphs, "max_num_seqs": 16}
    prefix = tokens(1, PREFIX_TOKENS)
    # others have no index: rows of both kinds meet in a step
    prompts = [(prefix if seed % 4 else tokens(2, PREFIX_TOKENS)) + tokens(seed, 3 + seed) for seed in range(REQUESTS)]
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder, "tokens.json")
        ids.write_text(json.dumps(prefix))
        store = index(
            str(options.model),
            None,
            ids,
            None,
            Path(folder, "store"),
            IndexParameters(),
            HALF_PRECISION,
            measured=False,
        )
        with engine(options.model, **settings, attention_backend="TRITON_ATTN") as llm:
            report["dense"], report["margins"] = answer(llm, prompts)
        with engine(options.model, store, squeeze={"mode": "squeezed"}, **settings) as llm:
            answer(llm, prompts[1:2])  # brings the prefix into the KV cache
            report["squeezed"], _ = answer(llm, prompts)
            report["outcomes"], report["layers"] = outcomes(llm), layers(llm)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
