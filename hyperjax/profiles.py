"""Joint fits of sources of any differentiable profile.

`fit_profiles` is `hyperjax.fit_groups` for a brightness profile that the user writes as a function
of pixel coordinates and parameters (`hyperjax.models.gaussian` and `moffat` are two). The Jacobian
is automatic; lanes, bounds, losses, backgrounds and statistics are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float

from hyperjax.batches import FitOptions, FitResult, GroupBatch, check_options
from hyperjax.errors import FitInputError
from hyperjax.fitting import in_pieces, solve_block
from hyperjax.models import Grid, Problem, ProfileGroup, monomials
from hyperjax.solver import Solution

__all__ = ["fit_profiles"]

Profile = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class _Switched:
    """The profile on scaled coordinates; the last parameter, 0 or 1, says whether it is there."""

    profile: Profile
    grid: Grid

    def __call__(self, x: Array, y: Array, source: Array) -> Array:
        x0, y0 = self.grid.centre
        half = self.grid.half
        return source[-1] * self.profile(x0 + half * x, y0 + half * y, source[:-1])


def fit_profiles(
    profile: Profile,
    batch: GroupBatch,
    options: FitOptions = FitOptions(),  # noqa: B008
) -> FitResult:
    """Fit every group of the batch with sources of a profile, over a polynomial background.

    Parameters
    ----------
    profile
        `profile(x, y, parameters)`: brightness at pixel coordinates x, y (0-based pixel centres of
        the cutout) of a source with `parameters` (k,), written with jax.numpy. It is compiled once
        per function: define it once, not in a loop.
    batch
        As for `hyperjax.fit_groups`, but `start`, `lower`, `upper` and `free` are (group, slot, k)
        of the profile's own parameters, and their bounds are boxes.
    options
        See `FitOptions`.

    Returns
    -------
    FitResult
        As of `hyperjax.fit_groups`, with `params` (group, slot, k); `covariance` is that of all
        (slot, k) parameters and then the coefficients.

    Raises
    ------
    FitInputError
        If shapes or bounds are inconsistent, or data are not finite where they have a weight.

    Examples
    --------
    A disc with a soft edge, of parameters (brightness, x, y, radius)::

        def disc(x, y, source):
            radius = jnp.hypot(x - source[1], y - source[2])
            return source[0] * jax.nn.sigmoid(4 * (source[3] - radius))

        fit = fit_profiles(disc, batch)
    """
    batch = _checked(batch, options)
    _, ny, nx = batch.data.shape
    slots, size = batch.start.shape[1:]
    grid = Grid((ny, nx))
    order = max(int(batch.order.max()), -1)
    model = ProfileGroup(grid, _Switched(profile, grid), size + 1, slots, order, options.loss)

    def fit(piece: GroupBatch, device: jax.Device) -> FitResult:
        problems, offset = _to_problems(model, piece, options)
        solution, _ = solve_block(model, problems, options, device)
        return _to_result(model, piece, problems, offset, solution)

    return in_pieces(fit, batch, model, options)


def _checked(batch: GroupBatch, options: FitOptions) -> GroupBatch:
    """The batch as numpy arrays of one floating type, its shapes and values checked."""
    arrays = GroupBatch(*(np.asarray(leaf) for leaf in batch))
    if arrays.data.ndim != 3 or 0 in arrays.data.shape:
        raise FitInputError(f"data: expected (group, ny, nx), not empty; got {arrays.data.shape}")
    if arrays.start.ndim != 3 or 0 in arrays.start.shape:
        raise FitInputError(f"start: expected (group, slot, k); got {arrays.start.shape}")
    wanted = {"start": (len(arrays.data), *arrays.start.shape[1:]), "weight": arrays.data.shape}
    wanted |= dict.fromkeys(("lower", "upper", "free"), wanted["start"])
    wanted |= {"present": wanted["start"][:2], "order": wanted["start"][:1]}
    for name, shape in wanted.items():
        if getattr(arrays, name).shape != shape:
            raise FitInputError(f"{name}: expected {shape}; got {getattr(arrays, name).shape}")
    arrays = arrays._replace(free=arrays.free.astype(bool), present=arrays.present.astype(bool))
    if not (np.isfinite(arrays.weight).all() and (arrays.weight >= 0).all()):
        raise FitInputError("weight: must be finite and not negative (0 masks a pixel)")
    if not np.isfinite(arrays.data[arrays.weight > 0]).all():
        raise FitInputError("data: not finite under a positive weight; set the weight to 0 there")
    if not np.isfinite(arrays.start[arrays.present]).all():
        raise FitInputError("start: not finite")
    if not (arrays.lower <= arrays.upper)[arrays.present].all():
        raise FitInputError("lower, upper: need lower <= upper")
    check_options(options)
    dtype = np.result_type(arrays.data.dtype, np.float32)
    floats = ("data", "weight", "start", "lower", "upper")
    return arrays._replace(**{name: getattr(arrays, name).astype(dtype) for name in floats})


def _to_problems(
    model: ProfileGroup, batch: GroupBatch, options: FitOptions
) -> tuple[Problem, Float[np.ndarray, " group"]]:
    """The groups with data about their mean (where there is a background), and that mean."""
    count, dtype = len(batch.data), batch.data.dtype
    weight = batch.weight.reshape(count, -1)
    data = np.where(weight > 0, batch.data.reshape(count, -1), 0)
    total = np.sum(weight, 1)
    mean = np.sum(weight * data, 1) / np.where(total > 0, total, 1)
    offset = np.where(batch.order >= 0, mean, 0).astype(dtype)
    degrees = np.array([sum(powers) for powers in monomials(model.order)], int)
    smooth = np.zeros((count, len(degrees)), dtype)

    # A slot without a source holds a copy of one that is there: finite, and switched off.
    first = batch.present.argmax(1)
    there = batch.present[..., None]
    start = np.where(there, batch.start, batch.start[np.arange(count), first][:, None])
    free = batch.free & there
    inside = np.where(free, np.clip(start, batch.lower, batch.upper), start)

    def whole(sources: np.ndarray, switch: np.ndarray, background: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [np.concatenate([sources, switch], 2).reshape(count, -1), background], 1
        )

    end = np.full_like(there, np.inf, dtype)
    pixels = np.maximum(np.sum(weight > 0, 1), 1)
    penalty = options.lambda_l2 * (total / pixels)[:, None]
    problems = Problem(
        data=np.where(weight > 0, data - offset[:, None], 0),
        weight=np.sqrt(weight),
        start=whole(inside, there.astype(dtype), smooth),
        lower=whole(np.where(free, batch.lower, -np.inf), -end, smooth - np.inf),
        upper=whole(np.where(free, batch.upper, np.inf), end, smooth + np.inf),
        free=whole(free, there & False, degrees <= batch.order[:, None]),
        ridge=whole(np.zeros_like(inside), np.zeros_like(end), smooth + penalty).astype(dtype),
        f_scale=np.full(count, options.f_scale, dtype),
        weight_moments=np.zeros((count, 0), dtype),
    )
    return problems, offset


def _to_result(
    model: ProfileGroup,
    batch: GroupBatch,
    problems: Problem,
    offset: Float[np.ndarray, " group"],
    solution: Solution,
) -> FitResult:
    """The solutions without the switches, with covariance and statistics."""
    count, slots, size = batch.start.shape
    ends = slots * (size + 1)
    own = np.arange(model.size) % (size + 1) < size
    own[ends:] = True

    def sources(values: np.ndarray) -> np.ndarray:
        return values[:, :ends].reshape(count, slots, size + 1)[..., :size]

    coefficients = solution.params[:, ends:].copy()
    coefficients[:, :1] += offset[:, None]
    pixels, freedom = np.sum(problems.weight > 0, 1), np.sum(problems.free, 1)
    known = pixels > 0
    chi2 = np.where(known, solution.normal.chi2, np.nan)  # nothing is known without data
    n = np.maximum(pixels, 1).astype(chi2.dtype)
    inverse = solution.normal.matrix[:, own][:, :, own]
    spread = 1 if model.loss == "linear" else solution.normal.spread[:, None, None]
    deviation = np.sum((problems.weight * _deviation(problems)) ** 2, 1)
    there = batch.present[..., None]
    params = np.where(there, sources(solution.params), batch.start)
    return FitResult(
        params=params,
        coefficients=coefficients,
        covariance=inverse * spread,
        cost=np.where(known, solution.normal.cost, np.nan),
        chi2_red=chi2 / np.maximum(pixels - freedom, 1),
        bic=n * np.log(np.maximum(chi2, np.finfo(chi2.dtype).tiny) / n) + freedom * np.log(n),
        nmse=chi2 / np.where(deviation > 0, deviation, 1),
        steps=solution.steps,
        status=solution.status,
        on_bound=((params <= batch.lower) | (params >= batch.upper)) & batch.free & there,
    )


def _deviation(problems: Problem) -> np.ndarray:
    """Data about their weighted mean."""
    share = problems.weight**2
    total = np.sum(share, 1, keepdims=True)
    mean = np.sum(share * problems.data, 1, keepdims=True) / np.where(total > 0, total, 1)
    return problems.data - mean
