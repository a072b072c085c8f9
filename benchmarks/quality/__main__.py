"""Measures what squeezing costs in answers to RULER's tasks and in conversations, many questions on one prefix.

    python -m benchmarks.quality --model M --tasks niah_single_2 vt --length 4096 --questions 20 \\
        --budgets 0.5 0.33 0.125 --work folder/ --out quality.json

Indexes each task's prefix, then has one engine that serves it answer the task's questions with vLLM's own attention and
at each budget, one question at a time, so that an answer depends on no other. Before each of these arms the KV cache is
emptied and the prefix computed anew, densely. A prefix is the system message of a conversation and a question its user
message, its last one in ``chat``; without a chat template they are a raw prompt, "prefix, question, Answer:". Answers
are greedy, and computed by vLLM's V1 runner, which shows logits to a benchmark in all versions. How the tasks differ
from RULER's is in ``tasks.py``: scores compare with those of the same command only.

    used      budget really used, by the server's own counters
    score     references found in answers, in percent, mean over questions; of questions on documents, any of them
    f1        SQuAD's, of questions on documents
    change    of the score, from dense answers to the same questions
    interval  that 95% of such changes lie in if questions are drawn anew from those asked (percentile bootstrap); few
              questions, or scores that are all the same, make it too narrow
    same      percent of answers that are the same token for token
    before    percent of an answer's tokens before the first that differs, mean over answers
    KL        of dense to other next-token distributions at the first 32 tokens of the dense answers, which are forced
              for this one after the other, in nats, mean over all these places; and its standard error if questions are
              drawn anew
    top-1     percent of these places where both have the same most likely token

With ``--served`` each arm is a ``vllm serve`` of its own, as users start it, the dense one with vLLM's own backend, and
questions go through the OpenAI API: to chat completions, or without a chat template to completions; KL is not measured
there. Its answers are kept beside the others, which it is compared with where they are there:

    alike     percent of answers that are token for token those that the engine in this process gave in the same arm

With ``--beside`` rules of ``selection.py`` answer too, in torch and at the same budgets, by the engine in this process:
arms called ``rule:budget``, such as ``oracle:0.125``. They say by themselves how much they choose, so need no threshold.

All is kept in the work folder, answers one a line: the command goes on where it was stopped, and adds tasks and budgets
to those that are there. An arm whose rows were not all squeezed (prompts dense), or that did not answer all questions,
or whose budget is less than centroids alone read, has no figures, and the exit code is 1.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.quality import plots
from benchmarks.quality.answers import DENSE, SERVED, answers_path, problem_path, read, same_tokens, summarise
from benchmarks.quality.questions import Task
from benchmarks.quality.selection import parse, threshold_of
from benchmarks.quality.tasks import TASKS, make_task

# Sets the environment before vLLM is imported.
from benchmarks.running import has_chat_template, indexer_args, question_prompts

ESSAY = Path(__file__).parents[2] / "examples" / "data" / "persuasion.txt"
# What all of a work folder was made with.
SETTINGS = ("model", "essay", "length", "questions", "answer_tokens", "seed", "engine_args")


# each in a process of its own


def prepare(arguments: argparse.Namespace) -> None:
    """Makes a task and the index of its prefix, then notes the task."""
    from vllm.tokenizers import get_tokenizer

    from vllm_squeeze.offline_tools.index import index
    from vllm_squeeze.prefix_index.manifest import IndexParameters

    tokenizer = get_tokenizer(arguments.model)
    task = make_task(
        arguments.task,
        arguments.questions,
        arguments.length,
        lambda text: len(tokenizer(text).input_ids),
        arguments.essay.read_text(encoding="utf-8"),
        arguments.seed,
    )
    if arguments.answer_tokens is not None:
        task = replace(task, answer_tokens=arguments.answer_tokens)
    folder = arguments.work / task.name
    folder.mkdir(exist_ok=True)
    prefix = folder / "prefix.txt"
    prefix.write_text(task.prefix, encoding="utf-8")
    engine_args = indexer_args(arguments.engine_args)
    index(arguments.model, prefix, None, None, folder / "index", IndexParameters(), engine_args, measured=False)
    # Whole or not at all: it says that the index is there.
    unfinished = folder / "task.json.part"
    unfinished.write_text(json.dumps(asdict(task), indent=2), encoding="utf-8")
    unfinished.rename(folder / "task.json")


def ask(arguments: argparse.Namespace) -> None:
    """Answers the questions of a task that its arms have no answer to."""
    task, folder = read_task(arguments.work, arguments.task), arguments.work / arguments.task
    prompts = prompts_of(task, arguments.model)
    if arguments.served:
        from vllm.tokenizers import get_tokenizer

        from benchmarks.quality.served import ServedAsker

        chat = has_chat_template(get_tokenizer(arguments.model))
        asker = ServedAsker(folder, task, arguments.model, prompts, chat, arguments.engine_args)
    else:
        from benchmarks.quality.asking import Asker

        asker = Asker(folder, arguments.model, prompts, task.answer_tokens, arguments.engine_args)
    asker.ask(missing_arms(folder, len(task.questions), arguments))


# all tasks and arms


def read_task(work: Path, name: str) -> Task:
    return Task.from_dict(json.loads((work / name / "task.json").read_text(encoding="utf-8")))


def prompts_of(task: Task, model: str) -> list[list[int]]:
    """Token ids of a task's questions, each after the prefix and its own earlier conversation."""
    from vllm.tokenizers import get_tokenizer

    texts, earlier = zip(*((question.text, question.earlier) for question in task.questions))
    return question_prompts(get_tokenizer(model), task.prefix, texts, earlier)


