"""Settings that hold for all tests."""

import os

import jax

from hyperjax.runtime import configure_runtime

os.environ.setdefault("MPLBACKEND", "Agg")
configure_runtime()
jax.config.update("jax_enable_x64", True)  # for tests that call the numerics directly
