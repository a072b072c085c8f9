"""Each check of the installation, on machines that this one is made to look like."""

from types import SimpleNamespace

import pytest
import torch
import vllm.platforms

from vllm_squeeze.attention_backend import compat
from vllm_squeeze.kernels import suffix_attention
from vllm_squeeze.offline_tools import installation, self_test
from vllm_squeeze.offline_tools.finding import FAIL, OK, WARN, Finding
from vllm_squeeze.offline_tools.self_test import Difference

H100 = "NVIDIA H100 80GB HBM3"


def platform(monkeypatch, kind: str, name: str = "") -> None:
    """Makes vLLM run on "cpu", "cuda" or neither."""
    fake = SimpleNamespace(
        is_cpu=lambda: kind == "cpu", is_cuda=lambda: kind == "cuda", get_device_name=lambda: name or kind
    )
    # of vLLM's modules some look at the platform as they are imported
    compat.graphs_of_squeezed_steps()
    monkeypatch.setattr(vllm.platforms, "current_platform", fake)


def states(check) -> dict[str, str]:
    return {finding.what: finding.state for finding in check()}


def cannot_import(monkeypatch, *names: str) -> None:
    original = installation.import_module

    def import_module(name):
        if name in names:
            raise ImportError(f"no {name}")
        return original(name)

    monkeypatch.setattr(installation, "import_module", import_module)


def test_versions(monkeypatch):
    assert states(installation.versions) == dict.fromkeys(("Python", "vllm-squeeze", "torch", "Triton", "vLLM"), OK)
    cannot_import(monkeypatch, "triton")
    assert [finding.what for finding in installation.versions() if finding.state == FAIL] == ["Triton"]


@pytest.mark.parametrize(
    ("capability", "state"), [((7, 5), WARN), ((8, 0), OK), ((8, 9), OK), ((9, 0), OK), ((10, 0), WARN)]
)
def test_gpus(monkeypatch, capability, state):
    platform(monkeypatch, "cuda", H100)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
    properties = SimpleNamespace(name=H100, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(installation, "driver_version", lambda: "580.1")
    found = list(installation.device())
    assert [(finding.state, finding.what) for finding in found] == [(state, "GPU 0"), (state, "GPU 1")]
    told = f"{H100}, 80 GiB, compute capability {capability[0]}.{capability[1]}, driver 580.1"
    assert all(finding.text.startswith(told) for finding in found)


@pytest.mark.parametrize(("kind", "state"), [("cpu", OK), ("neither", FAIL)])
def test_other_devices(monkeypatch, kind, state):
    platform(monkeypatch, kind)
    assert states(installation.device) == {"device": state}


def test_a_driver_that_says_nothing(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(installation.subprocess, "run", missing)
    assert installation.driver_version() == "unknown"


@pytest.mark.parametrize(("allowed", "state"), [(None, OK), ("squeeze", OK), ("other,squeeze", OK), ("other", FAIL)])
def test_the_plugin(monkeypatch, allowed, state):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    (found,) = installation.plugin()
    assert found.state == state and (state == OK or f"VLLM_PLUGINS is '{allowed}'" in found.text)


def test_a_model_runner_that_is_not_known(monkeypatch):
    monkeypatch.setattr(compat, "graphs_of_squeezed_steps", lambda: False)
    graphs = [finding for finding in installation.hooks() if finding.what == "CUDA graphs"]
    assert [finding.state for finding in graphs] == [WARN, OK]
    assert "V2 model runner is not known" in graphs[0].text and "V1" in graphs[1].text


@pytest.mark.parametrize(
    ("kind", "version", "reason", "state", "told"),
    [
        ("cuda", 3, "xformers is not installed", OK, "version 3"),
        ("cuda", None, None, OK, "none; xformers"),
        ("cuda", None, "xformers is not installed", FAIL, "(xformers is not installed): nothing is squeezed"),
        ("cpu", None, "xformers is not installed", OK, "none, and none is needed on the CPU"),
    ],
)
def test_flash_attention(monkeypatch, kind, version, reason, state, told):
    platform(monkeypatch, kind)
    monkeypatch.setattr(installation, "import_module", lambda name: None)
    monkeypatch.setattr(compat, "flash_attention_version", lambda: version)
    monkeypatch.setattr(suffix_attention, "why_unsupported", lambda *arguments: reason)
    *_, found = installation.hooks()
    assert found[:2] == (state, "FlashAttention") and told in found.text


def test_a_vllm_that_the_backend_cannot_be_built_on(monkeypatch):
    cannot_import(monkeypatch, "vllm_squeeze.attention_backend.connector")
    with pytest.raises(ImportError, match="no vllm_squeeze.attention_backend.connector"):
        list(installation.hooks())


@pytest.mark.parametrize(
    ("kind", "name", "state", "told"),
    [("cuda", H100, OK, H100), ("cuda", "NVIDIA A100", WARN, "none of NVIDIA A100"), ("cpu", "cpu", OK, "none on the")],
)
def test_measured_times(monkeypatch, kind, name, state, told):
    platform(monkeypatch, kind, name)
    (found,) = installation.times()
    assert found[:2] == (state, "measured times") and told in found.text


def test_extras(monkeypatch):
    cannot_import(monkeypatch, "matplotlib")
    assert states(installation.extras)["matplotlib"] == WARN
    assert Finding(WARN, "matplotlib", "") in [finding._replace(text="") for finding in installation.extras()]


@pytest.mark.parametrize(("relative", "state"), [(4e-3, OK), (6e-3, FAIL), (float("nan"), FAIL)])
def test_kernels_that_do_not_agree(monkeypatch, relative, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(self_test, "difference_of_kernels", lambda dtype, device: Difference(0.01, relative))
    (found,) = installation.kernels()
    assert found.state == state and "Triton on the GPU, in bfloat16" in found.text and "1.0e-02" in found.text


def test_without_a_gpu_the_torch_path_is_run_and_said_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = installation.kernels()
    assert found.state == OK and found.text.startswith("no GPU: the torch path on the CPU")
    monkeypatch.setattr(self_test, "difference_of_reference", lambda: Difference(1.0, 1.0))
    assert next(installation.kernels()).state == FAIL
