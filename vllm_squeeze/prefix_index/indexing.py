"""Makes what an index keeps of a layer: clusters of its keys, and histograms of how queries score them."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch

from vllm_squeeze.prefix_index.calibration import Choosable, attention_histogram, score_histogram
from vllm_squeeze.prefix_index.clustering import Clusters, cluster_keys, mean_cosine
from vllm_squeeze.prefix_index.manifest import IndexParameters
from vllm_squeeze.prefix_index.neighbours import in_groups
from vllm_squeeze.prefix_index.stored_clusters import stored


class ComputedLayer(NamedTuple):
    """What a layer computed of a prefix and of questions on it.

    Attributes:
        keys, values: [H, T, D] of the prefix, any float dtype.
        queries: [H, W, G, D], those that calibrate.
        held_back: [H, V, G, D], those by which it is seen what thresholds keep; V may be 0.
        scale: of the softmax.
        soft_cap: bound on the logits; 0 for none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    held_back: torch.Tensor
    scale: float
    soft_cap: float


class IndexedLayer(NamedTuple):
    """What an index keeps of a layer, or of some of its heads.

    Attributes:
        tensors: those of LayerClusters; scores, the histogram of ``score_histogram``; and where queries were held
            back, attention, that of ``attention_histogram``.
        mean_cosine: of keys to their centroids.
        num_queries: tokens whose queries calibrate.
    """

    tensors: dict[str, torch.Tensor]
    mean_cosine: float
    num_queries: int


def index_layers(
    layers: Sequence[ComputedLayer], parameters: IndexParameters, known: torch.Tensor | None = None
) -> Iterator[IndexedLayer]:
    """Clusters layers of one shape, all of their heads together, and scores their clusters.

    Args:
        layers: with H KV heads each.
        parameters: how to cluster, and by which rule clusters will be chosen.
        known: [layers * H, K] int32, as in ``cluster_keys``.

    Yields:
        What to keep of each, in the host's memory.
    """
    num_heads = len(layers[0].keys)
    keys = torch.cat([layer.keys for layer in layers]).float()
    values = torch.cat([layer.values for layer in layers]).float()
    clusters = in_groups(cluster_keys(keys, values, parameters, known=known))
    for number, layer in enumerate(layers):
        heads = slice(number * num_heads, (number + 1) * num_heads)
        of_layer = Clusters(*(getattr(clusters, field.name)[heads] for field in fields(Clusters)))
        cosine = mean_cosine(keys[heads], of_layer)
        fitted, counted = halves(layer.queries)
        kept = stored(of_layer, parameters.rule, keys[heads], fitted)
        # The threshold is calibrated with the centroids as the server will read them.
        facts = kept.frame, kept.log_weights, kept.variances, kept.sizes, kept.residuals, kept.directions
        choosable = Choosable(kept.mean_keys(), *facts, layer.scale, layer.soft_cap, parameters.rule)
        tensors = dict(vars(kept))
        tensors["scores"] = score_histogram(counted, choosable)
        if layer.held_back.shape[1]:
            tensors["attention"] = attention_histogram(layer.held_back, keys[heads], kept.members, choosable)
        on_host = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        yield IndexedLayer(on_host, cosine, layer.queries.shape[1])


def halves(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of queries [H, W, G, D], those that what tells keys apart is fitted to, and those that thresholds are read off.

    These are every second token each; where there is but one, it is both.
    """
    # Keys differ more along queries that were fitted to: a threshold read off these would keep fewer of others.
    return queries[:, ::2], queries[:, 1::2] if queries.shape[1] > 1 else queries
