"""What a group of sources looks like on its pixels, and the normal equations of fitting it.

A *model* turns the parameters of one group (its sources and a polynomial background) into the
cost, gradient and Gauss-Newton matrix that the solver needs (`Normal`). There are two:

`GaussianGroup`
    Elliptical Gaussians. Every column of the Jacobian is a Gaussian times a quadratic in (x, y)
    or a monomial of the background, so J^T W J and J^T W r are small linear maps of pixel moments
    sum(w g_k g_l x^a y^b). The Jacobian is never formed.
`ProfileGroup`
    Any differentiable profile, with a forward-mode Jacobian.

Both work on one group; the solver maps them over many. Coordinates are those of the scaled cutout
(`Grid`): the centre of the cutout is 0 and its longer half-side is 1.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LOSSES = ("linear", "soft_l1", "huber", "cauchy")
CompilerOptions = dict[str, bool | int | str]
"""Options of XLA's compiler."""

SHAPE = 6
"""Parameters of one Gaussian: peak, x, y, log size, two ellipticities."""

LEAST_ELLIPTICITY = 1e-6
"""log(sigma_major / sigma_minor) below which the errors of a source are those of this one.

The angle of a round source is undefined; its error is huge then, but finite.
"""


def monomials(degree: int) -> list[tuple[int, int]]:
    """Powers (a, b) of x^a y^b with a + b <= degree, by total degree; none for degree -1."""
    return [(total - b, b) for total in range(degree + 1) for b in range(total + 1)]