def arms_of(arguments: argparse.Namespace) -> list[str]:
    beside = [f"{rule}:{budget}" for rule in arguments.beside for budget in arguments.budgets]
    return list(dict.fromkeys([DENSE, *arguments.budgets, *beside]))


def kept_answers(folder: Path, arm: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """An arm's answers in the way that is wanted."""
    return read(answers_path(folder, (SERVED if arguments.served else "") + arm))


def missing_arms(folder: Path, count: int, arguments: argparse.Namespace) -> list[str]:
    """The arms of a task that have not answered all of its ``count`` questions, though they can."""
    return [
        arm
        for arm in arms_of(arguments)
        if len(kept_answers(folder, arm, arguments)) < count and not problem_path(folder, arm).exists()
    ]


def in_process(task: str, *what: str) -> int:
    """Prepares a task, or does something else with it, in a fresh process; returns its exit code."""
    command = [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:], "--task", task, *what]
    return subprocess.run(command, check=False, stdout=sys.stderr).returncode


def keep_settings(arguments: argparse.Namespace) -> None:
    """Notes what a work folder is made with.

    Raises:
        ValueError: the folder was made with something else.
    """
    settings = {name: getattr(arguments, name) for name in SETTINGS} | {"essay": str(arguments.essay)}
    path = arguments.work / "settings.json"
    if path.exists():
        for name, known in json.loads(path.read_text()).items():
            if known != settings[name]:
                raise ValueError(f"{name} is {settings[name]!r}; {arguments.work} was made with {known!r}")
    path.write_text(json.dumps(settings, indent=2))


