"""``vllm-squeeze warm`` and ``list`` against a real ``vllm serve`` that watches a folder."""

import json

from benchmarks.quality.served import flags, server
from tests.engine.conftest import ENGINE_ARGS, tokens
from vllm_squeeze.cli import main


def test_a_prefix_is_warm_before_the_first_question(models, indexes, tmp_path, capsys):
    model = models("llama")
    contract, manual = (indexes(model, tokens(seed, count=600)) for seed in (1, 2))
    store = tmp_path / "store"
    store.mkdir()
    settings = {"squeeze": {"index": str(store), "budget": 1, "watch": 0.1, "memory_limit_gib": 0.02}}
    arguments = {**ENGINE_ARGS, "enforce_eager": True, "additional_config": settings, "max_model_len": 1024}
    log = tmp_path / "server.log"
    with server(str(model), ["--attention-backend", "squeeze", *flags(arguments)], log) as url:

        def run(*command) -> tuple[int, list[list[str]]]:
            code = main([*map(str, command), "--url", url])
            return code, [line.split("  ") for line in capsys.readouterr().out.splitlines()]

        assert main(["add", str(contract), str(store)]) == main(["pin", contract.name, str(store)]) == 0
        capsys.readouterr()
        code, ((what, name, _, rows),) = run("warm", contract)
        assert (code, what, name) == (0, "warm", contract.name) and "squeezed 2" in rows
        assert run("list", store)[1][1][-1] == "on the devices"
        code, ((what, name, _, rows),) = run("warm", manual, "--wait", 1)
        assert (code, what, name) == (1, "not served", manual.name) and rows == "(dense: no index 3)"
    assert json.dumps(contract.name)[1:-1] in log.read_text()