@dataclass(frozen=True)
class Grid:
    """The pixel centres of a cutout of `shape` (ny, nx), scaled to [-1, 1] on its longer side."""

    shape: tuple[int, int]

    @property
    def half(self) -> float:
        """Half of the longer side, in pixels: one unit of the scaled coordinates."""
        return max(self.shape) / 2

    @property
    def centre(self) -> tuple[float, float]:
        """Pixel coordinates (x, y) of the scaled origin; the first pixel's centre is (0, 0)."""
        ny, nx = self.shape
        return (nx - 1) / 2, (ny - 1) / 2

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Scaled coordinates of the columns (nx,) and of the rows (ny,)."""
        ny, nx = self.shape
        x0, y0 = self.centre
        return (np.arange(nx) - x0) / self.half, (np.arange(ny) - y0) / self.half

    def pixels(self, dtype: jnp.dtype) -> tuple[Float[Array, " pixel"], Float[Array, " pixel"]]:
        """Scaled (x, y) of every pixel, rows first."""
        x, y = self.axes
        return jnp.asarray(np.tile(x, len(y)), dtype), jnp.asarray(np.repeat(y, len(x)), dtype)

    def vandermonde(self, degree: int, dtype: jnp.dtype) -> Float[Array, "pixel monomial"]:
        """The `monomials` of the degree at every pixel."""
        x, y = self.axes
        columns = [np.outer(y**b, x**a).ravel() for a, b in monomials(degree)]
        return jnp.asarray(
            np.stack(columns, 1) if columns else np.zeros((x.size * y.size, 0)), dtype
        )


class Problem(NamedTuple):
    """One least-squares problem: a group's pixels, its bounds and its start.

    With P parameters: `data` and `weight` (the square root of the inverse variance, 0 where
    masked) are (pixel,); `start`, `lower`, `upper`, `ridge` (the L2 penalty adds
    ridge/2 * parameter^2 to the cost) and the mask `free` are (P,). `weight_moments` belongs to the
    model (`Model.prepare`).
    """

    data: Float[Array, " pixel"]
    weight: Float[Array, " pixel"]
    start: Float[Array, " P"]
    lower: Float[Array, " P"]
    upper: Float[Array, " P"]
    free: Bool[Array, " P"]
    ridge: Float[Array, " P"]
    f_scale: Float[Array, ""]
    weight_moments: Float[Array, " moment"]


class Scale(NamedTuple):
    """Units of a scaled problem: data = offset + unit * scaled, weight^2 = weight * scaled^2.

    And the number of `pixels` with a weight.
    """

    offset: Float[Array, ""]
    unit: Float[Array, ""]
    weight: Float[Array, ""]
    pixels: Int[Array, ""]


class Normal(NamedTuple):
    """Cost, its gradient and its Gauss-Newton matrix, and what the covariance needs.

    `chi2` is the sum of the squared weighted residuals: twice the cost, for the linear loss and
    without penalty. `spread` times the inverse of the matrix is the covariance of the parameters
    for a robust loss; it is 0 for the linear one, where the weights tell the noise.
    """

    cost: Float[Array, ""]
    chi2: Float[Array, ""]
    spread: Float[Array, ""]
    gradient: Float[Array, " P"]
    matrix: Float[Array, "P P"]


class Misfit(NamedTuple):
    """What the residuals of a model come to: see `Normal`.

    `pull` (pixel,) is the factor of each pixel in the gradient and in the matrix: 1 for the linear
    loss.
    """

    cost: Float[Array, ""]
    chi2: Float[Array, ""]
    spread: Float[Array, ""]
    pull: Float[Array, " pixel"]


class Chart(NamedTuple):
    """Local coordinates round a point, in which the bounds are a box.

    A local step d moves the parameters by `basis` @ d to first order; `value` lies within
    `lower` and `upper`; `frozen` coordinates must not move now. `bend` is the second derivative of
    the cost that comes from the path of a step being curved.
    """

    basis: Float[Array, "P P"]
    value: Float[Array, " P"]
    lower: Float[Array, " P"]
    upper: Float[Array, " P"]
    frozen: Bool[Array, " P"]
    bend: Float[Array, " P"]


def robust(
    loss: str, z: Float[Array, "*any"]
) -> tuple[Float[Array, "*any"], Float[Array, "*any"], Float[Array, "*any"]]:
    """Loss rho(z) of z = (residual / f_scale)^2, weight rho' and slope psi' = rho' + 2 z rho''.

    The losses are those of `scipy.optimize.least_squares`.
    """
    if loss == "linear":
        return z, jnp.ones_like(z), jnp.ones_like(z)
    if loss == "soft_l1":
        root = jnp.sqrt(1 + z)
        return 2 * (root - 1), 1 / root, 1 / root**3
    if loss == "huber":
        root = jnp.sqrt(jnp.maximum(z, 1))
        inside = z <= 1
        return jnp.where(inside, z, 2 * root - 1), 1 / root, jnp.where(inside, 1.0, 0.0)
    if loss == "cauchy":
        weight = 1 / (1 + z)
        return jnp.log1p(z), weight, (1 - z) * weight**2
    raise ValueError(f"loss: {loss!r} is not one of {', '.join(LOSSES)}")


class Objective(abc.ABC):
    """What the solver minimises: a cost through its normal equations, over bounds.

    `chart` and `retract` say in which local coordinates the bounds are a box; without a say of its
    own an objective takes the parameters themselves.
    """

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of parameters."""

    @abc.abstractmethod
    def normal(self, params: Float[Array, " P"], problem: Problem) -> Normal:
        """Cost, gradient and Gauss-Newton matrix at `params`."""

    def prepare(self, problem: Problem) -> Problem:
        """Fill in what the model computes once per problem."""
        return problem

    def chart(
        self, params: Float[Array, " P"], gradient: Float[Array, " P"], problem: Problem
    ) -> Chart:
        """Local coordinates at `params`: the parameters themselves."""
        frozen = jnp.zeros_like(problem.free)
        eye = jnp.eye(self.size, dtype=params.dtype)
        bend = jnp.zeros_like(params)
        return Chart(eye, params, problem.lower, problem.upper, frozen, bend)

    def path(
        self, params: Float[Array, " P"], chart: Chart, step: Float[Array, " P"]
    ) -> Float[Array, " P"]:
        """The point that the local `step` leads to where no bound stops it; smooth in the step."""
        return params + chart.basis @ step

    def retract(
        self, params: Float[Array, " P"], chart: Chart, step: Float[Array, " P"], problem: Problem
    ) -> Float[Array, " P"]:
        """The feasible point that the local `step` leads to."""
        return jnp.clip(params + step, problem.lower, problem.upper)


class Model(Objective):
    """A group of `slots` sources on a `grid`, over a polynomial of `order` (-1: none)."""

    grid: Grid
    slots: int
    order: int
    loss: str

    @property
    @abc.abstractmethod
    def per_source(self) -> int:
        """Parameters of one source."""

    @property
    def compiler_options(self) -> CompilerOptions:
        """Options of XLA that this model's programs are compiled with, on processors."""
        return {}

    @property
    def size(self) -> int:
        """All parameters of the group: those of its sources, then the polynomial's."""
        return self.slots * self.per_source + len(monomials(self.order))

    @abc.abstractmethod
    def image(self, params: Float[Array, " P"]) -> Float[Array, " pixel"]:
        """The model on the pixels."""

    def scale(self, problem: Problem) -> Scale:
        """The units that the solver works in; here those that the problem is in."""
        zero, one = jnp.zeros_like(problem.f_scale), jnp.ones_like(problem.f_scale)
        return Scale(zero, one, one, jnp.sum(problem.weight > 0))

    def scaled(self, problem: Problem, scale: Scale) -> Problem:
        """The problem in the units of `scale`; here as it is."""
        return problem

    def cost(self, params: Float[Array, " P"], problem: Problem) -> Float[Array, ""]:
        """The cost alone, with derivatives of any order."""
        residual = problem.weight * (problem.data - self.image(params))
        return misfit(self.loss, residual, problem).cost + _penalty(params, problem)

    def background(self, params: Float[Array, " P"]) -> Float[Array, " pixel"]:
        """The polynomial alone on the pixels."""
        coefficients = params[self.slots * self.per_source :]
        if self.order != 1:
            return self.grid.vandermonde(self.order, params.dtype) @ coefficients
        x, y = self.grid.pixels(params.dtype)
        return coefficients[0] + coefficients[1] * x + coefficients[2] * y  # faster than a product

    def _sources(self, params: Float[Array, " P"]) -> Float[Array, "slot k"]:
        count = self.slots * self.per_source
        return params[:count].reshape(self.slots, self.per_source)


