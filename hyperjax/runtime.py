"""How a process uses its machine."""

import ctypes
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 2**30, 2**25  # bytes; the second is what the manual allows


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def configure_runtime(cpu_devices: int | None = None, cache: Path | None = None) -> None:
    """Set jax up for a process of its own; best before the first computation.

    One process uses all cores: each is a device of jax's, and the fits are divided over the
    devices. XLA's thread pool (the environment variable NPROC) is made larger than the number of
    devices: where a device's own thread waits for others of a full pool, it waits for ever. Where
    jax is running already, its devices stay as they are. Memory that is freed stays with the
    process.

    Parameters
    ----------
    cpu_devices
        Devices that the processor is divided into, one per core unless given.
    cache
        Folder of the persistent compilation cache; `hyperjax` in the user's cache folder unless
        given. The environment variable JAX_COMPILATION_CACHE_DIR, if set, has the last word.
    """
    import jax
    from platformdirs import user_cache_dir

    _keep_memory()
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        cache or Path(user_cache_dir("hyperjax")) / "jax"
    )
    devices = cpu_devices or usable_cores()
    os.environ.setdefault("NPROC", str(2 * devices if devices > 1 else 1))
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # jax's only way to tell that it is running
        logger.debug("jax is running already: its %d devices are used", jax.local_device_count())
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
