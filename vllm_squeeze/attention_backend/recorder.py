"""Makes the clusters of one prefix after another inside vLLM: runs with the model, next to the keys, on each rank.

While questions on the prefix are answered, attention layers keep the queries that thresholds are calibrated on, and
then those of other questions, by which it is seen what thresholds keep. At last the indexer sends the prefix alone. The
recording connector waits until that has been computed, reads each layer's keys and values from the paged KV cache, and
writes the clusters of this rank's heads, and histograms of their scores, into a folder of parts that the indexer joins.
Each request says which prefix it is on (``Recording``); the requests of the next follow when that is done.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole

from vllm_squeeze.attention_backend.connector import PassiveConnector
from vllm_squeeze.attention_backend.layers import in_model_dtype, why_dense
from vllm_squeeze.attention_backend.placement import full_attention_groups
from vllm_squeeze.attention_backend.wiring import RECORD, options_of
from vllm_squeeze.attention_backend.worker import layers_of
from vllm_squeeze.prefix_index.extension import known_labels
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.indexing import ComputedLayer, IndexedLayer, index_layers
from vllm_squeeze.prefix_index.manifest import IndexParameters

# Bytes of keys and values clustered at once: several layers of a small model, one of a large one.
BATCH_BYTES = 1 << 28


RECORDING = "squeeze_recording"
"""The key of vLLM's ``kv_transfer_params`` under which a request says what is recorded."""


@dataclass(frozen=True)
class Recording:
    """What is recorded of a prefix.

    Attributes:
        parts: folder that the parts go to.
        num_tokens: of the prefix.
        num_questions: on the prefix that are answered first, for thresholds; what is asked then is held back.
        former: folder of the index that is extended, if any.
    """

    parts: str
    num_tokens: int
    num_questions: int
    former: str | None = None


