"""What depends on vLLM's version. Most of it is in ``contract.py``, which runs against other versions as well."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_squeeze.attention_backend import compat
from vllm_squeeze.plugin import register

ROOT = Path(__file__).resolve().parents[2]


def run_contract(*packages: Path) -> str:
    """What the contract says last, in a process of its own, which has loaded no plugin; ``packages`` come first."""
    script = Path(__file__).with_name("contract.py")
    found = os.pathsep.join(map(str, (*packages, ROOT)))
    environment = {**os.environ, "PYTHONPATH": found}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=500, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


def test_what_we_build_on_is_there():
    assert run_contract().startswith("OK ")


def test_registering_again_changes_nothing():
    register()
    before = list(AttentionBackendEnum), EngineArgs.create_engine_config
    register()
    assert (list(AttentionBackendEnum), EngineArgs.create_engine_config) == before


@pytest.mark.parametrize("feature", [compat.graphs_of_squeezed_steps, compat.no_full_graph_while_squeezing])
def test_features_are_detected_again_and_again(feature):
    assert feature() is True
    assert feature() is True


def test_graphs_are_wrapped_once():
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    compat.graphs_of_squeezed_steps(), compat.no_full_graph_while_squeezing()
    wrapped = [ModelCudaGraphManager.capture, ModelCudaGraphManager.run_fullgraph, CudagraphDispatcher.dispatch]
    assert all(hasattr(function, "__wrapped__") for function in wrapped)
    assert not any(hasattr(function.__wrapped__, "__wrapped__") for function in wrapped)
    compat.graphs_of_squeezed_steps(), compat.no_full_graph_while_squeezing()
    now = [ModelCudaGraphManager.capture, ModelCudaGraphManager.run_fullgraph, CudagraphDispatcher.dispatch]
    assert now == wrapped


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU's backend takes the place of vLLM's")
def test_vllms_own_attention_where_squeeze_was_not_chosen():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    register()
    backend = AttentionBackendEnum.CPU_ATTN.get_class()
    assert issubclass(backend, CPUAttentionBackend)
    assert backend.get_name() == "CPU_ATTN"
    with set_current_vllm_config(VllmConfig()):
        assert backend.get_impl_cls() is CPUAttentionBackendImpl


def hashed(salt: bytes | None, parts: list[list[int]], first: int = 5) -> list[bytes]:
    """vLLM's hashes of a request's blocks of 4 tokens, whose tokens come in parts; salted from one token on."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    request = Request("a", parts[0], SamplingParams(), None, block_hasher=get_request_block_hasher(4, sha256))
    if salt is not None:
        assert compat.salt_block_hashes(request, SimpleNamespace(hash_block_size=4), first, salt)
    for part in parts[1:]:
        request.append_output_token_ids(part)
    return request.block_hashes


def test_blocks_are_found_by_requests_of_the_same_salt():
    """Whatever tokens came together; before the first salted token by all."""
    tokens = list(range(20))
    plain = hashed(None, [tokens])
    salted = hashed(b"a", [tokens])
    assert len({*plain, *salted, *hashed(b"b", [tokens])}) == 5 + 2 * 4 and plain[0] == salted[0]
    assert {len(block_hash) for block_hash in salted} == {len(plain[0])}
    for parts in ([tokens[:4], tokens[4:]], [tokens[:7], tokens[7:9], tokens[9:18], tokens[18:]]):
        assert hashed(b"a", parts) == salted and hashed(None, parts) == plain


@pytest.mark.parametrize("request_of_vllm", [SimpleNamespace(block_hashes=[]), SimpleNamespace(_block_hasher=None)])
def test_another_way_of_hashing_is_told(request_of_vllm):
    pool = SimpleNamespace(hash_block_size=16)
    assert not compat.salt_block_hashes(request_of_vllm, pool, 16, b"a")
    known = SimpleNamespace(block_hashes=[], _block_hasher=None)
    assert compat.salt_block_hashes(known, pool, 16, b"a") and not compat.salt_block_hashes(known, None, 16, b"a")