def misfit(loss: str, residual: Float[Array, " pixel"], problem: Problem) -> Misfit:
    """Cost and sum of squares of weighted residuals, and the pixels' factors.

    A robust loss weighs each squared residual by rho' (iteratively reweighted least squares). With
    its true curvature, which is 0 or negative in the wings, steps were too long: from the truth,
    3 % of fits with 5 % of outliers went to a wrong minimum (none with rho'), in 2.6 times the
    steps.

    `spread` comes from the covariance of an M-estimator with independent residuals r,
    sum(psi^2) / (n - p) / mean(psi')^2 inv(J^T W J) with psi = rho' r (Huber 1981, Robust
    Statistics, section 7.6), and from the matrix being mean(rho') J^T W J on average.
    """
    chi2 = _total(residual**2)
    if loss == "linear":
        return Misfit(0.5 * chi2, chi2, jnp.zeros_like(chi2), jnp.ones_like(residual))
    rho, weight, slope = robust(loss, (residual / problem.f_scale) ** 2)
    valid = problem.weight > 0
    pixels = _total(valid.astype(chi2.dtype))
    freedom = jnp.maximum(pixels - jnp.sum(problem.free), 1)
    rigidity = jnp.maximum(jnp.abs(_total(jnp.where(valid, slope, 0))), 1) / pixels  # not 0
    stiffness = _total(jnp.where(valid, weight, 0)) / pixels
    spread = _total((weight * residual) ** 2) / freedom * stiffness / rigidity**2
    return Misfit(0.5 * problem.f_scale**2 * _total(rho), chi2, spread, weight)


def _total(pixels: Float[Array, " pixel"]) -> Float[Array, ""]:
    """Sum over the pixels, as a matrix product: XLA's own sums are several times slower."""
    return pixels @ jnp.ones_like(pixels)


def _or_one(value: Float[Array, ""]) -> Float[Array, ""]:
    """The value, 1 where it is not positive."""
    return jnp.where(value > 0, value, 1)


def _penalty(params: Float[Array, " P"], problem: Problem) -> Float[Array, ""]:
    """The L2 penalty."""
    return 0.5 * jnp.sum(problem.ridge * params**2)


def _add_ridge(normal: Normal, params: Float[Array, " P"], problem: Problem) -> Normal:
    """Add the L2 penalty."""
    return Normal(
        normal.cost + _penalty(params, problem),
        normal.chi2,
        normal.spread,
        normal.gradient + problem.ridge * params,
        normal.matrix + jnp.diag(problem.ridge),
    )


@dataclass(frozen=True)
class ProfileGroup(Model):
    """Sources of any differentiable `profile(x, y, parameters) -> brightness`.

    `profile` is called with arrays x, y of scaled pixel coordinates (`Grid`) and the
    parameters (k,) of one source. All bounds are boxes on the parameters themselves.
    """

    grid: Grid
    profile: Callable[[Array, Array, Array], Array]
    profile_size: int
    slots: int
    order: int
    loss: str = "linear"

    @property
    def per_source(self) -> int:
        """Parameters of one source."""
        return self.profile_size

    def image(self, params: Float[Array, " P"]) -> Float[Array, " pixel"]:
        """The model on the pixels."""
        x, y = self.grid.pixels(params.dtype)
        sources = jax.vmap(lambda source: self.profile(x, y, source))(self._sources(params))
        return jnp.sum(sources, 0) + self.background(params)

    def normal(self, params: Float[Array, " P"], problem: Problem) -> Normal:
        """Cost, gradient and Gauss-Newton matrix, from a forward-mode Jacobian."""
        image = self.image(params)
        jacobian = problem.weight[:, None] * jax.jacfwd(self.image)(params)
        residual = problem.weight * (problem.data - image)
        told = misfit(self.loss, residual, problem)
        gradient = -jacobian.T @ (told.pull * residual)
        matrix = jacobian.T @ (told.pull[:, None] * jacobian)
        normal = Normal(told.cost, told.chi2, told.spread, gradient, matrix)
        return _add_ridge(normal, params, problem)


