"""Measures what requests on one cached prefix wait for: vLLM's own backend against squeezed attention.

    python benchmarks/serve.py --arms stock exact squeezed --batches 1 8 32
    python benchmarks/serve.py --arms ordinary-stock ordinary-index --rounds 3
    python benchmarks/serve.py --arms stock auto:0.125 auto:0.33 --together --batches 1 4 --question-tokens 512
    python benchmarks/serve.py --model M --prefix contract.txt

Each arm runs in a fresh process, and its requests together, with questions of random tokens, distinct in each repeat
and the same in all arms. A number after a mode is a budget for prompts; they are dense without. With --together all
engines are alive at once, for which the GPU must have room, and are measured in turn, one repeat each: where a host is
now fast and now slow, it is so for all. The model is a real one, or one with random weights in the shape of a known
one: then what is chosen is random too, and a threshold is searched for that keeps a given share (--kept). Times are
medians over repeats:

    ttft     ms from handing over the first request until a request's first token, mean over requests
    handed   ms of that until all requests were handed over, the hashing of their prompts included
    tpot     ms between tokens of a request, while all requests have a first token and none its last
    tok/s    tokens of all requests, from handing over the first request until the last token
    x ttft   how many times less ttft is than of stock (of ordinary-stock for ordinary-index)
    x tpot   the same of tpot
    kept     share of the prefix's keys that a token chooses, while decoding
    union    share that is loaded for the tokens that share loads
    shared   tokens that share loads

The counters are read in one more batch, which warms up; timed batches are only checked: all tokens there, all prefixes
found in the KV cache, all rows squeezed (prompts without a budget dense) or exact as the arm is ("auto" chooses), and
none in ordinary traffic. An arm that failed, or whose checks did, has no speed-up, and the exit code is 1.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MODES = ("auto", "exact", "squeezed")
STOCK, ORDINARY_STOCK, ORDINARY_INDEX = "stock", "ordinary-stock", "ordinary-index"
ARMS = (STOCK, *MODES, ORDINARY_STOCK, ORDINARY_INDEX)


def mode_and_prefill(arm: str) -> tuple[str, float | str | None]:
    """The name of an arm, and the budget of prompts that may follow a mode.

    Raises:
        argparse.ArgumentTypeError: this budget is not allowed.
    """
    from vllm_squeeze.cli import prefill

    name, colon, budget = arm.partition(":")
    return name, prefill(budget) if colon else None


def arm(text: str) -> str:
    """An arm as it is asked for.

    Raises:
        argparse.ArgumentTypeError: there is none of this name, or with such a budget.
    """
    name, budget = mode_and_prefill(text)
    if name not in (ARMS if budget is None else ("auto", "squeezed")):
        allowed = f"one of {', '.join(ARMS)}, or auto or squeezed with a budget of prompts, as auto:0.33"
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return text


SHAPES = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072 * 8,
        "torch_dtype": "bfloat16",
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "torch_dtype": "float32",
    },
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# vLLM's name of its own made-up weights ends like this, by which an index knows them as made up.
LOAD_FORMAT = "spread-dummy"

# By how much a kept share may differ from the wanted, relative to it: in the search, and later with other questions.
SEARCH_TOLERANCE = 0.02
KEPT_TOLERANCE = 0.1
SEARCH_TOKENS = 256
SEARCH_ROUNDS = 24
MOST_IN_A_ROW = 3
COUNTED_TOKENS = 32
LOWEST_LOG_P = -40.0


# the model and its index


def write_model(folder: Path, shape: str) -> None:
    """Writes the configuration of a model without weights, and a tokenizer that nothing needs but the indexer."""
    folder.mkdir()
    words = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": words}
    files = {
        "config.json": LLAMA | SHAPES[shape],
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def register_spread_weights() -> None:
    """Lets vLLM load made-up weights that spread attention scores.

    Those of vLLM's own load format "dummy" are so small that all keys score alike, and are the same in every layer.
    """
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class SpreadLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        @torch.no_grad()
        def load_weights(self, model: Any, model_config: Any) -> None:
            for number, weight in enumerate(model.parameters()):
                if weight.dim() == 1:
                    weight.fill_(1)
                    continue
                generator = torch.Generator(weight.device).manual_seed(number)
                weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)


def make_index(arguments: argparse.Namespace) -> None:
    """Indexes the prefix where the arms will look for it."""
    import numpy as np
    from running import indexer_args

    from vllm_squeeze.offline_tools.index import index
    from vllm_squeeze.prefix_index.manifest import IndexParameters

    engine_args = indexer_args(arguments.engine_args)
    if arguments.model:
        from vllm.tokenizers import get_tokenizer

        ids = get_tokenizer(str(arguments.model))(arguments.prefix.read_text(encoding="utf-8")).input_ids
    else:
        vocabulary = SHAPES[arguments.shape]["vocab_size"]
        ids = np.random.default_rng(0).integers(10, vocabulary, arguments.prefix_tokens).tolist()
        engine_args |= {"load_format": LOAD_FORMAT, "skip_tokenizer_init": True}
    path = arguments.work / "prefix.json"
    path.write_text(json.dumps(ids))
    index(str(model_of(arguments)), None, path, None, arguments.index, IndexParameters(), engine_args, measured=False)


def model_of(arguments: argparse.Namespace) -> Path:
    return arguments.model or arguments.work / arguments.shape


# one arm, in a process of its own


def start(arguments: argparse.Namespace, prefix: list[int]) -> Any:
    """Starts the engine of an arm."""
    from vllm import LLM

    settings, (mode, prefill) = {"index": str(arguments.index)}, mode_and_prefill(arguments.arm)
    if mode in MODES:
        settings["mode"] = mode
    if arguments.budget:
        settings["budget"] = arguments.budget
    if prefill is not None:
        settings["prefill"] = prefill
    engine_args = {
        "max_model_len": len(prefix) + arguments.question_tokens + max(arguments.tokens, SEARCH_TOKENS) + 1,
        "max_num_seqs": max(arguments.batches),
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    if not arguments.model:
        engine_args["load_format"] = LOAD_FORMAT
    if arguments.arm not in (STOCK, ORDINARY_STOCK):
        engine_args |= {"attention_backend": "squeeze", "additional_config": {"squeeze": settings}}
    return LLM(str(model_of(arguments)), **(engine_args | arguments.engine_args))


def prompts_of(prefix: list[int], seed: tuple[int, ...], batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Prompts of one batch: the prefix, and questions of ``length`` random tokens."""
    import numpy as np

    questions = np.random.default_rng(seed).integers(10, vocabulary, (batch, length))
    return [prefix + question for question in questions.tolist()]


