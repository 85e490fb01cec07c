"""Where log records go: the terminal, one plain file per map, or another process.

The library only makes records; these handlers are set by the command line and by the survey, whose
logs begin when there is something to log of.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from logging.handlers import MemoryHandler, QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from hyperjax.errors import OutputError
from hyperjax.lockstep import own_time

logger = logging.getLogger(__name__)

LIBRARY = ("hyperjax", "py.warnings")
"""Loggers of the library, and of Python's warnings where they are captured."""

_ALL, _NEVER = 1 << 30, 1 << 30  # records, and a level above any: keep until told otherwise
_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class _Levels(NamedTuple):
    """Levels of a logger: its own and what that came to before any handler, and the handlers'."""

    own: int
    effective: int
    wanted: list[int]

    @property
    def lowest(self) -> int:
        """The level that lets all handlers have their records."""
        return min([self.effective, *self.wanted])


_levels: dict[logging.Logger, _Levels] = {}  # of those with handlers of ours


class _ListHandler(QueueHandler):
    """Keeps records in a list, in the form that can be sent to another process."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(SimpleQueue())
        self._records = records

    def enqueue(self, record: logging.LogRecord) -> None:
        self._records.append(record)


def counted(number: int, noun: str) -> str:
    """Write a number of things: "1 map", "2 maps"."""
    return f"{number} {noun}{'s' * (number != 1)}"


@contextmanager
def attached(
    handler: logging.Handler, level: int, names: Iterable[str] = LIBRARY
) -> Iterator[None]:
    """Send the records of the named loggers to a handler, which is closed at the end.

    Handlers may come and go in any order.
    """
    handler.setLevel(level)
    loggers = list(map(logging.getLogger, names))
    for logger in loggers:
        if logger not in _levels:
            _levels[logger] = _Levels(logger.level, logger.getEffectiveLevel(), [])
        _levels[logger].wanted.append(level)
        logger.addHandler(handler)
        logger.setLevel(_levels[logger].lowest)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            _levels[logger].wanted.remove(level)
            logger.setLevel(_levels[logger].lowest)
            if not _levels[logger].wanted:
                logger.setLevel(_levels.pop(logger).own)
        handler.close()


@contextmanager
def log_file(
    path: Path,
    level: int = logging.INFO,
    names: Iterable[str] = LIBRARY,
    *,
    thread: int | None = None,
) -> Iterator[Callable[[], Path]]:
    """Write records to a new plain file, from when it is wanted; what was logged before is kept.

    Those of one thread only, if that is given.

    Yields
    ------
    callable
        Opens the file, and returns its path. From then on each line is flushed as it is made. If it
        is never called nothing is written, and no folder is made.

    Raises
    ------
    OutputError
        The file cannot be written; from the callable.
    """
    kept = MemoryHandler(_ALL, flushLevel=_NEVER)
    if thread is not None:
        kept.addFilter(lambda record: record.thread == thread)

    @cache
    def begin() -> Path:
        file = _new_file(path)
        kept.setTarget(file)
        kept.flush()
        kept.capacity = 1
        return path

    with attached(kept, level, names):
        try:
            yield begin
        finally:
            target = kept.target
            kept.close()
            if target is not None:
                target.close()


def _new_file(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{path}: the log cannot be written ({error.strerror}); choose another output folder "
            "with -o or paths.output.dir_root"
        ) from error
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    return handler


@contextmanager
def collected(level: int) -> Iterator[list[logging.LogRecord]]:
    """Collect the library's records in a list, for `replay` in another process."""
    records: list[logging.LogRecord] = []
    with attached(_ListHandler(records), level):
        yield records


@contextmanager
def without_warnings() -> Iterator[None]:
    """Let no warning of the library pass: of work on versions of a map that nobody else has."""

    def is_none(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    known = (name for name in list(logging.root.manager.loggerDict) if name.startswith("hyperjax."))
    loggers = list(map(logging.getLogger, known))
    for logger in loggers:
        logger.addFilter(is_none)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_none)


def replay(records: Iterable[logging.LogRecord]) -> None:
    """Handle here the records that another process made."""
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


@contextmanager
def timed(seconds: dict[str, float], step: str, map_name: str) -> Iterator[None]:
    """Note the wall-clock time of a step of the work on a map, without that of maps in step."""
    logger.debug("%s: %s", map_name, step)
    start = own_time()
    try:
        yield
    finally:
        seconds[step] = own_time() - start
