"""Files that appear complete or not at all, so that no reader, and no crash, meets half of one."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from hyperjax.errors import OutputError

_temporaries: set[Path] = set()
"""Temporary files of this process that may exist now."""

_ANOTHER_FOLDER = "choose another output folder with -o or paths.output.dir_root"


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside a target, and rename it to the target at the end.

    The temporary name keeps the target's endings, by which writers choose their format, and is
    unique: several processes may write into one folder. If the block raises, the temporary file
    is removed and the target stays what it was.

    Parameters
    ----------
    target : Path
        The file to write; its folder is made where it is missing.

    Yields
    ------
    Path
        The path to write to.

    Raises
    ------
    OutputError
        If the folder cannot be made or the file not be written.
    """
    endings = "".join(target.suffixes[-2:]) if target.suffix == ".gz" else target.suffix
    temporary = target.with_name(f".hyperjax-{uuid4().hex}{endings}")
    _temporaries.add(temporary)
    try:
        with _output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, target)
    finally:
        _remove(temporary)
        _temporaries.discard(temporary)


def remove_temporaries() -> None:
    """Remove the temporary files of a process that is about to end without further ado."""
    for temporary in list(_temporaries):
        _remove(temporary)


def _remove(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_together(writers: Mapping[Path, Callable[[Path], object]]) -> list[Path]:
    """Write files of which all, or none, get their names; the first is renamed last.

    Parameters
    ----------
    writers : mapping of Path to callable
        Each target, and what writes it to the path that it is given.

    Returns
    -------
    list of Path
        The targets.

    Raises
    ------
    OutputError
        If a folder or file cannot be written.
    """
    with ExitStack() as stack:
        for target, write in writers.items():
            temporary = stack.enter_context(atomic_path(target))
            with _output_errors(target):
                write(temporary)
    return list(writers)


@contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    """Turn what the system refuses into an `OutputError` that names the target."""
    try:
        yield
    except OSError as error:
        raise OutputError(_refusal(target, error)) from error


def _refusal(target: Path, error: OSError) -> str:
    """Return one line: what could not be written, why, and what to do."""
    reason = " ".join((error.strerror or str(error)).split())
    existing = filter(os.path.lexists, target.parents)
    in_the_way = next((folder for folder in existing if not os.path.isdir(folder)), None)
    if in_the_way:
        return (
            f"{in_the_way}: a file is in the place of an output folder; remove it, or "
            f"{_ANOTHER_FOLDER}"
        )
    if os.path.isdir(target):
        return (
            f"{target}: a folder is in the place of an output file; remove it, or {_ANOTHER_FOLDER}"
        )
    return f"{target}: cannot be written ({reason}); make room for it or {_ANOTHER_FOLDER}"
