"""What depends on vLLM's version. Most of it is in ``contract.py``, which runs against other versions as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_squeeze.attention_backend import compat
from vllm_squeeze.plugin import register


def test_what_we_build_on_is_there():
    """In a process of its own, which has loaded no plugin; against another vLLM if one comes first on PYTHONPATH."""
    script = Path(__file__).with_name("contract.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=500, env={**os.environ})
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].startswith("OK ")


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
