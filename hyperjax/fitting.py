"""Joint fits of many groups of sources at once.

`fit_groups` takes a `GroupBatch` (cutouts of the same size, each with the same number of source
slots) in pixel units and returns a `FitResult` in the same units. Inside, every problem is brought
to scaled coordinates and to data of unit scale (so that a fit of Jy or of MJy/sr takes the
same steps), solved in persistent lanes on every device, and brought back with its covariance.
"""

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from hyperjax.errors import FitInputError
from hyperjax.models import LOSSES, SHAPE, GaussianGroup, Grid, Problem, monomials
from hyperjax.solver import (
    CONVERGED,
    NO_DATA,
    SINGULAR,
    STEP_LIMIT,
    Solution,
    Tolerances,
    solve_lanes,
    to_local,
)

__all__ = [
    "CONVERGED",
    "NO_DATA",
    "SINGULAR",
    "STEP_LIMIT",
    "FitOptions",
    "FitResult",
    "GroupBatch",
    "configure_runtime",
    "fit_groups",
]

PEAK, X, Y, MAJOR, MINOR, THETA = range(SHAPE)
"""Places of a source's parameters: peak, x, y, sigma_major, sigma_minor, theta."""

_ORDERS = (2, 4)  # that code is compiled for; lower ones hold coefficients at 0
_BLOCKS = (64, 512, 4096)  # problems per call: few sizes, so few compilations
_LANE_BYTES = 2_500_000  # working set of the lanes of one core: it should fit the cache


class GroupBatch(NamedTuple):
    """Groups of sources on cutouts of one size, padded to the same number of slots.

    Attributes
    ----------
    data
        (group, ny, nx) brightness, in any unit; not read where `weight` is 0.
    weight
        (group, ny, nx) inverse variance of the data, 0 where masked.
    start, lower, upper
        (group, slot, 6) start and bounds of peak, x, y, sigma_major, sigma_minor (pixels;
        0-based pixel centres of the cutout) and theta (rad, from +x towards +y; its bounds are
        not read, and both sigmas of a source share the bounds of sigma_minor and sigma_major:
        the lower of the first, the upper of the second).
    free
        (group, slot, 6) False where a parameter is held at its start.
    present
        (group, slot) False for slots that hold no source.
    order
        (group,) order of the polynomial background that is fitted with the sources, -1 for none.
    """

    data: Float[Array, "group ny nx"]
    weight: Float[Array, "group ny nx"]
    start: Float[Array, "group slot 6"]
    lower: Float[Array, "group slot 6"]
    upper: Float[Array, "group slot 6"]
    free: Bool[Array, "group slot 6"]
    present: Bool[Array, "group slot"]
    order: Int[Array, " group"]


class FitOptions(NamedTuple):
    """How to fit. `loss` shapes the compiled code; the others are data.

    Attributes
    ----------
    loss
        "linear", "soft_l1", "huber" or "cauchy", as in `scipy.optimize.least_squares`.
    f_scale
        Residual, in units of the noise, from which the loss is no longer quadratic.
    lambda_l2
        L2 penalty on the polynomial's coefficients (noise units over a cutout scaled to [-1, 1]).
    ftol, xtol, gtol, max_steps
        When to stop (`hyperjax.solver.Tolerances`).
    """

    loss: str = "linear"
    f_scale: float = 1.0
    lambda_l2: float = 0.0
    ftol: float | None = None
    xtol: float = 0.0
    gtol: float = 0.0
    max_steps: int = 200


class FitResult(NamedTuple):
    """Fitted groups, in the batch's units, with the groups' order kept.

    Attributes
    ----------
    params
        (group, slot, 6) peak, x, y, sigma_major >= sigma_minor, theta in [0, pi).
    coefficients
        (group, monomial) of the background over `models.monomials`, in scaled coordinates; 0 beyond
        the group's order.
    covariance
        (group, P, P) of the sources' parameters and then the coefficients: the inverse of the
        Gauss-Newton matrix at the optimum; 0 for what was held, NaN where it is singular.
    cost
        (group,) half the weighted sum of squared residuals (of the loss).
    chi2_red, bic, nmse
        (group,) chi^2 per degree of freedom; n ln(chi^2/n) + k ln n for n pixels and k free
        parameters; weighted sum of squared residuals over that of the data about their mean.
    steps, status
        (group,) evaluations of the model, and CONVERGED, STEP_LIMIT, SINGULAR or NO_DATA.
    on_bound
        (group, slot, 6) parameters that ended on a bound.
    """

    params: Float[Array, "group slot 6"]
    coefficients: Float[Array, "group monomial"]
    covariance: Float[Array, "group P P"]
    cost: Float[Array, " group"]
    chi2_red: Float[Array, " group"]
    bic: Float[Array, " group"]
    nmse: Float[Array, " group"]
    steps: Int[Array, " group"]
    status: Int[Array, " group"]
    on_bound: Bool[Array, "group slot 6"]