def precision(shape: Float[Array, " 3"]) -> Float[Array, " 3"]:
    """The inverse covariance (xx, xy, yy) of a Gaussian of `shape` (log size, e1, e2).

    With size^2 = sigma_major sigma_minor and (e1, e2) = log(sigma_major / sigma_minor)
    (cos 2 theta, sin 2 theta), the inverse covariance is exp(-2 log size) [cosh(e) I - sinh(e)/e
    (e1, e2; e2, -e1)]: smooth where the source is circular and theta has no meaning.
    """
    scale, cosh, sinhc, _ = _hyperbolic(shape)
    _, e1, e2 = shape
    return scale * jnp.stack([cosh - sinhc * e1, -sinhc * e2, cosh + sinhc * e1])


def precision_slopes(shape: Float[Array, " 3"]) -> Float[Array, "3 3"]:
    """Derivatives of `precision` (row: by log size, e1, e2; column: of xx, xy, yy)."""
    scale, cosh, sinhc, bend = _hyperbolic(shape)
    _, e1, e2 = shape
    return scale * jnp.stack(
        [
            -2 * jnp.stack([cosh - sinhc * e1, -sinhc * e2, cosh + sinhc * e1]),
            jnp.stack(
                [
                    sinhc * (e1 - 1) - bend * e1**2,
                    -bend * e1 * e2,
                    sinhc * (e1 + 1) + bend * e1**2,
                ]
            ),
            jnp.stack(
                [
                    sinhc * e2 - bend * e1 * e2,
                    -sinhc - bend * e2**2,
                    sinhc * e2 + bend * e1 * e2,
                ]
            ),
        ]
    )


