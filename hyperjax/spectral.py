"""The Fourier-space model: Gaussians in noise of any power spectrum.

Stationary noise of the power spectrum P has a diagonal covariance in Fourier space, where Gaussians
are known in closed form. A group of sources is fitted there to the Fourier transform of a whitened
cutout, with the weights P^-1/2. A smooth background is noise at low wave numbers: there is no
polynomial.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from hyperjax.models import (
    CompilerOptions,
    GaussianGroup,
    Normal,
    Problem,
    Scale,
    monomials,
    precision,
    precision_slopes,
)

_EVEN = [power for power in monomials(4) if sum(power) % 2 == 0]
_ODD = [power for power in monomials(4) if sum(power) % 2 == 1]


def modes(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Wave numbers (kx, ky), cycles per pixel, of the modes of a window of even `side`.

    kx (side/2,) are not negative: real images have the conjugate at -k. The Nyquist terms, whose
    phase is lost, are left out: ky (side - 1,).
    """
    half = side // 2
    return np.arange(half) / side, np.arange(1 - half, half) / side


@dataclass(frozen=True)
class SpectralGroup(GaussianGroup):
    r"""Elliptical Gaussians, fitted to the Fourier modes of a whitened window.

    The parameters, bounds and charts are those of `GaussianGroup`; there is no polynomial
    (`order` is -1) and the loss is linear. `Problem.data` holds the real parts of all `modes` of
    the window, rows (ky) first, then the imaginary parts, with the window's centre as the origin;
    `Problem.weight` (mode,) is what the transform of an image is multiplied by to have data of unit
    variance, and 0 for modes that are not used.

    In scaled coordinates a Gaussian of the covariance S and of unit peak at x has the transform

    .. math:: 2 \pi h^2 |S|^{1/2} \exp(-\kappa^T S \kappa / 2 - i \kappa^T x),

    with :math:`\kappa = 2 \pi k h` and h = `Grid.half`. A column of the Jacobian is that times a
    quadratic in kappa, so that moments over the modes give the normal equations.
    """

    @property
    def compiler_options(self) -> CompilerOptions:
        """XLA's older kernels: as fast for this model, and compiled in half the time."""
        return {"xla_cpu_use_fusion_emitters": False}

    @property
    def degree(self) -> int:
        """There are no moments of the weights alone."""
        return -1

    def scale(self, problem: Problem) -> Scale:
        """That of the problem as it is: whitened data are in units of their noise."""
        zero, one = jnp.zeros_like(problem.f_scale), jnp.ones_like(problem.f_scale)
        return Scale(zero, one, one, 2 * jnp.sum(problem.weight > 0))

    def scaled(self, problem: Problem, scale: Scale) -> Problem:
        """The problem as it is."""
        return problem

    def prepare(self, problem: Problem) -> Problem:
        """Nothing is computed once per problem."""
        return problem

    def image(self, params: Float[Array, " P"]) -> Float[Array, " mode"]:
        """The model of the data, but for the weights: real parts, then imaginary parts."""
        sources = self._sources(params)
        real, imaginary = self._waves(sources)
        return jnp.concatenate([sources[:, 0] @ real, sources[:, 0] @ imaginary])

    def cost(self, params: Float[Array, " P"], problem: Problem) -> Float[Array, ""]:
        """The cost alone, with derivatives of any order."""
        weight = jnp.tile(problem.weight, 2)
        return 0.5 * jnp.sum((problem.data - weight * self.image(params)) ** 2)

    def normal(self, params: Float[Array, " P"], problem: Problem) -> Normal:
        """Cost, gradient and Gauss-Newton matrix, from moments over the modes.

        With u_k the weighted transform of source k at unit peak, the moments of the real part of
        conj(u_k) u_l over even monomials of kappa, and of its imaginary part over odd ones, give
        the matrix; with the residual in the place of u_l, the gradient; with it in both, the cost.
        """
        sources = self._sources(params)
        real, imaginary = lax.optimization_barrier(self._waves(sources))
        data_real, data_imaginary = jnp.split(problem.data, 2)
        real, imaginary = lax.optimization_barrier(
            tuple(
                jnp.concatenate([problem.weight * unit, (data - problem.weight * model)[None]])
                for unit, model, data in (
                    (real, sources[:, 0] @ real, data_real),
                    (imaginary, sources[:, 0] @ imaginary, data_imaginary),
                )
            )
        )
        first, second = np.triu_indices(self.slots + 1)  # the residual is the last one
        apart = first != second
        left, right = first[apart], second[apart]
        by_even, by_odd = lax.optimization_barrier(
            (
                real[first] * real[second] + imaginary[first] * imaginary[second],
                real[left] * imaginary[right] - imaginary[left] * real[right],
            )
        )
        over_even, over_odd = self._monomials(params.dtype)
        alone = jnp.zeros((self.slots + 1, len(_ODD)), params.dtype)
        odd = jnp.concatenate([by_odd @ over_odd, alone])
        place = np.where(apart, np.cumsum(apart) - 1, len(left) + first)
        moments = jnp.concatenate([by_even @ over_even, odd[place]], 1)

        index, sign = _product_table()
        columns = jax.vmap(_transform_quadratics)(sources)
        among = second < self.slots
        products = sign * moments[among][:, index]
        upper = jnp.einsum(
            "pim,pmn,pjn->pij", columns[first[among]], products, columns[second[among]]
        )[self._pair_index]
        below = np.tri(self.slots, k=-1, dtype=bool)[:, :, None, None]
        blocks = jnp.where(below, upper.swapaxes(2, 3), upper)
        matrix = blocks.transpose(0, 2, 1, 3).reshape(self.size, self.size)

        pulls = sign[:, 0] * moments[~among][:, index[:, 0]]
        gradient = -jnp.einsum("kim,km->ki", columns, pulls[:-1]).ravel()
        chi2 = pulls[-1, 0]
        return Normal(0.5 * chi2, chi2, jnp.zeros_like(chi2), gradient, matrix)

    def _kappa(self) -> tuple[np.ndarray, np.ndarray]:
        """Scaled wave numbers (mode,) along x and along y."""
        kx, ky = self._axes()
        return np.tile(kx, len(ky)), np.repeat(ky, len(kx))

    def _axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Scaled wave numbers of the columns and of the rows of modes."""
        kx, ky = modes(self.grid.shape[0])
        scale = 2 * np.pi * self.grid.half
        return scale * kx, scale * ky

    def _waves(
        self, sources: Float[Array, "slot 6"]
    ) -> tuple[Float[Array, "slot mode"], Float[Array, "slot mode"]]:
        """Real and imaginary parts of the transforms of the sources at unit peak."""
        kx, ky = (jnp.asarray(k, sources.dtype) for k in self._kappa())
        columns, rows = (jnp.asarray(k, sources.dtype) for k in self._axes())

        def size(source: Float[Array, " 6"]) -> Float[Array, " mode"]:
            xx, xy, yy = precision(-source[3:])  # of the inverse shape: the covariance
            volume = 2 * np.pi * self.grid.half**2 * jnp.exp(2 * source[3])
            return volume * jnp.exp(-0.5 * (xx * kx**2 + 2 * xy * kx * ky + yy * ky**2))

        along, across = sources[:, 1, None] * columns, sources[:, 2, None] * rows
        cos_x, sin_x, cos_y, sin_y = (
            part(k) for k in (along, across) for part in (jnp.cos, jnp.sin)
        )
        turns = jnp.concatenate([jnp.stack([cos_y, -sin_y], 2), jnp.stack([sin_y, cos_y], 2)], 1)
        phases = turns @ jnp.stack([cos_x, sin_x], 1)  # a product, for which they are done once
        real, imaginary = jnp.split(phases.reshape(len(sources), -1), 2, axis=1)
        sizes = jax.vmap(size)(sources)
        return sizes * real, -sizes * imaginary

    def _monomials(
        self, dtype: jnp.dtype
    ) -> tuple[Float[Array, "mode even"], Float[Array, "mode odd"]]:
        """Monomials of the scaled wave numbers, of even and of odd degree up to 4."""
        kx, ky = self._kappa()
        even, odd = (np.stack([kx**a * ky**b for a, b in powers], 1) for powers in (_EVEN, _ODD))
        return jnp.asarray(even, dtype), jnp.asarray(odd, dtype)


def _product_table() -> tuple[np.ndarray, np.ndarray]:
    """Which moment each product of two monomials (6, 6) is, even ones first, and its sign.

    With the factor -i that belongs to the odd monomials: conj(f) g of an even f and an odd g turns
    the real part into the imaginary part, the other way round into minus it.
    """
    powers = monomials(2)
    index, sign = np.zeros((6, 6), int), np.ones((6, 6))
    for m, (a, b) in enumerate(powers):
        for n, (c, d) in enumerate(powers):
            index[m, n] = (_EVEN + _ODD).index((a + c, b + d))
            if (a + b) % 2 == 1 and (c + d) % 2 == 0:
                sign[m, n] = -1
    return index, sign


def _transform_quadratics(source: Float[Array, " 6"]) -> Float[Array, "6 6"]:
    """Coefficients of the Jacobian's columns over 1, -i kx, -i ky, kx kx, kx ky, ky ky."""
    peak = source[0]
    zero, one = jnp.zeros_like(peak), jnp.ones_like(peak)
    rows = [
        jnp.stack([one, zero, zero, zero, zero, zero]),
        jnp.stack([zero, peak, zero, zero, zero, zero]),
        jnp.stack([zero, zero, peak, zero, zero, zero]),
    ]
    constants = (2 * peak, zero, zero)
    for constant, (dxx, dxy, dyy) in zip(constants, -precision_slopes(-source[3:]), strict=True):
        rows.append(
            jnp.stack([constant, zero, zero, *(-0.5 * peak * jnp.stack([dxx, 2 * dxy, dyy]))])
        )
    return jnp.stack(rows)
