"""A KV cache in 8-bit floats: at a budget of 1, answers are those of vLLM's own backend with the same cache."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import check_answers_are_dense, tokens
from vllm_squeeze.kernels.tables import unpacked
from vllm_squeeze.prefix_index.index_folder import PrefixIndex

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU backend needs AVX-512 for 8-bit floats"
)

PREFIX = tokens(seed=1, count=600)
KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def with_scales(model: Path, folder: Path) -> Path:
    """A copy of a model whose checkpoint asks for a KV cache in 8-bit floats, with scales for it."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": KV_CACHE_SCHEME,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        # Powers of two would not round; keys and values are far off without them.
        scales = {"k_scale": 0.13 * (layer + 1), "v_scale": 0.07 * (layer + 1), "q_scale": 1.0}
        weights |= {f"model.layers.{layer}.self_attn.{name}": torch.tensor(scale) for name, scale in scales.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("indexed", "served"), [("fp8", "fp8_e4m3"), ("fp8_e5m2", "fp8_e5m2")])
def test_answers_are_the_dense_ones(models, indexes, indexed, served):
    model = models("llama")
    check_answers_are_dense(model, indexes(model, PREFIX, kv_cache_dtype=indexed), PREFIX, kv_cache_dtype=served)


def mean_key_and_value(index: Path, layer: int) -> torch.Tensor:
    """Of all clustered tokens, [2, H, D]."""
    clusters = PrefixIndex.open(index).layer(layer)
    sizes = clusters.sizes[..., None]
    keys = clusters.mean_keys()
    values = unpacked(clusters.value_centroids, clusters.value_scales)
    return torch.stack([(means * sizes).sum(1) for means in (keys, values)]) / sizes.sum(1)


def test_a_checkpoint_with_scales(models, indexes, tmp_path):
    plain, scaled = models("llama"), with_scales(models("llama"), tmp_path / "model")
    index = indexes(scaled, PREFIX)
    check_answers_are_dense(scaled, index, PREFIX)
    model = PrefixIndex.open(index).manifest.model
    assert (model.cache_element_size, model.element_size) == (1, 4)
    for layer in range(model.num_layers):
        ours, exact = mean_key_and_value(index, layer), mean_key_and_value(indexes(plain, PREFIX), layer)
        # Already the keys of the second layer come of attention over 8-bit keys, and means lie in 4 bits.
        assert ((ours - exact).flatten(1).norm(dim=1) < 0.25 * exact.flatten(1).norm(dim=1)).all()
