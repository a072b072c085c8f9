"""The documents that become prefixes: one, or a folder of files or a list in JSON lines."""

import json
import reprlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_squeeze.offline_tools.prefix_text import checked_token_ids

CONTENTS = ("text", "path", "token_ids")
"""What a line of a list may have, one of them; and a name."""


@dataclass(frozen=True)
class Document:
    """A document; it has a text or token ids, or a file that was not read yet.

    Attributes:
        name: after which its index is named.
        text: of the document.
        token_ids: that prompts on it begin with.
        path: of a file that holds its text.
        option: of the command that named it, for error messages; empty where they begin with the name.
    """

    name: str
    text: str | None = None
    token_ids: list[int] | None = None
    path: Path | None = None
    option: str = ""

    @property
    def size(self) -> int:
        """About its length in characters: 0 where the file cannot be read."""
        if self.token_ids is not None:
            return 4 * len(self.token_ids)
        if self.text is not None:
            return len(self.text)
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def load(self) -> "Document":
        """The document with its text, if it has a file.

        Raises:
            ValueError: the file is missing, empty or not UTF-8.
        """
        return self if self.path is None else replace(self, text=read_input(self.path), path=None)


def read_input(path: Path) -> str:
    """The text in a file, or on standard input for "-".

    Raises:
        ValueError: the file is missing, empty or not UTF-8.
    """
    try:
        content = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not content.strip():
        raise ValueError(f"{path}: empty")
    return content


def list_documents(path: Path) -> list[Document]:
    """All documents of a folder or of a list; files of documents are not read.

    Args:
        path: a folder, whose files are the documents, without hidden ones and those in folders inside it; or a file
            of JSON lines, each with "text", "path" (of a text file, from the list's folder) or "token_ids", and
            perhaps a "name". Blank lines are skipped.

    Raises:
        ValueError: it is neither, has no document, or a line is none.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        documents = [Document(file.name, path=file) for file in files]
    else:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--documents: {path}: {error}") from None
        documents = [document_of(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not documents:
        raise ValueError(f"--documents: {path}: no documents")
    return documents


def document_of(line: str, path: Path, number: int) -> Document:
    """The document in a line of a list.

    Args:
        line: of JSON lines.
        path: of the list.
        number: of the line.

    Raises:
        ValueError: it is none. Names the list and the line.
    """
    where = f"--documents: {path}, line {number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    contents = [name for name in CONTENTS if name in value] if isinstance(value, dict) else []
    if len(contents) != 1 or (unknown := set(value) - {"name", *CONTENTS}):
        found = f", not {sorted(unknown)[0]!r}" if len(contents) == 1 else ""
        raise ValueError(f"{where}: must be a JSON object with one of {', '.join(CONTENTS)}, and perhaps name{found}")
    (kind,) = contents
    content = value[kind]
    name = value.get("name", Path(content).name if kind == "path" and isinstance(content, str) else None)
    name = f"{path.stem}-{number}" if name is None else name
    for field, text in (("name", name), *([(kind, content)] if kind != "token_ids" else [])):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: {field} is {reprlib.repr(text)}, must be a text that is not blank")
    if kind == "text":
        return Document(name, text=content)
    if kind == "path":
        return Document(name, path=path.parent / content)
    try:
        return Document(name, token_ids=checked_token_ids(content))
    except ValueError as error:
        raise ValueError(f"{where}: token_ids {error}") from None
