"""What `hyperjax.fit_groups` takes and gives, and the checks of it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hyperjax.errors import FitInputError
from hyperjax.models import LOSSES, SHAPE
from hyperjax.solver import FIRST_DAMPING

PEAK, X, Y, MAJOR, MINOR, THETA = range(SHAPE)
"""Places of a source's parameters: peak, x, y, sigma_major, sigma_minor, theta."""

HIGHEST_ORDER = 4
"""Of a polynomial background."""


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
        0-based pixel centres of the cutout) and theta (rad, from +x towards +y). The bounds of
        both sigmas are ``lower[..., 4]`` and ``upper[..., 3]``; those of theta are not read. A
        start outside its bounds is moved to them.
    free
        (group, slot, 6) False where a parameter is held at its start, whatever its bounds. Where
        only a part of a shape is held (in batches of up to 32 slots) the sigma_major of the result
        is the larger one even so: a sigma_major that is held becomes the sigma_minor if the other
        axis is longer, and a theta that is held is turned by a right angle with it.
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
    ftol, xtol, gtol, max_steps, damping
        When to stop, and how to begin (`hyperjax.solver.Tolerances`).
    other_starts
        Whether groups of several sources are fitted four times more where their optimum may be the
        wrong one: far from the start (more than nine steps with the linear loss, more than seven if
        a parameter is on a bound), or none found (SINGULAR). That is with short first steps, from
        small and from large round sources, and from sizes in between, with positions on the other
        side of their starts, and where they were fitted first with equal peaks. The best fit
        counts. (`fit_groups` with up to 32 slots; after robust losses only where none was found.)
    """

    loss: str = "linear"
    f_scale: float = 1.0
    lambda_l2: float = 0.0
    ftol: float | None = None
    xtol: float = 0.0
    gtol: float = 0.0
    max_steps: int = 200
    damping: float = FIRST_DAMPING
    other_starts: bool = True


class FitResult(NamedTuple):
    """Fitted groups, in the batch's units, with the groups' order kept.

    Cost, statistics and covariance are those of the last evaluation, one small step before the
    parameters (`solver.advance`).

    Attributes
    ----------
    params
        (group, slot, 6) peak, x, y, sigma_major >= sigma_minor, theta in [0, pi); shapes that are
        wholly held as they were given. The flux is 2 pi peak sigma_major sigma_minor.
    coefficients
        (group, monomial) of the background over `models.monomials`, in scaled coordinates: 0 is the
        centre of the cutout, and max(ny, nx) / 2 pixels are 1. 0 beyond the group's order.
    covariance
        (group, P, P) of the sources' parameters, six for each slot, and then the coefficients: the
        inverse of the Gauss-Newton matrix at the optimum, for a robust loss times the spread of the
        residuals (`models.misfit`); 0 for what was held, NaN where it is singular. For batches of
        more than 32 slots (group, slot, 6, 6): each source's own block of it, as the whole grows
        with the square of their number.
    cost
        (group,) half the weighted sum of squared residuals (of the loss). It and the statistics are
        NaN for a group without data.
    chi2_red, bic, nmse
        (group,) chi^2 per degree of freedom; n ln(chi^2/n) + k ln n for n pixels and k free
        parameters; weighted sum of squared residuals over that of the data about their mean.
    steps, status
        (group,) evaluations of the model, of all fits where there were several, and
        CONVERGED (1), STEP_LIMIT (2), SINGULAR (3) or NO_DATA (4), names of `hyperjax.fitting`.
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


def validated(batch: GroupBatch, options: FitOptions) -> GroupBatch:
    """The batch as numpy arrays of consistent shape and one floating dtype."""
    arrays = GroupBatch(*(np.asarray(leaf) for leaf in batch))
    check_shapes(arrays, options)
    arrays = arrays._replace(free=arrays.free.astype(bool), present=arrays.present.astype(bool))
    dtype = np.result_type(arrays.data.dtype, np.float32)
    floats = {
        name: np.ascontiguousarray(getattr(arrays, name), dtype)
        for name in ("data", "weight", "start", "lower", "upper")
    }
    order = arrays.order.astype(np.int32)
    if not ((order >= -1) & (order <= HIGHEST_ORDER) & (order == arrays.order)).all():
        raise FitInputError(f"order: must be -1 (no background) to {HIGHEST_ORDER}")
    return arrays._replace(**floats, order=order)


