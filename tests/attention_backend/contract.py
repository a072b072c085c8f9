"""What we build on in vLLM, checked against whatever vLLM is importable: ``PYTHONPATH=... python contract.py``.

Prints "OK" and vLLM's version. Each check fails loudly when vLLM moves what it is about. Runs without a GPU, and on the
Python files of a wheel alone.
"""

import ast
import copy
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

CONFIG = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 32,
"max_position_embeddings": 512, "torch_dtype": "float32"}"""


def received(pipe) -> None:
    """In a spawned process: says what was unpickled, and whether vLLM's plugins had been loaded before."""
    member = pipe.recv()
    import vllm.plugins

    pipe.send((member.name, member.value, type(member).__name__, vllm.plugins.plugins_loaded))


def check_name() -> None:
    """The enum's internals that the name is added through, and its way into other processes."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for table in ("_member_map_", "_value2member_map_", "_member_names_"):
        assert hasattr(AttentionBackendEnum, table), table
    from vllm_squeeze.attention_backend.compat import BACKEND, BACKEND_PATH, ensure_backend_name

    member = ensure_backend_name()
    assert isinstance(member, AttentionBackendEnum)
    assert (member.name, member.value) == (BACKEND, BACKEND_PATH)
    for found in (AttentionBackendEnum[BACKEND], AttentionBackendEnum.SQUEEZE, AttentionBackendEnum(BACKEND_PATH)):
        assert found is member
    assert list(AttentionBackendEnum).count(member) == 1
    assert ensure_backend_name() is member and list(AttentionBackendEnum).count(member) == 1
    assert member.get_path() == BACKEND_PATH, "vLLM finds a backend's class otherwise"
    import cloudpickle

    for copied in (
        *(pickle.loads(pickle.dumps({"backend": member}, protocol))["backend"] for protocol in (2, 4, 5)),
        cloudpickle.loads(cloudpickle.dumps(member)),
        copy.deepcopy(member),
        copy.copy(member),
    ):
        assert copied is member
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=received, args=(theirs,))
    process.start()
    ours.send(member)
    assert ours.poll(100), "the spawned process did not answer"
    assert ours.recv() == (BACKEND, BACKEND_PATH, "AttentionBackendEnum", False)
    process.join()


def check_connectors() -> None:
    """The factory's table of names."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert isinstance(KVConnectorFactory._registry, dict)
    parameters = list(inspect.signature(KVConnectorFactory.register_connector).parameters)
    assert parameters == ["name", "module_path", "class_name"], parameters
    from vllm_squeeze.attention_backend.compat import CONNECTORS, register_connectors

    register_connectors()
    register_connectors()
    for name in CONNECTORS:
        cls = KVConnectorFactory._registry[name]()
        assert cls.__name__ == name
        assert not inspect.isabstract(cls), f"{name} lacks {cls.__abstractmethods__}"


def check_wiring(folder: Path) -> None:
    """From the engine's arguments, through vLLM's own checks, to the configuration that its processes get."""
    from vllm.engine.arg_utils import EngineArgs

    for field in ("attention_backend", "attention_config", "kv_transfer_config", "additional_config"):
        assert field in inspect.signature(EngineArgs).parameters, field
    # Names of settings that rule squeezing out: if vLLM renames one, we would no longer see it.
    for field in ("kv_offloading_size", "decode_context_parallel_size", "enable_dbo", "ubatch_size"):
        assert field in inspect.signature(EngineArgs).parameters, field
    from tests.prefix_index.small_index import write_index
    from vllm_squeeze.attention_backend.wiring import SERVE, options_of
    from vllm_squeeze.plugin import register

    register()
    wrapped = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is wrapped, "wrapped twice"
    assert list(inspect.signature(wrapped).parameters)[0] == "self"
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(CONFIG)
    index = write_index(folder / "store")
    settings = {"squeeze": {"index": str(index)}}

    def configured(**arguments):
        arguments = {"additional_config": settings, "skip_tokenizer_init": True, "dtype": "float32", **arguments}
        return EngineArgs(str(folder / "model"), **arguments).create_engine_config()

    for chosen in ({"attention_backend": "squeeze"}, {"attention_config": {"backend": "squeeze"}}):
        config = configured(**chosen)
        assert config.attention_config.backend.name == "SQUEEZE"
        assert options_of(config, SERVE)["indexes"] == [str(index)]
        config.compute_hash()
        sent = pickle.loads(pickle.dumps(config.attention_config))
        assert sent.backend is config.attention_config.backend
    assert configured().kv_transfer_config is None
    assert configured(attention_backend="squeeze", additional_config={}).kv_transfer_config is None