class _Scale(NamedTuple):
    """Units of one problem: data = offset + unit * scaled data, weight = weight * scaled weight."""

    offset: Float[Array, ""]
    unit: Float[Array, ""]
    weight: Float[Array, ""]


def configure_runtime(
    cpu_devices: int | None = None, cache: Path | None = None, x64: bool = True
) -> None:
    """Set jax up for a process of its own; call it before the first computation.

    Parameters
    ----------
    cpu_devices
        Devices that the processor is divided into, one per core unless given.
    cache
        Folder of the persistent compilation cache; `hyperjax` in the user's cache folder unless
        given. The environment variable JAX_COMPILATION_CACHE_DIR, if set, has the last word.
    x64
        Compute in double precision.
    """
    from platformdirs import user_cache_dir

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        cache or Path(user_cache_dir("hyperjax")) / "jax"
    )
    jax.config.update("jax_enable_x64", x64)
    jax.config.update("jax_num_cpu_devices", cpu_devices or len(os.sched_getaffinity(0)))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def fit_groups(batch: GroupBatch, options: FitOptions = FitOptions()) -> FitResult:  # noqa: B008
    """Fit every group of the batch: Gaussians and a polynomial background, jointly.

    Parameters
    ----------
    batch
        Groups on cutouts of one size; float32 or float64 decides the precision of the fit.
    options
        See `FitOptions`.

    Returns
    -------
    FitResult
        Arrays (numpy) with the leading axis of the batch. A group without a valid pixel has the
        status NO_DATA and its start as parameters; the others are not affected by it.

    Raises
    ------
    FitInputError
        If shapes, bounds or data are inconsistent; the message names the argument.
    """
    batch = _validated(batch, options)
    count, ny, nx = batch.data.shape
    highest = next(order for order in _ORDERS if batch.order.max() <= order)
    model = GaussianGroup(Grid((ny, nx)), batch.start.shape[1], highest, options.loss)
    knobs = _Knobs.of(options, batch.data.dtype)
    devices = jax.local_devices()
    pieces = []
    for first in range(0, count, _BLOCKS[-1]):
        piece = jax.tree.map(lambda leaf: leaf[first : first + _BLOCKS[-1]], batch)  # noqa: B023
        size = len(piece.data)
        padded = _padded(piece, _block(size, len(devices)))
        fitted = _fit_block(model, len(devices), _lanes(model, batch.data.dtype), padded, knobs)
        pieces.append(jax.tree.map(lambda leaf: np.asarray(leaf)[:size], fitted))  # noqa: B023
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)


class _Knobs(NamedTuple):
    """The options that are data, as arrays."""

    f_scale: Float[Array, ""]
    lambda_l2: Float[Array, ""]
    tolerances: Tolerances

    @classmethod
    def of(cls, options: FitOptions, dtype: Any) -> "_Knobs":
        default = 1e-9 if dtype == np.float64 else 1e-6
        ftol = default if options.ftol is None else max(options.ftol, float(np.finfo(dtype).eps))
        scalars = (options.f_scale, options.lambda_l2, ftol, options.xtol, options.gtol)
        f_scale, lambda_l2, *tolerances = (np.asarray(value, dtype) for value in scalars)
        return cls(
            f_scale, lambda_l2, Tolerances(*tolerances, np.asarray(options.max_steps, np.int32))
        )


