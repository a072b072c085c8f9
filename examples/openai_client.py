"""Asks a running server about an indexed document, with the plain OpenAI client: nothing in it knows of squeezing.

    python examples/openai_client.py contract.txt "Who may terminate this contract?"

The document must be the one that was indexed with --chat-system. OPENAI_BASE_URL names another server than
http://localhost:8000/v1.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI


def connect() -> OpenAI:
    """A client of the server that the environment names."""
    return OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
    )


def ask(client: OpenAI, document: str, question: str, max_tokens: int = 64) -> Iterator[str]:
    """Streams the answer to a question about a document, piece by piece."""
    messages = [{"role": "system", "content": document}, {"role": "user", "content": question}]
    return go_on(client, messages, max_tokens)


def go_on(client: OpenAI, messages: list[dict[str, str]], max_tokens: int = 64) -> Iterator[str]:
    """Streams what follows in a conversation, piece by piece."""
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=messages, max_tokens=max_tokens, temperature=0, stream=True
    )
    for chunk in stream:
        if chunk.choices:
            yield chunk.choices[0].delta.content or ""


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for piece in ask(connect(), Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2]):
        print(piece, end="", flush=True)
    print()
