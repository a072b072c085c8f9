"""Which connector an engine gets. The arguments are vLLM's own, as the command line or Python makes them."""

import os

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm.config import AttentionConfig, KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.engine.tiny_models import make_model
from tests.logs import warnings_of_squeeze
from tests.prefix_index.small_index import write_index
from vllm_squeeze.attention_backend.compat import ensure_backend_name
from vllm_squeeze.attention_backend.wiring import RECORD, SERVE, add_connector, connector, options_of
from vllm_squeeze.config import CONFIG_VARIABLE, INDEX_VARIABLE

EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(INDEX_VARIABLE, raising=False)


@pytest.fixture
def index(tmp_path):
    return write_index(tmp_path / "store")


def wired(model: str, index=None, **arguments) -> EngineArgs:
    """Engine arguments, with a connector if they get one."""
    if index is not None:
        arguments["additional_config"] = {"squeeze": {"index": str(index)}}
    args = EngineArgs(model, **{"attention_backend": "squeeze", **arguments})
    add_connector(args)
    return args


def served(args: EngineArgs) -> list[str]:
    """The index folders that these arguments lead to, none without a connector."""
    return [] if args.kv_transfer_config is None else (options_of(args, SERVE) or {}).get("indexes", [])


def command_line(*arguments: str) -> EngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(arguments)))


@pytest.mark.parametrize("backend", [None, "FLASH_ATTN", "CPU_ATTN"])
def test_another_backend_is_left_alone(model, index, monkeypatch, backend):
    monkeypatch.setenv(INDEX_VARIABLE, str(index))
    assert wired(model, index, attention_backend=backend).kv_transfer_config is None


def test_another_backend_never_looks_at_our_settings(model, monkeypatch):
    monkeypatch.setenv(INDEX_VARIABLE, "/missing")
    settings = {"squeeze": {"budget": 7}}
    assert wired(model, attention_backend=None, additional_config=settings).kv_transfer_config is None


@pytest.mark.parametrize("variable", [None, ""])
def test_without_an_index_there_is_no_connector(model, monkeypatch, variable):
    if variable is not None:
        monkeypatch.setenv(INDEX_VARIABLE, variable)
    assert wired(model).kv_transfer_config is None


@pytest.mark.parametrize("more", [{}, {"watch": 1}], ids=["once", "watched"])
def test_a_server_that_is_off_looks_at_no_index(model, more):
    settings = {"index": "/missing", "mode": "off", **more}
    assert wired(model, additional_config={"squeeze": settings}).kv_transfer_config is None


@pytest.mark.parametrize(
    "chosen",
    [
        lambda: {"attention_backend": "squeeze"},
        lambda: {"attention_backend": "SQUEEZE"},
        lambda: {"attention_backend": ensure_backend_name()},
        lambda: {"attention_backend": None, "attention_config": {"backend": "squeeze"}},
        lambda: {"attention_backend": None, "attention_config": AttentionConfig(backend="squeeze")},
    ],
    ids=["lower-case", "upper-case", "enum", "config-dict", "config-object"],
)
def test_all_ways_to_choose_the_backend(model, index, chosen):
    args = wired(model, index, **chosen())
    assert args.kv_transfer_config.kv_connector == SERVE
    assert served(args) == [str(index)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--attention-backend", "squeeze"],
        ["--attention-backend=SQUEEZE"],
        ["--attention-config", '{"backend": "squeeze"}'],
        ["--attention-config.backend=squeeze"],
    ],
)
def test_all_ways_to_choose_it_on_the_command_line(model, index, arguments):
    args = command_line("--model", model, *arguments, "--additional-config", f'{{"squeeze": {{"index": "{index}"}}}}')
    add_connector(args)
    assert served(args) == [str(index)]


def test_the_environment_variable_names_the_index(model, index, monkeypatch):
    monkeypatch.setenv(INDEX_VARIABLE, str(index.parent))
    assert served(wired(model)) == [str(index)]
    assert served(wired(model, additional_config={"squeeze": {"index": []}})) == []


def test_options_are_handed_on(model, index, tmp_path):
    second = write_index(tmp_path / "store", "second-000000000000", seed=1)
    settings = {"index": [str(index), str(tmp_path / "store")], "budget": 0.5, "rest": "drop", "memory_limit_gib": 1}
    args = wired(model, additional_config={"squeeze": settings})
    assert options_of(args, SERVE) == {
        "indexes": [str(index), str(second)], "folders": settings["index"], "watch": 0, "budget": 0.5, "max_kl": 0.05, "rest": "drop", "mode": "auto",
        "prefill": "dense", "memory_limit_gib": 1, "pin_share": 0.5,
    }  # fmt: skip
    assert options_of(args, RECORD) is None
    assert args.kv_transfer_config.kv_role == "kv_producer"


