"""How far next-token distributions at each budget are from dense ones, when dense answers are forced."""

from pathlib import Path
from typing import Any

from vllm_squeeze.config import SqueezeConfig
from vllm_squeeze.offline_tools.bench.plan import Plan
from vllm_squeeze.offline_tools.index import MEMORY_UTILIZATION
from vllm_squeeze.offline_tools.measure import measure
from vllm_squeeze.offline_tools.prefix_engine import PrefixEngine


def run_agreement(plan: Plan) -> dict[str, Any]:
    """Serves the index at each budget to the questions that are compared.

    Returns:
        "places", the tokens at which distributions were compared; and of each budget, as text, its figures: "kl" and
        "kl_error" in nats, and "same_top", the share of places with the same most likely token.

    Raises:
        RuntimeError: the index is not served, or not all rows were squeezed.
    """
    ours = {"enforce_eager": True, "max_num_seqs": max(plan.batches), "gpu_memory_utilization": MEMORY_UTILIZATION}
    prefill = SqueezeConfig.resolve(None).prefill
    prompts = plan.prompts[: plan.compared]
    engine = PrefixEngine(plan.model, Path(plan.index), prompts, plan.tokens, ours | plan.engine_args, prefill)
    try:
        costs, places = measure(engine, prompts, plan.tokens, map(float, plan.arms))
    finally:
        engine.shut_down()
    return {"places": places, **{f"{cost.budget:g}": cost._asdict() for cost in costs}}
