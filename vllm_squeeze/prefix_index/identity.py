"""Which model an index was made for, and how two models are told apart."""

import hashlib
import reprlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number in the dtypes that an index may have."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
HEADER_BYTES = 64 * 1024
SAMPLE_BYTES = 16 * 1024
NUM_SAMPLES = 64


@dataclass(frozen=True)
class ModelIdentity:
    """What has to agree between the model that an index was made with and the model that is served.

    Attributes:
        model: the model's name as it was given. Only shown, never compared: one model has many names.
        architecture: class of the model, as in its config.
        weights: digest of the weights, see ``weights_digest``.
        dtype: of the model, a key of ``DTYPE_BYTES``.
        kv_cache_dtype: of the KV cache, as vLLM names it.
        quantization: method, or "none".
        rope: settings of the rotary embedding, canonical JSON.
        num_layers: of the model, with or without attention that can be indexed.
        num_heads: query heads of a layer, over all tensor-parallel ranks.
        num_kv_heads: KV heads of a layer, over all tensor-parallel ranks.
        head_size: numbers in a key, D.
    """

    model: str
    architecture: str
    weights: str
    dtype: str
    kv_cache_dtype: str
    quantization: str
    rope: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is {reprlib.repr(self.dtype)}, must be one of {', '.join(DTYPE_BYTES)}")
        check_ranges(self, num_layers=(1, 2**16), num_heads=(1, 2**16), num_kv_heads=(1, 2**16), head_size=(1, 2**16))

    @property
    def element_size(self) -> int:
        """Bytes of one number in the model's dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def cache_element_size(self) -> int:
        """Bytes of one number in the KV cache."""
        return 1 if self.kv_cache_dtype.startswith("fp8") else DTYPE_BYTES.get(self.kv_cache_dtype, self.element_size)

    def compared(self) -> dict[str, str | int]:
        """The fields that have to agree, in the order in which they are compared."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}

    def difference(self, other: "ModelIdentity") -> str | None:
        """One line on the first field in which the model of an index (self) and a server's (other) differ, or None."""
        theirs = other.compared()
        for name, value in self.compared().items():
            if value != theirs[name]:
                return f"{name}: the index has {value}, this server {theirs[name]}"
        return None


def check_ranges(owner: Any, **ranges: tuple[float, float]) -> None:
    """Checks that numbers in the named fields lie between two bounds, both allowed.

    Raises:
        ValueError: one does not (or is NaN). Names the field.
    """
    for name, (low, high) in ranges.items():
        value = getattr(owner, name)
        if not low <= value <= high:
            raise ValueError(f"{name} is {reprlib.repr(value)}, must be from {low} to {high}")


def weights_digest(folder: Path) -> str:
    """A digest of a model's weight files that is cheap for big models: at most 1.1 MiB of each file is read.

    It covers the name and the size of each file, its first 64 KiB, and 64 evenly spaced samples of 16 KiB, the last
    of which ends with the file; so files of up to 1 MiB are covered whole. Other weights of the same shape, such as
    a fine-tune of all layers, are told apart. A change that falls between the samples is not: a few numbers patched
    in place, or one small matrix replaced in a file of gigabytes.

    Args:
        folder: holds the weights as safetensors, or else in the first other format of ``WEIGHT_FILES`` found.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: the folder holds no weights.
    """
    found = (sorted(file for file in folder.glob(pattern) if file.is_file()) for pattern in WEIGHT_FILES)
    files = next(filter(None, found), None)
    if files is None:
        raise ValueError(f"{folder} holds no weights ({', '.join(WEIGHT_FILES)})")
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\n{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(HEADER_BYTES))
            for i in range(NUM_SAMPLES):
                file.seek(max(size - SAMPLE_BYTES, 0) * i // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
