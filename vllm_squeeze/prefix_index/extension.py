"""Extends an index whose prefix has grown at its end: only what is new is clustered.

Of the former index the members of its clusters are taken, and nothing else. Its windows stay as they are; the tokens
after them, which begin with its observation window, are cut into windows of their own. So it does not matter whether
the keys of former tokens come out the same to the bit, nor what followed them: its observation window may have been
the end of a chat template.

Everything that is not k-means is made anew over all clusters. Means, distances and weights take one pass over the keys
and values of former tokens too, since a weight is relative to the mean of all of its KV head, and an index does not
keep what it was made from. So do the mean cosine and the attention of questions that were held back. Levels of layers
and thresholds need clusters and queries, but no keys.
"""

from collections.abc import Sequence

import torch

from vllm_squeeze.prefix_index.identity import ModelIdentity
from vllm_squeeze.prefix_index.index_folder import LayerClusters, PrefixIndex
from vllm_squeeze.prefix_index.manifest import IndexParameters, InvalidIndex


def check_extends(
    former: PrefixIndex, ids: Sequence[int], identity: ModelIdentity, parameters: IndexParameters
) -> None:
    """Raises ValueError, in one line, unless a prefix of these tokens continues what an index has clustered.

    Args:
        former: the index.
        ids: of the longer prefix's tokens.
        identity: of the model that it is indexed for.
        parameters: of its clustering.
    """
    manifest = former.manifest
    if manifest.exact:
        raise ValueError("it is exact, and has no clusters to keep")
    made = {**manifest.model.compared(), **vars(manifest.parameters)}
    for name, value in {**identity.compared(), **vars(parameters)}.items():
        if made[name] != value:
            raise ValueError(f"{name}: it has {made[name]}, the new index would have {value}")
    needed = parameters.num_sinks + manifest.num_members
    for i, (theirs, ours) in enumerate(zip(former.token_ids[:needed].tolist(), ids)):
        if theirs != ours:
            raise ValueError(f"token {i} is {theirs} in it and {ours} in the prefix; the first {needed} must agree")
    if len(ids) <= manifest.num_tokens:
        raise ValueError(f"it has {manifest.num_tokens} tokens, and the prefix no more than that: {len(ids)}")


def known_labels(former: PrefixIndex, layer: str, heads: slice) -> torch.Tensor:
    """Which cluster each token that an index has clustered belongs to.

    Args:
        former: the index.
        layer: its name.
        heads: of its KV heads.

    Returns:
        [H, M] int32, by token; numbers of a head's clusters, from 0 without gaps.

    Raises:
        InvalidIndex: the layer is missing or damaged.
    """
    names = [entry.name for entry in former.manifest.layers]
    if layer not in names:
        raise InvalidIndex(f"{former.folder}: the layer {layer} is missing")
    return labels_by_token(former.layer(names.index(layer)), former.manifest.parameters.num_sinks)[heads]


def labels_by_token(clusters: LayerClusters, num_sinks: int) -> torch.Tensor:
    """The cluster of each token from ``num_sinks`` on, as ``known_labels`` gives it: [H, M] int32."""
    numbers = (clusters.sizes > 0).cumsum(1, dtype=torch.int32) - 1
    ordered = numbers.flatten().repeat_interleave(clusters.sizes.flatten()).view_as(clusters.members)
    return torch.empty_like(ordered).scatter_(1, clusters.members.long() - num_sinks, ordered)
