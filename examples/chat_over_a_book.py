"""A conversation about a book, which was indexed with --chat-system and is served by ``vllm serve`` (README, "Use"):
``python examples/chat_over_a_book.py examples/data/persuasion.txt``, then a question a line; an empty line ends it.

The book is the system message, so all conversations on it, and all turns of each, share one prefix.
"""

import argparse

from openai_client import connect, go_on, text_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=text_in, help="text file, as it was indexed")
    parser.add_argument("--tokens", type=int, default=64, help="most of an answer")
    arguments = parser.parse_args()
    messages = [{"role": "system", "content": arguments.book}]
    client = connect()
    while question := read_line():
        messages.append({"role": "user", "content": question})
        pieces = []
        for piece in go_on(client, messages, arguments.tokens):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


def read_line() -> str:
    """What is asked next; nothing at the end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
