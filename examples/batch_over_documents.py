"""The same questions on many documents, by vLLM in this process. Index each into one folder, with --chat-system; then
``python examples/batch_over_documents.py --model M --index index/ docs/limits.md docs/operating.md``: JSON lines.

All requests of a document stand together, so that they find its prefix in the KV cache, and share what is read of it.
On the CPU: ``--engine-args '{"dtype": "float32", "enforce_eager": true, "gpu_memory_utilization": 0.5}'``, and indexes
that were made with this dtype.
"""

import argparse
import json
from pathlib import Path

from openai_client import text_in

QUESTIONS = ("What is this text about?", "Name something that is not supported.", "What should a reader do first?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=named_text, help="text files, as they were indexed")
    parser.add_argument("--model", required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder with an index of each document")
    parser.add_argument("--budget", type=float, default=0.33, help="bytes read of a prefix over those of a dense pass")
    parser.add_argument("--tokens", type=int, default=48, help="most of an answer")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON", help="more for vLLM's engine")
    arguments = parser.parse_args()
    from vllm import LLM, SamplingParams

    settings = {"index": str(arguments.index), "budget": arguments.budget}
    llm = LLM(
        arguments.model,
        attention_backend="squeeze",
        additional_config={"squeeze": settings},
        **arguments.engine_args,
    )
    told = {"kv_transfer_params": {"squeeze": {}}}
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, extra_args=told)
    for name, text in arguments.documents:
        system = {"role": "system", "content": text}
        conversations = [[system, {"role": "user", "content": question}] for question in QUESTIONS]
        # The first brings the prefix into the KV cache.
        outputs = llm.chat(conversations[:1], sampling, use_tqdm=False)
        outputs += llm.chat(conversations[1:], sampling, use_tqdm=False)
        for question, output in zip(QUESTIONS, outputs, strict=True):
            answer = {"document": name, "question": question, "answer": output.outputs[0].text}
            print(json.dumps(answer | output.kv_transfer_params), flush=True)


def named_text(path: str) -> tuple[str, str]:
    """The name of a file and the text in it."""
    return Path(path).name, text_in(path)


if __name__ == "__main__":
    main()
