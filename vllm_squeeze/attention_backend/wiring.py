"""How an engine that chose ``squeeze`` gets its connector, and how its parts find their options again."""

from pathlib import Path
from typing import Any

from vllm_squeeze.attention_backend.compat import BACKEND, CONNECTORS, logger
from vllm_squeeze.config import OFF, SqueezeConfig

SERVE, RECORD = CONNECTORS


def connector(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The vLLM settings of one of our connectors.

    It neither sends nor receives KV. Of the roles, the producer's is the one that changes nothing else in vLLM.
    """
    return {
        "kv_connector": name,
        "kv_connector_module_path": CONNECTORS[name],
        "kv_role": "kv_producer",
        "kv_connector_extra_config": options,
    }


def add_connector(args: Any) -> None:
    """Adds the serving connector to ``vllm.EngineArgs`` that chose this backend and named an index.

    Raises:
        ValueError: settings that are not allowed, or an index folder that is missing.
    """
    backend = args.attention_backend or getattr(args.attention_config, "backend", None)
    if getattr(backend, "name", str(backend)).upper() != BACKEND:
        return
    existing = as_dict(args.kv_transfer_config)
    if any(child["kv_connector"] in CONNECTORS for child in children(existing)):
        return
    config = SqueezeConfig.resolve(args.additional_config)
    if config.mode == OFF:
        logger.info("squeeze: nothing will be squeezed: squeeze.mode is off")
        return
    folders = config.index_folders()
    if not folders and not config.watch:
        return
    if reason := unsupported(args):
        logger.warning("squeeze: nothing will be squeezed: %s", reason)
        return
    if args.kv_offloading_size is not None:
        raise ValueError(
            "--kv-offloading-size: not together with a squeeze index, vLLM would replace our connector by its own; "
            "name the offloading connector in --kv-transfer-config instead, it is then combined with ours"
        )
    from vllm.config import KVTransferConfig

    options = {
        "indexes": [str(folder) for folder in folders],
        "folders": [str(Path(path).resolve()) for path in config.index],
        "watch": config.watch,
        "budget": config.budget,
        "max_kl": config.max_kl,
        "rest": config.rest,
        "mode": config.mode,
        "prefill": config.prefill,
        "memory_limit_gib": config.memory_limit_gib,
        "pin_share": config.pin_share,
    }
    ours = connector(SERVE, options)
    if existing is not None:
        # The first connector that has tokens to load wins: ours never has, so the order costs nothing. vLLM gives
        # its children the engine's id itself.
        theirs = [{key: value for key, value in child.items() if key != "engine_id"} for child in children(existing)]
        ours = {
            **existing,
            "kv_connector": "MultiConnector",
            "kv_connector_module_path": None,
            "kv_role": existing.get("kv_role") or "kv_both",
            "kv_connector_extra_config": {"connectors": [ours, *theirs]},
        }
    args.kv_transfer_config = KVTransferConfig(**ours)


def unsupported(args: Any) -> str | None:
    """What in these engine arguments cannot be squeezed, in a line, or None."""
    for field, meaning in (
        ("decode_context_parallel_size", "each GPU holds only a part of each prefix"),
        ("prefill_context_parallel_size", "each GPU holds only a part of each prefix"),
    ):
        if (size := getattr(args, field, 1)) > 1:
            return f"{field} is {size}: {meaning}"
    if getattr(args, "enable_dbo", False) or getattr(args, "ubatch_size", 0) > 1:
        return "micro-batching (enable_dbo, ubatch_size) splits a step's rows"
    return None


def options_of(vllm_config: Any, name: str) -> dict[str, Any] | None:
    """The options of our connector of this name in a configured engine, or None where it is not used."""
    for child in children(as_dict(vllm_config.kv_transfer_config)):
        if child["kv_connector"] == name:
            return child["kv_connector_extra_config"]
    return None


def as_dict(kv_transfer_config: Any) -> dict[str, Any] | None:
    """A KVTransferConfig's settings that say which connector it is, or None if it names none."""
    if kv_transfer_config is None:
        return None
    if not isinstance(kv_transfer_config, dict):
        kv_transfer_config = vars(kv_transfer_config)
    return kv_transfer_config if kv_transfer_config.get("kv_connector") else None


def children(settings: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The connectors in these settings: those of a MultiConnector, or the one itself."""
    if settings is None:
        return []
    if settings["kv_connector"] == "MultiConnector":
        return settings["kv_connector_extra_config"]["connectors"]
    return [settings]
