"""What budgets of the index in ``small_index.py`` cost."""

from tests.prefix_index.small_index import LAYER_NAMES, NUM_HEADS
from vllm_squeeze.prefix_index.manifest import Manifest
from vllm_squeeze.prefix_index.quality import QUALITY_VERSION, BudgetQuality, Quality, manifest_digest


def make_quality(manifest: Manifest, kls: dict[float, float] | None = None, **changes) -> Quality:
    """KL by budget, decreasing; the last head of the last layer keeps least."""
    kls = kls or {0.5: 0.001, 0.25: 0.01, 0.125: 0.1}
    recall = tuple(tuple(0.9 - 0.1 * (i == h == 1) for h in range(NUM_HEADS)) for i in range(len(LAYER_NAMES)))
    values = {
        "format_version": QUALITY_VERSION,
        "manifest_digest": manifest_digest(manifest),
        "own_questions": False,
        "num_questions": 8,
        "num_places": 200,
        "budgets": tuple(
            BudgetQuality(budget, budget * 0.99, kl, abs(kl) / 4, 0.95, recall) for budget, kl in kls.items()
        ),
    }
    return Quality(**{**values, **changes})
