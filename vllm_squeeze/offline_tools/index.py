"""``vllm-squeeze index``: writes the index of a prefix.

To cluster its keys, the prefix is run through vLLM once, and questions on it are answered, which shows how many keys a
threshold keeps. Then it is served to other questions, which shows what budgets cost. An exact index needs only the
prefix's tokens.
"""

import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_squeeze import __version__
from vllm_squeeze.offline_tools.documents import Document, read_input
from vllm_squeeze.offline_tools.inspect import calibrated_on, costs_of_budgets
from vllm_squeeze.offline_tools.prefix_text import PrefixTokens, describe, given_tokens, read_token_ids, text_tokens
from vllm_squeeze.offline_tools.questions import (
    ANSWER_TOKENS,
    GENERAL_HELD_BACK,
    general_questions,
    hold_back,
    read_questions,
    spread,
)
from vllm_squeeze.offline_tools.recording_engine import AS_LONG_AS_FITS, MEMORY_UTILIZATION, RecordingEngine
from vllm_squeeze.prefix_index.budget import ReadCost
from vllm_squeeze.prefix_index.calibration import BIN_WIDTH, level, log_threshold, moved, recall, threshold_curve
from vllm_squeeze.prefix_index.extension import check_extends
from vllm_squeeze.prefix_index.identity import ModelIdentity
from vllm_squeeze.prefix_index.index_folder import (
    PER_HEAD,
    IndexWriter,
    LayerClusters,
    PrefixIndex,
    index_name,
    tokens_digest,
    write_quality,
)
from vllm_squeeze.prefix_index.manifest import FORMAT_VERSION, Calibration, IndexParameters, LayerEntry, Manifest
from vllm_squeeze.prefix_index.quality import QUALITY_VERSION, BudgetQuality, Quality, manifest_digest
from vllm_squeeze.prefix_index.stores import find_manifest, place_in, store_at


def index(
    model: str,
    prefix: Path | None,
    token_ids: Path | None,
    chat: bool | None,
    out: Path | str,
    parameters: IndexParameters | None,
    engine_args: dict[str, Any],
    questions: Path | None = None,
    measured: bool | None = None,
    extend: Path | None = None,
) -> Path | str:
    """Indexes one prefix.

    Args:
        model: as vLLM takes it.
        prefix: text file, "-" for standard input; or None, with ``token_ids``.
        token_ids: file with a JSON list of token ids, "-" for standard input.
        chat: whether the text is the system message of conversations, or the start of raw prompts; None: the former
            where the model has a chat template.
        out: folder of indexes, or a URL as fsspec takes it.
        parameters: of the clustering; None for an exact index.
        engine_args: more arguments for vLLM's engine.
        questions: file of questions to calibrate thresholds on, and to measure what budgets cost; None for general
            ones.
        measured: whether what budgets cost is measured; None: where there is a GPU, since the CPU takes minutes for it.
        extend: folder of an index that keeps its clusters, of the same text before it grew at its end.

    Returns:
        folder of the index, or its URL.

    Raises:
        ValueError: an argument that cannot be used.
        OSError: the index could not be uploaded; it says where it is.
    """
    started = time.monotonic()
    if token_ids is not None:
        document = Document(file_name(token_ids), token_ids=read_token_ids(read_input(token_ids)), option="--token-ids")
    else:
        document = Document(file_name(prefix), text=read_input(prefix), option="--prefix")
    given_questions = read_questions(questions) if questions else None
    indexer = Indexer(model, chat, parameters, engine_args, given_questions, measured, extend=extend)
    asked = indexer.prepare(document)
    with store_at(out, keep=True) as store:
        made = indexer.write(asked, store)
        place = place_in(out, made.folder)
        summarise(place, made, time.monotonic() - started)
    return place


def file_name(path: Path) -> str:
    return path.name if str(path) != "-" else "stdin"


@dataclass(frozen=True)
class AskedPrefix:
    """A prefix that can be indexed, and what it is asked.

    Attributes:
        source: where it came from.
        ids: of its tokens.
        prompts: token ids of questions on it, to calibrate thresholds on.
        held_back: token ids of other questions, to measure with what budgets cost; none where that is not measured.
        own_questions: whether these are the user's.
    """

    source: str
    ids: list[int]
    prompts: list[list[int]]
    held_back: list[list[int]]
    own_questions: bool


