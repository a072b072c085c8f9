"""Loads indexes onto a rank's device beside what it serves, one after the other, in a thread of its own."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from vllm_squeeze.attention_backend.compat import logger
from vllm_squeeze.attention_backend.orders import Drop, Load, LoadReport, Order
from vllm_squeeze.attention_backend.residency import Residency
from vllm_squeeze.prefix_index.index_folder import PrefixIndex
from vllm_squeeze.prefix_index.manifest import InvalidIndex


class Loader:
    """Carries out a worker's orders. Nothing here waits for a disk or the device but its thread.

    Args:
        residency: of the rank.
    """

    def __init__(self, residency: Residency):
        self._residency = residency
        self._on_gpu = residency.device.type == "cuda"
        self._stream = torch.cuda.Stream(residency.device) if self._on_gpu else None
        self._thread = ThreadPoolExecutor(1, "squeeze-loader")
        self._running: dict[int, tuple[Load, Future[float]]] = {}
        self._ended = threading.Event()

    def follow(self, order: Order) -> None:
        """Begins to carry out an order."""
        if isinstance(order, Drop):
            self._residency.drop(order.slot)
            # what is being loaded goes on, into room that only a later load can be given, in the same thread
            self._running.pop(order.slot, None)
            return
        launched = torch.cuda.Event() if self._on_gpu else None
        if launched is not None:
            launched.record()
        self._running[order.span.slot] = order, self._thread.submit(self._load, order, launched)

    def take_report(self) -> LoadReport | None:
        """Lets rows attend to what has been loaded; returns which orders have ended since the last call, if any."""
        report = LoadReport()
        for slot, (order, future) in list(self._running.items()):
            if not future.done():
                continue
            del self._running[slot]
            try:
                report.seconds[order.number] = future.result()
            except Exception as error:  # noqa: BLE001 (whatever it is, the prefix is served densely)
                if not isinstance(error, InvalidIndex):
                    logger.error("squeeze: loading %s failed", order.folder, exc_info=error)
                report.failed[order.number] = f"{order.placement.name}: {error}"
            else:
                self._residency.activate(order.placement, order.span)
                report.loaded[order.number] = 1
        return report if report.loaded or report.failed else None

    def end(self) -> None:
        """Stops loading: the process, which waits for its threads, is about to end."""
        self._ended.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, order: Load, launched: torch.cuda.Event | None) -> float:
        """Loads an index; returns the seconds that it took.

        Args:
            order: what, and where to.
            launched: when the device has done what may still read what lies there.
        """
        start = time.monotonic()
        index = PrefixIndex.open(Path(order.folder))
        if index.manifest.digest != order.digest:
            raise InvalidIndex("it was replaced while it was being loaded")
        with torch.inference_mode(), torch.cuda.stream(self._stream) if self._on_gpu else nullcontext():
            if launched is not None:
                self._stream.wait_event(launched)
            self._residency.load(index, order.placement, order.span, self._ended.is_set)
        if self._stream is not None:
            self._stream.synchronize()
        return time.monotonic() - start
