"""The engine alone: what it needs to be imported, and how often it compiles."""

import os
import subprocess
import sys
from pathlib import Path

FIT = """
import sys
blocked = {"astropy", "photutils", "scipy.optimize", "regions", "matplotlib", "pydantic", "typer"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import jax
import numpy as np
import hyperjax.solver, hyperjax.models
from hyperjax.fitting import GroupBatch, fit_groups
from hyperjax.runtime import configure_runtime
from pathlib import Path

compiled = []
def count(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(event)
hits = []
jax.monitoring.register_event_duration_secs_listener(count)
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
)
configure_runtime(threads=1, cache=Path(sys.argv[1]))

def fit(groups, seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:12, :12]
    source = np.array([20.0, 5.5, 5.2, 1.8, 1.4, 0.3])
    data = 20 * np.exp(-0.5 * ((x - 5.5) ** 2 + (y - 5.2) ** 2) / 1.6**2)
    every = np.ones((groups, 1, 6))
    spread = np.array([20, 2, 2, 1.2, 1.2, 0])
    return fit_groups(GroupBatch(
        data=data + rng.normal(size=(groups, 12, 12)), weight=np.ones((groups, 12, 12)),
        start=source * every, lower=(source - spread) * every, upper=(source + spread) * every,
        free=every > 0, present=np.ones((groups, 1), bool),
        order=np.arange(groups) % 3 - 1,
    ))

for seed, groups in enumerate((3, 17, 5, 60, 1)):
    assert (fit(groups, seed).status == 1).all()
print(len(compiled), len(hits))
"""


def run(cache: Path) -> tuple[int, int]:
    """Fit five "maps" in a process of its own: programs asked for, and those found in the cache."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", FIT, str(cache)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled, hits = done.stdout.split()
    return int(compiled), int(hits)


def test_fits_without_astronomy_and_compiles_once_per_bucket(tmp_path: Path) -> None:
    """Five maps of other sources in one bucket: one program; a second process compiles nothing."""
    compiled, hits = run(tmp_path)
    assert compiled - hits == 1
    compiled, hits = run(tmp_path)
    assert compiled == hits