def _validated(batch: GroupBatch, options: FitOptions) -> GroupBatch:
    """The batch as numpy arrays of consistent shape and one floating dtype."""
    arrays = GroupBatch(*(np.asarray(leaf) for leaf in batch))
    if arrays.data.ndim != 3 or 0 in arrays.data.shape:
        raise FitInputError(f"data: expected (group, ny, nx), not empty; got {arrays.data.shape}")
    count = len(arrays.data)
    slots = arrays.present.shape[1] if arrays.present.ndim == 2 else 0
    shapes = {"weight": arrays.data.shape, "present": (count, slots)}
    shapes |= dict.fromkeys(("start", "lower", "upper", "free"), (count, slots, SHAPE))
    shapes["order"] = (count,)
    for name, shape in shapes.items():
        if getattr(arrays, name).shape != shape or slots == 0:
            raise FitInputError(f"{name}: expected {shape}; got {getattr(arrays, name).shape}")
    dtype = np.result_type(arrays.data.dtype, np.float32)
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise FitInputError("data: float64 needs jax_enable_x64 (or call configure_runtime first)")
    floats = {
        name: np.ascontiguousarray(getattr(arrays, name), dtype)
        for name in ("data", "weight", "start", "lower", "upper")
    }
    arrays = arrays._replace(
        **floats, free=arrays.free.astype(bool), order=arrays.order.astype(np.int32)
    )
    _check_values(arrays)
    if options.loss not in LOSSES:
        raise FitInputError(f"loss: {options.loss!r} is not one of {', '.join(LOSSES)}")
    return arrays


def _check_values(batch: GroupBatch) -> None:
    if not (np.isfinite(batch.weight).all() and (batch.weight >= 0).all()):
        raise FitInputError("weight: must be finite and not negative (0 masks a pixel)")
    if not np.isfinite(batch.data[batch.weight > 0]).all():
        raise FitInputError("data: not finite under a positive weight; set the weight to 0 there")
    there = batch.present
    if not np.isfinite(batch.start[there]).all():
        raise FitInputError("start: not finite")
    if not (batch.start[there][:, MAJOR : MINOR + 1] > 0).all():
        raise FitInputError("start: sigma_major and sigma_minor must be positive")
    if not ((batch.order >= -1) & (batch.order <= _ORDERS[-1])).all():
        raise FitInputError(f"order: must be -1 (no background) to {_ORDERS[-1]}")
    bounded = (batch.lower[there] <= batch.upper[there])[:, :THETA]
    if not bounded.all() or not (batch.lower[there][:, MINOR] > 0).all():
        raise FitInputError("lower, upper: need lower <= upper, and positive sigmas")