def set_threshold(worker: Any, log_threshold: float) -> None:
    """Sets what all choices on a worker compare with, from the next kernel on."""
    from vllm_squeeze.attention_backend.worker import residency_of

    residency_of(worker.vllm_config).prefixes.log_threshold.fill_(log_threshold)


def search(measure: Callable[[float], float], wanted: float) -> float:
    """A log threshold at which a wanted share of keys is measured, within SEARCH_TOLERANCE, or KEPT_TOLERANCE at worst.

    Steps are halved, as in a bisection, but doubled where several in a row went the same way: what a threshold keeps
    changes while requests go on.

    Raises:
        RuntimeError: none was found.
    """
    threshold, step, above, in_a_row = LOWEST_LOG_P / 2, -LOWEST_LOG_P / 2, False, 0
    found, least = None, KEPT_TOLERANCE
    for _ in range(SEARCH_ROUNDS):
        share = measure(threshold)
        error = abs(share / wanted - 1)
        if error < least:
            least, found = error, threshold
        if error < SEARCH_TOLERANCE:
            break
        in_a_row = in_a_row + 1 if (share > wanted) == above else 1
        above = share > wanted
        step = step * 2 if in_a_row > MOST_IN_A_ROW else step / 2
        tried, threshold = threshold, threshold + (step if above else -step)
    if found is None:
        raise RuntimeError(f"no threshold keeps {wanted} of the keys; {tried} keeps {share:.4f}")
    return found


