"""``vllm serve`` itself: what a streamed answer says of its request, and its end in the middle of answers."""

import signal
from pathlib import Path

import openai
import psutil
import pytest

import vllm_squeeze
from benchmarks.quality.served import flags, server
from tests.engine.conftest import ENGINE_ARGS, tokens

PREFIX = tokens(seed=1, count=600)
TOKENS = 4
SECONDS_TO_END = 30
# The tiny models have no template: messages as they stand, one after the other.
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
WRONG = "kv_transfer_params.squeeze.mode: 'off' is not one of auto, squeezed, exact, dense"


@pytest.fixture
def client(models, indexes, tmp_path):
    """An OpenAI client of a server that has the prefix in its KV cache."""
    model = models("llama")
    arguments = [*flags({**ENGINE_ARGS, "enforce_eager": True}), "--chat-template", TEMPLATE]
    # else vLLM kills its engine before our side of it has ended
    arguments += ["--shutdown-timeout", "10"]
    settings = f'{{"squeeze": {{"index": "{indexes(model, PREFIX)}", "budget": 0.4}}}}'
    arguments += ["--attention-backend", "squeeze", "--additional-config", settings]
    with server(str(model), arguments, tmp_path / "server.log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
        client.completions.create(model=str(model), prompt=text(PREFIX), max_tokens=1)
        yield client


def text(ids: list[int]) -> str:
    return " ".join(f"t{id}" for id in ids)


def asked(model: Path, squeeze: dict) -> dict:
    extra = {"kv_transfer_params": {"squeeze": squeeze}, "ignore_eos": True}
    return {"model": str(model), "temperature": 0, "stream": True, "extra_body": extra}


def told(index: Path, mode: str, budget: float | None, rows: dict[str, int], **error: str) -> dict:
    return {"squeeze": {"index": index.name, "mode": mode, "budget": budget, "rows": rows, **error}}


@pytest.mark.long
def test_streams_tell_and_a_server_ends_under_load(client, models, indexes, tmp_path):
    """One server for all of it, as it takes most of the time."""
    check_responses(client, models("llama"), indexes, {}, ("auto", 0.4, {"dense: prefill": 1, "squeezed": TOKENS - 1}))
    dense = "dense", None, {"dense: asked for": TOKENS}
    check_responses(client, models("llama"), indexes, {"mode": "off"}, dense, error=WRONG)
    check_chats_and_completions(client, models("llama"), indexes)
    check_sigterm_ends_it(client, models("llama"), tmp_path / "server.log")


def check_responses(client, model: Path, indexes, settings: dict, expected: tuple, **error: str) -> None:
    """The last event of a response tells."""
    question = text(tokens(seed=2, count=20))
    stream = client.responses.create(
        instructions=text(PREFIX), input=question, max_output_tokens=TOKENS, **asked(model, settings)
    )
    events = list(stream)
    assert [event.type for event in events].count("response.output_text.delta") > 1
    assert events[-1].type == "response.completed"
    assert events[-1].response.kv_transfer_params == told(indexes(model, PREFIX), *expected, **error)


def check_chats_and_completions(client, model: Path, indexes) -> None:
    """Their chunks tell if they have a field for it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionStreamResponse

    question = text(tokens(seed=3, count=20))
    arguments = {**asked(model, {}), "max_tokens": TOKENS, "stream_options": {"include_usage": True}}
    messages = [{"role": "system", "content": text(PREFIX)}, {"role": "user", "content": question}]
    chat = client.chat.completions.create(messages=messages, **arguments)
    completion = client.completions.create(prompt=f"{text(PREFIX)} {question}", **arguments)
    expected = told(indexes(model, PREFIX), "auto", 0.4, {"dense: prefill": 1, "squeezed": TOKENS - 1})
    for stream, chunk in ((chat, ChatCompletionStreamResponse), (completion, CompletionStreamResponse)):
        known = [params for chunk in stream if (params := getattr(chunk, "kv_transfer_params", None))]
        assert known == ([expected] if "kv_transfer_params" in chunk.model_fields else [])


def check_sigterm_ends_it(client, model: Path, log: Path) -> None:
    """With squeezed answers half given, all of its processes end, and none of them in our code."""
    # engines of other tests may have left processes that have ended
    children = [process for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE]
    (serving,) = [process for process in children if str(model) in process.cmdline()]
    workers = serving.children(recursive=True)
    arguments = {**asked(model, {}), "max_tokens": 1000}
    streams = [client.completions.create(prompt=text([*PREFIX, seed]), **arguments) for seed in range(10, 16)]
    for stream in streams:
        next(iter(stream))
    serving.send_signal(signal.SIGTERM)
    for stream in streams:
        # vLLM may tell that the answer was cut short, or nothing, and wait for clients that do
        stream.close()
    ended, left = psutil.wait_procs([serving, *workers], SECONDS_TO_END)
    assert workers and not left
    assert [process.returncode for process in ended if process == serving] == [0]
    assert str(Path(vllm_squeeze.__file__).parent) not in log.read_text(), "it ended with a traceback through our code"