@dataclass(frozen=True)
class Made:
    """An index that was made.

    Attributes:
        folder: of the index.
        manifest: of the index.
        cosine: mean of keys to their centroids; None where nothing was clustered.
        quality: what budgets cost, if it was measured.
    """

    folder: Path
    manifest: Manifest
    cosine: float | None = None
    quality: Quality | None = None


class Indexer:
    """Indexes one prefix after another for one model.

    Args:
        model: as vLLM takes it.
        chat: as in ``index``.
        parameters: of the clustering; None for exact indexes.
        engine_args: more arguments for vLLM's engine.
        questions: to calibrate thresholds on, and to measure what budgets cost; None for general ones.
        measured: as in ``index``.
        many: whether more than one prefix is expected: the engine then takes prefixes of any length that fits, and
            stays for the next one. (Not where what budgets cost is measured, which takes an engine of its own.)
        extend: as in ``index``.

    Raises:
        ValueError: an argument that cannot be used.
    """

    def __init__(
        self,
        model: str,
        chat: bool | None,
        parameters: IndexParameters | None,
        engine_args: dict[str, Any],
        questions: list[str] | None,
        measured: bool | None,
        many: bool = False,
        extend: Path | None = None,
    ):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if (model.startswith(("/", ".", "~")) or model.count("/") > 1) and not Path(model).exists():
            raise ValueError(f"--model: {model}: no such folder")
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.tokenizers import get_tokenizer

        check_engine_args(engine_args, {field.name for field in fields(EngineArgs)})
        self._args = EngineArgs(model=model, **engine_args)
        self._model_config = self._args.create_model_config()
        trusted = self._model_config.trust_remote_code
        self._tokenizer = get_tokenizer(self._model_config.tokenizer, trust_remote_code=trusted)
        self._model, self._engine_args, self._chat, self._parameters = model, engine_args, chat, parameters
        self._measured = not current_platform.is_cpu() if measured is None else measured
        self._questions = questions or []
        self._many = many
        self._extend = extend
        self._engine: RecordingEngine | None = None

    @cached_property
    def identity(self) -> ModelIdentity:
        """Of the model, found without an engine."""
        return identity_of(self._args.create_engine_config())

    def prepare(self, document: Document) -> AskedPrefix:
        """Tokenizes a document that was loaded, and what it is asked; prints its tokens.

        Raises:
            ValueError: it cannot be indexed.
        """
        if document.token_ids is not None:
            tokens = given_tokens(self._tokenizer, document.token_ids)
        else:
            tokens = text_tokens(self._tokenizer, document.text, self._chat)
            if self._chat is None:
                form = "a system message (--chat-system)" if tokens.chat else "raw text (--raw)"
                print(f"Indexing as {form}.", file=sys.stderr)
        most = self._model_config.max_model_len
        vocabulary = self._model_config.get_vocab_size()
        try:
            check_length(len(tokens.ids), self._parameters, most)
            if max(tokens.ids) >= vocabulary:
                raise ValueError(f"{max(tokens.ids)} is not in the model's vocabulary")
        except ValueError as error:
            raise ValueError(f"{document.option}: {error}" if document.option else str(error)) from None
        print(f"{len(tokens.ids)} tokens: {describe(tokens.ids, self._tokenizer)}", file=sys.stderr)
        if tokens.unstable:
            print(
                f"The last {tokens.unstable} tokens of the text are left out: this tokenizer may merge them with what "
                "follows, and no request that it merges would have matched.",
                file=sys.stderr,
            )
        if self._parameters is None:
            return AskedPrefix(document.name, tokens.ids, [], [], False)
        if self._extend is not None:
            self._check_extended(tokens.ids)
        given = spread(self._questions)
        calibrating, own = hold_back(given) if self._measured else (given, [])
        calibrating = calibrating or general_questions(tokens.chat)
        held_back = own or general_questions(tokens.chat, GENERAL_HELD_BACK)
        prompts, others = (prompts_on(tokens, asked, most) for asked in (calibrating, held_back))
        if not prompts:
            print("Budgets are calibrated on the end of the prefix, and may be exceeded.", file=sys.stderr)
        return AskedPrefix(document.name, tokens.ids, prompts, others if prompts and self._measured else [], bool(own))

    def _check_extended(self, ids: list[int]) -> None:
        """Raises ValueError unless these tokens continue the index that is extended; prints how many are new."""
        try:
            former = PrefixIndex.open(self._extend)
            check_extends(former, ids, self.identity, self._parameters)
            former.verify()
        except ValueError as error:
            raise ValueError(f"--extend: {self._extend}: {error}") from None
        new = len(ids) - former.manifest.num_tokens
        print(f"{former.manifest.num_members} tokens keep their clusters, {new} are clustered.", file=sys.stderr)

    def is_indexed(self, asked: AskedPrefix, out: Path | str) -> bool:
        """Whether a folder of indexes, or a URL, holds the index that ``write`` would make of a prefix.

        It is of the same tokens, model and parameters; questions are compared by their number, bytes by how many a file
        has.
        """
        name = index_name(asked.source, asked.ids, self.identity)
        found = find_manifest(out, name, needs_quality=bool(asked.held_back))
        return (
            found is not None
            and found.tokens_digest == tokens_digest(asked.ids)
            and found.model.compared() == self.identity.compared()
            and found.parameters == self._parameters
            and (found.calibration is None or found.calibration.num_questions == len(asked.prompts))
        )

    def _keeps_engine(self, asked: AskedPrefix) -> bool:
        return self._many and not asked.held_back

    def start_engine(self, asked: AskedPrefix) -> None:
        """Starts the engine that a prefix needs, unless it runs or none is needed."""
        if self._parameters is None or self._engine is not None:
            return
        if self._keeps_engine(asked):
            max_model_len = AS_LONG_AS_FITS
        elif asked.prompts:
            max_model_len = max(map(len, [*asked.prompts, *asked.held_back])) + ANSWER_TOKENS
        else:
            max_model_len = len(asked.ids) + 1
        self._engine = RecordingEngine(self._model, self._parameters, max_model_len, self._engine_args)

    def write(self, asked: AskedPrefix, store: Path) -> Made:
        """Makes the index of a prefix in a folder of indexes.

        Raises:
            ValueError: the engine has no room for it, or the model no layer that can be squeezed.
        """
        if self._parameters is None:
            return Made(*write_exact(store, asked.source, asked.ids, self.identity))
        made, attention = self._write_clustered(asked, store)
        if not asked.held_back:
            return made
        quality = measure_quality(
            made.folder,
            made.manifest,
            attention,
            self._model,
            asked.held_back,
            asked.own_questions,
            self._engine_args,
        )
        return replace(made, quality=quality)

    def _write_clustered(self, asked: AskedPrefix, store: Path) -> tuple[Made, list[torch.Tensor]]:
        """Has the engine record a prefix, and writes the index.

        Returns:
            the index, and of each layer the histogram of attention [H, NUM_BINS], if questions were held back.
        """
        ids, prompts = asked.ids, asked.prompts
        # The engine must not start before it is known that the index can be written.
        with IndexWriter(store, "parts") as scratch:
            parts = scratch.folder / "parts"
            parts.mkdir()
            self.start_engine(asked)
            identity = identity_of(self._engine.vllm_config)
            self._engine.record(ids, prompts, asked.held_back, parts, self._extend)
            if not self._keeps_engine(asked):
                self._engine.shut_down()
                self._engine = None
            with IndexWriter(store, index_name(asked.source, ids, identity)) as writer:
                manifest, cosine, attention = write(
                    writer, parts, asked.source, ids, identity, self._parameters, len(prompts)
                )
                return Made(writer.publish(manifest), manifest, cosine), attention


