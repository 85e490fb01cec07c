"""Settings that hold for all tests."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads that wait for small matrices

import jax

from hyperjax.runtime import configure_runtime

os.environ.setdefault("MPLBACKEND", "Agg")
configure_runtime()
jax.config.update("jax_enable_x64", True)  # for tests that call the numerics directly
