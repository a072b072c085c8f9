"""All that depends on vLLM's version or has no official hook. Checked with vLLM 0.26.0, 0.32.0 and 0.33.0.

Features are detected, never concluded from a version number.
"""

import functools
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND = "SQUEEZE"
BACKEND_PATH = "vllm_squeeze.attention_backend.gpu_attention.SqueezeBackend"
CPU_BACKEND_PATH = "vllm_squeeze.attention_backend.cpu_attention.SqueezeCPUBackend"
CONNECTORS = {
    "SqueezeConnector": "vllm_squeeze.attention_backend.connector",
    "SqueezeRecorder": "vllm_squeeze.attention_backend.recorder",
}
logger = init_logger("vllm.squeeze")


def ensure_backend_name() -> "AttentionBackendEnum":
    """Adds the member SQUEEZE to vLLM's enum of attention backends, once a process.

    vLLM pickles its configuration, this member in it, into its processes before it loads plugins there, so the
    member carries its own way of being restored. vLLM's registration of names (0.32 and later) lacks that and fails
    when its processes are spawned; 0.26 has no registration of names at all.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum._member_map_.get(BACKEND)
    if member is None:
        member = object.__new__(AttentionBackendEnum)
        member._name_, member._value_ = BACKEND, BACKEND_PATH
        member._sort_order_ = len(AttentionBackendEnum._member_names_)
        type.__setattr__(AttentionBackendEnum, BACKEND, member)
        AttentionBackendEnum._member_map_[BACKEND] = member
        AttentionBackendEnum._value2member_map_[BACKEND_PATH] = member
        AttentionBackendEnum._member_names_.append(BACKEND)
        member.__reduce_ex__ = lambda protocol: (ensure_backend_name, ())
    return member


def register_cpu_backend() -> None:
    """On the CPU, where vLLM overrides any choice of backend, puts ours (neutral unless chosen) in the CPU's place."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND_PATH)


def flash_attention_version() -> int | None:
    """The FlashAttention that vLLM has, in its build and for the GPU; None if it has none."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    except ImportError:
        return None
    return get_flash_attn_version()


def has_flash_attention() -> bool:
    """Whether vLLM has FlashAttention, in its build and for the GPU."""
    return flash_attention_version() is not None


@functools.cache
def can_share_prefixes() -> bool:
    """Whether FlashAttention spreads the keys of a prefix over the GPU for several queries, as versions before 3 do not.

    Asked once a process: vLLM's answer depends on the configuration that is current, and graphs are captured by it.
    """
    return flash_attention_version() == 3


def register_connectors() -> None:
    """Makes our connectors known by name, which MultiConnector needs."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name, module in CONNECTORS.items():
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, module, name)


def wrap_create_engine_config() -> None:
    """Lets every engine that chose this backend get its connector, from the command line and from Python alike.

    vLLM has no hook by which a backend adds to the configuration.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, "squeeze"):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_squeeze.attention_backend.wiring import add_connector

        add_connector(self)
        return original(self, *args, **kwargs)

    create_engine_config.squeeze = True
    EngineArgs.create_engine_config = create_engine_config


def before_reset(pool: Any, release: Callable[[], None]) -> None:
    """Has ``release`` called before vLLM's block pool is reset, which it refuses to be while blocks are held."""
    reset = pool.reset_prefix_cache

    @functools.wraps(reset)
    def release_and_reset() -> bool:
        release()
        return reset()

    pool.reset_prefix_cache = release_and_reset


def salt_block_hashes(request: Any, pool: Any, first: int, salt: bytes) -> bool:
    """Has only requests of the same salt find the blocks of a new request that hold tokens from ``first`` on.

    Args:
        request: vLLM's, whose prompt has been hashed.
        pool: vLLM's block pool.
        first: the first token that makes a block differ.
        salt: up to 64 bytes.

    Returns:
        Whether this vLLM hashes blocks in a way we know.
    """
    size = getattr(pool, "hash_block_size", None)
    if size is None or not all(hasattr(request, name) for name in ("block_hashes", "_block_hasher")):
        return False
    if (hasher := request._block_hasher) is None:
        return True
    plain, alike = list(request.block_hashes), first // size

    def salted(hashes: list[bytes], start: int) -> list[bytes]:
        few = max(alike - start, 0)
        differ = (blake2b(block_hash, key=salt, digest_size=len(block_hash)).digest() for block_hash in hashes[few:])
        return [*hashes[:few], *differ]

    def hash_and_salt(request: Any) -> list[bytes]:
        # vLLM chains hashes: without salt, so that they do not depend on which tokens came together
        shown, start = request.block_hashes, len(request.block_hashes)
        del plain[start:]
        request.block_hashes = plain
        try:
            new = hasher(request)
        finally:
            request.block_hashes = shown
        plain.extend(new)
        return salted(new, start)

    request.block_hashes[alike:] = salted(plain[alike:], alike)
    request._block_hasher = hash_and_salt
    return True


