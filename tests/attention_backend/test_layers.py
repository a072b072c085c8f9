from types import SimpleNamespace

import pytest
import torch

from vllm_squeeze.attention_backend.layers import FLOAT8, as_stored, cache_scales, in_model_dtype, why_dense


def layer(scale=1.0, **facts):
    """What is asked of a vLLM attention layer, for a plain decoder."""
    plain = {
        "attn_type": "decoder",
        "sliding_window": None,
        "alibi_slopes": None,
        "sinks": None,
        "kv_sharing_target_layer_name": None,
        "kv_cache_dtype": "auto",
        "num_queries_per_kv": 16,
    }
    scale = torch.tensor(scale)
    return SimpleNamespace(impl=SimpleNamespace(**(plain | facts)), _q_scale=scale, _k_scale=scale, _v_scale=scale)


@pytest.mark.parametrize("window", [None, -1, (-1, -1)])
def test_a_plain_decoder_layer_is_squeezed(window):
    assert why_dense(layer(sliding_window=window)) is None


@pytest.mark.parametrize(
    "facts",
    [{"logits_soft_cap": 30.0}, {"kv_cache_dtype": "bfloat16"}, *({"kv_cache_dtype": name} for name in FLOAT8)],
    ids=str,
)
def test_what_does_not_keep_a_layer_dense(facts):
    assert why_dense(layer(**facts)) is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"sliding_window": (511, 0)}, "sliding window"),
        ({"sliding_window": 512}, "sliding window"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sinks": object()}, "sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.1"}, "shared"),
        ({"num_queries_per_kv": 17}, "more than 16 query heads"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "fp8_per_token_head"),
        ({"kv_cache_dtype": "nvfp4"}, "nvfp4"),
        ({"kv_cache_dtype": "fp8", "scale": [0.5, 0.25]}, "a scale for each KV head"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_keeps_a_layer_dense(facts, reason):
    assert reason in why_dense(layer(**facts))


def test_a_cache_in_the_models_dtype_is_read_as_it_is():
    cache = torch.randn(3, 4).bfloat16()
    assert as_stored(layer(), cache) is cache and cache_scales(layer()) == (None, None)
    assert in_model_dtype(cache, layer(), torch.bfloat16) is cache


@pytest.mark.parametrize("name", FLOAT8)
def test_a_cache_in_8_bits_is_bytes_and_scales(name):
    stored = torch.randn(3, 4).to(FLOAT8[name])
    quantised = layer(scale=0.3, kv_cache_dtype=name)
    assert torch.equal(as_stored(quantised, stored.view(torch.uint8)).float(), stored.float())
    assert cache_scales(quantised) == (quantised._k_scale, quantised._v_scale)


def test_queries_in_8_bits_are_scaled():
    query = torch.randn(50, 4).to(torch.float8_e4m3fn)
    scaled = in_model_dtype(query, layer(scale=0.3, kv_cache_dtype="fp8"), torch.bfloat16)
    assert torch.equal(scaled, (query.float() * 0.3).bfloat16())


def test_vllms_layers_have_these_attributes():
    """Fails when vLLM renames what is asked."""
    import inspect

    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    source = inspect.getsource(CPUAttentionBackendImpl.__init__)
    needed = [*vars(layer().impl), "logits_soft_cap"]
    assert [name for name in needed if f"self.{name} =" not in source] == []
