"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``)."""


def register() -> None:
    """Makes ``squeeze`` an attention backend that vLLM knows by name. Safe to call again."""
    from vllm_squeeze.attention_backend import compat

    compat.ensure_backend_name()
    compat.register_cpu_backend()
    compat.register_connectors()
    compat.wrap_create_engine_config()
