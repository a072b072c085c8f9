"""Times how an index is made of what a model has computed of a prefix: clustering and calibration of all layers.

    python benchmarks/indexing.py --prefixes 8 32 128 512 1024 --layers 32 --out indexing.json

Keys are random, but as keys are: topics, repeated tokens, and a part that all have. A line for each length says how many
seconds all layers took one after the other, what the most memory was beside one layer's keys and values, what the index
takes on the device as a share of what they take in the KV cache in 16 bits, and, with --reference, the mean cosine of the
points that K-means sees to the centres of their clusters, ours and scikit-learn's, in one window of one head. Reading
keys from the KV cache and writing files is not in it.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional

from vllm_squeeze.prefix_index.budget import BYTES_HELD_OF_MEMBER, bytes_of_clusters, bytes_of_prefix
from vllm_squeeze.prefix_index.clustering import cluster_keys
from vllm_squeeze.prefix_index.indexing import ComputedLayer, index_layers
from vllm_squeeze.prefix_index.manifest import IndexParameters

TOKENS_PER_TOPIC = 64
VOCABULARY = 1000


def random_keys(num_heads: int, num_tokens: int, head_size: int, generator: torch.Generator) -> torch.Tensor:
    """Keys [H, T, D] float32 on the generator's device: what all share, a topic, which token it is, and noise."""
    device = generator.device

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(num_heads, *shape, head_size, generator=generator, device=device)

    topic = normal(-(-num_tokens // TOKENS_PER_TOPIC)).repeat_interleave(TOKENS_PER_TOPIC, 1)[:, :num_tokens]
    # few tokens are as common as all others together
    rank = torch.rand(num_tokens, generator=generator, device=device).square() * VOCABULARY
    return 4 * normal(1) + topic + normal(VOCABULARY)[:, rank.long()] + 0.5 * normal(num_tokens)


def random_layer(arguments: argparse.Namespace, num_tokens: int, seed: int) -> ComputedLayer:
    """What a layer in the shape of the arguments might have computed."""
    generator = torch.Generator(arguments.device).manual_seed(seed)
    num_heads, group = arguments.heads
    of_tokens = num_heads, num_tokens, arguments.head_size, generator
    keys, values = random_keys(*of_tokens).bfloat16(), random_keys(*of_tokens).bfloat16()
    # each asks for one token
    asked = torch.randint(num_tokens, (2, arguments.queries), generator=generator, device=arguments.device)
    noise = torch.randn(2, group, 1, 1, arguments.head_size, generator=generator, device=arguments.device)
    queries, held_back = ((keys[:, at] + other).permute(1, 2, 0, 3) for at, other in zip(asked, noise))
    return ComputedLayer(keys, values, queries, held_back, arguments.head_size**-0.5, 0.0)


def cosine(points: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cosine of points [N, D] to the mean of those with the same label [N]."""
    _, labels = labels.unique(return_inverse=True)
    means = torch.zeros(int(labels.max()) + 1, points.shape[1]).index_add_(0, labels, points)
    return float(functional.cosine_similarity(points, means[labels], dim=-1).mean())


def compare(keys: torch.Tensor, values: torch.Tensor, parameters: IndexParameters) -> tuple[float, float, int]:
    """The cosines of our clusters, and of as many of scikit-learn's, for the keys [T, D] of one window; how many."""
    from sklearn.cluster import KMeans

    found = cluster_keys(keys[None], values[None], parameters)
    members, sizes = found.members[0].long().cpu(), found.sizes[0].long().cpu()
    points = keys.cpu().float()[members]
    points = functional.normalize(points - points.mean(0), dim=-1)
    ours = cosine(points, torch.arange(len(sizes)).repeat_interleave(sizes))
    num_clusters = int((sizes > 0).sum())
    theirs = KMeans(num_clusters, n_init=1, random_state=0).fit_predict(points.numpy())
    return ours, cosine(points, torch.from_numpy(theirs).long()), num_clusters


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line of the table after the other."""
    parameters = IndexParameters(window=arguments.window)
    on_gpu = arguments.device == "cuda"
    warm = argparse.Namespace(**vars(arguments) | {"queries": 8})
    list(index_layers([random_layer(warm, 1000, 0)], parameters))
    for prefix in arguments.prefixes:
        num_tokens = prefix * 1024
        seconds, peak, num_clusters = 0.0, 0, 0
        for number in range(arguments.layers):
            layer = random_layer(arguments, num_tokens, number)
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            begin = time.perf_counter()
            (indexed,) = index_layers([layer], parameters)
            seconds += time.perf_counter() - begin
            if on_gpu:
                peak = max(peak, torch.cuda.max_memory_allocated() - held)
            num_clusters = max(num_clusters, indexed.tensors["sizes"].shape[1])
        of_index = bytes_of_clusters(num_clusters, arguments.head_size, rest=True)
        of_index += bytes_of_prefix(arguments.head_size) + num_tokens * BYTES_HELD_OF_MEMBER
        line = {
            "tokens": num_tokens,
            "seconds": seconds,
            "peak_gib": peak / 2**30 if on_gpu else None,
            "device_share": of_index / (num_tokens * arguments.head_size * 4),
        }
        if arguments.reference:
            one_window = parameters.num_sinks + parameters.observation_window + min(parameters.window, num_tokens - 200)
            keys, values = layer.keys[0, :one_window], layer.values[0, :one_window]
            line["ours"], line["reference"], line["clusters"] = compare(keys, values, parameters)
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[8, 32, 128, 512, 1024], help="units of 1024 tokens")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, nargs=2, default=(8, 4), help="KV heads, and query heads for each")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--queries", type=int, default=512, help="that calibrate, and as many that are held back")
    parser.add_argument("--window", type=int, default=IndexParameters.window, help="most tokens clustered together")
    parser.add_argument("--reference", action="store_true", help="compare with scikit-learn's K-means")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": name, "torch": torch.__version__, "date": str(date.today()), "command": " ".join(sys.argv)}
    print(f"{name}, torch {machine['torch']}, {machine['date']}")
    print(f"{'tokens':>8} {'seconds':>8} {'peak GiB':>8} {'of KV':>6} {'cosine':>7} {'theirs':>7}")
    rows = []
    for line in run(arguments):
        rows.append(line)
        peak = f"{line['peak_gib']:8.2f}" if line["peak_gib"] is not None else " " * 8
        cosines = "".join(f" {line[which]:7.4f}" for which in ("ours", "reference") if which in line)
        print(f"{line['tokens']:>8} {line['seconds']:8.2f} {peak} {line['device_share']:6.1%}{cosines}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