def _hyperbolic(
    shape: Float[Array, " 3"],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """exp(-2 log size), cosh(e), sinh(e)/e and (cosh(e) - sinh(e)/e)/e^2, by series near 0."""
    log_size, e1, e2 = shape
    square = e1**2 + e2**2
    tiny = square < 1e-4
    safe = jnp.where(tiny, 1.0, square)
    e = jnp.sqrt(safe)
    up, down = jnp.exp(e), jnp.exp(-e)
    cosh = jnp.where(tiny, 1 + square / 2 * (1 + square / 12), (up + down) / 2)
    sinhc = jnp.where(tiny, 1 + square / 6 * (1 + square / 20), (up - down) / (2 * e))
    bend = jnp.where(tiny, 1 / 3 + square / 30, (cosh - sinhc) / safe)
    return jnp.exp(-2 * log_size), cosh, sinhc, bend


def gaussian(
    x: Float[Array, "*pixel"], y: Float[Array, "*pixel"], source: Float[Array, " 6"]
) -> Float[Array, "*pixel"]:
    """Brightness of an elliptical Gaussian (peak, x, y, log size, e1, e2)."""
    xx, xy, yy = precision(source[3:])
    dx, dy = x - source[1], y - source[2]
    return source[0] * jnp.exp(-0.5 * (xx * dx**2 + 2 * xy * dx * dy + yy * dy**2))


def moffat(
    x: Float[Array, "*pixel"], y: Float[Array, "*pixel"], source: Float[Array, " 7"]
) -> Float[Array, "*pixel"]:
    """Brightness of an elliptical Moffat (peak, x, y, log core size, e1, e2, log beta).

    peak * (1 + q)^-beta, q the squared elliptical radius in units of the core size
    (Moffat 1969, A&A 3, 455).
    """
    xx, xy, yy = precision(source[3:6])
    dx, dy = x - source[1], y - source[2]
    q = xx * dx**2 + 2 * xy * dx * dy + yy * dy**2
    return source[0] * jnp.exp(-jnp.exp(source[6]) * jnp.log1p(q))


@dataclass(frozen=True)
class GaussianGroup(Model):
    """Elliptical Gaussians over a polynomial, fitted through pixel moments.

    Each source has six parameters (`gaussian`). Bounds are on peak, x, y and on the logarithm of
    both sigmas (in the place of log size); those in the places of the ellipticities are not read.
    """

    grid: Grid
    slots: int
    order: int
    loss: str = "linear"

    @property
    def per_source(self) -> int:
        """Parameters of one source."""
        return SHAPE

    @property
    def degree(self) -> int:
        """Highest degree of the moments: of two quadratics, or of products with the polynomial."""
        return max(4, 2 + self.order, 2 * self.order)

    def image(self, params: Float[Array, " P"]) -> Float[Array, " pixel"]:
        """The model on the pixels."""
        sources = self._sources(params)
        return sources[:, 0] @ self._unit_gaussians(sources) + self.background(params)

    def scale(self, problem: Problem) -> Scale:
        """Units in which data are of unit scale about their mean, and weights of mean 1.

        Without a background the mean stays.
        """
        valid = problem.weight > 0
        data = jnp.where(valid, problem.data, 0)
        counted = _total(valid.astype(data.dtype))
        pixels = jnp.maximum(counted, 1)
        weight = _or_one(_total(problem.weight) / pixels)
        share = problem.weight / weight
        mean = _total(share * data) / pixels
        deviation = jnp.where(valid, data - mean, 0)
        size = lax.stop_gradient(_or_one(_total(jnp.abs(deviation)) / pixels))  # no overflow
        unit = size * jnp.sqrt(_or_one(_total(share * (deviation / size) ** 2) / pixels))
        smooth = problem.free[self.slots * SHAPE :]
        offset = jnp.where(smooth[0], mean, 0) if smooth.size else jnp.zeros_like(mean)
        return Scale(offset, unit, weight, counted.astype(jnp.int32))

    def scaled(self, problem: Problem, scale: Scale) -> Problem:
        """The problem in the units of `scale`.

        Here alone `problem.weight` is the inverse variance itself, `problem.f_scale` is in units of
        the noise, and data without weight may be anything.
        """
        valid, unit = problem.weight > 0, scale.unit
        share = jnp.where(valid, problem.weight, scale.weight) / scale.weight
        return problem._replace(
            data=jnp.where(valid, problem.data - scale.offset, 0) / unit,
            weight=jnp.where(valid, jnp.sqrt(share), 0),
            start=self._with_peaks_over(unit, problem.start),
            lower=self._with_peaks_over(unit, problem.lower),
            upper=self._with_peaks_over(unit, problem.upper),
            f_scale=problem.f_scale / (unit * jnp.sqrt(scale.weight)),
        )

    def _with_peaks_over(
        self, unit: Float[Array, ""], params: Float[Array, " P"]
    ) -> Float[Array, " P"]:
        peak = (np.arange(self.size) < self.slots * SHAPE) & (np.arange(self.size) % SHAPE == 0)
        finite = peak & jnp.isfinite(params)
        return jnp.where(finite, jnp.where(finite, params, 0) / unit, params)

    def prepare(self, problem: Problem) -> Problem:
        """Fill in the moments of the weights alone."""
        return problem._replace(
            weight_moments=self._moments(problem.weight[None] ** 2, self.degree)[0]
        )

    def normal(self, params: Float[Array, " P"], problem: Problem) -> Normal:
        """Cost, gradient and Gauss-Newton matrix, from pixel moments.

        With p_k = w g_k (w the root of the inverse variance) and r the weighted residual, the
        moments of p_k p_l, p_k w, w^2 give the matrix, those of p_k r and w r the gradient: a
        Gaussian's column of the Jacobian is p_k times the quadratic whose coefficients are
        row i of `_quadratics`, a background column is w times a monomial.
        """
        sources = self._sources(params)
        unit = lax.optimization_barrier(self._unit_gaussians(sources))  # or exp is done again
        model = jnp.sum(sources[:, :1] * unit, 0) + self.background(params)
        weighted = problem.weight * unit
        residual = problem.weight * (problem.data - model)
        told = misfit(self.loss, residual, problem)
        pulled = residual if self.loss == "linear" else told.pull * residual
        bent = weighted if self.loss == "linear" else told.pull * weighted

        first, second = np.triu_indices(self.slots)
        rows = [bent[first] * weighted[second], bent * problem.weight]
        if self.loss != "linear":
            rows.append((told.pull * problem.weight**2)[None])
        rows += [weighted * pulled, (pulled * problem.weight)[None]]
        moments = self._moments(lax.optimization_barrier(jnp.concatenate(rows)), self.degree)
        pairs, singles, *plain, pulls, pull = jnp.split(
            moments, np.cumsum([len(row) for row in rows[:-1]])
        )
        weights = plain[0][0] if plain else problem.weight_moments

        quadratics = self._quadratics(sources)
        matrix = self._matrix(quadratics, pairs[self._pair_index], singles, weights)
        gradient = jnp.concatenate(
            [
                -jnp.einsum("kim,km->ki", quadratics, pulls[:, : len(monomials(2))]).ravel(),
                -pull[0, : len(monomials(self.order))],
            ]
        )
        normal = Normal(told.cost, told.chi2, told.spread, gradient, matrix)
        return _add_ridge(normal, params, problem)

    def chart(
        self, params: Float[Array, " P"], gradient: Float[Array, " P"], problem: Problem
    ) -> Chart:
        """Local coordinates at `params`: (log size, e1, e2) become (log major, log minor, turn).

        In them the bounds on the sigmas are a box. The turn moves (e1, e2) at right angles to
        itself. Where the source is circular its axes are those of the downhill direction, and
        the turn is frozen if the circle is on a bound (any turn would leave it).
        """
        sources, slopes = self._sources(params), self._sources(gradient)
        low, high = self._sources(problem.lower)[:, 3], self._sources(problem.upper)[:, 3]
        blocks, shape, frozen, bend = jax.vmap(shape_chart)(sources, slopes, low, high)
        endless = jnp.full_like(low, jnp.inf)
        basis = jnp.eye(self.size, dtype=params.dtype)
        for k in range(self.slots):
            at = slice(SHAPE * k + 3, SHAPE * k + 6)
            basis = basis.at[at, at].set(blocks[k])
        still, straight = jnp.zeros_like(frozen), jnp.zeros_like(bend)
        return Chart(
            basis=basis,
            value=self._with_shapes(params, shape),
            lower=self._with_shapes(problem.lower, jnp.stack([low, low, -endless], 1)),
            upper=self._with_shapes(problem.upper, jnp.stack([high, high, endless], 1)),
            frozen=self._with_shapes(
                jnp.zeros(self.size, bool), jnp.stack([still, still, frozen], 1)
            ),
            bend=self._with_shapes(
                jnp.zeros_like(params), jnp.stack([straight, straight, bend], 1)
            ),
        )

    def retract(
        self, params: Float[Array, " P"], chart: Chart, step: Float[Array, " P"], problem: Problem
    ) -> Float[Array, " P"]:
        """The feasible point that the local `step` leads to, each sigma clipped to its bounds."""
        low, high = self._sources(problem.lower)[:, 3], self._sources(problem.upper)[:, 3]
        shapes = jax.vmap(move_shape)(
            self._sources(params)[:, 3:],
            self._shape_blocks(chart),
            self._sources(chart.value)[:, 3:],
            self._sources(step)[:, 3:],
            low,
            high,
        )
        boxed = jnp.clip(params + step, problem.lower, problem.upper)
        return self._with_shapes(boxed, shapes)

    def path(
        self, params: Float[Array, " P"], chart: Chart, step: Float[Array, " P"]
    ) -> Float[Array, " P"]:
        """As `retract`, without clipping."""
        low, high = self._sources(chart.lower)[:, 3], self._sources(chart.upper)[:, 3]
        shapes = jax.vmap(_shape_path)(
            self._sources(params)[:, 3:],
            self._shape_blocks(chart),
            self._sources(chart.value)[:, 3:],
            self._sources(step)[:, 3:],
            low,
            high,
        )
        return self._with_shapes(params + step, shapes)

    def _shape_blocks(self, chart: Chart) -> Float[Array, "slot 3 3"]:
        """The parts of the chart's basis that belong to each source's shape."""
        return jnp.stack(
            [
                chart.basis[SHAPE * k + 3 : SHAPE * k + 6, SHAPE * k + 3 : SHAPE * k + 6]
                for k in range(self.slots)
            ]
        )

    def _with_shapes(
        self, params: Float[Array, " P"], shapes: Float[Array, "slot 3"]
    ) -> Float[Array, " P"]:
        sources = jnp.concatenate([self._sources(params)[:, :3], shapes], 1).ravel()
        return jnp.concatenate([sources, params[self.slots * SHAPE :]])

    def _unit_gaussians(self, sources: Float[Array, "slot 6"]) -> Float[Array, "slot pixel"]:
        """Each source's profile at unit peak."""
        x, y = self.grid.pixels(sources.dtype)
        return jax.vmap(lambda source: gaussian(x, y, source))(sources.at[:, 0].set(1))

    def _moments(self, rows: Float[Array, "row pixel"], degree: int) -> Float[Array, "row moment"]:
        """Sums over the pixels of row * x^a y^b, a + b <= degree: first along x, then along y."""
        nx = self.grid.shape[1]
        along_x, along_y = self._moment_matrices(degree)
        partial = rows.reshape(-1, nx) @ jnp.asarray(along_x, rows.dtype)
        return partial.reshape(len(rows), -1) @ jnp.asarray(along_y, rows.dtype)

    def _moment_matrices(self, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """The powers of x (nx, width), and those of y spread over (ny * width, moment)."""
        x, y = self.grid.axes
        width = -(-(degree + 1) // 4) * 4  # whole vector registers
        along_x = np.zeros((len(x), width))
        along_x[:, : degree + 1] = x[:, None] ** np.arange(degree + 1)
        powers = monomials(degree)
        along_y = np.zeros((len(y), width, len(powers)))
        for moment, (a, b) in enumerate(powers):
            along_y[:, a, moment] = y**b
        return along_x, along_y.reshape(len(y) * width, len(powers))

    @property
    def _pair_index(self) -> np.ndarray:
        """Row of the moments of the product of sources k and l (slot, slot)."""
        first, second = np.triu_indices(self.slots)
        index = np.zeros((self.slots, self.slots), int)
        index[first, second] = index[second, first] = np.arange(len(first))
        return index

    def _products(self, left: int, right: int) -> np.ndarray:
        """Which moment is the product of monomials m and n, of degrees `left` and `right`."""
        where = {power: i for i, power in enumerate(monomials(self.degree))}
        return np.array(
            [[where[a + c, b + d] for c, d in monomials(right)] for a, b in monomials(left)], int
        )

    def _matrix(
        self,
        quadratics: Float[Array, "slot 6 6"],
        pairs: Float[Array, "slot slot moment"],
        singles: Float[Array, "slot moment"],
        weights: Float[Array, " moment"],
    ) -> Float[Array, "P P"]:
        """J^T W J from the moments."""
        count = self.slots * SHAPE
        own = jnp.einsum(
            "kim,klmn,ljn->kilj", quadratics, pairs[:, :, self._products(2, 2)], quadratics
        ).reshape(count, count)
        if self.order < 0:
            return own
        mixed = jnp.einsum("kim,kmn->kin", quadratics, singles[:, self._products(2, self.order)])
        mixed = mixed.reshape(count, -1)
        smooth = weights[self._products(self.order, self.order)]
        return jnp.block([[own, mixed], [mixed.T, smooth]])

    @staticmethod
    def _quadratics(sources: Float[Array, "slot 6"]) -> Float[Array, "slot 6 6"]:
        """Coefficients, over the monomials 1, x, y, xx, xy, yy, of each source's Jacobian columns.

        d(peak g)/d(peak) = g; d/dx0 = peak g (Axx dx + Axy dy), d/dy0 likewise; and for a shape
        parameter s, d/ds = -1/2 peak g (A'xx dx^2 + 2 A'xy dx dy + A'yy dy^2), with A the inverse
        covariance, A' its derivative and dx = x - x0.
        """
        return jax.vmap(source_quadratics)(sources)


@dataclass(frozen=True)
class AxesGroup(GaussianGroup):
    """The same by axes and angle, any of which may be held: (peak, x, y, log a, log b, theta).

    Theta is the angle of axis a, which may be the smaller. Bounds are boxes, those of log a and
    log b among them. Where a source is round its angle has no effect: `GaussianGroup` is for
    sources of which nothing or all of the shape is held.
    """

    path = Objective.path
    retract = Objective.retract

    def chart(
        self, params: Float[Array, " P"], gradient: Float[Array, " P"], problem: Problem
    ) -> Chart:
        """The parameters themselves, with the curvature of a turn as in `shape_chart`.

        At a constant axis ratio a turn moves (e1, e2) on a circle of the radius e = log a - log b,
        at twice the angle: the second derivative is -2 e (slope by log a - slope by log b).
        """
        chart = Objective.chart(self, params, gradient, problem)
        _, _, _, log_a, log_b, _ = self._sources(params).T
        _, _, _, by_a, by_b, _ = self._sources(gradient).T
        bend = jnp.maximum(-2 * (log_a - log_b) * (by_a - by_b), 0)
        shapes = jnp.stack([jnp.zeros_like(bend), jnp.zeros_like(bend), bend], 1)
        return chart._replace(bend=self._with_shapes(chart.bend, shapes))

    def image(self, params: Float[Array, " P"]) -> Float[Array, " pixel"]:
        """The model on the pixels."""
        return super().image(self._by_ellipticity(params))

    def normal(self, params: Float[Array, " P"], problem: Problem) -> Normal:
        """Cost, gradient and Gauss-Newton matrix, from those of `GaussianGroup`."""
        normal = super().normal(self._by_ellipticity(params), problem)
        basis = jax.jacfwd(self._by_ellipticity)(params)
        return normal._replace(
            gradient=basis.T @ normal.gradient, matrix=basis.T @ normal.matrix @ basis
        )

    def _by_ellipticity(self, params: Float[Array, " P"]) -> Float[Array, " P"]:
        """The parameters of `GaussianGroup`."""
        _, _, _, log_a, log_b, theta = self._sources(params).T
        e = log_a - log_b
        shape = [(log_a + log_b) / 2, e * jnp.cos(2 * theta), e * jnp.sin(2 * theta)]
        return self._with_shapes(params, jnp.stack(shape, 1))


def source_quadratics(source: Float[Array, " 6"]) -> Float[Array, "6 6"]:
    """Coefficients of one source's Jacobian columns: see `GaussianGroup._quadratics`."""
    peak, x0, y0 = source[:3]
    xx, xy, yy = precision(source[3:])
    zero, one = jnp.zeros_like(peak), jnp.ones_like(peak)
    rows = [
        jnp.stack([one, zero, zero, zero, zero, zero]),
        peak * jnp.stack([-xx * x0 - xy * y0, xx, xy, zero, zero, zero]),
        peak * jnp.stack([-xy * x0 - yy * y0, xy, yy, zero, zero, zero]),
    ]
    for dxx, dxy, dyy in precision_slopes(source[3:]):
        constant = dxx * x0**2 + 2 * dxy * x0 * y0 + dyy * y0**2
        slopes = (-2 * (dxx * x0 + dxy * y0), -2 * (dxy * x0 + dyy * y0))
        rows.append(-0.5 * peak * jnp.stack([constant, *slopes, dxx, 2 * dxy, dyy]))
    return jnp.stack(rows)


def shape_chart(
    source: Float[Array, " 6"],
    slope: Float[Array, " 6"],
    lower: Float[Array, ""],
    upper: Float[Array, ""],
) -> tuple[Float[Array, "3 3"], Float[Array, " 3"], Bool[Array, ""], Float[Array, ""]]:
    """Chart of one source's shape.

    Returns d(log size, e1, e2)/d(log major, log minor, turn), the values of those coordinates,
    whether the turn is frozen, and its bend.

    With one sigma on a bound a turn moves (e1, e2) on a circle of radius e, which adds minus the
    slope along the radius, over e, to the second derivative.
    """
    ellipticity = source[4:]
    e = jnp.sqrt(jnp.sum(ellipticity**2))
    circular = e < 1e-9
    axis = jnp.where(circular, -slope[4:], ellipticity)
    length = jnp.sqrt(jnp.sum(axis**2))
    axis = jnp.where(length > 0, axis / jnp.where(length > 0, length, 1), jnp.array([1.0, 0.0]))
    cos, sin = axis.astype(source.dtype)
    half, zero = 0.5 * jnp.ones_like(cos), jnp.zeros_like(cos)
    block = jnp.stack(
        [
            jnp.stack([half, half, zero]),
            jnp.stack([cos, -cos, -sin]),
            jnp.stack([sin, -sin, cos]),
        ]
    )
    value = jnp.stack([source[3] + e / 2, source[3] - e / 2, zero])
    on_bound = _on_bound(value, lower, upper)
    inward = jnp.maximum(-(slope[4] * cos + slope[5] * sin), 0)
    bend = jnp.where(on_bound & ~circular, inward / jnp.where(circular, 1, e), 0)
    return block, value, circular & on_bound, bend


def _on_bound(
    value: Float[Array, " 3"], lower: Float[Array, ""], upper: Float[Array, ""]
) -> Bool[Array, ""]:
    """Whether log minor is on its lower or log major on its upper bound."""
    slack = 8 * jnp.finfo(value.dtype).eps * (1 + jnp.abs(value))
    return (value[1] <= lower + slack[1]) | (value[0] >= upper - slack[0])


def move_shape(
    shape: Float[Array, " 3"],
    block: Float[Array, "3 3"],
    value: Float[Array, " 3"],
    step: Float[Array, " 3"],
    lower: Float[Array, ""],
    upper: Float[Array, ""],
) -> Float[Array, " 3"]:
    """The shape (log size, e1, e2) after a local step.

    Inside the bounds a step is straight in (log size, e1, e2), smooth through the circle, then
    clipped. On a bound it changes the axes and turns them, so that the bound is kept.
    """
    straight = shape + block @ step
    e = jnp.sqrt(jnp.sum(straight[1:] ** 2))
    major = jnp.clip(straight[0] + e / 2, lower, upper)
    minor = jnp.clip(straight[0] - e / 2, lower, upper)
    shrink = jnp.where(e > 0, (major - minor) / jnp.where(e > 0, e, 1), 1)
    clipped = jnp.stack([(major + minor) / 2, straight[1] * shrink, straight[2] * shrink])
    return jnp.where(_on_bound(value, lower, upper), _turned(block, value, step), clipped)


def _shape_path(
    shape: Float[Array, " 3"],
    block: Float[Array, "3 3"],
    value: Float[Array, " 3"],
    step: Float[Array, " 3"],
    lower: Float[Array, ""],
    upper: Float[Array, ""],
) -> Float[Array, " 3"]:
    """As `move_shape`, without clipping."""
    on_bound = _on_bound(value, lower, upper)
    return jnp.where(on_bound, _turned(block, value, step), shape + block @ step)


def _turned(
    block: Float[Array, "3 3"], value: Float[Array, " 3"], step: Float[Array, " 3"]
) -> Float[Array, " 3"]:
    """The shape after its two axes were changed and turned by a local step."""
    major, minor = value[0] + step[0], value[1] + step[1]
    towards = (value[0] - value[1]) * block[1:, 0] + step[2] * block[1:, 2]
    square = jnp.sum(towards**2)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    axis = jnp.where(square > 0, towards / length, block[1:, 0])
    return jnp.concatenate([(major + minor)[None] / 2, (major - minor) * axis])
