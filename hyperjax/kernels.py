"""Traced fits, kept between processes.

jax's persistent cache saves a later process the compilation of a fit, but not the tracing that
comes before it, which takes longer than fitting a map. Here the traced program (StableHLO, by
`jax.export`) is kept too, in the same folder. Without a cache folder nothing is kept.
"""

import functools
import hashlib
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Int

from hyperjax.definite import inverse_over_free
from hyperjax.errors import OutputError
from hyperjax.files import atomic_path
from hyperjax.models import CompilerOptions, GaussianGroup, Model, Normal, Problem, Scale
from hyperjax.parts import Packed, apart, in_turns, packed
from hyperjax.solver import NO_DATA, Solution, Tolerances, solve_lanes

logger = logging.getLogger(__name__)

_OPTIONS: CompilerOptions = {
    "xla_cpu_multi_thread_eigen": False,
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
"""Options of XLA for all models, on processors.

The products of small matrices are not divided over threads, which costs more than they do: the
stacks of problems are. Vectors are as wide as the processor has them: XLA prefers half of that.
The library for products of matrices does these alone: what it does beside them (sums, and what
goes into them) is slower than XLA's own code.
"""

_TRACED = ("parts", "models", "spectral", "definite", "solver", "kernels")
_making = threading.Lock()
_DIGEST = hashlib.sha256().digest_size
_SOLVED = jax.tree.structure((Solution(0, Normal(0, 0, 0, 0, 0), 0, 0), Scale(0, 0, 0, 0)))


class _Kind(NamedTuple):
    """What tells one program from another: the model, types and shapes of the data, the device."""

    model: Model
    lanes: int
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    structure: Any
    device: jax.Device


def solve_on(
    device: jax.Device,
    model: Model,
    lanes: int,
    problems: Problem,
    tolerances: Tolerances,
    count: Int[Array, ""],
) -> tuple[Solution, Scale]:
    """Solve a stack of problems on one device, several of them in as many threads.

    Arrays that are aligned to 64 bytes are used where they are. XLA copies the others in a thread
    of its own, where the solution is then waited for.

    They are brought to the model's own units (`Model.scaled`), in which the solutions are. The
    first `count` are solved (`solver.solve_lanes`). In the place of the matrix of the normal
    equations is its inverse over the free parameters.
    """
    leaves, structure = jax.tree.flatten((problems, tolerances, count))
    specs = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    double = problems.data.dtype == np.float64
    with jax.enable_x64(double), jax.default_matmul_precision("highest"):
        with _making:  # threads ask for a program at the same time
            solve = _program(_Kind(model, lanes, specs, structure, device))
        return jax.tree.unflatten(_SOLVED, solve(*leaves))


@functools.cache
def _program(kind: _Kind) -> Callable[..., list[Array]]:
    """The compiled program: loaded if it was kept, else traced, and kept if there is a folder."""
    options = _OPTIONS | kind.model.compiler_options
    solve = jax.jit(functools.partial(_solve, kind))
    folder = jax.config.jax_compilation_cache_dir
    may_change = not isinstance(kind.model, GaussianGroup)  # a user's profile
    if not may_change and folder and "://" not in folder:
        path = Path(folder) / f"hyperjax-{_fingerprint(kind)}.stablehlo"
        exported = _kept(path)
        if exported is None:
            exported = export.export(solve)(*kind.arguments)
            _keep(exported, path)
        solve = jax.jit(exported.call)
    there = SingleDeviceSharding(kind.device)
    placed = [
        jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=there)
        for argument in kind.arguments
    ]
    return _compiled(solve.lower(*placed), options if jax.default_backend() == "cpu" else {})


def _compiled(lowered: jax.stages.Lowered, options: CompilerOptions) -> jax.stages.Compiled:
    """Compile a program, without those options, or kinds of them, that this compiler lacks."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        told = re.search(
            r"No such compile option: '(\w+)'|option (\w+), '\w*' is not a valid enum value",
            str(error),
        )
        unknown = [name for name in options if told and name in told.groups()]
        if not unknown:
            raise
        logger.debug("compiled without %s", ", ".join(unknown))
        known = {name: value for name, value in options.items() if name not in unknown}
        return _compiled(lowered, known)


def _solve(kind: _Kind, *leaves: Array) -> list[Array]:
    problems, tolerances, count = jax.tree.unflatten(kind.structure, leaves)
    model, lanes = kind.model, kind.lanes

    def ready(problem: Problem) -> tuple[Packed[Problem], Packed[Scale]]:
        scale = model.scale(problem)
        scaled = model.prepare(model.scaled(problem, scale))
        return packed(scaled._replace(data=(), weight=())), packed(scale)

    def problem_of(row: tuple[Array, Array, Array, Array]) -> Problem:
        data, weight, *packs = row
        rest, scale = rests.unpack(packs[0]), scales.unpack(packs[1])
        pixels = model.scaled(rest._replace(data=data, weight=weight), scale)
        return rest._replace(data=pixels.data, weight=pixels.weight)

    def solved(rows: Any, tolerances: Tolerances, count: Int[Array, ""]) -> Packed[Solution]:
        return solve_lanes(model, Packed(rows, problem_of), tolerances, lanes, count)

    def finished(row: tuple[Array, Array, Array]) -> Array:
        free, solution, scale = row[0], solutions.unpack(row[1]), scales.unpack(row[2])
        usable = scale.pixels > 0
        inverse = inverse_over_free(solution.normal.matrix, free)
        solution = solution._replace(
            normal=solution.normal._replace(matrix=inverse),
            steps=jnp.where(usable, solution.steps, 0),
            status=jnp.where(usable, solution.status, NO_DATA),
        )
        return packed(solution).arrays

    rests, scales = in_turns(ready, problems, lanes, count)
    rows = (problems.data, problems.weight, rests.arrays, scales.arrays)
    solutions = apart(solved)(rows, tolerances, count)
    results = in_turns(finished, (problems.free, solutions.arrays, scales.arrays), lanes, count)
    solution = apart(jax.vmap(solutions.unpack))(results)
    scale = apart(jax.vmap(scales.unpack))(scales.arrays)
    return jax.tree.leaves((solution, scale))


def _kept(path: Path) -> export.Exported | None:
    """A traced program that was kept; None where there is none to be read, or a damaged one."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, program = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(program).digest() != digest:
        logger.debug("%s: damaged, made again", path)
        return None
    return export.deserialize(bytearray(program))


def _keep(exported: export.Exported, path: Path) -> None:
    """Write a traced program; a folder that cannot be written to only costs time."""
    program = bytes(exported.serialize())
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(hashlib.sha256(program).digest() + program)
    except OutputError as error:
        logger.debug("traced fit not kept: %s", error)


def _fingerprint(kind: _Kind) -> str:
    """A name for a traced program, which changes with the code, jax and the processor's kind."""
    told = repr((kind[:-1], jax.__version__, jax.default_backend()))
    return hashlib.sha256(told.encode() + _source()).hexdigest()[:32]


@functools.cache
def _source() -> bytes:
    """The code that is traced."""
    here = Path(__file__).parent
    return b"".join((here / f"{name}.py").read_bytes() for name in _TRACED)
