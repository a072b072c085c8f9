"""Reads the identity of the model that an engine runs, as an index has to match it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_squeeze.prefix_index.identity import ModelIdentity, weights_digest

ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings")


def model_identity(vllm_config: Any) -> ModelIdentity:
    """The identity of the model in an engine's configuration.

    Raises:
        ValueError: the weights cannot be found on this machine.
    """
    model, text = vllm_config.model_config, vllm_config.model_config.hf_text_config
    rope = {field: getattr(text, field) for field in ROPE_FIELDS if getattr(text, field, None) is not None}
    parallel = vllm_config.parallel_config
    dtype = str(model.dtype).removeprefix("torch.")
    # Versions of vLLM differ in whether they resolve "auto".
    other_names = {dtype: "auto", "fp8": "fp8_e4m3"}
    kv_cache_dtype = str(vllm_config.cache_config.cache_dtype)
    return ModelIdentity(
        model=model.model,
        architecture=",".join(model.hf_config.architectures or [model.hf_config.model_type]),
        weights=weights_of(vllm_config),
        dtype=dtype,
        kv_cache_dtype=other_names.get(kv_cache_dtype, kv_cache_dtype),
        quantization=str(model.quantization or "none"),
        rope=json.dumps(rope, sort_keys=True, default=str),
        num_layers=text.num_hidden_layers,
        num_heads=model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
    )


def weights_of(vllm_config: Any) -> str:
    """A digest of the model's weights.

    Weights that vLLM makes up (load format "dummy") depend on the seed and on everything else in the identity.
    """
    if str(vllm_config.load_config.load_format).endswith("dummy"):
        return f"dummy-{vllm_config.model_config.seed}"
    model = vllm_config.model_config
    if Path(model.model).is_dir():
        return weights_digest(Path(model.model))
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model.model, revision=model.revision, cache_dir=vllm_config.load_config.download_dir, local_files_only=True
        )
        return weights_digest(Path(folder))
    except (OSError, ValueError):
        name = f"{model.model}@{model.revision}"
        return "name-" + hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
