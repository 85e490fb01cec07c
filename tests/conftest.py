"""Settings that hold for all tests."""

import os

from hyperjax.runtime import configure_runtime

os.environ.setdefault("MPLBACKEND", "Agg")
configure_runtime()
