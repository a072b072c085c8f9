"""What a server says about squeezing, whatever vLLM does with its log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def warnings_of_squeeze() -> Iterator[list[str]]:
    """Collects our warnings and errors while they are logged."""
    handler, logger = Messages(), logging.getLogger("vllm.squeeze")
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)
