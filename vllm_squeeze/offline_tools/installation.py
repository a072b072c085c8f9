"""Checks of what is installed, of the device, and of what this vLLM offers to build on."""

import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import vllm_squeeze
from vllm_squeeze.offline_tools.finding import FAIL, OK, WARN, Finding

TESTED_CAPABILITIES = (8, 0), (9, 0)
"""The lowest and the highest compute capability of the GPUs that this is made for."""
EXTRAS = {
    "xformers": "needed on GPUs without FlashAttention only: pip install vllm-squeeze[xformers]",
    "matplotlib": "needed by vllm-squeeze report only: pip install vllm-squeeze[report]",
}


def versions() -> Iterator[Finding]:
    yield Finding(OK, "Python", platform.python_version())
    yield Finding(OK, "vllm-squeeze", f"{vllm_squeeze.__version__} in {Path(vllm_squeeze.__file__).parent}")
    for name, label in (("torch", "torch"), ("triton", "Triton"), ("vllm", "vLLM")):
        try:
            yield Finding(OK, label, import_module(name).__version__)
        except (ImportError, OSError) as error:
            yield Finding(FAIL, label, f"cannot be imported: {error}")


def device() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        yield Finding(OK, "device", "CPU engine, for trying out: squeezed answers take longer than dense ones on it")
        return
    if not current_platform.is_cuda():
        yield Finding(FAIL, "device", "vLLM runs neither on an NVIDIA GPU nor on the CPU here")
        return
    import torch

    lowest, highest = TESTED_CAPABILITIES
    for number in range(torch.cuda.device_count()):
        gpu, capability = torch.cuda.get_device_properties(number), torch.cuda.get_device_capability(number)
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {'.'.join(map(str, capability))}"
        text += f", driver {driver_version()}"
        if lowest <= capability <= highest:
            yield Finding(OK, f"GPU {number}", text)
        else:
            yield Finding(WARN, f"GPU {number}", f"{text}, which was not tested: 8.0 to 9.0 were")


def driver_version() -> str:
    """Version of NVIDIA's driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def plugin() -> Iterator[Finding]:
    from vllm.plugins import load_plugins_by_group

    register = load_plugins_by_group("vllm.general_plugins").get("squeeze")
    if register is None:
        allowed = os.environ.get("VLLM_PLUGINS")
        reason = "install vllm-squeeze beside vLLM" if allowed is None else f"VLLM_PLUGINS is {allowed!r}"
        yield Finding(FAIL, "plugin", f"vLLM finds no entry point squeeze: {reason}")
        return
    register()
    yield Finding(OK, "plugin", f"{register.__module__}:{register.__name__} is registered")


def hooks() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    from vllm_squeeze.attention_backend import compat

    backend = compat.CPU_BACKEND_PATH if current_platform.is_cpu() else compat.BACKEND_PATH
    for path in (*compat.CONNECTORS.values(), backend.rpartition(".")[0]):
        import_module(path)
    yield Finding(OK, "backend", f"{backend} and the connectors can be imported")
    for runner, known in (("V2", compat.graphs_of_squeezed_steps()), ("V1", compat.no_full_graph_while_squeezing())):
        if known:
            yield Finding(OK, "CUDA graphs", f"those of vLLM's {runner} model runner are known")
        else:
            yield Finding(
                WARN, "CUDA graphs", f"vLLM's {runner} model runner is not known: use --enforce-eager with it"
            )
    version = compat.flash_attention_version()
    if version is not None:
        yield Finding(OK, "FlashAttention", f"version {version}")
    elif current_platform.is_cpu():
        yield Finding(OK, "FlashAttention", "none, and none is needed on the CPU")
    else:
        yield without_flash_attention()


def without_flash_attention() -> Finding:
    """Whether xformers can take FlashAttention's place on this GPU."""
    import torch

    from vllm_squeeze.kernels.suffix_attention import why_unsupported

    if reason := why_unsupported(128, torch.float16, torch.device("cuda")):
        return Finding(FAIL, "FlashAttention", f"none, nor xformers in its place ({reason}): nothing is squeezed")
    return Finding(OK, "FlashAttention", "none; xformers attends to what follows a prefix")


def times() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    from vllm_squeeze.attention_backend.policy import DEFAULT_GPU, measured_times

    gpu = current_platform.get_device_name()
    if gpu in measured_times():
        yield Finding(OK, "measured times", f"mode auto goes by those of {gpu}")
    elif current_platform.is_cpu():
        yield Finding(OK, "measured times", "none on the CPU, where mode auto always squeezes")
    else:
        yield Finding(WARN, "measured times", f"none of {gpu}: mode auto goes by those of {DEFAULT_GPU}")


def extras() -> Iterator[Finding]:
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns of binaries that are not used here
    for name, use in EXTRAS.items():
        try:
            yield Finding(OK, name, import_module(name).__version__)
        except (ImportError, OSError) as error:
            yield Finding(WARN, name, f"cannot be imported ({error}); {use}")


def kernels() -> Iterator[Finding]:
    import torch

    from vllm_squeeze.offline_tools.self_test import TOLERANCE, difference_of_kernels, difference_of_reference

    if torch.cuda.is_available():
        dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
        found = difference_of_kernels(dtype, "cuda")
        told = f"Triton on the GPU, in {str(dtype).removeprefix('torch.')}, against the oracle"
    else:
        dtype, found = torch.float32, difference_of_reference()
        told = "no GPU: the torch path on the CPU, in float32, against dense attention"
    # not a comparison that NaN passes
    state = OK if found.relative <= TOLERANCE[dtype] else FAIL
    told += f": greatest difference {found.greatest:.1e}, relative {found.relative:.1e} ({TOLERANCE[dtype]:g} allowed)"
    yield Finding(state, "kernels", told)