def attributes(cls: ast.ClassDef) -> set[str]:
    """Methods of a class and attributes that it sets or uses on itself, by name."""
    methods = {node.name for node in ast.walk(cls) if isinstance(node, ast.FunctionDef)}
    used = (node for node in ast.walk(cls) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    return methods | {node.attr for node in used if node.value.id == "self"}


def source_of(module: str) -> dict[str, ast.ClassDef]:
    """Classes of a module of vLLM by name, read and not run: on a CPU some cannot be imported."""
    path = Path(importlib.util.find_spec("vllm").submodule_search_locations[0], *module.split(".")[1:])
    tree = ast.parse(path.with_suffix(".py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def method(cls: ast.ClassDef, name: str) -> ast.FunctionDef:
    return next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == name)


def check_graphs() -> None:
    """What two sets of full CUDA graphs, and steps without any, are made by."""
    classes = source_of("vllm.v1.worker.gpu.cudagraph_utils")
    base, manager = classes["CudaGraphManager"], classes["ModelCudaGraphManager"]
    assert [ast.unparse(b) for b in manager.bases] == ["CudaGraphManager"]
    for name in ("graphs", "_capture_descs", "vllm_config", "capture", "run_fullgraph"):
        assert name in attributes(base), name
    # Ours wraps those of the class that the runner makes; a step's graph is looked up when it is replayed.
    assert [arg.arg for arg in method(manager, "run_fullgraph").args.args] == ["self", "desc"]
    assert method(manager, "capture").args.args[0].arg == "self"
    replay = ast.unparse(method(base, "run_fullgraph"))
    assert "self.graphs[desc]" in replay and ".replay()" in replay
    captured = ast.unparse(method(base, "capture"))
    assert "self._capture_descs" in captured and "self.graphs[desc] = " in captured
    dispatch = method(source_of("vllm.v1.cudagraph_dispatcher")["CudagraphDispatcher"], "dispatch")
    assert "invalid_modes" in [arg.arg for arg in (*dispatch.args.args, *dispatch.args.kwonlyargs)]
    assert "vllm_config" in attributes(source_of("vllm.v1.cudagraph_dispatcher")["CudagraphDispatcher"])


def check_scheduler_output() -> None:
    """What the scheduler's side reads of each step and of each request."""
    classes = source_of("vllm.v1.core.sched.output")
    for name, fields in {
        "SchedulerOutput": {"scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"},
        "NewRequestData": {"req_id", "block_ids", "num_computed_tokens"},
        "CachedRequestData": {"req_ids", "new_block_ids", "num_computed_tokens", "resumed_req_ids"},
    }.items():
        declared = {node.target.id for node in classes[name].body if isinstance(node, ast.AnnAssign)}
        assert fields <= declared, (name, fields - declared)
    used = attributes(source_of("vllm.v1.request")["Request"])
    needed = {
        "request_id", "prompt_token_ids", "prompt_embeds", "lora_request", "cache_salt", "mm_features",
        "kv_transfer_params", "num_tokens", "block_hashes", "_block_hasher",
    }  # fmt: skip
    assert needed <= used, needed - used
    assert "hash_block_size" in attributes(source_of("vllm.v1.core.block_pool")["BlockPool"])


def check_attention() -> None:
    """What our layers read of vLLM's."""
    impl = source_of("vllm.v1.attention.backends.flash_attn")["FlashAttentionImpl"]
    needed = {"logits_soft_cap", "kv_cache_dtype", "supports_quant_query_input", "vllm_flash_attn_version"}
    assert needed <= attributes(impl), needed - attributes(impl)
    for name in ("q", "k", "v"):
        assert f"layer._{name}_scale.expand(descale_shape)" in ast.unparse(impl), name


def check_without_flash_attention() -> None:
    """How vLLM says that it has no FlashAttention, and its attention in place of it."""
    from vllm.v1.attention.backends import fa_utils

    parameters = inspect.signature(fa_utils.get_flash_attn_version).parameters.values()
    assert all(parameter.default is not parameter.empty for parameter in parameters)
    classes = source_of("vllm.v1.attention.backends.triton_attn")
    declared = {node.target.id for node in classes["TritonAttentionMetadata"].body if isinstance(node, ast.AnnAssign)}
    needed = {"num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len", "seq_lens", "block_table"}
    assert needed <= declared, needed - declared
    impl = classes["TritonAttentionImpl"]
    assert "fused_output_quant_supported" in attributes(impl)
    forward = ast.unparse(method(impl, "forward"))
    # each row's tokens, which we shorten, and where keys and values lie
    assert "seqused_k = attn_metadata.seq_lens" in forward and "block_table = attn_metadata.block_table" in forward
    assert "kv_cache.transpose(1, 2)" in forward and "kv_cache.split(hs, dim=-1)" in forward


def check_connector_hooks() -> None:
    """What vLLM calls us by, and what we call of it."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    for name in ("SupportsHMA", "KVConnectorMetadata", "KVConnectorRole", "KVConnectorBase_V1"):
        assert hasattr(base, name), name
    for name in (
        "on_new_request", "build_connector_meta", "request_finished", "reset_cache", "register_kv_caches",
        "handle_preemptions", "bind_connector_metadata", "clear_connector_metadata", "get_kv_connector_stats",
        "build_kv_connector_stats", "build_prom_metrics",
    ):  # fmt: skip
        assert hasattr(base.KVConnectorBase_V1, name), name
    assert hasattr(base.SupportsHMA, "request_finished_all_groups")


def main() -> None:
    check_name()
    check_connectors()
    check_connector_hooks()
    check_scheduler_output()
    check_graphs()
    check_attention()
    check_without_flash_attention()
    with tempfile.TemporaryDirectory() as folder:
        check_wiring(Path(folder))
    from importlib.metadata import version

    print("OK", version("vllm"))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
