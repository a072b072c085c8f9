"""What was squeezed, what was not and why, on vLLM's own paths to the log and to /metrics."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

ROWS, BYTES_READ, BYTES_ALONE, BYTES_DENSE = "rows", "bytes_read", "bytes_alone", "bytes_dense"
ON_DEVICES, LOADING, WAITING = "on the devices", "loading", "waiting"
STATES = (ON_DEVICES, LOADING, WAITING)
"""What an index that is served may be."""
MISSES = "misses"
INDEXES, PINNED, LOADS, LOAD_SECONDS = "indexes", "pinned", "loads", "load_seconds"


class SqueezeStats(KVConnectorStats):
    """Counts since the last report: rows by what became of them, and bytes of prefixes.

    A row is one request in one step. Bytes are those of the prefixes of squeezed and exact rows: really read, each once
    for the rows that share it; read if each row were alone, which is what the budget bounds; and read by a dense pass
    for each row.
    """

    def add_rows(self, rows: dict[str, int]) -> None:
        counts = self.data.setdefault(ROWS, {})
        for reason, count in rows.items():
            counts[reason] = counts.get(reason, 0) + count

    def add_misses(self, misses: dict[tuple[str, str], int]) -> None:
        """Requests that missed an index, by its name and cause."""
        counts = self.data.setdefault(MISSES, {})
        for (index, cause), count in misses.items():
            by_cause = counts.setdefault(index, {})
            by_cause[cause] = by_cause.get(cause, 0) + count

    def add_bytes(self, read: float, alone: float, dense: float) -> None:
        for name, count in ((BYTES_READ, read), (BYTES_ALONE, alone), (BYTES_DENSE, dense)):
            self.data[name] = self.data.get(name, 0) + count

    def set_indexes(self, states: dict[str, str], pinned: dict[str, int]) -> None:
        """The state of each index now, and the blocks held for those that are pinned."""
        self.data[INDEXES], self.data[PINNED] = states, pinned

    def add_loads(self, count: int, seconds: float) -> None:
        """Indexes that came to the devices while serving, and what loading them took."""
        self.data[LOADS] = self.data.get(LOADS, 0) + count
        self.data[LOAD_SECONDS] = self.data.get(LOAD_SECONDS, 0.0) + seconds

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "SqueezeStats":
        self.add_rows(other.data.get(ROWS, {}))
        if MISSES in other.data:
            by_index = other.data[MISSES].items()
            self.add_misses({(index, cause): n for index, causes in by_index for cause, n in causes.items()})
        if other.data.get(BYTES_DENSE):
            self.add_bytes(*(other.data[name] for name in (BYTES_READ, BYTES_ALONE, BYTES_DENSE)))
        if INDEXES in other.data:
            self.set_indexes(other.data[INDEXES], other.data[PINNED])
            self.add_loads(other.data[LOADS], other.data[LOAD_SECONDS])
        return self

    def reduce(self) -> dict[str, int | float]:
        summary: dict[str, int | float] = {f"rows {reason}": n for reason, n in self.data.get(ROWS, {}).items()}
        if self.data.get(BYTES_DENSE):
            summary["budget used"] = round(self.data[BYTES_ALONE] / self.data[BYTES_DENSE], 4)
            summary["bytes read"] = round(self.data[BYTES_READ] / self.data[BYTES_DENSE], 4)
        if MISSES in self.data:
            summary["requests that missed an index"] = sum(sum(n.values()) for n in self.data[MISSES].values())
        if INDEXES in self.data:
            summary["indexes on the devices"] = list(self.data[INDEXES].values()).count(ON_DEVICES)
        return summary

    def is_empty(self) -> bool:
        return not self.data


class SqueezePromMetrics(KVConnectorPromMetrics):
    """The same as counters on /metrics: vllm:squeeze_rows_total{outcome}, vllm:squeeze_prefix_bytes_*_total."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labels = per_engine_labelvalues
        self._rows = self._counter_cls(
            name="vllm:squeeze_rows",
            documentation="Rows (requests in a step) by what became of them: squeezed, exact, or dense and why.",
            labelnames=[*labelnames, "outcome"],
        )
        self._misses = self._counter_cls(
            name="vllm:squeeze_misses",
            documentation="Requests that begin as a prefix does, but not with the whole of it: too short, or differs.",
            labelnames=[*labelnames, "index", "cause"],
        )
        self._read = self._counter_cls(
            name="vllm:squeeze_prefix_bytes_read",
            documentation="Bytes read of the indexed prefixes of squeezed and exact rows, centroids included.",
            labelnames=labelnames,
        )
        self._alone = self._counter_cls(
            name="vllm:squeeze_prefix_bytes_alone",
            documentation="Bytes that these rows would have read of their prefixes if each had been alone.",
            labelnames=labelnames,
        )
        self._dense = self._counter_cls(
            name="vllm:squeeze_prefix_bytes_dense",
            documentation="Bytes that dense attention would have read of the same prefixes.",
            labelnames=labelnames,
        )
        self._index = self._gauge_cls(
            name="vllm:squeeze_index",
            documentation="1 for the state that an index is in: on the devices, loading, or waiting to be loaded.",
            labelnames=[*labelnames, "index", "state"],
            multiprocess_mode="mostrecent",
        )
        self._pinned = self._gauge_cls(
            name="vllm:squeeze_pinned_blocks",
            documentation="Blocks of the KV cache that are held for a pinned prefix.",
            labelnames=[*labelnames, "index"],
            multiprocess_mode="mostrecent",
        )
        self._loads = self._counter_cls(
            name="vllm:squeeze_index_loads",
            documentation="Indexes that came to the devices while serving.",
            labelnames=labelnames,
        )
        self._load_seconds = self._counter_cls(
            name="vllm:squeeze_index_load_seconds",
            documentation="Seconds that loading them took, beside serving.",
            labelnames=labelnames,
        )
        self._shown: dict[int, set[str]] = {}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self._labels[engine_idx]
        for outcome, count in transfer_stats_data.get(ROWS, {}).items():
            self._rows.labels(*labels, outcome).inc(count)
        for index, causes in transfer_stats_data.get(MISSES, {}).items():
            for cause, count in causes.items():
                self._misses.labels(*labels, index, cause).inc(count)
        if transfer_stats_data.get(BYTES_DENSE):
            self._read.labels(*labels).inc(transfer_stats_data[BYTES_READ])
            self._alone.labels(*labels).inc(transfer_stats_data[BYTES_ALONE])
            self._dense.labels(*labels).inc(transfer_stats_data[BYTES_DENSE])
        if INDEXES in transfer_stats_data:
            states, pinned = transfer_stats_data[INDEXES], transfer_stats_data[PINNED]
            shown = self._shown.setdefault(engine_idx, set())
            shown.update(states)
            for index in shown:
                # one that is gone is in no state
                for state in STATES:
                    self._index.labels(*labels, index, state).set(states.get(index) == state)
                self._pinned.labels(*labels, index).set(pinned.get(index, 0))
            self._loads.labels(*labels).inc(transfer_stats_data[LOADS])
            self._load_seconds.labels(*labels).inc(transfer_stats_data[LOAD_SECONDS])
