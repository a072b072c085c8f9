from types import SimpleNamespace

import pytest

from vllm_squeeze.attention_backend.layers import why_dense


def layer(**facts):
    """What is asked of a vLLM attention layer, for a plain decoder."""
    plain = {
        "attn_type": "decoder",
        "sliding_window": None,
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "sinks": None,
        "kv_sharing_target_layer_name": None,
        "kv_cache_dtype": "auto",
    }
    return SimpleNamespace(**(plain | facts))


@pytest.mark.parametrize("window", [None, -1, (-1, -1)])
def test_a_plain_decoder_layer_is_squeezed(window):
    assert why_dense(layer(sliding_window=window)) is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"sliding_window": (511, 0)}, "sliding window"),
        ({"sliding_window": 512}, "sliding window"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft cap"),
        ({"sinks": object()}, "sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.1"}, "shared"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "fp8_e4m3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_keeps_a_layer_dense(facts, reason):
    assert reason in why_dense(layer(**facts))


def test_vllms_layers_have_these_attributes():
    """Fails when vLLM renames what is asked."""
    import inspect

    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    source = inspect.getsource(CPUAttentionBackendImpl.__init__)
    assert [name for name in vars(layer()) if f"self.{name} =" not in source] == []