def run_task(arguments: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Does what is missing of a task; returns the figures of its arms."""
    folder = arguments.work / name
    if not (folder / "task.json").exists() and (code := in_process(name)):
        return [{"task": name, "arm": "index", "problem": f"exit code {code}"}]
    task = read_task(arguments.work, name)
    if missing_arms(folder, len(task.questions), arguments):
        in_process(name, "--ask")
    arms = arms_of(arguments)
    problems = {arm: path.read_text(encoding="utf-8") for arm in arms if (path := problem_path(folder, arm)).exists()}
    answers = {arm: kept_answers(folder, arm, arguments) for arm in arms}
    summaries = summarise(task, answers, problems)
    if arguments.served:
        for summary in summaries:
            summary["as_in_process"] = same_tokens(answers[arm := summary["arm"]], read(answers_path(folder, arm)))
    return summaries


COLUMNS = (
    ("used", "budget_used", 1, ".4f"),
    ("score", "score", 100, ".1f"),
    ("f1", "f1", 100, ".1f"),
    ("change", "difference", 100, "+.1f"),
    ("from", "low", 100, "+.1f"),
    ("to", "high", 100, "+.1f"),
    ("same", "same", 100, ".0f"),
    ("before", "before_difference", 100, ".0f"),
    ("KL", "kl", 1, ".4f"),
    ("+-", "kl_error", 1, ".4f"),
    ("top-1", "top1", 100, ".1f"),
)
SERVED_COLUMNS = (*COLUMNS[:8], ("alike", "as_in_process", 100, ".0f"))


def print_table(arguments: argparse.Namespace, summaries: list[dict[str, Any]]) -> None:
    folders = (arguments.work / summary["task"] for summary in summaries)
    rows = (row for folder in folders for path in folder.glob("*.jsonl") for row in read(path))
    for device, versions in {(row["machine"], tuple(row["versions"].items())) for row in rows}:
        print(f"{device}, {', '.join(f'{name} {version}' for name, version in versions)}, {datetime.now(UTC):%Y-%m-%d}")
    print(f"python -m benchmarks.quality {shlex.join(sys.argv[1:])}")
    columns = SERVED_COLUMNS if arguments.served else COLUMNS
    print(f"{'task':<18}{'arm':<16}" + "".join(f"{title:>8}" for title, *_ in columns))
    for summary in summaries:
        start = f"{summary['task']:<18}{summary['arm']:<16}"
        if "problem" in summary:
            print(f"{start}  {summary['problem']}")
            continue
        values = ((summary.get(name), scale, form) for _, name, scale, form in columns)
        print(start + "".join(f"{'-' if v is None else format(v * scale, form):>8}" for v, scale, form in values))


def plot_summaries(path: Path, summaries: list[dict[str, Any]]) -> None:
    """Scores and KL of each task against the budget that was really used."""
    figures = {"score, percent": ("score", 100), plots.KL: ("kl", 1)}
    panels: dict[str, plots.Lines] = {title: {} for title in figures}
    for summary in summaries:
        used = 1 if summary["arm"] == DENSE else summary.get("budget_used")
        for title, (name, scale) in figures.items():
            if name in summary:
                rule, _, _ = summary["arm"].rpartition(":")
                line = f"{summary['task']}, {rule}" if rule else summary["task"]
                panels[title].setdefault(line, []).append((used, summary[name] * scale))
    plots.plot(path, panels, logarithmic=frozenset({plots.KL}))


def budget(text: str) -> str:
    """A budget as its arm is called.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget; must be above 0 and at most 1")
    return f"{value:g}"


def rule_beside(text: str) -> str:
    """A rule as its arms are called.

    Raises:
        argparse.ArgumentTypeError: there is no such rule, or how much it chooses is a matter of its threshold.
    """
    try:
        if threshold_of(parse(text), 0.5, 1) is None:
            raise ValueError(f"{text!r} chooses by a threshold, which only benchmarks.quality.sweep can find")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--length", type=int, default=4096, help="most tokens of a prefix")
    parser.add_argument("--questions", type=int, default=20, help="of each task")
    parser.add_argument("--answer-tokens", type=int, help="most tokens of an answer, instead of RULER's")
    parser.add_argument("--budgets", nargs="+", type=budget, default=["0.5", "0.33", "0.125"])
    parser.add_argument("--beside", nargs="+", type=rule_beside, default=[], metavar="RULE", help="see above")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps prefixes, indexes and answers")
    parser.add_argument("--essay", type=Path, default=ESSAY, help="text that needles are planted in")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    parser.add_argument("--served", action="store_true", help="ask through the OpenAI API, see above")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--out", type=Path, help="where to write all figures, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw scores and KL against budgets")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        ask(arguments)
        return 0
    if arguments.task:
        try:
            prepare(arguments)
        except ValueError as error:
            parser.error(str(error))
        return 0
    if arguments.beside and (arguments.served or not arguments.engine_args.get("enforce_eager")):
        parser.error(
            "--beside: rules in torch need an engine in this process that captures no CUDA graphs, so no "
            "--served, and --engine-args '{\"enforce_eager\": true}'"
        )
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.plot:
            plots.check()
        keep_settings(arguments)
    except ValueError as error:
        parser.error(str(error))
    summaries = [summary for name in arguments.tasks for summary in run_task(arguments, name)]
    print_table(arguments, summaries)
    if arguments.out:
        arguments.out.write_text(json.dumps({"command": sys.argv, "rows": summaries}, indent=2))
    if arguments.plot:
        plot_summaries(arguments.plot, summaries)
    return int(any("problem" in summary for summary in summaries))


if __name__ == "__main__":
    sys.exit(main())