def find_threshold(llm: Any, prompts: list[list[int]], wanted: float) -> float:
    """Searches for the log threshold that keeps a share of the keys, on requests that are being decoded."""
    from running import count

    from vllm_squeeze.offline_tools.timing import steps

    running = steps(llm, prompts, SEARCH_TOKENS)
    next(arrivals for arrivals in running if all(arrivals))

    def measure(log_threshold: float) -> float:
        llm.collective_rpc(set_threshold, args=(log_threshold,))
        # steps that the engine had begun before, with the threshold before
        for _ in range(2):
            next(running)
        before = count(llm)
        for _ in range(max(8 // len(prompts), 2)):
            next(running)
        return (count(llm) - before).kept_share

    found = search(measure, wanted)
    for _ in running:
        pass
    return found


def fix_kept(llm: Any, arguments: argparse.Namespace, prompts: list[list[int]]) -> float:
    """Sets the threshold that keeps the wanted share in a batch of this size; the first arm that chooses finds it."""
    path = arguments.work / f"threshold-{arguments.kept}-{len(prompts)}.json"
    if path.exists():
        found = json.loads(path.read_text())
    else:
        found = find_threshold(llm, prompts, arguments.kept)
        path.write_text(json.dumps(found))
    llm.collective_rpc(set_threshold, args=(found,))
    return found


def problems_of(arguments: argparse.Namespace, row: dict[str, Any], cached: int) -> list[str]:
    """What is wrong with the figures of an arm and batch size.

    Args:
        arguments: of the arm.
        row: its figures.
        cached: tokens that each request had to find in the KV cache.
    """
    found = []
    for name in ("least_tokens", "most_tokens"):
        if any(repeat[name] != arguments.tokens for repeat in row["repeats"]):
            found.append(f"{name} is not {arguments.tokens}")
    rows = {name: grown for name, grown in row["growth"].items() if grown}
    mode, prefill = mode_and_prefill(arguments.arm)
    expected = {
        ORDINARY_INDEX: ["dense: no index"],
        "exact": ["exact"],
        "squeezed": ["squeezed"] if prefill else ["dense: prefill", "squeezed"],
    }.get(mode, [])
    if mode != "auto" and sorted(rows) != expected:
        found.append(f"rows are {rows}, not {expected}")
    if any(repeat["least_cached"] < cached for repeat in row["repeats"]):
        found.append("prefixes were not found in the KV cache")
    if arguments.kept and mode == "squeezed":
        share = row["kept_share"]
        if not abs(share / arguments.kept - 1) <= KEPT_TOLERANCE:
            found.append(f"kept share is {share:.4f}, not {arguments.kept}")
    return found


class Turns(AbstractContextManager):
    """Is entered when another process says that it is this one's turn, which ends when it is to be entered again.

    Args:
        go: file descriptor that a line comes from for each turn.
        ready: one that a line is written to where the next is waited for.
    """

    def __init__(self, go: int, ready: int):
        for pipe in (go, ready):
            os.set_inheritable(pipe, False)
        self._go, self._ready = os.fdopen(go), os.fdopen(ready, "w")

    def __enter__(self) -> None:
        print("ready", file=self._ready, flush=True)
        self._go.readline()

    def __exit__(self, *_: Any) -> None:
        pass


def run_batch(
    llm: Any, arguments: argparse.Namespace, prefix: list[int], batch: int, turn: AbstractContextManager
) -> dict[str, Any]:
    """The figures of one batch size: warms up, counts, then times, each repeat in a turn."""
    from running import count_decoding

    from vllm_squeeze.offline_tools.timing import rows_so_far, timed

    ordinary = arguments.arm.startswith("ordinary")
    length = arguments.ordinary_tokens if ordinary else arguments.question_tokens
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def prompts(repeat: int) -> list[list[int]]:
        return prompts_of([] if ordinary else prefix, (batch, repeat), batch, length, vocabulary)

    row: dict[str, Any] = {"arm": arguments.arm, "batch": batch}
    if arguments.kept and mode_and_prefill(arguments.arm)[0] == "squeezed":
        row["log_threshold"] = fix_kept(llm, arguments, prompts(arguments.repeats + 1))
    counted = count_decoding(llm, prompts(arguments.repeats), min(arguments.tokens, COUNTED_TOKENS))
    if counted is not None and counted.pairs:
        row |= {"counts": asdict(counted), "kept_share": counted.kept_share}
        row |= {"union_share": counted.union_share, "tokens_per_pass": counted.tokens_per_pass}
    before = rows_so_far(llm)
    row["repeats"] = []
    for repeat in range(arguments.repeats):
        with turn:
            row["repeats"].append(timed(llm, prompts(repeat), arguments.tokens))
    row["growth"] = {name: value - before.get(name, 0) for name, value in rows_so_far(llm).items()}
    block_size = llm.llm_engine.vllm_config.cache_config.block_size
    cached = 0 if ordinary else len(prefix) - block_size
    tpot = statistics.median(repeat["tpot_ms"] for repeat in row["repeats"])
    print(f"{arguments.arm}, batch {batch}: tpot {tpot:.2f} ms", flush=True)
    return row | {"problems": problems_of(arguments, row, cached)}


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one arm over all batch sizes."""
    from vllm_squeeze.offline_tools.timing import machine, steps
    from vllm_squeeze.prefix_index.index_folder import PrefixIndex, find_indexes

    (folder,) = find_indexes(arguments.index)
    prefix = PrefixIndex.open(folder).token_ids.tolist()
    llm = start(arguments, prefix)
    if not arguments.arm.startswith("ordinary"):
        for _ in steps(llm, [prefix + [10]], 1):
            pass
    turn = Turns(*arguments.turns) if arguments.turns else nullcontext()
    return machine() | {
        "prefix_tokens": len(prefix),
        "rows": [run_batch(llm, arguments, prefix, batch, turn) for batch in arguments.batches],
    }


# all arms


class ArmProcess:
    """One arm, or the indexing, in a fresh process.

    Args:
        arguments: of all arms.
        arm: its name, or "index".
        takes_turns: whether it waits for its turn before each repeat.
    """

    def __init__(self, arguments: argparse.Namespace, arm: str, takes_turns: bool = False):
        self.arm, self._timeout, self._started = arm, arguments.timeout, time.monotonic()
        self._result = arguments.work / f"result-{arm}.json"
        self._result.unlink(missing_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--work", str(arguments.work)]
        command += ["--index", str(arguments.index), "--result", str(self._result)]
        pipes: tuple[int, ...] = ()
        if takes_turns:
            (go, told), (says, ready) = os.pipe(), os.pipe()
            pipes = go, ready
            self._told, self._says = os.fdopen(told, "w"), os.fdopen(says)
            command += ["--turns", *map(str, pipes)]
        self._process = subprocess.Popen(command, stdout=sys.stderr, pass_fds=pipes)
        for pipe in pipes:
            os.close(pipe)
        self._timer = threading.Timer(self._timeout, self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    def is_ready(self) -> bool:
        """Waits until it asks for a turn; false if it ends instead."""
        return bool(self._says.readline())

    def has_turn(self) -> bool:
        """Lets it run one repeat; false if it ends then."""
        try:
            print("go", file=self._told, flush=True)
        except BrokenPipeError:
            return False
        return self.is_ready()

    def outcome(self) -> dict[str, Any]:
        """Waits for its end; returns its result, or what went wrong under "error"."""
        code = self._process.wait()
        timed_out = not self._timer.is_alive()
        self._timer.cancel()
        error = f"exit code {code}" if code or not self._result.exists() else None
        error = f"took more than {self._timeout} s" if error and timed_out else error
        outcome = {"error": error} if error else json.loads(self._result.read_text())
        seconds = round(time.monotonic() - self._started, 1)
        print(f"{self.arm}: {error or 'done'} after {seconds} s", file=sys.stderr, flush=True)
        return {"arm": self.arm, "seconds": seconds} | outcome


def one_after_the_other(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all arms."""
    return [ArmProcess(arguments, arm).outcome() for arm in arguments.arms]


def in_turn(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all arms at once, of which one at a time is measured, once."""
    arms = [ArmProcess(arguments, arm, takes_turns=True) for arm in arguments.arms]
    waiting = [arm for arm in arms if arm.is_ready()]
    while waiting:
        waiting = [arm for arm in waiting if arm.has_turn()]
    return [arm.outcome() for arm in arms]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins the rounds of each arm and batch size: medians over all repeats, and speed-ups where nothing is wrong."""
    joined: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in (row for run in runs for row in run.get("rows", [])):
        joined.setdefault((row["arm"], row["batch"]), []).append(row)
    rows = {}
    for known, parts in joined.items():
        repeats = [repeat for part in parts for repeat in part["repeats"]]
        medians = {name: statistics.median(repeat[name] for repeat in repeats) for name in repeats[0]}
        problems = [problem for part in parts for problem in part["problems"]]
        rows[known] = parts[-1] | medians | {"problems": problems}
    for (arm, batch), row in rows.items():
        stock = rows.get((ORDINARY_STOCK if arm.startswith("ordinary") else STOCK, batch))
        if stock is not None and not stock["problems"] and not row["problems"]:
            for name in ("ttft", "tpot"):
                row[f"{name}_over_stock"] = stock[f"{name}_ms"] / row[f"{name}_ms"]
    return list(rows.values())


COLUMNS = (
    ("ttft", "ttft_ms", ".0f"),
    ("x ttft", "ttft_over_stock", ".2f"),
    ("handed", "handed_ms", ".0f"),
    ("tpot", "tpot_ms", ".2f"),
    ("tok/s", "tokens_per_s", ".0f"),
    ("x tpot", "tpot_over_stock", ".2f"),
    ("kept", "kept_share", ".4f"),
    ("union", "union_share", ".4f"),
    ("shared", "tokens_per_pass", ".1f"),
)


def print_table(arguments: argparse.Namespace, runs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    ran = next((run for run in runs if "machine" in run), None)
    if ran:
        versions = ", ".join(f"{name} {version}" for name, version in ran["versions"].items())
        print(f"{ran['machine']}, {versions}, {datetime.now(UTC):%Y-%m-%d}; prefix of {ran['prefix_tokens']} tokens")
    print(f"python {shlex.join([Path(__file__).name, *sys.argv[1:]])}")
    print(f"{'arm':<15}{'batch':>6}" + "".join(f"{title:>9}" for title, _, _ in COLUMNS))
    for row in rows:
        figures = (format(row[name], form) if row.get(name) is not None else "-" for _, name, form in COLUMNS)
        print(f"{row['arm']:<15}{row['batch']:>6}" + "".join(f"{figure:>9}" for figure in figures))
    for row in rows:
        for problem in dict.fromkeys(row["problems"]):
            print(f"{row['arm']}, batch {row['batch']}: {problem}")
    for run in runs:
        if "error" in run:
            print(f"{run['arm']}: {run['error']}")
    if not arguments.model:
        print("The weights are random, hence the choices too.")
    if any("log_threshold" in row for row in rows):
        print(f"The share of keys kept was fixed at {arguments.kept}.")


def run_all(arguments: argparse.Namespace) -> int:
    """Makes what is missing, runs all arms, and prints the table."""
    if not arguments.model and not model_of(arguments).exists():
        write_model(model_of(arguments), arguments.shape)
    arguments.index = arguments.index or arguments.work / "index"
    runs = [] if arguments.index.exists() else [ArmProcess(arguments, "index").outcome()]
    if not any("error" in run for run in runs):
        run_arms = in_turn if arguments.together else one_after_the_other
        runs += [run for _ in range(arguments.rounds) for run in run_arms(arguments)]
    rows = summarise(runs)
    print_table(arguments, runs, rows)
    if arguments.out:
        arguments.out.write_text(json.dumps({"command": sys.argv, "rows": rows, "runs": runs}, indent=2))
    return int(any("error" in run for run in runs) or any(row["problems"] for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a real model; needs --prefix or --index")
    parser.add_argument("--prefix", type=Path, help="text of the prefix")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="of a model with random weights")
    parser.add_argument("--prefix-tokens", type=int, default=131072, help="of the random prefix")
    parser.add_argument("--kept", type=float, help="share of keys to keep; 0.1 with random weights")
    parser.add_argument("--budget", type=float, help="of the server, where --kept is not given")
    parser.add_argument("--index", type=Path, help="an index to use; its tokens are the prefix")
    parser.add_argument("--work", type=Path, help="folder that keeps model, index and thresholds for another run")
    parser.add_argument(
        "--arms",
        nargs="+",
        type=arm,
        metavar="ARM",
        default=["stock", "exact", "squeezed"],
        help=f"of {', '.join(ARMS)}; squeezed and auto perhaps with a budget of prompts, as auto:0.33",
    )
    parser.add_argument("--together", action="store_true", help="all engines are alive at once and take turns")
    parser.add_argument("--rounds", type=int, default=1, help="of all arms, one after the other")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="requests that run together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each request")
    parser.add_argument("--question-tokens", type=int, default=128)
    parser.add_argument("--ordinary-tokens", type=int, default=1024, help="of prompts in the ordinary arms")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that an arm may take")
    parser.add_argument("--out", type=Path, help="where to write all figures, as JSON")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turns", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model and not (arguments.prefix or arguments.index):
        parser.error("--model needs --prefix or --index")
    if not arguments.model and arguments.kept is None:
        arguments.kept = 0.1
    if not arguments.arm:
        with tempfile.TemporaryDirectory() as folder:
            arguments.work = arguments.work or Path(folder)
            arguments.work.mkdir(parents=True, exist_ok=True)
            return run_all(arguments)
    import running  # noqa: F401 (sets the environment before vLLM is imported)

    if not arguments.model:
        register_spread_weights()
    result = make_index(arguments) if arguments.arm == "index" else run_arm(arguments)
    arguments.result.write_text(json.dumps(result or {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