def test_an_existing_connector_is_combined_with_ours(model, index, tmp_path):
    """Its own settings stay: those that vLLM reads off the whole, such as what to do when a load fails, too."""
    theirs = KVTransferConfig(**EXAMPLE, kv_connector_extra_config={"shared_storage_path": str(tmp_path)})
    args = wired(model, index, kv_transfer_config=theirs)
    config = args.kv_transfer_config
    assert (config.kv_connector, config.kv_role, config.engine_id) == ("MultiConnector", "kv_both", theirs.engine_id)
    assert config.kv_load_failure_policy == "recompute"
    ours, example = config.kv_connector_extra_config["connectors"]
    assert ours == connector(SERVE, options_of(args, SERVE)) and ours["kv_connector_extra_config"]["indexes"]
    assert example["kv_connector"] == "ExampleConnector"
    assert example["kv_connector_extra_config"] == {"shared_storage_path": str(tmp_path)}


def test_vllm_can_make_the_combined_connectors(model, index, tmp_path):
    """Once a connector's own settings held the engine's id, which vLLM then passed twice: no engine started."""
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    theirs = KVTransferConfig(**EXAMPLE, kv_connector_extra_config={"shared_storage_path": str(tmp_path)})
    args = EngineArgs(
        model,
        dtype="float32",
        attention_backend="squeeze",
        additional_config={"squeeze": {"index": str(index)}},
        kv_transfer_config=theirs,
    )
    made = MultiConnector._get_connector_classes_and_configs(args.create_engine_config())
    assert [cls.__name__ for cls, _ in made] == [SERVE, "ExampleConnector"]
    assert all(config.kv_transfer_config.engine_id == theirs.engine_id for _, config in made)


def test_an_existing_multi_connector_gets_one_more(model, index):
    theirs = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_consumer", kv_connector_extra_config={"connectors": [EXAMPLE]}
    )
    config = wired(model, index, kv_transfer_config=theirs).kv_transfer_config
    assert config.kv_role == "kv_consumer"
    names = [child["kv_connector"] for child in config.kv_connector_extra_config["connectors"]]
    assert names == [SERVE, "ExampleConnector"]


@pytest.mark.parametrize("name", [SERVE, RECORD])
@pytest.mark.parametrize("form", ["alone", "among-others"])
def test_a_connector_of_ours_is_left_alone(model, index, name, form):
    ours = connector(name, {"mark": 1})
    if form == "among-others":
        among = {"connectors": [EXAMPLE, ours]}
        ours = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": among}
    given = KVTransferConfig(**ours)
    args = wired(model, index, kv_transfer_config=given)
    assert args.kv_transfer_config is given
    assert options_of(args, name) == {"mark": 1}
    assert options_of(args, RECORD if name == SERVE else SERVE) is None


def test_settings_that_name_no_connector_are_no_connector(model, index):
    args = wired(model, index, kv_transfer_config=KVTransferConfig())
    assert args.kv_transfer_config.kv_connector == SERVE
    assert options_of(wired(model, kv_transfer_config=KVTransferConfig()), SERVE) is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size is 2"),
        ({"enable_dbo": True}, "enable_dbo"),
        ({"ubatch_size": 2}, "ubatch_size"),
    ],
    ids=["decode-context-parallel", "prefill-context-parallel", "dual-batch-overlap", "micro-batches"],
)
def test_what_cannot_be_squeezed_is_served_densely_with_one_warning(model, index, arguments, word):
    with warnings_of_squeeze() as warnings:
        args = wired(model, index, **arguments)
    assert args.kv_transfer_config is None
    assert len(warnings) == 1 and word in warnings[0] and "\n" not in warnings[0]


def test_offloading_is_refused(model, index):
    with pytest.raises(ValueError, match="^--kv-offloading-size: [^\n]*$"):
        wired(model, index, kv_offloading_size=1.0)
    assert wired(model, kv_offloading_size=1.0).kv_transfer_config is None


@pytest.mark.parametrize("content", ["missing", "empty", "file"])
def test_a_folder_without_an_index_is_an_error_that_names_it(model, tmp_path, monkeypatch, content):
    path = tmp_path / content
    if content == "empty":
        path.mkdir()
    if content == "file":
        path.touch()
    for way in ("setting", "variable"):
        if way == "variable":
            monkeypatch.setenv(INDEX_VARIABLE, str(path))
        with pytest.raises(ValueError, match=f"^squeeze.index .or SQUEEZE_INDEX.: {path}[^\n]*$"):
            wired(model, path if way == "setting" else None)


def test_settings_that_are_not_allowed_stop_the_start(model):
    """Through vLLM's own entry, so that what a user sees is this error."""
    args = EngineArgs(model, attention_backend="squeeze", additional_config={"squeeze": {"budget": 0}})
    with pytest.raises(ValueError, match="^squeeze.budget: 0 is not a number"):
        args.create_engine_config()


def test_a_file_of_settings_reaches_the_engine(model, index, tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text(f"squeeze: {{index: {index}, budget: 0.5, mode: exact}}")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "settings.yaml"))
    options = options_of(wired(model, additional_config={"squeeze": {"mode": "squeezed"}}), SERVE)
    assert options["indexes"] == [str(index)]
    assert (options["budget"], options["mode"]) == (0.5, "squeezed")
