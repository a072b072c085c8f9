"""Examples that need a server ask one that stands in for vLLM's; all say how they are used.

They were run with real servers by hand.
"""

import io
import json
import runpy
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


class Echo(BaseHTTPRequestHandler):
    """Answers each conversation with its number of messages and its last one, in two pieces; keeps what was asked."""

    asked: list[dict] = []

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply("application/json", json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}))

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        pieces = (f"{len(body['messages'])}: ", body["messages"][-1]["content"])
        chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
        self.reply("text/event-stream", "".join(f"data: {line}\n\n" for line in [*map(json.dumps, chunks), "[DONE]"]))

    def reply(self, kind: str, text: str):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[dict]]:
    """What was asked of a server that the examples find."""
    monkeypatch.syspath_prepend(EXAMPLES)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    Echo.asked.clear()
    yield Echo.asked
    server.shutdown()
    server.server_close()


def run(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def document(tmp_path) -> Path:
    path = tmp_path / "contract.txt"
    path.write_text("Either party may terminate.")
    return path


def test_openai_client(asked, document, monkeypatch, capsys):
    run(monkeypatch, "openai_client.py", str(document), "Who may?")
    assert capsys.readouterr().out == "2: Who may?\n"
    assert asked[0]["messages"][0] == {"role": "system", "content": "Either party may terminate."}


def test_a_chat_keeps_what_was_said(asked, document, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who may?\nWhen?\n\nNever asked\n"))
    run(monkeypatch, "chat_over_a_book.py", str(document))
    assert capsys.readouterr().out == "> 2: Who may?\n> 4: When?\n> "
    assert [message["role"] for message in asked[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert asked[1]["messages"][:2] == asked[0]["messages"] and asked[1]["messages"][2]["content"] == "2: Who may?"


def test_a_code_base_is_asked_about_as_it_was_printed(asked, tmp_path, monkeypatch, capsys):
    (tmp_path / "b").mkdir()
    for name in ("b/c.py", "a.py", "notes.txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    run(monkeypatch, "ask_a_code_base.py", str(tmp_path))
    printed = capsys.readouterr().out
    assert printed == "# a.py\n\ntext of a.py\n\n# b/c.py\n\ntext of b/c.py\n\n"
    run(monkeypatch, "ask_a_code_base.py", str(tmp_path), "What is a?", "What is c?")
    assert capsys.readouterr().out == "> What is a?\n2: What is a?\n> What is c?\n2: What is c?\n"
    assert [body["messages"][0]["content"] for body in asked] == [printed] * 2


@pytest.mark.parametrize(
    "name", ["chat_over_a_book.py", "ask_a_code_base.py", "batch_over_documents.py", "langchain_chat.py"]
)
def test_help(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, name, "--help")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and f"python examples/{name}" in printed


def test_no_server(document, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(SystemExit, match="http://127.0.0.1:9/v1/: Connection error.\nOPENAI_BASE_URL must name"):
        run(monkeypatch, "openai_client.py", str(document), "Who may?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["openai_client.py", "FOLDER/none", "Who may?"], "argument document: 'FOLDER/none' cannot be read as text"),
        (["chat_over_a_book.py", "FOLDER"], "argument book: 'FOLDER' cannot be read as text"),
        (["langchain_chat.py", "FOLDER/b.bin", "Who?"], "argument document: 'FOLDER/b.bin' cannot be read as text"),
        (["ask_a_code_base.py", "FOLDER/none"], "folder: there are no files *.py in FOLDER/none"),
        (["ask_a_code_base.py", "FOLDER", "--pattern", "*"], "--pattern: 'FOLDER/b.bin' cannot be read as text"),
        (
            ["batch_over_documents.py", "--model", "M", "--index", "I", "FOLDER/b.bin"],
            "argument documents: 'FOLDER/b.bin' cannot be read as text",
        ),
    ],
)
def test_files_that_cannot_be_read_are_named(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    (tmp_path / "b.bin").write_bytes(b"\xbb\xff")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *(argument.replace("FOLDER", str(tmp_path)) for argument in arguments))
    assert ended.value.code == 2 and said.replace("FOLDER", str(tmp_path)) in capsys.readouterr().err


def test_the_demo_refuses_a_budget_before_it_indexes(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    read_budget = runpy.run_path(str(EXAMPLES / "demo.py"), run_name="demo")["read_budget"]
    for budget, allowed in (("0.1", True), ("", True), ("1", True), ("0", False), ("7", False), ("a third", False)):
        monkeypatch.setenv("BUDGET", budget)
        if allowed:
            assert read_budget() == float(budget or 0.33)
        else:
            with pytest.raises(SystemExit, match=f"BUDGET: '{budget}' is not a number above 0, at most 1"):
                read_budget()