def prepare_cuda_graphs() -> None:
    """Sees to it that no step with squeezed rows replays a CUDA graph of dense attention."""
    known = {"V2": graphs_of_squeezed_steps(), "V1": no_full_graph_while_squeezing()}
    if unknown := [runner for runner, found in known.items() if not found]:
        logger.warning(
            "squeeze: the CUDA graphs of this vLLM's %s model runner are not known here; where it replays full graphs "
            "rows may stay dense. Use --enforce-eager.",
            " and ".join(unknown),
        )


def graphs_of_squeezed_steps() -> bool:
    """Gives vLLM's V2 model runner more sets of full CUDA graphs, one for each kind of step with squeezed rows.

    A step without squeezed rows replays vLLM's own graphs. The sets are captured only in an engine that serves an index.

    Returns:
        Whether this vLLM has the V2 runner's graph manager in a form we know.
    """
    try:
        from vllm.config import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager as Manager
    except ImportError:
        return False
    if hasattr(Manager, "squeeze"):
        return True
    if not (hasattr(Manager, "capture") and hasattr(Manager, "run_fullgraph")):
        return False
    capture, run_fullgraph = Manager.capture, Manager.run_fullgraph

    def by_kind(worker: Any, descriptions: list[Any]) -> dict[Any, list[Any]]:
        kinds: dict[Any, list[Any]] = {}
        for description in descriptions:
            for kind in worker.kinds_of_steps(description.num_tokens):
                kinds.setdefault(kind, []).append(description)
        return kinds

    @functools.wraps(capture)
    def capture_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_squeeze.attention_backend.worker import worker_of

        result = capture(self, *args, **kwargs)
        worker = worker_of(self.vllm_config)
        full = self._capture_descs.get(CUDAGraphMode.FULL)
        if worker is None or not full:
            return result
        dense_graphs, descriptions = self.graphs, self._capture_descs
        self.squeezed_graphs = {}
        try:
            for kind, of_kind in by_kind(worker, full).items():
                self.graphs, self._capture_descs = {}, {CUDAGraphMode.FULL: of_kind}
                with worker.capturing(kind):
                    capture(self, *args, **kwargs)
                self.squeezed_graphs[kind] = self.graphs
        finally:
            self.graphs, self._capture_descs = dense_graphs, descriptions
        return result

    @functools.wraps(run_fullgraph)
    def run_one_of_them(self: Any, description: Any) -> Any:
        from vllm_squeeze.attention_backend.worker import worker_of

        squeezed_graphs = getattr(self, "squeezed_graphs", None)
        if squeezed_graphs is None or not (worker := worker_of(self.vllm_config)).squeezing:
            return run_fullgraph(self, description)
        dense_graphs, self.graphs = self.graphs, squeezed_graphs[worker.kind]
        try:
            return run_fullgraph(self, description)
        finally:
            self.graphs = dense_graphs

    Manager.capture, Manager.run_fullgraph, Manager.squeeze = capture_all, run_one_of_them, True
    return True


def no_full_graph_while_squeezing() -> bool:
    """Keeps vLLM's V1 model runner from replaying a full CUDA graph in a step with squeezed rows.

    Returns:
        Whether this vLLM has the V1 runner's dispatcher in a form we know.
    """
    try:
        from vllm.config import CUDAGraphMode
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher as Dispatcher
    except ImportError:
        return False
    if hasattr(Dispatcher, "squeeze"):
        return True
    if not hasattr(Dispatcher, "dispatch"):
        return False
    original = Dispatcher.dispatch

    @functools.wraps(original)
    def dispatch(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_squeeze.attention_backend.worker import worker_of

        worker = worker_of(self.vllm_config)
        if worker is not None and worker.squeezing:
            kwargs["invalid_modes"] = {CUDAGraphMode.FULL, *(kwargs.get("invalid_modes") or ())}
        return original(self, *args, **kwargs)

    Dispatcher.dispatch, Dispatcher.squeeze = dispatch, True
    return True
