"""Commands on a folder of indexes: what a server that watches it would find."""

import dataclasses

import pytest

from tests.prefix_index.small_index import write_exact_index, write_index
from tests.prefix_index.small_quality import make_quality
from vllm_squeeze.cli import main
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, is_pinned, write_quality


@pytest.fixture
def made(tmp_path):
    """A folder with a clustered index, whose budgets were measured, and an exact one."""
    clustered = write_index(tmp_path / "made", "contract-0")
    write_quality(clustered, make_quality(PrefixIndex.open(clustered).manifest))
    write_exact_index(tmp_path / "made", "manual-0")
    return tmp_path / "made"


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def listed(capsys, store, *more: str) -> list[list[str]]:
    assert main(["list", str(store), *more]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def refused(capsys, *arguments) -> str:
    assert main([*map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_indexes_are_added_whole(capsys, made, store):
    assert main(["add", str(made), str(store)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(store / name) for name in ("contract-0", "manual-0")]
    for name in ("contract-0", "manual-0"):
        files, copies = ({file.name: file.read_bytes() for file in (at / name).iterdir()} for at in (made, store))
        assert files == copies
    assert sorted(path.name for path in store.iterdir()) == [".lock", "contract-0", "manual-0"]
    assert [line[0] for line in listed(capsys, store)] == ["index", "contract-0", "manual-0"]


def test_one_takes_the_place_of_another_of_its_name(capsys, made, store, tmp_path):
    assert main(["add", str(made), str(store)]) == 0
    write_index(tmp_path / "again", "manual-0")
    assert main(["add", str(tmp_path / "again" / "manual-0"), str(store)]) == 0
    assert not PrefixIndex.open(store / "manual-0").manifest.exact


def test_a_damaged_index_is_not_added(capsys, made, store):
    layer = made / "contract-0" / "layer-0000.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.write_bytes(content)
    assert "layer-0000.safetensors: damaged" in refused(capsys, "add", made / "contract-0", store)
    assert [path.name for path in store.iterdir()] == [".lock"]


def test_pins_stay_where_an_index_is_replaced_and_go_where_it_is_removed(capsys, made, store):
    assert main(["add", str(made), str(store)]) == 0
    assert main(["pin", "contract-0", str(store)]) == 0
    assert main(["add", str(made), str(store)]) == 0
    capsys.readouterr()
    assert [line[-1] for line in listed(capsys, store)[1:]] == ["pinned", "exact"]
    assert main(["unpin", "contract-0", str(store)]) == 0 and not is_pinned(store / "contract-0")
    assert main(["pin", "contract-0", str(store)]) == 0
    assert main(["remove", "contract-0", str(store)]) == 0
    assert sorted(path.name for path in store.iterdir()) == [".lock", "manual-0"]


@pytest.mark.parametrize("name", ["notes-0", "../made/contract-0", ".", "", ".lock"])
@pytest.mark.parametrize("command", ["remove", "pin", "unpin"])
def test_only_an_index_in_the_folder_can_be_named(capsys, made, store, command, name):
    assert main(["add", str(made), str(store)]) == 0
    capsys.readouterr()
    error = refused(capsys, command, name, store)
    assert f"{name!r} is not an index in {store}; there are: contract-0, manual-0" in error
    assert (made / "contract-0" / "manifest.json").exists() and len(list(store.iterdir())) == 3


def test_a_damaged_index_is_listed_with_the_reason(capsys, made, store):
    (made / "contract-0" / "manifest.json").write_text("{}")
    assert main(["list", str(made)]) == 1
    assert "contract-0" in (line := capsys.readouterr().out.splitlines()[1]) and "manifest.json" in line


@pytest.mark.parametrize(
    ("url", "message"),
    [("localhost:8000", "--url: 'localhost:8000' must begin with"), ("http://127.0.0.1:9", "http://127.0.0.1:9/")],
)
def test_no_server(capsys, made, url, message):
    assert message in refused(capsys, "list", made, "--url", url)
    assert message in refused(capsys, "warm", made, "--url", url)


def test_another_tokens_index_is_not_taken_for_a_copy(made, store):
    """The manifest's digests are checked once more when a copy is published."""
    from vllm_squeeze.prefix_index.index_folder import IndexWriter
    from vllm_squeeze.prefix_index.manifest import InvalidIndex

    index = PrefixIndex.open(made / "contract-0")
    with IndexWriter(store, "contract-0") as writer:
        writer.copy(dataclasses.replace(index, token_ids=index.token_ids[::-1].copy()))
        with pytest.raises(InvalidIndex, match="tokens"):
            writer.publish(index.manifest)
