"""Questions on a code base. To index: ``python examples/ask_a_code_base.py tools > code.txt``, and index code.txt with
--chat-system; then, with ``vllm serve`` running, ``python examples/ask_a_code_base.py tools "Which Python is needed?"``.

The files of a folder, in one order, are the system message. After a change of the code index it again: requests on the
new text would be dense.
"""

import argparse
from pathlib import Path

from openai_client import ask, connect, text_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the code")
    parser.add_argument("questions", nargs="*", help="to ask; without any the document is printed, to be indexed")
    parser.add_argument("--pattern", default="*.py", help="of the files' names (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="most of an answer")
    arguments = parser.parse_args()
    try:
        document = joined(arguments.folder, arguments.pattern)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--pattern: {error}")
    if not document:
        parser.error(f"folder: there are no files {arguments.pattern} in {arguments.folder}")
    if not arguments.questions:
        print(document, end="")
        return
    client = connect()
    for question in arguments.questions:
        print(f"> {question}")
        for piece in ask(client, document, question, arguments.tokens):
            print(piece, end="", flush=True)
        print()


def joined(folder: Path, pattern: str) -> str:
    """The files of a folder and those below it, each after its path."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return "".join(f"# {path.relative_to(folder)}\n\n{text_in(path)}\n" for path in files)


if __name__ == "__main__":
    main()