def write_exact(out: Path, source: str, ids: Sequence[int], identity: ModelIdentity) -> tuple[Path, Manifest]:
    """Writes the index of a prefix that is not clustered; returns its folder and manifest."""
    manifest = manifest_of(source, ids, identity)
    with IndexWriter(out, index_name(source, ids, identity)) as writer:
        writer.write_tokens(ids)
        return writer.publish(manifest), manifest


def measure_quality(
    folder: Path,
    manifest: Manifest,
    attention: list[torch.Tensor],
    model: str,
    prompts: Sequence[Sequence[int]],
    own_questions: bool,
    engine_args: dict[str, Any],
) -> Quality | None:
    """Serves an index to questions at several budgets, and adds to it what they cost.

    Args:
        folder: of the index.
        manifest: of the index.
        attention: histograms of attention of each layer, [H, NUM_BINS].
        model: as vLLM takes it.
        prompts: token ids of questions on the prefix that were held back.
        own_questions: whether they are the user's.
        engine_args: more arguments for vLLM's engine.

    Returns:
        what was added; None, and a line on standard error, where the index cannot be served to these questions.
    """
    from vllm_squeeze.offline_tools.measure import measure
    from vllm_squeeze.offline_tools.prefix_engine import PrefixEngine

    free_memory()
    ours = {"enforce_eager": True, "max_num_seqs": len(prompts), "gpu_memory_utilization": MEMORY_UTILIZATION}
    try:
        engine = PrefixEngine(model, folder, prompts, ANSWER_TOKENS, ours | engine_args)
        try:
            costs, num_places = measure(engine, prompts, ANSWER_TOKENS)
            cost = engine.cost
        finally:
            engine.shut_down()
    except Exception as error:  # noqa: BLE001 (whatever vLLM raises: the index is there, and good without this)
        print(f"What budgets cost was not measured: {type(error).__name__}: {error}", file=sys.stderr)
        return None

    def recall_at(budget: float) -> tuple[tuple[float, ...], ...]:
        threshold = log_threshold(manifest.thresholds, cost.kept_share(budget))
        return tuple(tuple(round(share, 4) for share in recall(of_layer, threshold).tolist()) for of_layer in attention)

    if not costs:
        print("What budgets cost was not measured: centroids alone read more than half of the prefix.", file=sys.stderr)
        return None
    budgets = tuple(BudgetQuality(**measured._asdict(), recall=recall_at(measured.budget)) for measured in costs)
    digest = manifest_digest(manifest)
    quality = Quality(QUALITY_VERSION, digest, own_questions, len(prompts), num_places, budgets)
    write_quality(folder, quality)
    return quality


