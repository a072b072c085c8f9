import dataclasses
import os

import pytest
from small_index import make_identity

from vllm_squeeze.prefix_index.identity import NUM_SAMPLES, SAMPLE_BYTES, weights_digest

OTHERS = dict(
    architecture="Qwen2ForCausalLM",
    weights="11ee",
    dtype="bfloat16",
    kv_cache_dtype="fp8",
    quantization="awq",
    rope='{"rope_theta": 500000.0}',
    num_layers=5,
    num_heads=8,
    num_kv_heads=1,
    head_size=16,
)


def test_others_change_every_field_that_is_compared():
    assert {"model", *OTHERS} == {field.name for field in dataclasses.fields(make_identity())}


@pytest.mark.parametrize("field", OTHERS)
def test_difference_names_the_field_and_both_values(field):
    index, server = make_identity(), make_identity(**{field: OTHERS[field]})
    assert index.difference(server) == f"{field}: the index has {getattr(index, field)}, this server {OTHERS[field]}"


def test_the_first_of_several_differences_is_named():
    assert make_identity().difference(make_identity(**OTHERS)).startswith("architecture: ")


def test_a_model_may_have_many_names():
    assert make_identity().difference(make_identity(model="/models/tiny")) is None


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "num_bytes"),
    [("float32", "auto", 4), ("bfloat16", "auto", 2), ("float32", "bfloat16", 2), ("bfloat16", "fp8_e4m3", 1)],
)
def test_bytes_of_numbers(dtype, kv_cache_dtype, num_bytes):
    model = make_identity(dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    assert (model.element_size, model.cache_element_size) == ({"float32": 4, "bfloat16": 2}[dtype], num_bytes)


@pytest.mark.parametrize("changes", [dict(dtype="float64"), dict(num_layers=0), dict(head_size=-1)], ids=str)
def test_an_impossible_model_is_refused(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} is "):
        make_identity(**changes)


@pytest.fixture
def weights(tmp_path):
    """A folder of two weight files, one of less than a sample and one of more than all samples."""
    (tmp_path / "model-1.safetensors").write_bytes(b"small")
    (tmp_path / "model-2.safetensors").write_bytes(bytes(3 * NUM_SAMPLES * SAMPLE_BYTES))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def overwrite(path, position, content):
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        file.write(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: overwrite(folder / "model-1.safetensors", 0, b"S"),
        lambda folder: overwrite(folder / "model-2.safetensors", 0, b"x"),
        lambda folder: overwrite(folder / "model-2.safetensors", -1, b"x"),
        lambda folder: overwrite(folder / "model-2.safetensors", 2**20, b"x" * 4 * SAMPLE_BYTES),
        lambda folder: os.truncate(folder / "model-2.safetensors", 3 * NUM_SAMPLES * SAMPLE_BYTES - 1),
        lambda folder: (folder / "model-1.safetensors").rename(folder / "model-0.safetensors"),
        lambda folder: (folder / "model-1.safetensors").unlink(),
    ],
    ids=["small file", "first byte", "last byte", "stretch", "size", "name", "one file less"],
)
def test_weights_digest_changes_with_the_weights(weights, change):
    before = weights_digest(weights)
    change(weights)
    assert weights_digest(weights) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text('{"a": 1}'),
        lambda folder: (folder / "training_args.bin").write_bytes(b"x"),
        lambda folder: os.utime(folder / "model-1.safetensors", (1, 1)),
    ],
    ids=["config", "second format", "time"],
)
def test_weights_digest_does_not_change_with_other_things(weights, change):
    before = weights_digest(weights)
    change(weights)
    assert weights_digest(weights) == before


def test_every_byte_counts_in_files_of_up_to_one_mebibyte(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(NUM_SAMPLES * SAMPLE_BYTES))
    before = weights_digest(tmp_path)
    for position in range(0, NUM_SAMPLES * SAMPLE_BYTES, SAMPLE_BYTES + 1):
        overwrite(path, position, b"x")
        assert weights_digest(tmp_path) != before, position
        overwrite(path, position, b"\0")


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path} holds no weights"):
        weights_digest(tmp_path)
