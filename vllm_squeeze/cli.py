"""The command ``vllm-squeeze``."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_squeeze.config import SERVING_MODES, SqueezeConfig


def engine_args(text: str) -> dict[str, Any]:
    """Parses --engine-args."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def prefill(text: str) -> float | str:
    """The setting of this name.

    Raises:
        argparse.ArgumentTypeError: it is not allowed.
    """
    try:
        value = float(text)
    except ValueError:
        value = text
    try:
        return SqueezeConfig(prefill=value).prefill
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_form(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of how a text is tokenized."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat-system",
        dest="chat",
        action="store_true",
        default=None,
        help="the text is the system message of conversations (default if the model has a chat template)",
    )
    form.add_argument("--raw", dest="chat", action="store_false", help="prompts begin with the text as it is")


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine-args",
        type=engine_args,
        default={},
        metavar="JSON",
        help='more arguments for the engine, as the server will have them: {"dtype": "float32"}',
    )


def add_source(parser: argparse.ArgumentParser) -> Any:
    """Adds where a prefix comes from; returns the group of these arguments, which exclude each other."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prefix", type=Path, help="text file; - for standard input")
    source.add_argument("--token-ids", type=Path, help="file with a JSON list of token ids; - for standard input")
    return source


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-squeeze", description="Indexes long prompt prefixes for vLLM.")
    commands = parser.add_subparsers(dest="command", required=True)

    index = commands.add_parser("index", help="index a prefix: run it once, cluster its keys, write the index")
    index.add_argument("--model", required=True, help="model folder or name, as for vllm serve")
    add_source(index).add_argument(
        "--documents",
        type=Path,
        metavar="PATH",
        help="many prefixes, indexed on Ray: a folder of text files, or JSON lines with text, path or token_ids, and "
        "perhaps name. Documents whose indexes are there already are skipped; what failed is listed at the end",
    )
    index.add_argument(
        "--workers", type=int, metavar="N", help="of --documents: engines at a time (default: one for each GPU)"
    )
    index.add_argument(
        "--ray", metavar="ADDRESS", help="of --documents: the Ray cluster (default: RAY_ADDRESS, or this machine alone)"
    )
    add_form(index)
    index.add_argument(
        "--out",
        required=True,
        help="folder of indexes, or a URL that fsspec knows, such as s3://...; each index gets a folder of its own",
    )
    index.add_argument(
        "--exact",
        action="store_true",
        help="do not cluster: requests attend to all of the prefix, reading it once for all of them",
    )
    index.add_argument(
        "--extend",
        type=Path,
        metavar="OLD",
        help="an index of the same text, before it grew at its end: its clusters are kept, and only what is new is "
        "clustered. Model and options of the clustering must be those that it was made with",
    )
    index.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="what to calibrate budgets on, and to measure what they cost: a question a line, or JSON lines with "
        '{"question": ...} '
        "(default: general questions about a text)",
    )
    index.add_argument(
        "--quality",
        action=argparse.BooleanOptionalAction,
        help="measure what budgets cost, which takes another start of the engine (default: where there is a GPU, "
        "and not with --documents)",
    )
    index.add_argument("--centroids", type=float, help="centroids per token of the prefix (default 0.05)")
    index.add_argument("--window", type=int, help="most tokens clustered together (default 8192)")
    index.add_argument("--num-sinks", type=int, help="first tokens, always attended to (default 16)")
    index.add_argument("--observation-window", type=int, help="last tokens, always attended to as well (default 100)")
    index.add_argument("--seed", type=int, help="of the clustering (default 0)")
    index.add_argument("--rule", help="by which keys are chosen: keys, the default, clusters, or paper")
    add_engine_args(index)

    inspect = commands.add_parser("inspect", help="show and verify indexes; needs neither a GPU nor vLLM")
    inspect.add_argument("index", type=Path, help="an index, or a folder of indexes")

    config = commands.add_parser("config", help="check a file of the server's settings without starting a server")
    config.add_argument(
        "--check",
        type=Path,
        required=True,
        metavar="FILE",
        help="YAML, or JSON if named *.json: an object as it is given to vLLM's --additional-config, with the key "
        "squeeze, or a file for vLLM's --config, with squeeze under additional-config. A server reads either where "
        "SQUEEZE_CONFIG names it. Prints the settings with all defaults, and the indexes",
    )

    doctor = commands.add_parser(
        "doctor", help="check the installation, the GPU, indexes, and whether a prompt matches"
    )
    doctor.add_argument(
        "--index",
        type=Path,
        help="an index, or a folder of indexes (default: those that SQUEEZE_CONFIG or SQUEEZE_INDEX name)",
    )
    doctor.add_argument("--model", help="model that will be served (default for --prompt: the index's)")
    doctor.add_argument(
        "--prompt",
        type=Path,
        metavar="FILE",
        help="say why this prompt would be squeezed or not: text, or a JSON list of token ids; - for standard input",
    )
    add_form(doctor)
    add_engine_args(doctor)

    report = commands.add_parser("report", help="write a page on what budgets cost in answers, as measured by index")
    report.add_argument("index", type=Path, help="an index, or a folder of indexes")
    report.add_argument("--out", type=Path, required=True, metavar="FILE", help="HTML file to write")
    report.add_argument(
        "--max-kl",
        type=float,
        default=SqueezeConfig.max_kl,
        help="what the suggested budget may cost: KL from dense next-token distributions, nats (default %(default)s)",
    )

    for name, help in (
        ("list", "say which indexes are in a folder, and with --url what a server makes of them"),
        ("add", "copy indexes into a folder that servers watch"),
        ("remove", "remove an index from such a folder"),
        ("pin", "have servers keep an index's prefix in their KV cache once it is there"),
        ("unpin", "let it be evicted again"),
    ):
        command = commands.add_parser(name, help=help)
        if name == "add":
            command.add_argument("index", type=Path, help="an index, or a folder of indexes")
        elif name != "list":
            command.add_argument("name", help="of the index")
        command.add_argument("store", type=Path, help="folder of indexes")
        if name == "list":
            command.add_argument("--url", help="of a server, http://localhost:8000; its key is OPENAI_API_KEY")

    warm = commands.add_parser("warm", help="have a server compute the prefixes of indexes before the first question")
    warm.add_argument("index", type=Path, help="an index, or a folder of indexes")
    warm.add_argument("--url", required=True, help="of the server, http://localhost:8000; its key is OPENAI_API_KEY")
    warm.add_argument(
        "--wait",
        type=float,
        default=30,
        metavar="SECONDS",
        help="for an index that the server has not seen or not loaded yet (default %(default)s)",
    )

    bench = commands.add_parser(
        "bench", help="compare speed and answers with vLLM's own backend, on your model, prefix and questions"
    )
    bench.add_argument("--model", required=True, help="model folder or name, as for vllm serve")
    bench.add_argument("--index", type=Path, required=True, help="an index of the prefix, or a folder of indexes")
    add_source(bench)
    add_form(bench)
    bench.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='a question a line, or JSON lines with {"question": ...} (default: general questions about a text)',
    )
    bench.add_argument(
        "--budgets", type=float, nargs="+", help="to serve the prefix at, one after the other (default: the server's)"
    )
    bench.add_argument("--mode", choices=SERVING_MODES, help="of the server (default: the server's)")
    bench.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests that run together (default 1 8)")
    bench.add_argument("--tokens", type=int, default=64, help="of each answer (default %(default)s)")
    bench.add_argument("--repeats", type=int, default=3, help="of each timing (default %(default)s)")
    add_engine_args(bench)
    bench.add_argument("--out", type=Path, metavar="FILE", help="HTML file to write")
    bench.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures, as JSON")
    return parser


def run_index(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.prefix_index.manifest import IndexParameters

    names = "centroids", "window", "num_sinks", "observation_window", "seed", "rule"
    given = {name: getattr(arguments, name) for name in names}
    chosen = {name: value for name, value in given.items() if value is not None}
    if arguments.exact and arguments.questions:
        raise ValueError("--questions: not together with --exact, which has no budget to calibrate")
    if arguments.exact and arguments.extend:
        raise ValueError("--extend: not together with --exact, which clusters nothing")
    if arguments.exact and chosen:
        option = next(iter(chosen)).replace("_", "-")
        raise ValueError(f"--{option}: not together with --exact, which clusters nothing")
    parameters = None if arguments.exact else IndexParameters(**chosen)
    if arguments.documents:
        if arguments.extend:
            raise ValueError("--extend: not together with --documents")
        return run_index_documents(arguments, parameters)
    for option in ("workers", "ray"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option}: only with --documents")
    from vllm_squeeze.offline_tools.index import index

    index(
        arguments.model,
        arguments.prefix,
        arguments.token_ids,
        arguments.chat,
        arguments.out,
        parameters,
        arguments.engine_args,
        arguments.questions,
        arguments.quality,
        arguments.extend,
    )
    return 0


def run_index_documents(arguments: argparse.Namespace, parameters: Any) -> int:
    from vllm_squeeze.offline_tools.index_documents import index_documents
    from vllm_squeeze.offline_tools.questions import read_questions

    # Other machines have other working folders.
    model = str(Path(arguments.model).resolve()) if Path(arguments.model).exists() else arguments.model
    settings = {
        "model": model,
        "chat": arguments.chat,
        "parameters": parameters,
        "engine_args": arguments.engine_args,
        "questions": read_questions(arguments.questions) if arguments.questions else None,
        "measured": bool(arguments.quality),
    }
    return index_documents(arguments.documents, arguments.out, arguments.workers, arguments.ray, settings)


def run_inspect(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.inspect import inspect

    return inspect(arguments.index, sys.stdout)


def run_config(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.check_config import check_config

    return check_config(arguments.check, sys.stdout)


def run_doctor(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.doctor import Subject, doctor

    given = arguments.index, arguments.model, arguments.prompt, arguments.chat, arguments.engine_args
    return doctor(Subject(*given), sys.stdout)


def run_report(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.report import report

    if not arguments.max_kl > 0:
        raise ValueError(f"--max-kl: {arguments.max_kl} is not above 0")
    report(arguments.index, arguments.out, arguments.max_kl)
    print(arguments.out)
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm_squeeze.offline_tools.bench.command import bench
    from vllm_squeeze.offline_tools.bench.plan import Asked, make_plan

    asked = Asked(
        arguments.model,
        arguments.index,
        arguments.prefix,
        arguments.token_ids,
        arguments.chat,
        arguments.questions,
        arguments.budgets,
        arguments.mode,
        arguments.batch,
        arguments.tokens,
        arguments.repeats,
        arguments.engine_args,
    )
    return bench(make_plan(asked), arguments.out, arguments.json)


def run_list(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.server import Server
    from vllm_squeeze.offline_tools.store import list_store

    return list_store(arguments.store, Server(arguments.url) if arguments.url else None, sys.stdout)


def run_add(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.store import add_to_store

    for folder in add_to_store(arguments.index, arguments.store):
        print(folder)
    return 0


def run_remove(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.store import remove_from_store

    remove_from_store(arguments.name, arguments.store)
    return 0


def run_pin(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.store import pin_in_store

    pin_in_store(arguments.name, arguments.store, arguments.command == "pin")
    return 0


def run_warm(arguments: argparse.Namespace) -> int:
    from vllm_squeeze.offline_tools.server import Server
    from vllm_squeeze.offline_tools.warm import warm

    return warm(arguments.index, Server(arguments.url), arguments.wait, sys.stdout)


RUN = {
    "index": run_index,
    "inspect": run_inspect,
    "config": run_config,
    "doctor": run_doctor,
    "report": run_report,
    "bench": run_bench,
    "list": run_list,
    "add": run_add,
    "remove": run_remove,
    "pin": run_pin,
    "unpin": run_pin,
    "warm": run_warm,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, or 1 for an error, which is printed in one line."""
    arguments = build_parser().parse_args(argv)
    # Else nothing that is half written would be removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return RUN[arguments.command](arguments)
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"vllm-squeeze {arguments.command}: error: {' '.join(lines)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
