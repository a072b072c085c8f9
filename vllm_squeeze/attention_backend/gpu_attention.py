"""The backend on NVIDIA GPUs: on FlashAttention, or on vLLM's Triton attention where vLLM has no FlashAttention."""

from vllm_squeeze.attention_backend.compat import has_flash_attention

if has_flash_attention():
    from vllm_squeeze.attention_backend.flash_attention import SqueezeBackend
else:
    from vllm_squeeze.attention_backend.triton_attention import SqueezeTritonBackend as SqueezeBackend

__all__ = ["SqueezeBackend"]
