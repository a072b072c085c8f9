"""Asks a running server about an indexed document, with the plain OpenAI client: nothing in it knows of squeezing.

    python examples/openai_client.py contract.txt "Who may terminate this contract?"

The document must be the one that was indexed with --chat-system. OPENAI_BASE_URL names another server than
http://localhost:8000/v1.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI, OpenAIError


def connect() -> OpenAI:
    """A client of the server that the environment names. Ends the program where none answers."""
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
    )
    try:
        client.models.list()
    except OpenAIError as error:
        sys.exit(
            f"{client.base_url}: {error}\nOPENAI_BASE_URL must name the API of a running `vllm serve`, which ends with "
            "/v1, and OPENAI_API_KEY its key, if it wants one."
        )
    return client


def text_in(path: str | Path) -> str:
    """The text in a file, as a type of argparse's arguments.

    Raises:
        argparse.ArgumentTypeError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{str(path)!r} cannot be read as text: {error}") from None


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=text_in, help="text file, as it was indexed")
    parser.add_argument("question")
    arguments = parser.parse_args()
    for piece in ask(connect(), arguments.document, arguments.question):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