def layer_order(name: str) -> list[int | str]:
    """Sorts layer names by the numbers in them."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def read_parts(folder: Path) -> dict[str, list[Path]]:
    """The files of recorded parts by layer in the model's order, those of a layer in the order of heads."""
    found: dict[str, dict[int, Path]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        found.setdefault(metadata["layer"], {})[int(metadata["first_head"])] = path
    return {layer: [path for _, path in sorted(found[layer].items())] for layer in sorted(found, key=layer_order)}


def read_part(path: Path) -> IndexedLayer:
    """Reads one file of ``read_parts``."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return IndexedLayer(tensors, float(metadata["mean_cosine"]), int(metadata["num_queries"]))


class ObservesQueries:
    """Mixed into vLLM's attention layers: keeps the queries that thresholds are calibrated on, in the host's memory.

    Attributes:
        observed: what this step's queries are added to, ``queries`` or ``held_back``. None while there is no step of
            requests; vLLM also tries its layers out.
        recording: what this step's requests are on.
        queries: those that calibrate, [W, H * G, D] in all, of each step with any.
        held_back: those of questions that do not, likewise.
    """

    observed: list[torch.Tensor] | None = None
    recording: Recording | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        from vllm.config import get_current_vllm_config

        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        self._dtype = vllm_config.model_config.dtype
        self._parameters = parameters_of(vllm_config)
        self.queries: list[torch.Tensor] = []
        self.held_back: list[torch.Tensor] = []

    def begin(self, recording: Recording) -> None:
        """Forgets the queries on another prefix."""
        self.recording = recording
        self.queries.clear()
        self.held_back.clear()

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.observed is not None and attn_metadata is not None:
            tokens = observed_tokens(attn_metadata, self.recording, self._parameters.observation_window)
            self.observed.append(in_model_dtype(query[tokens], layer, self._dtype).cpu())
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)


def parameters_of(vllm_config: Any) -> IndexParameters:
    """The parameters of all indexes that an engine makes."""
    return IndexParameters(**options_of(vllm_config, RECORD))


def observed_tokens(attn_metadata: Any, recording: Recording, observation_window: int) -> torch.Tensor:
    """The query tokens of a step, by their place in it, that thresholds are calibrated on.

    They are the last of each row on the prefix: those that an answer's tokens come from. Most of what a server squeezes
    is like them, and a long question does not outweigh its answer. Where nothing is asked, they are those of the
    prefix's observation window.
    """
    ends, seq_lens = attn_metadata.query_start_loc[1:], attn_metadata.seq_lens
    if recording.num_questions:
        return ends[seq_lens > recording.num_tokens] - 1
    # The prefix is the only request.
    num_tokens, done = attn_metadata.num_actual_tokens, int(seq_lens[0])
    window = recording.num_tokens - observation_window
    return torch.arange(num_tokens - min(max(done - window, 0), num_tokens), num_tokens, device=ends.device)


@dataclass
class RecordMetadata(KVConnectorMetadata):
    """What the worker has to know of a step.

    Attributes:
        recording: what its requests are on; None before the first.
        held_back: whether its queries do not calibrate.
        blocks: of the prefix by KV cache group, in the step that completes it; None in others.
    """

    recording: Recording | None
    held_back: bool
    blocks: dict[int, list[int]] | None = None


class SqueezeRecorder(PassiveConnector):
    """Scheduler's side: waits for the request of the prefix alone to be computed. Worker's side: clusters it."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        self._parameters = parameters_of(vllm_config)
        self._recording: Recording | None = None
        self._groups = full_attention_groups(kv_cache_config)
        self._layers_by_group = [group.layer_names for group in kv_cache_config.kv_cache_groups]
        self._prefix_request: str | None = None
        self._num_asked = 0
        self._blocks: dict[int, list[int]] = {}

    # scheduler's side

    def build_connector_meta(self, scheduler_output: Any) -> RecordMetadata:
        cached = scheduler_output.scheduled_cached_reqs
        progress = {}
        for new in scheduler_output.scheduled_new_reqs:
            recording = Recording(**new.sampling_params.extra_args["kv_transfer_params"][RECORDING])
            if recording != self._recording:
                self._recording, self._num_asked = recording, 0
            self._num_asked += 1
            if len(new.prompt_token_ids) == recording.num_tokens:
                self._prefix_request = new.req_id
                self._blocks = {group: list(new.block_ids[group]) for group in self._groups}
            progress[new.req_id] = new.num_computed_tokens
        for request_id, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            for group in self._groups if request_id == self._prefix_request and blocks is not None else ():
                self._blocks[group].extend(blocks[group])
            progress[request_id] = computed
        recording = self._recording
        held_back = recording is not None and self._num_asked > recording.num_questions > 0
        computed = progress.get(self._prefix_request)
        if computed is not None:
            done = computed + scheduler_output.num_scheduled_tokens[self._prefix_request]
            if computed < recording.num_tokens <= done:
                return RecordMetadata(recording, held_back, self._blocks)
        return RecordMetadata(recording, held_back)

    # worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = kv_caches

    def bind_connector_metadata(self, connector_metadata: RecordMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        for impl in self._observing():
            if impl.recording != connector_metadata.recording:
                impl.begin(connector_metadata.recording)
            impl.observed = impl.held_back if connector_metadata.held_back else impl.queries

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        for impl in self._observing():
            impl.observed = None

    def _observing(self) -> list[ObservesQueries]:
        impls = (getattr(layer, "impl", None) for layer in layers_of(self._vllm_config).values())
        return [impl for impl in impls if isinstance(impl, ObservesQueries)]

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        if metadata.blocks is not None:
            self._record(metadata.recording, metadata.blocks)

    def _record(self, recording: Recording, blocks: dict[int, list[int]]) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        total_heads = self._vllm_config.model_config.get_total_num_kv_heads()
        if world > total_heads and rank % (world // total_heads):
            return  # another rank holds the same heads
        layers = layers_of(self._vllm_config)
        names = [
            (name, group)
            for group in self._groups
            for name in self._layers_by_group[group]
            if isinstance(getattr(layers.get(name), "impl", None), ObservesQueries) and not why_dense(layers[name])
        ]
        names.sort(key=lambda named: layer_order(named[0]))
        first_head = rank * total_heads // world
        former = PrefixIndex.open(Path(recording.former)) if recording.former is not None else None
        with tqdm(total=len(names), desc="Clustering", unit="layer", disable=rank > 0) as progress:
            for batch in self._batches(names, recording.num_tokens):
                computed = [self._read(layers[name], blocks[group], recording.num_tokens) for name, group in batch]
                known = None
                if former is not None:
                    keys = computed[0].keys
                    heads = slice(first_head, first_head + len(keys))
                    known = torch.cat([known_labels(former, name, heads) for name, _ in batch]).to(keys.device)
                for (name, _), indexed in zip(batch, index_layers(computed, self._parameters, known)):
                    metadata = {
                        "layer": name,
                        "first_head": str(first_head),
                        "mean_cosine": repr(indexed.mean_cosine),
                        "num_queries": str(indexed.num_queries),
                    }
                    file = f"{re.sub('[^A-Za-z0-9]', '-', name)}.rank{rank}.safetensors"
                    save_file(indexed.tensors, Path(recording.parts) / file, metadata)
                progress.update(len(batch))

    def _batches(self, names: list[tuple[str, int]], num_tokens: int) -> Iterator[list[tuple[str, int]]]:
        """Layers of one shape whose keys and values fit into BATCH_BYTES in float32, at least one at a time."""
        layers = layers_of(self._vllm_config)
        batch: list[tuple[str, int]] = []
        shape = None
        for name, group in names:
            impl = layers[name].impl
            this = (impl.num_kv_heads, impl.num_heads, impl.head_size, impl.scale)
            size = 8 * num_tokens * impl.num_kv_heads * impl.head_size
            if batch and (this != shape or (len(batch) + 1) * size > BATCH_BYTES):
                yield batch
                batch = []
            batch, shape = [*batch, (name, group)], this
        if batch:
            yield batch

    def _read(self, layer: Any, blocks: list[int], num_tokens: int) -> ComputedLayer:
        impl, cache = layer.impl, self._kv_caches[layer.layer_name]
        group = next(g for g in self._groups if layer.layer_name in self._layers_by_group[g])
        # A block of the scheduler may be several of the attention kernel's.
        pages = self._groups[group] // cache.shape[2]
        table = (torch.tensor(blocks)[:, None] * pages + torch.arange(pages)).flatten()
        keys, values = impl.read_tokens(layer, cache, table, num_tokens)
        heads = impl.num_kv_heads, impl.num_queries_per_kv, impl.head_size
        none = torch.empty(0, impl.num_heads, impl.head_size, dtype=impl.queries[0].dtype)
        queries = (
            torch.cat([none, *kept]).view(-1, *heads).to(keys.device).transpose(0, 1)
            for kept in (impl.queries, impl.held_back)
        )
        return ComputedLayer(keys, values, *queries, impl.scale, impl.logits_soft_cap)
