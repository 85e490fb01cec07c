"""Radial profiles of sources that are no Gaussians.

A disc, a plateau or a source with wings leaves something of itself when a Gaussian is fitted to it,
in rings about its centre. A companion leaves something on one side. What the first explains of a
residual is no evidence for the second.
"""

import numpy as np
from numpy.typing import NDArray

from hyperjax.spectral import modes

_DEGREES = (2, 3, 4)  # those of 0 and 1 are the peak and the size


def explained_by_profiles(
    data: NDArray[np.float64],
    weight: NDArray[np.float64],
    side: int,
    sources: NDArray[np.float64],
    which: NDArray[np.int_],
) -> float:
    r"""Chi^2 that other radial profiles of some sources would take from what fits of all have left.

    A source on ellipses of the shape S of a Gaussian with another profile is, in Fourier space, the
    Gaussian times a series in :math:`q = (2 \pi)^2 k^T S k / 2`: that of the polar shapelets
    without an angle (Refregier 2003, MNRAS 338, 35). Of its terms of degree 2 to 4 counts what the
    columns of the Jacobian of all sources do not hold.

    Parameters
    ----------
    data
        (2, mode) real and imaginary parts of the modes (`hyperjax.spectral.modes`) of a whitened
        window, about its centre.
    weight
        (mode,) factor of the transform of a source.
    side
        Of the window, pixels.
    sources
        (k, 6) peak, position, sigmas and angle of the sources as they were fitted, in the window.
    which
        Those of them whose profiles may be others.
    """
    used = weight > 0
    kx, ky = (k[used] for k in _wave_numbers(side))
    middle = (side - 1) / 2
    left = data[0, used] + 1j * data[1, used]
    columns, profiles = [], []
    for index, (peak, x, y, major, minor, theta) in enumerate(sources):
        along = 2 * np.pi * (kx * np.cos(theta) + ky * np.sin(theta))
        across = 2 * np.pi * (ky * np.cos(theta) - kx * np.sin(theta))
        q = ((major * along) ** 2 + (minor * across) ** 2) / 2
        phase = 2 * np.pi * (kx * (x - middle) + ky * (y - middle))
        wave = weight[used] * 2 * np.pi * major * minor * np.exp(-q - 1j * phase)
        left -= peak * wave
        factors = (1, 1j * along, 1j * across, along**2, along * across, across**2)
        columns += [factor * wave for factor in factors]
        profiles += [q**degree * wave for degree in _DEGREES] if index in which else []
    matrix = _as_real(np.array(columns + profiles))
    basis = np.linalg.qr((matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).T)[0]
    return float(np.sum((_as_real(left) @ basis[:, len(columns) :]) ** 2))


def _wave_numbers(side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wave numbers (mode,) along x and along y, cycles per pixel."""
    kx, ky = modes(side)
    return np.tile(kx, len(ky)), np.repeat(ky, len(kx))


def _as_real(values: NDArray[np.complex128]) -> NDArray[np.float64]:
    """Real parts and imaginary parts, one after the other."""
    return np.concatenate([values.real, values.imag], axis=-1)
