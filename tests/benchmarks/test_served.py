"""What is said to ``vllm serve``, and what its /metrics say."""

import sys
from pathlib import Path

import pytest

from benchmarks.quality import served

METRICS = """\
# HELP vllm:squeeze_rows_total Rows.
# TYPE vllm:squeeze_rows_total counter
vllm:squeeze_rows_total{engine="0",outcome="squeezed"} 5.0
vllm:squeeze_rows_total{engine="1",outcome="squeezed"} 2.0
vllm:squeeze_rows_total{engine="0",outcome="dense: no index"} 1.0
# HELP vllm:squeeze_rows_created Rows.
# TYPE vllm:squeeze_rows_created gauge
vllm:squeeze_rows_created{engine="0",outcome="squeezed"} 1.7e+09
# HELP vllm:squeeze_prefix_bytes_alone_total Bytes.
# TYPE vllm:squeeze_prefix_bytes_alone_total counter
vllm:squeeze_prefix_bytes_alone_total{engine="0"} 1.5e+06
# HELP vllm:prompt_tokens_total Tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0"} 900.0
"""


def test_counters():
    assert served.counters_in(METRICS) == {
        "vllm:squeeze_rowssqueezed": 7,
        "vllm:squeeze_rowsdense: no index": 1,
        "vllm:squeeze_prefix_bytes_alone": 1.5e6,
    }


def test_arguments_of_the_engine():
    engine_args = {
        "dtype": "float32",
        "enforce_eager": True,
        "async_scheduling": False,
        "max_model_len": 1024,
        "compilation_config": {"cudagraph_capture_sizes": [1, 8]},
    }
    assert served.flags(engine_args) == [
        *("--dtype", "float32"),
        "--enforce-eager",
        "--no-async-scheduling",
        *("--max-model-len", "1024"),
        *("--compilation-config", '{"cudagraph_capture_sizes": [1, 8]}'),
    ]


def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    log = tmp_path / "server.log"
    message = f"the server did not start; its log is {log}"
    with pytest.raises(RuntimeError, match=message), served.server("no-such-model", [], log):
        pass


def test_a_server_is_stopped_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in = tmp_path / "serves"
    stand_in.write_text("#!/bin/sh\necho $$\nexec sleep 60\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(served, "is_healthy", lambda url: log.read_text().strip().isdigit())
    log = tmp_path / "server.log"
    with pytest.raises(ZeroDivisionError), served.server("model", [], log):
        process = Path(f"/proc/{log.read_text().strip()}")
        assert process.exists()
        raise ZeroDivisionError
    assert not process.exists()
