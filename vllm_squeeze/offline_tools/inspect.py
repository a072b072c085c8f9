"""What is in an index, as text: ``vllm-squeeze inspect``. Needs neither vLLM nor a GPU."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from vllm_squeeze.config import SqueezeConfig
from vllm_squeeze.prefix_index.calibration import log_threshold
from vllm_squeeze.prefix_index.identity import DTYPE_BYTES
from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes
from vllm_squeeze.prefix_index.manifest import Calibration, InvalidIndex, Manifest, printable
from vllm_squeeze.prefix_index.quality import BudgetQuality, Quality

SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


def inspect(path: Path, out: TextIO = sys.stdout) -> int:
    """Prints what the index at a path, or each index in a folder of them, holds, and whether it is whole.

    Args:
        path: an index, or a folder of indexes.
        out: where to print.

    Returns:
        the exit code: 1 if there is no index or one of them cannot be used, else 0.
    """
    try:
        folders = find_indexes(path)
    except ValueError as error:
        print(printable(f"error: {error}"), file=out)
        return 1
    results = []
    for folder in folders:
        print(printable(folder.resolve().name), file=out)
        results.append(inspect_index(folder, out))
    return max(results)


def inspect_index(folder: Path, out: TextIO) -> int:
    try:
        index = PrefixIndex.open(folder)
        for label, value in facts(index):
            print(f"  {label:<17} {printable(value)}", file=out)
        index.verify()
        num_files = len(index.manifest.layers) + (2 if index.quality() is None else 3)
    except (InvalidIndex, OSError) as error:
        print(f"  {'verification':<17} {printable(f'error: {error}')}", file=out)
        return 1
    print(f"  {'verification':<17} all {num_files} files verified", file=out)
    return 0


def facts(index: PrefixIndex) -> list[tuple[str, str]]:
    """Labels and values, in the order in which they are printed."""
    manifest = index.manifest
    model = manifest.model
    on_disk = sum(file.lstat().st_size for file in index.folder.iterdir())
    made = f"{manifest.created} by vllm-squeeze {manifest.tool_version}, format {manifest.format_version}"
    identity = [("model", model.model), *((f"  {name}", str(value)) for name, value in model.compared().items())]
    if manifest.exact:
        return [
            ("source", manifest.source),
            ("made", made),
            ("tokens", f"{manifest.num_tokens}, all attended to exactly"),
            *identity,
            ("on disk", f"{on_disk / 2**10:.1f} KiB"),
        ]
    dense = dense_bytes(manifest)
    centroids = sum(layer.num_centroids for layer in manifest.layers) / len(manifest.layers)
    return [
        ("source", manifest.source),
        ("made", made),
        ("tokens", f"{manifest.num_tokens}, of which {manifest.num_members} are clustered"),
        *identity,
        ("layers", f"{len(manifest.layers)} of {model.num_layers} indexed"),
        ("heads", f"{model.num_kv_heads} KV heads of size {model.head_size}, {model.num_heads} query heads"),
        ("centroids", f"{centroids:.0f} per layer and KV head, {manifest.num_members / centroids:.1f} keys each"),
        ("on disk", f"{on_disk / 2**20:.1f} MiB, {on_disk / dense:.1%} of the dense KV's {dense / 2**20:.1f} MiB"),
        ("parameters", ", ".join(f"{name} {value}" for name, value in vars(manifest.parameters).items())),
        ("calibrated on", calibrated_on(manifest.calibration)),
        ("keys kept", "  ".join(f"{share:>7.0%}" for share in SHARES)),
        ("log threshold", "  ".join(f"{log_threshold(manifest.thresholds, share):>7.2f}" for share in SHARES)),
        *(costs_of_budgets(quality) if (quality := index.quality()) else [("costs", "not measured")]),
    ]


def costs_of_budgets(quality: Quality) -> list[tuple[str, str]]:
    """Labels and values of what budgets cost, a column a budget."""

    def line(form: str, figure: Callable[[BudgetQuality], float]) -> str:
        return "  ".join(f"{figure(measured):>7{form}}" for measured in quality.budgets)

    asked = f"{quality.num_questions} {'questions given' if quality.own_questions else 'general questions'}"
    return [
        ("measured on", f"{asked} that were held back, {quality.num_places} tokens of answers"),
        ("budget", line(".3f", lambda measured: measured.budget)),
        ("bytes read", line(".3f", lambda measured: measured.bytes_read)),
        ("KL from dense", line(".4f", lambda measured: measured.kl)),
        ("  +-", line(".4f", lambda measured: measured.kl_error)),
        ("same best token", line(".1%", lambda measured: measured.same_top)),
        ("attention kept", line(".1%", lambda measured: measured.mean_recall)),
        ("suggested budget", suggestion(quality)),
    ]


def suggestion(quality: Quality, max_kl: float = SqueezeConfig.max_kl) -> str:
    """The budget that a server with a budget of "auto" takes, in a line."""
    budget = quality.least_budget(max_kl)
    if budget is None:
        worst = f"a budget of {quality.budgets[0].budget:g} already costs a KL of {quality.budgets[0].kl:.3g}"
        return f"NONE: {worst}, more than {max_kl:g}. Serve this prefix exactly."
    return f"{budget:g}, for a KL of {max_kl:g}"


def calibrated_on(calibration: Calibration) -> str:
    """What thresholds were calibrated on, in a few words."""
    if calibration.num_questions:
        return f"answers to {calibration.num_questions} questions, {calibration.num_tokens} tokens"
    return f"the observation window, {calibration.num_tokens} tokens"


def dense_bytes(manifest: Manifest) -> int:
    """Bytes of the prefix's keys and values in the indexed layers, in the model's dtype."""
    model = manifest.model
    vector = model.head_size * DTYPE_BYTES[model.dtype]
    return 2 * manifest.num_tokens * model.num_kv_heads * vector * len(manifest.layers)
