"""How a process uses its machine."""

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

_threads: int | None = None  # that compute, where that was configured

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 2**30, 2**25  # bytes; the second is what the manual allows


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_threads() -> int:
    """Threads that compute at the same time, where that is done on processors: one per core."""
    return _threads or usable_cores()


def at_once(call: Callable[[S], T], items: Sequence[S], threads: int | None = None) -> list[T]:
    """Return what a function that releases Python's lock makes of each item, some at a time.

    That is in `cpu_threads` unless their number is given.
    """
    threads = min(threads or cpu_threads(), len(items))
    if threads < 2:
        return list(map(call, items))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, items))


def fit_threads(devices: int) -> int:
    """Threads that fit at the same time: `cpu_threads`, or two for each other kind of device.

    Of those two one makes ready what the device is to do next.
    """
    import jax

    return cpu_threads() if jax.default_backend() == "cpu" else 2 * devices


def configure_runtime(threads: int | None = None, cache: Path | None = None) -> None:
    """Set jax up for a process of its own; best before the first computation.

    One process uses all cores: fits and transforms are divided over threads. What they call works
    in the thread that calls it: XLA's own pool gets a single thread (the environment variable
    NPROC, unless it is set; `hyperjax.parts`), and BLAS and LAPACK, whose threads wait busily
    between small matrices, none. Memory that is freed stays with the process.

    Parameters
    ----------
    threads
        Threads that compute on processors; as before unless given, at first one per core.
    cache
        Folder of the persistent compilation cache; `hyperjax` in the user's cache folder unless
        given. The environment variable JAX_COMPILATION_CACHE_DIR, if set, has the last word.
    """
    import jax
    import scipy.linalg  # noqa: F401  whose library jax's own linear algebra is
    from platformdirs import user_cache_dir
    from threadpoolctl import threadpool_limits

    global _threads
    _threads = threads or _threads
    _keep_memory()
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        cache or Path(user_cache_dir("hyperjax")) / "jax"
    )
    os.environ.setdefault("NPROC", "1")
    threadpool_limits(1, user_api="blas")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _keep_memory() -> None:
    """Make freed memory stay with the process, where the C library can be told to (glibc).

    Arrays of megabytes otherwise go back to the system and come again, page by page, with every
    call: a fifth of the time of small fits.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST):
        mallopt(_TRIM_THRESHOLD, _LARGEST[0])