def free_memory() -> None:
    """Frees what an engine in this process that was shut down still holds on the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check_engine_args(engine_args: dict[str, Any], known: set[str]) -> None:
    """Raises ValueError for arguments that vLLM does not have, or that the indexer sets itself."""
    ours = {
        "model",
        "attention_backend",
        "kv_transfer_config",
        "async_scheduling",
        "max_model_len",
        "max_num_seqs",
    }
    if unknown := sorted(set(engine_args) - known):
        raise ValueError(f"--engine-args: {unknown[0]!r} is not an argument of vLLM's engine")
    if taken := sorted(set(engine_args) & (ours | {"enforce_eager"})):
        raise ValueError(f"--engine-args: {taken[0]!r} is set by the indexer itself")


def prompts_on(tokens: PrefixTokens, questions: list[str], max_model_len: int) -> list[list[int]]:
    """Token ids of the prompts that ask questions on a prefix, those that a server would squeeze and has room for."""
    prompts = [tokens.prompt(question) for question in questions]
    length, most = len(tokens.ids), max_model_len - ANSWER_TOKENS
    fitting = [p for p in prompts if length < len(p) <= most and p[:length] == tokens.ids]
    if left_out := len(prompts) - len(fitting):
        print(
            f"{left_out} of {len(prompts)} questions are left out: they do not begin with the prefix, or leave no room "
            f"for {ANSWER_TOKENS} tokens of an answer.",
            file=sys.stderr,
        )
    return fitting


def check_length(num_tokens: int, parameters: IndexParameters | None, max_model_len: int) -> None:
    """Raises ValueError if a prefix is empty, too short to cluster, or too long for the model."""
    least, reason = 1, ""
    if parameters is not None:
        least = parameters.num_sinks + parameters.observation_window + 1
        reason = (
            f", since the first {parameters.num_sinks} and the last {parameters.observation_window} are always "
            "attended to"
        )
    if num_tokens < least:
        raise ValueError(f"{num_tokens} tokens; an index needs at least {least}{reason}")
    if num_tokens >= max_model_len:
        raise ValueError(f"{num_tokens} tokens; the model takes at most {max_model_len}, with the question")


def identity_of(vllm_config: Any) -> ModelIdentity:
    """The identity of the model of a configured engine."""
    from vllm_squeeze.attention_backend.model_identity import model_identity

    return model_identity(vllm_config)


def write(
    writer: IndexWriter,
    parts: Path,
    source: str,
    ids: Sequence[int],
    identity: ModelIdentity,
    parameters: IndexParameters,
    num_questions: int,
) -> tuple[Manifest, float, list[torch.Tensor]]:
    """Joins the recorded parts of all ranks and writes the files of the index but the manifest.

    Returns:
        the manifest, the mean cosine of keys to their centroids, and of each layer the histogram of attention [H,
        NUM_BINS], if questions were held back.

    Raises:
        ValueError: nothing was recorded.
    """
    from vllm_squeeze.attention_backend.recorder import read_part, read_parts

    entries, cosines, attention, num_members, num_queries = [], [], [], 0, 0
    scores: Any = 0
    for number, (layer, paths) in enumerate(read_parts(parts).items()):
        recorded = [read_part(path) for path in paths]
        cosines += [part.mean_cosine for part in recorded]
        of_layer = sum(part.tensors.pop("scores") for part in recorded)
        bins = level(of_layer) if parameters.rule != "paper" else 0
        scores = scores + moved(of_layer, bins)
        if "attention" in recorded[0].tensors:
            attention.append(moved(torch.cat([part.tensors.pop("attention") for part in recorded]), bins))
        clusters = join([LayerClusters(**part.tensors) for part in recorded])
        clusters = replace(clusters, log_weights=clusters.log_weights + bins * BIN_WIDTH)
        num_members, num_queries = clusters.members.shape[1], recorded[0].num_queries
        entries.append(writer.write_layer(number, layer, clusters))
    if not entries:
        raise ValueError("--model: it has no layer of full attention that can be squeezed")
    writer.write_tokens(ids)
    calibration = Calibration("questions" if num_questions else "observation window", num_questions, num_queries)
    manifest = manifest_of(
        source, ids, identity, parameters, num_members, threshold_curve(scores), calibration, tuple(entries)
    )
    return manifest, sum(cosines) / len(cosines), attention


def manifest_of(
    source: str,
    ids: Sequence[int],
    identity: ModelIdentity,
    parameters: IndexParameters | None = None,
    num_members: int = 0,
    thresholds: tuple[tuple[float, float], ...] = (),
    calibration: Calibration | None = None,
    layers: tuple[LayerEntry, ...] = (),
) -> Manifest:
    """The manifest of an index made now; of an exact one where there are no clusters."""
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source,
        num_tokens=len(ids),
        tokens_digest=tokens_digest(ids),
        num_members=num_members,
        model=identity,
        parameters=parameters,
        thresholds=thresholds,
        calibration=calibration,
        layers=layers,
    )


def join(parts: list[LayerClusters]) -> LayerClusters:
    """Clusters of all heads of a layer from those of each rank, which may have made different numbers of them."""
    widest = max(part.sizes.shape[1] for part in parts)

    def whole(name: str) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        if name not in PER_HEAD:
            tensors = [pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, widest - tensor.shape[1])) for tensor in tensors]
        return torch.cat(tensors)

    return LayerClusters(**{field.name: whole(field.name) for field in fields(LayerClusters)})


def summarise(place: Path | str, made: Made, seconds: float) -> None:
    """Prints what was made.

    Args:
        place: where the index is.
        made: the index.
        seconds: that it took.
    """
    manifest, cosine, quality = made.manifest, made.cosine, made.quality
    size = sum(file.stat().st_size for file in made.folder.iterdir())
    if cosine is None:
        facts = {"size": f"{size / 2**10:.1f} KiB"}
    else:
        facts = clustered_facts(manifest, size, cosine)
    print(place)
    for label, value in {"tokens": manifest.num_tokens, **facts, "time": f"{seconds:.1f} s"}.items():
        print(f"  {label:<15}  {value}")
    for label, value in costs_of_budgets(quality) if quality else ():
        print(f"  {label:<15}  {value}")


def clustered_facts(manifest: Manifest, size: int, cosine: float) -> dict[str, str]:
    """What a summary says of clusters.

    Args:
        manifest: of the index.
        size: of the index, in bytes.
        cosine: mean of keys to their centroids.
    """
    model = manifest.model
    cost = ReadCost(
        num_tokens=manifest.num_tokens,
        num_always=manifest.num_tokens - manifest.num_members,
        num_clustered=manifest.num_members,
        num_centroids=max(layer.num_centroids for layer in manifest.layers),
        head_size=model.head_size,
        element_size=model.cache_element_size,
        rest=True,
        by_key=manifest.parameters.rule == "keys",
    )
    kv = len(manifest.layers) * model.num_kv_heads * cost.dense_bytes
    return {
        "layers": f"{len(manifest.layers)} of {model.num_layers}",
        "clusters": f"{cost.num_centroids} per KV head, mean cosine of keys to their centroid {cosine:.3f}",
        "size": f"{size / 2**20:.1f} MiB, {size / kv:.1%} of the KV cache that it indexes",
        "calibrated on": calibrated_on(manifest.calibration),
        "smallest budget": f"{cost.budget_used(0):.3f} (centroids and always attended tokens)",
    }