def check_shapes(batch: GroupBatch, options: FitOptions) -> None:
    """Raise `FitInputError` if the shapes of the arrays do not agree, or the loss is unknown."""
    if batch.data.ndim != 3 or 0 in batch.data.shape:
        raise FitInputError(f"data: expected (group, ny, nx), not empty; got {batch.data.shape}")
    count = len(batch.data)
    if batch.present.ndim != 2 or batch.present.shape[1] == 0:
        raise FitInputError(f"present: expected (group, slot); got {batch.present.shape}")
    slots = batch.present.shape[1]
    shapes = {"weight": batch.data.shape, "present": (count, slots)}
    shapes |= dict.fromkeys(("start", "lower", "upper", "free"), (count, slots, SHAPE))
    shapes["order"] = (count,)
    for name, shape in shapes.items():
        if getattr(batch, name).shape != shape:
            raise FitInputError(f"{name}: expected {shape}; got {getattr(batch, name).shape}")
    check_options(options)


def check_options(options: FitOptions) -> None:
    """Raise `FitInputError` if an option cannot be; the message names it."""
    if options.loss not in LOSSES:
        raise FitInputError(f"loss: {options.loss!r} is not one of {', '.join(LOSSES)}")
    for name in ("f_scale", "damping"):
        if not 0 < getattr(options, name) < np.inf:
            raise FitInputError(f"{name}: must be positive; got {getattr(options, name)}")
    for name in ("lambda_l2", "ftol", "xtol", "gtol"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < np.inf:
            raise FitInputError(f"{name}: must not be negative; got {value}")
    if not (1 <= options.max_steps < 2**31 and options.max_steps == int(options.max_steps)):
        raise FitInputError(f"max_steps: must be a number from 1; got {options.max_steps}")


def check_pixels(batch: GroupBatch) -> None:
    """Raise `FitInputError` if a pixel cannot be fitted: it gives a cost that is not finite."""
    if not batch.weight.max() < np.inf:
        raise FitInputError("weight: must be finite and not negative (0 masks a pixel)")
    if not np.isfinite(np.where(batch.weight > 0, batch.data, 0)).all():
        raise FitInputError("data: not finite under a positive weight; set the weight to 0 there")


def check_parameters(batch: GroupBatch) -> None:
    """Raise `FitInputError` if a weight is negative, or starts or bounds cannot be."""
    if not batch.weight.min() >= 0:
        raise FitInputError("weight: must be finite and not negative (0 masks a pixel)")
    there = batch.present
    if not np.isfinite(batch.start[there]).all():
        raise FitInputError("start: not finite")
    if not (batch.start[there][:, MAJOR : MINOR + 1] > 0).all():
        raise FitInputError("start: sigma_major and sigma_minor must be positive")
    free = batch.free[there][:, :THETA]
    bounded = (batch.lower[there] <= batch.upper[there])[:, :THETA] | ~free
    least, most = batch.lower[there][:, MINOR], batch.upper[there][:, MAJOR]
    sized = (least > 0) & (least <= most) | ~free[:, MAJOR:].any(1)
    if not bounded.all() or not sized.all():
        raise FitInputError("lower, upper: need lower <= upper, and positive sigmas")


def shapes_partly_held(free: Bool[Array, "group slot 6"]) -> Bool[Array, " group"]:
    """Whether something, but not all, of the shape of one of a group's sources is held."""
    shape = free[..., MAJOR:].astype(bool)
    return (shape.any(-1) & ~shape.all(-1)).any(-1)
