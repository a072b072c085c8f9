"""Lists of documents: folders and JSON lines."""

import json

import pytest

from vllm_squeeze.offline_tools.documents import Document, list_documents


def test_the_files_of_a_folder(tmp_path):
    for name in ("b.md", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "inside").mkdir()
    documents = list_documents(tmp_path)
    assert [document.name for document in documents] == ["a.txt", "b.md"]
    assert [document.load().text for document in documents] == ["a.txt", "b.md"]


def test_a_list(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file.txt").write_text("from a file")
    lines = [
        {"text": "one", "name": "named"},
        {"text": "two"},
        {"path": "inside/file.txt"},
        {"token_ids": [3, 4], "name": "ids"},
    ]
    (tmp_path / "all.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert [document.load() for document in list_documents(tmp_path / "all.jsonl")] == [
        Document("named", text="one"),
        Document("all-3", text="two"),
        Document("file.txt", text="from a file"),
        Document("ids", token_ids=[3, 4]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("text", "not JSON: "),
        ('["text"]', "must be a JSON object with one of text, path, token_ids, and perhaps name"),
        ('{"name": "a"}', "must be a JSON object with one of text, path, token_ids, and perhaps name"),
        ('{"text": "a", "path": "b"}', "must be a JSON object with one of text, path, token_ids, and perhaps name"),
        ('{"text": "a", "title": "b"}', "and perhaps name, not 'title'"),
        ('{"text": " "}', "text is ' ', must be a text that is not blank"),
        ('{"path": 3}', "path is 3, must be a text that is not blank"),
        ('{"text": "a", "name": 3}', "name is 3, must be a text that is not blank"),
        ('{"token_ids": [1, -1]}', "token_ids must be a JSON list of token ids, integers from 0 to 2147483647"),
    ],
)
def test_a_line_that_is_no_document(tmp_path, line, message):
    path = tmp_path / "all.jsonl"
    path.write_text(f'{{"text": "first"}}\n{line}')
    with pytest.raises(ValueError) as error:
        list_documents(path)
    assert str(error.value).startswith(f"--documents: {path}, line 2: ") and message in str(error.value)


def test_no_documents(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    for name, message in (("blank.jsonl", "no documents"), ("folder", "no documents"), ("missing", "No such file")):
        with pytest.raises(ValueError, match=f"^--documents: {tmp_path}/{name}: .*{message}"):
            list_documents(tmp_path / name)


def test_a_file_is_read_when_its_turn_comes(tmp_path):
    """What is wrong with it then does not stop the others."""
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (document,) = list_documents(tmp_path)
    assert document.size == 2
    with pytest.raises(ValueError, match="utf-8"):
        document.load()
    (tmp_path / "a.txt").unlink()
    assert document.size == 0
