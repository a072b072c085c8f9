"""Tiny models with random weights whose answers depend on all of the prompt."""

from pathlib import Path
from typing import Any

VOCABULARY = 512


def make_model(folder: Path, family: str, group: int = 3, head_size: int = 64, seed: int = 0, **config: Any) -> Path:
    """Writes a model and a tokenizer of whole words, "t10 t11 ...", into a folder.

    Args:
        folder: to write into.
        family: "llama"; "gemma2": every second layer with a sliding window, all with a logit soft cap that binds; or
            "gemma3": a hybrid of sliding-window and full-attention layers.
        group: query heads per KV head.
        head_size: of keys.
        seed: of the weights.
        config: more settings of the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64 * group,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2 * group,
        "num_key_value_heads": 2,
        "head_dim": head_size,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "gemma2":
        cap = {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 1}
        model_config = Gemma2Config(**{**shape, **cap, "sliding_window": 64, **config})
    elif family == "gemma3":
        window = {"sliding_window": 64, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        model_config = Gemma3TextConfig(**{**shape, "query_pre_attn_scalar": head_size, **window, **config})
    else:
        model_config = LlamaConfig(**{**shape, **config})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    if family != "llama":
        # Gemma's output embeddings are those of the input: at full size, each answer would repeat the last token.
        model.get_input_embeddings().weight.data *= 0.1
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"t{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
