"""Small whole indexes, and what several tests do to them."""

from pathlib import Path

import numpy as np
import torch

from vllm_squeeze.kernels.tables import LEAST_PACKED, NUM_DIRECTIONS, frame_of, packed, packed_keys, words_of
from vllm_squeeze.prefix_index.budget import ReadCost
from vllm_squeeze.prefix_index.identity import ModelIdentity
from vllm_squeeze.prefix_index.index_folder import IndexWriter, LayerClusters, tokens_digest
from vllm_squeeze.prefix_index.manifest import FORMAT_VERSION, Calibration, IndexParameters, LayerEntry, Manifest

NUM_HEADS, NUM_CENTROIDS, HEAD_SIZE = 2, 7, 8
NUM_TOKENS, NUM_MEMBERS = 47, 37
LAYER_NAMES = ("model.layers.0.self_attn.attn", "model.layers.3.self_attn.attn")
PARAMETERS = IndexParameters(num_sinks=4, observation_window=6, max_cluster=12)
# What the manifest of an exact index has in place of clusters.
EXACT = {"num_members": 0, "parameters": None, "thresholds": (), "calibration": None}
# What one KV head reads over a prefix.
COST = ReadCost(
    num_tokens=1000,
    num_always=116,
    num_clustered=884,
    num_centroids=50,
    head_size=64,
    element_size=2,
    rest=True,
)


def make_identity(**changes) -> ModelIdentity:
    values = dict(
        model="tiny",
        architecture="LlamaForCausalLM",
        weights="00ff",
        dtype="float32",
        kv_cache_dtype="auto",
        quantization="none",
        rope='{"rope_theta": 10000.0}',
        num_layers=4,
        num_heads=6,
        num_kv_heads=NUM_HEADS,
        head_size=HEAD_SIZE,
    )
    return ModelIdentity(**{**values, **changes})


def make_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**31, NUM_TOKENS, dtype=np.int32)


def make_clusters(seed: int = 0) -> LayerClusters:
    """Random clusters of at most ``max_cluster`` members, one of them empty in each head."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, NUM_HEADS, NUM_CENTROIDS, HEAD_SIZE, generator=generator)
    sizes = torch.tensor([[12, 1, 0, 9, 6, 7, 2], [0, 5, 5, 5, 11, 11, 0]], dtype=torch.int32)
    members = torch.stack([torch.randperm(NUM_MEMBERS, generator=generator) for _ in range(NUM_HEADS)])
    members = members.int() + PARAMETERS.num_sinks
    for head in range(NUM_HEADS):
        parts = members[head].split(sizes[head].tolist())
        members[head] = torch.cat([part.sort().values for part in parts])
    log_weights = torch.randn(NUM_HEADS, NUM_CENTROIDS, generator=generator)
    variances = torch.rand(NUM_HEADS, NUM_CENTROIDS, generator=generator)
    frame = frame_of(vectors[0], sizes)
    packed_vectors = *packed_keys(vectors[0], frame), *packed(vectors[1])
    elements = torch.randint(LEAST_PACKED, 8, (*members.shape, NUM_DIRECTIONS), generator=generator)
    directions = torch.randn(NUM_HEADS, NUM_DIRECTIONS, HEAD_SIZE, generator=generator) / 8
    facts = log_weights, variances, sizes, members
    return LayerClusters(*packed_vectors, *facts, words_of(elements), frame, directions)


def make_manifest(token_ids: np.ndarray, layers: list[LayerEntry], **changes) -> Manifest:
    values = dict(
        format_version=FORMAT_VERSION,
        tool_version="0.1.0",
        created="2026-01-02T03:04:05+00:00",
        source="contract.txt",
        num_tokens=NUM_TOKENS,
        tokens_digest=tokens_digest(token_ids),
        num_members=NUM_MEMBERS,
        model=make_identity(),
        parameters=PARAMETERS,
        thresholds=((1.0, -20.0), (0.5, -9.0), (0.1, -7.0), (0.01, -4.0)),
        calibration=Calibration("questions", 16, 512),
        layers=tuple(layers),
    )
    return Manifest(**{**values, **changes})


def write_index(
    store: Path,
    name: str = "contract-000000000000",
    seed: int = 0,
    dtype: str = "float32",
    layers: list[LayerClusters] | None = None,
    **changes,
) -> Path:
    """Publishes an index of two layers, whose contents follow from the seed."""
    token_ids = make_tokens(seed)
    with IndexWriter(store, name) as writer:
        writer.write_tokens(token_ids)
        layers = layers or [make_clusters(10 * seed + i) for i in range(len(LAYER_NAMES))]
        entries = [writer.write_layer(i, LAYER_NAMES[i], clusters) for i, clusters in enumerate(layers)]
        return writer.publish(make_manifest(token_ids, entries, model=make_identity(dtype=dtype), **changes))


def write_exact_index(store: Path, name: str = "contract-000000000000") -> Path:
    """Publishes an index without clusters, of the tokens of the first seed."""
    token_ids = make_tokens()
    with IndexWriter(store, name) as writer:
        writer.write_tokens(token_ids)
        return writer.publish(make_manifest(token_ids, [], **EXACT))
