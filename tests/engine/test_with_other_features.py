"""Other features of vLLM on an engine that squeezes: at a budget of 1, answers are those of vLLM's own backend."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.conftest import ENGINE_ARGS, engine, generate, grown, outcomes, tokens
from vllm_squeeze.offline_tools.index import index as make_index
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import IndexParameters

PREFIX = tokens(seed=1, count=600)
CHOICES, PATTERN = ["t10t11t12t13", "t20t21t22t23"], "(t[4-9]){6}"


def make_adapter(folder: Path, model: Path, rank: int = 4) -> Path:
    """Writes a random LoRA adapter of the query and value projections, as PEFT would."""
    config = json.loads((model / "config.json").read_text())
    sizes = {"q_proj": config["num_attention_heads"], "v_proj": config["num_key_value_heads"]}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in sizes.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes = {"lora_A": (rank, config["hidden_size"]), "lora_B": (heads * config["head_dim"], rank)}
            for matrix, shape in shapes.items():
                weights[f"{module}.{matrix}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_adapters_and_structured_output(models, indexes, tmp_path):
    """In the same steps: a request with a LoRA adapter is dense, one whose answer must be of a form is squeezed."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    model = models("llama")
    adapter = LoRARequest("adapter", 1, str(make_adapter(tmp_path / "adapter", model)))
    forms = [None, None, StructuredOutputsParams(choice=CHOICES), StructuredOutputsParams(regex=PATTERN)] * 2
    loras = [None, adapter, None, None] * 2
    asked = [PREFIX + tokens(seed, 20) for seed in (2, 2, 3, 4, 5, 5, 6, 7)]

    def ask(llm: Any) -> list[Any]:
        generate(llm, [PREFIX + [5]], num_tokens=1)
        before = outcomes(llm)
        sampling = [
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=form is None, structured_outputs=form)
            for form in forms
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked]
        results = llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras)
        return [result.outputs[0] for result in results], grown(llm, before)

    # With room for one adapter, vLLM's CPU build gives it to the requests beside it too: their number for none is -1.
    arguments = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "skip_tokenizer_init": False}
    with engine(model, **arguments) as llm:
        dense, _ = ask(llm)
    with engine(model, indexes(model, PREFIX), **arguments) as llm:
        answers, rows = ask(llm)
    ids = [tuple(answer.token_ids) for answer in answers]
    assert ids == [tuple(answer.token_ids) for answer in dense]
    assert ids[0] != ids[1] and ids[4] != ids[5], "the adapter changes nothing"
    for place in (2, 6):
        assert answers[place].text.replace(" ", "") in CHOICES
        assert re.fullmatch(PATTERN, answers[place + 1].text.replace(" ", ""))
    num_squeezed = sum(len(answer) for answer, lora in zip(ids, loras) if lora is None)
    assert rows.pop("squeezed") == num_squeezed and rows.keys() == {"dense: LoRA adapter"}


def test_a_prefix_that_another_connector_loads(models, indexes, dense_answers, tmp_path):
    """It keeps KV on disk; ours is beside it."""
    model = models("llama")
    prompts = [PREFIX + tokens(seed, 20) for seed in range(4)]
    dense = dense_answers(model, prompts)
    theirs = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with engine(model, indexes(model, PREFIX), kv_transfer_config=theirs) as llm:
        for prompt, answer in zip(prompts, dense):
            assert generate(llm, [prompt]) == [answer]
        assert len(list(tmp_path.iterdir())) == len(prompts)
        for prompt, answer in zip(prompts, dense):
            assert llm.reset_prefix_cache()
            before = outcomes(llm)
            assert generate(llm, [prompt]) == [answer]
            assert grown(llm, before) == {"squeezed": 8}, "the prefix was computed again"


TENSOR, PIPELINE = (
    {"tensor_parallel_size": 2},
    # vLLM's CPU build runs a pipeline only where it compiles the model.
    {"pipeline_parallel_size": 2, "enforce_eager": False},
)


@pytest.mark.long
def test_two_ranks_make_the_index_that_one_makes(models, indexes, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # vLLM would else want a NUMA node for each
    model = models("llama")
    one = PrefixIndex.open(indexes(model, PREFIX))
    (tmp_path / "ids.json").write_text(str(PREFIX))
    arguments = (None, tmp_path / "ids.json", None, tmp_path / "store", IndexParameters(), {**ENGINE_ARGS, **TENSOR})
    two = PrefixIndex.open(make_index(str(model), *arguments, measured=False))
    assert (two.manifest.model, two.manifest.parameters) == (one.manifest.model, one.manifest.parameters)
    for number in range(len(one.manifest.layers)):
        of_one, of_two = one.layer(number), two.layer(number)
        assert torch.equal(of_two.members, of_one.members) and torch.equal(of_two.sizes, of_one.sizes)
        torch.testing.assert_close(of_two.mean_keys(), of_one.mean_keys())


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "budget"), [(TENSOR, 0.4), (PIPELINE, 1.0)], ids=["tensor", "pipeline"])
def test_one_index_fits_two_ranks(models, indexes, dense_answers, monkeypatch, ranks, budget):
    """Answers are those of one rank; below a budget of 1, where each rank must have the clusters of its own heads."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # vLLM would else want a NUMA node for each
    model = models("llama")
    index = indexes(model, PREFIX)
    prompts = [PREFIX + tokens(seed, 20) for seed in range(4)]

    def ask(**arguments: Any) -> list[tuple[int, ...]]:
        with engine(model, index, budget, **arguments) as llm:
            generate(llm, [PREFIX + [5]], num_tokens=1)
            before = outcomes(llm)
            answers = generate(llm, prompts)
            assert grown(llm, before) == {"squeezed": 32}
        return answers

    expected = ask()
    assert (expected == dense_answers(model, prompts)) == (budget == 1)
    assert ask(**ranks) == expected