def _block(size: int, devices: int) -> int:
    """The size that a block of `size` problems is padded to."""
    wanted = next(block for block in _BLOCKS if size <= block)
    return -(-wanted // devices) * devices


def _lanes(model: GaussianGroup, dtype: Any) -> int:
    """Lanes whose working set (rows of products over the pixels) fits the cache of a core."""
    if jax.default_backend() != "cpu":
        return _BLOCKS[-1]
    ny, nx = model.grid.shape
    rows = model.slots * (model.slots + 1) // 2 + 2 * model.slots + 1
    lanes = _LANE_BYTES // (rows * ny * nx * np.dtype(dtype).itemsize)
    return int(np.clip(2 ** int(np.log2(max(lanes, 1))), 4, 64))


def _padded(batch: GroupBatch, block: int) -> GroupBatch:
    """Add problems without data until there are `block`."""
    missing = block - len(batch.data)
    return jax.tree.map(
        lambda leaf: np.concatenate([leaf, np.zeros((missing, *leaf.shape[1:]), leaf.dtype)]), batch
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit_block(
    model: GaussianGroup, devices: int, lanes: int, batch: GroupBatch, knobs: _Knobs
) -> FitResult:
    """Fit a block of groups, its leading axis divided over the devices."""
    mesh = Mesh(np.array(jax.local_devices()[:devices]), ("group",))
    each, same = PartitionSpec("group"), PartitionSpec()
    fit = functools.partial(_fit_share, model, lanes)
    return jax.shard_map(fit, mesh=mesh, in_specs=(each, same), out_specs=each, check_vma=False)(
        batch, knobs
    )


def _fit_share(model: GaussianGroup, lanes: int, batch: GroupBatch, knobs: _Knobs) -> FitResult:
    """Fit one device's share of the groups."""
    problems, scales = jax.vmap(functools.partial(_to_problem, model, knobs))(batch)
    solutions = solve_lanes(model, problems, knobs.tolerances, lanes)
    return jax.vmap(functools.partial(_to_result, model))(batch, problems, scales, solutions)


def _to_problem(model: GaussianGroup, knobs: _Knobs, group: GroupBatch) -> tuple[Problem, _Scale]:
    """One group in scaled coordinates and with data of unit scale."""
    weight = group.weight.ravel()
    valid = weight > 0
    data = jnp.where(valid, group.data.ravel(), 0)
    mean_weight = jnp.sum(weight) / jnp.maximum(jnp.sum(valid), 1)
    mean_weight = jnp.where(mean_weight > 0, mean_weight, 1)
    share = weight / mean_weight
    total = jnp.maximum(jnp.sum(share), 1)
    mean = jnp.sum(share * data) / total
    spread = jnp.max(jnp.where(valid, jnp.abs(data - mean), 0))
    spread = jnp.where(spread > 0, spread, 1)
    unit = spread * jnp.sqrt(jnp.sum(share * ((data - mean) / spread) ** 2) / total)
    unit = jnp.where(unit > 0, unit, 1)
    offset = jnp.where(group.order >= 0, mean, 0)
    scale = _Scale(offset, unit, mean_weight)

    engine = functools.partial(_to_engine, model.grid, unit)
    start, lower, upper = jax.vmap(engine)(group.start), group.lower, group.upper
    start = jnp.where(group.present[:, None], start, jnp.zeros(SHAPE, start.dtype))
    degrees = np.array([sum(powers) for powers in monomials(model.order)])
    smooth = len(degrees)
    edge = jnp.full(smooth, jnp.inf, start.dtype)
    free = group.free & group.present[:, None]
    problem = Problem(
        data=jnp.where(valid, data - offset, 0) / unit,
        weight=jnp.sqrt(share),
        start=jnp.concatenate([start.ravel(), jnp.zeros(smooth, start.dtype)]),
        lower=jnp.concatenate([_bounds(model.grid, unit, lower, MINOR, -1).ravel(), -edge]),
        upper=jnp.concatenate([_bounds(model.grid, unit, upper, MAJOR, +1).ravel(), edge]),
        free=jnp.concatenate([free.ravel(), degrees <= group.order]),
        ridge=jnp.concatenate(
            [jnp.zeros(start.size, start.dtype), jnp.full(smooth, knobs.lambda_l2, start.dtype)]
        ),
        f_scale=knobs.f_scale / (unit * jnp.sqrt(mean_weight)),
        weight_moments=jnp.zeros(len(monomials(model.degree)), start.dtype),
    )
    return _with_feasible_start(model, problem), scale


def _to_engine(
    grid: Grid, unit: Float[Array, ""], source: Float[Array, " 6"]
) -> Float[Array, " 6"]:
    """Pixel units to the scaled parameters (peak, x, y, log size, e1, e2)."""
    x0, y0 = grid.centre
    major = jnp.where(source[MAJOR] > 0, source[MAJOR], 1) / grid.half
    minor = jnp.where(source[MINOR] > 0, source[MINOR], 1) / grid.half
    e = jnp.log(major / minor)
    return jnp.stack(
        [
            source[PEAK] / unit,
            (source[X] - x0) / grid.half,
            (source[Y] - y0) / grid.half,
            0.5 * jnp.log(major * minor),
            e * jnp.cos(2 * source[THETA]),
            e * jnp.sin(2 * source[THETA]),
        ]
    )


def _from_engine(
    grid: Grid, unit: Float[Array, ""], source: Float[Array, " 6"]
) -> Float[Array, " 6"]:
    """Scaled parameters to pixel units, with theta in (-pi/2, pi/2]."""
    x0, y0 = grid.centre
    square = source[4] ** 2 + source[5] ** 2
    round_source = square < 1e-12
    e = jnp.sqrt(jnp.where(round_source, 1e-12, square))
    angle = jnp.arctan2(source[5], jnp.where(round_source, source[4] + 1e-6, source[4]))
    return jnp.stack(
        [
            source[0] * unit,
            x0 + source[1] * grid.half,
            y0 + source[2] * grid.half,
            grid.half * jnp.exp(source[3] + e / 2),
            grid.half * jnp.exp(source[3] - e / 2),
            0.5 * angle,
        ]
    )


def _bounds(
    grid: Grid, unit: Float[Array, ""], bound: Float[Array, "slot 6"], sigma: int, side: int
) -> Float[Array, "slot 6"]:
    """Scaled bounds: peak, x, y, log sigma; the ellipticities' places are open."""
    x0, y0 = grid.centre
    positive = jnp.where(bound[:, sigma] > 0, bound[:, sigma], 1)
    open_end = jnp.full_like(positive, side * jnp.inf)
    columns = [
        bound[:, PEAK] / unit,
        (bound[:, X] - x0) / grid.half,
        (bound[:, Y] - y0) / grid.half,
        jnp.log(positive / grid.half),
        open_end,
        open_end,
    ]
    return jnp.stack(columns, 1)


def _with_feasible_start(model: GaussianGroup, problem: Problem) -> Problem:
    """Move what is free of the start into the bounds."""
    chart = model.chart(problem.start, jnp.zeros_like(problem.start), problem)
    nowhere = jnp.zeros_like(problem.start)
    feasible = model.retract(problem.start, chart, nowhere, problem)
    return problem._replace(start=jnp.where(problem.free, feasible, problem.start))


def _to_result(
    model: GaussianGroup,
    group: GroupBatch,
    problem: Problem,
    scale: _Scale,
    solution: Solution,
) -> FitResult:
    """One group's solution in pixel units."""
    count = model.slots * SHAPE

    def natural(params: Float[Array, " P"]) -> Float[Array, " P"]:
        sources = params[:count].reshape(-1, SHAPE)
        sources = jax.vmap(functools.partial(_from_engine, model.grid, scale.unit))(sources)
        return jnp.concatenate([sources.ravel(), params[count:] * scale.unit])

    params = natural(solution.params)
    sources = params[:count].reshape(-1, SHAPE)
    sources = sources.at[:, THETA].set(jnp.mod(sources[:, THETA], jnp.pi))
    held = group.present[:, None] & group.free
    sources = jnp.where(held | _moved_shape(group), sources, group.start)
    coefficients = params[count:]
    coefficients = coefficients.at[0].add(scale.offset)

    inner = _covariance(solution, problem)
    slope = jax.jacfwd(natural)(solution.params)
    covariance = slope @ inner @ slope.T / (scale.weight * scale.unit**2)
    pixels = jnp.sum(problem.weight > 0)
    freedom = jnp.sum(problem.free)
    squares = jnp.sum((problem.weight * (problem.data - model.image(solution.params))) ** 2)
    n = jnp.maximum(pixels, 1).astype(params.dtype)
    mean = jnp.sum(problem.weight**2 * problem.data) / jnp.maximum(jnp.sum(problem.weight**2), 1)
    variation = jnp.sum((problem.weight * (problem.data - mean)) ** 2)
    noise = scale.weight * scale.unit**2
    chi2 = squares * noise
    return FitResult(
        params=sources,
        coefficients=coefficients,
        covariance=covariance,
        cost=solution.normal.cost * noise,
        chi2_red=chi2 / jnp.maximum(pixels - freedom, 1),
        bic=n * jnp.log(jnp.maximum(chi2, 1e-30) / n) + freedom * jnp.log(n),
        nmse=squares / jnp.where(variation > 0, variation, 1),
        steps=solution.steps,
        status=solution.status,
        on_bound=_bound_flags(model, solution),
    )


def _moved_shape(group: GroupBatch) -> Bool[Array, "slot 6"]:
    """Shape parameters of a source of which any may move (its major and minor may swap)."""
    any_free = jnp.any(group.free[:, MAJOR:], axis=1) & group.present
    return any_free[:, None] & (jnp.arange(SHAPE) >= MAJOR)


def _covariance(solution: Solution, problem: Problem) -> Float[Array, "P P"]:
    """Inverse of the Gauss-Newton matrix over the free parameters; 0 elsewhere."""
    matrix = solution.normal.matrix
    diagonal = jnp.diagonal(matrix)
    free = problem.free
    scale = jnp.where(free & (diagonal > 0), 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    scaled = matrix * scale[:, None] * scale + jnp.diag(jnp.where(free, 0, 1).astype(scale.dtype))
    factor = jnp.linalg.cholesky(scaled, symmetrize_input=False)
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(len(scaled), dtype=scaled.dtype))
    return inverse * scale[:, None] * scale


def _bound_flags(model: GaussianGroup, solution: Solution) -> Bool[Array, "slot 6"]:
    """Active bounds per source parameter: of the local coordinates, which stand in their order."""
    return solution.on_bound[: model.slots * SHAPE].reshape(-1, SHAPE)
