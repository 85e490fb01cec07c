"""The noise of a map: how strong it is, and how it is correlated from pixel to pixel."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from astropy.stats import sigma_clip
from numpy.typing import NDArray
from scipy import fft, ndimage

_CLIP_SIGMA = 3.0
_CLIP_ITERATIONS = 10
_LOCAL_ROUNDS = 3
_BLOCKS = 10  # along the standard deviation of the bell that local noise is told under
_ENOUGH = 30_000  # values that tell a standard deviation to 0.5 %
_HUGE = 1e12  # times the squared noise of the image: what no clipping leaves
_LEAST_NEAR = 1e-3  # share of valid pixels round a pixel that its local noise is told from
_SIGNIFICANT = 4.0  # standard deviations that a correlation must stand out by
_LEAST_CORRELATION = 0.03  # what is less is taken for none
_TAPER = 0.25  # of the reach, over which the correlation fades to 0
_LEAST_SHARE = 0.05  # of the pixels of a map that must be free of sources
_CHUNK = 32  # blocks whose sums are transformed at a time


@dataclass(frozen=True, eq=False)
class Correlation:
    """Correlation of the noise of two pixels by their offset, at the centre 1.

    `values` is (2 L + 1, 2 L + 1); white noise has L = 0.
    """

    values: NDArray[np.float64]

    @classmethod
    def white(cls) -> "Correlation":
        """Noise that is independent from pixel to pixel."""
        return cls(np.ones((1, 1)))

    @property
    def reach(self) -> int:
        """The largest offset L along an axis with a correlation."""
        return len(self.values) // 2

    @property
    def is_white(self) -> bool:
        """Whether there is no correlation at all."""
        return self.reach == 0

    @property
    def fwhm_pix(self) -> float:
        """Full width of the correlation at half its maximum, 0 for white noise."""
        profile = np.append(_radial_profile(self.values), 0.0)
        below = int(np.argmax(profile < 0.5))
        inner, outer = profile[below - 1], profile[below]
        return 0.0 if self.is_white else float(2 * (below - 1 + (inner - 0.5) / (inner - outer)))


def clipped_rms(data: NDArray[np.float64]) -> float:
    """Standard deviation of Gaussian noise, measured on the pixels that 3-sigma clipping leaves.

    The pixels are clipped about their median. What the clipping takes from the noise itself is made
    up for (`clipped_share`), so that noise without sources has its own standard deviation.

    Parameters
    ----------
    data
        Image, NaN where blank; high-pass filtered, if the background has structure.
    """
    clipped = sigma_clip(
        data[np.isfinite(data)],
        sigma=_CLIP_SIGMA,
        maxiters=_CLIP_ITERATIONS,
        masked=False,
        axis=0,  # astropy's faster way
    )
    kept = clipped[np.isfinite(clipped)]
    return float(np.std(kept)) / clipped_share(_CLIP_SIGMA, _CLIP_ITERATIONS)


@functools.cache
def clipped_share(clip: float, iterations: int) -> float:
    r"""Share of the standard deviation of Gaussian noise that iterated clipping leaves.

    Every iteration keeps what lies within `clip` times the present standard deviation s, in units
    of the noise, so that s becomes that of a Gaussian truncated at a = clip s,

    .. math:: s^2 = 1 - \frac{2 a \varphi(a)}{2 \Phi(a) - 1} .

    It converges at once: to 0.985 for `clip` = 3.
    """
    share = 1.0
    for _ in range(iterations):
        a = clip * share
        density = math.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
        share = math.sqrt(1 - 2 * a * density / math.erf(a / math.sqrt(2)))
    return share


def local_rms(
    image: NDArray[np.float64], valid: NDArray[np.bool_], width_pix: float
) -> NDArray[np.float64]:
    """Standard deviation of noise round every pixel (ny, nx), under a bell of a standard deviation.

    Pixels further out than 3 standard deviations, local ones, are left out, and what that takes
    from the noise is made up for. Where no pixel is near, it is that of the whole image.

    Parameters
    ----------
    image, valid
        (ny, nx) noise about 0, and where it is.
    width_pix
        Standard deviation of the bell, pixels.
    """
    whole = clipped_rms(_some(image[valid]))
    if not whole > 0:
        return np.full(image.shape, whole)
    side = max(int(width_pix / _BLOCKS), 1)
    power = _in_blocks(image, valid, whole, side)
    local = np.ones(power.shape[1:])
    for _ in range(_LOCAL_ROUNDS):
        kept = power < ((_CLIP_SIGMA * local) ** 2).astype(np.float32)
        share = _under_bell(np.count_nonzero(kept, axis=0) / side**2, width_pix / side)
        square = np.sum(power * kept, axis=0, dtype=float) / side**2
        square = _under_bell(square, width_pix / side)
        known = share > _LEAST_NEAR
        variance = np.divide(square, share, out=np.ones_like(square), where=known)
        deviation = np.sqrt(np.maximum(variance, 0))  # sums of boxes may round below 0
        local = np.where(known, deviation / clipped_share(_CLIP_SIGMA, 1), 1.0)
    return whole * _between_blocks(local, side, image.shape)


def _some(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """As many values at random as tell their scatter, all if there are no more."""
    if len(values) <= _ENOUGH:
        return values
    return values[np.random.default_rng(0).integers(len(values), size=_ENOUGH)]


def _in_blocks(
    image: NDArray[np.float64], valid: NDArray[np.bool_], unit: float, side: int
) -> NDArray[np.float32]:
    """Squares of an image's pixels (pixel, y, x) by blocks; huge where there is no valid pixel."""
    rows, columns = (-(-length // side) for length in image.shape)
    power = np.full((rows * side, columns * side), _HUGE, np.float32)
    inside = power[: image.shape[0], : image.shape[1]]
    with np.errstate(over="ignore"):
        np.multiply(image, 1 / unit, out=inside, casting="same_kind", where=valid)
        np.square(inside, out=inside)
    np.minimum(inside, _HUGE, out=inside)
    blocks = power.reshape(rows, side, columns, side).transpose(1, 3, 0, 2)
    return np.ascontiguousarray(blocks).reshape(side**2, rows, columns)


def _between_blocks(
    blocks: NDArray[np.float64], side: int, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """An image of what varies slowly, from its means over squares: interpolate between centres."""
    for axis in (1, 0):
        place = np.clip((np.arange(shape[axis]) + 0.5) / side - 0.5, 0, blocks.shape[axis] - 1)
        below = np.minimum(place.astype(int), max(blocks.shape[axis] - 2, 0))
        above = np.minimum(below + 1, blocks.shape[axis] - 1)
        share = place - below
        lower, upper = blocks.take(below, axis), blocks.take(above, axis)
        upper -= lower
        upper *= share if axis == 1 else share[:, None]
        blocks = np.add(lower, upper, out=lower)
    return blocks


def _under_bell(image: NDArray[np.float64], width_pix: float) -> NDArray[np.float64]:
    """Mean of an image under a bell: that of a box, three times; 0 beyond the edges.

    Three boxes of the side s have the variance (s^2 - 1) / 4.
    """
    side = max(2 * round(math.sqrt(width_pix**2 + 0.25) - 0.5) + 1, 3)
    for _ in range(3):
        image = ndimage.uniform_filter(image, side, mode="constant")
    return image


def measure_correlation(noise: NDArray[np.float64], reach: int) -> Correlation:
    r"""Autocorrelation of an image of noise, blank (NaN) where it is none.

    .. math:: \rho(d) = \frac{\sum_x m(x)\,m(x+d)\,n(x)\,n(x+d)}{\sum_x m(x)\,m(x+d)} / \rho_0

    with m = 1 where there is noise. It is kept up to the last radius at which its mean over the
    angle stands out of its own scatter, :math:`\sqrt{\sum \rho^2 / N}` for N pixels
    (Bartlett 1946), and fades to 0 there. White noise, and images with too few pixels or the same
    value in all, give `Correlation.white`.

    Parameters
    ----------
    noise
        (ny, nx) image, in any unit.
    reach
        Largest offset, pixels.
    """
    valid = np.isfinite(noise)
    reach = min(reach, min(noise.shape) // 4)
    if valid.mean() < _LEAST_SHARE or reach < 1:
        return Correlation.white()
    centred = np.where(valid, noise - np.mean(noise[valid]), 0.0)
    pairs = _autocorrelation(valid.astype(float), reach)
    covariance = _autocorrelation(centred, reach) / np.maximum(pairs, 1)
    variance = covariance[reach, reach]
    if not variance > 0:
        return Correlation.white()
    rho = covariance / variance
    scatter = math.sqrt(np.sum(rho**2) / valid.sum())
    profile = _radial_profile(rho)
    seen = np.abs(profile) > max(_SIGNIFICANT * scatter, _LEAST_CORRELATION)
    last = int(np.max(np.flatnonzero(seen), initial=0))
    if last == 0:
        return Correlation.white()
    return _faded(rho, last)


def _autocorrelation(image: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Sums of products of pixels that are apart by up to `reach`, (2 reach + 1, 2 reach + 1)."""
    size = [fft.next_fast_len(side + reach, real=True) for side in image.shape]
    power = np.abs(fft.rfft2(image, size)) ** 2
    sums = np.roll(fft.irfft2(power, size), (reach, reach), (0, 1))
    return np.asarray(sums[: 2 * reach + 1, : 2 * reach + 1])


def _radii(reach: int) -> NDArray[np.float64]:
    offset = np.arange(-reach, reach + 1)
    return np.hypot(offset[:, None], offset)


def _radial_profile(rho: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the angle, by the radius in whole pixels, up to the reach."""
    ring = np.rint(_radii(len(rho) // 2)).astype(int)
    inside = ring <= len(rho) // 2
    return np.bincount(ring[inside], rho[inside]) / np.bincount(ring[inside])


def _faded(rho: NDArray[np.float64], last: int) -> Correlation:
    """The correlation up to a radius, and fading to 0 beyond."""
    reach = len(rho) // 2
    end = min(math.ceil(last * (1 + _TAPER)) + 1, reach)
    fade = np.clip((end + 1 - _radii(end)) / max(end + 1 - last, 1), 0, 1)
    middle = slice(reach - end, reach + end + 1)
    return Correlation(rho[middle, middle] * fade)


def covariance_of_sums(
    weights: NDArray[np.float64], correlation: Correlation
) -> NDArray[np.float64]:
    r"""Covariance of weighted sums over noise of unit variance.

    .. math:: M_{pq} = \sum_{xy} w_p(x)\,\rho(x - y)\,w_q(y)

    Parameters
    ----------
    weights
        (n, p, ny, nx): p sums over each of n windows.
    correlation
        Of the noise.

    Returns
    -------
    ndarray (n, p, p)
        Computed in Fourier space, where the correlation is a product; what power of it is negative,
        as it is measured, counts as none.
    """
    if correlation.is_white:
        flat = weights.reshape(*weights.shape[:2], -1)
        return flat @ flat.swapaxes(1, 2)
    reach = correlation.reach
    sides = (fft.next_fast_len(side + reach, real=True) for side in weights.shape[2:])
    shape = tuple(max(side, 2 * reach + 1) for side in sides)
    root = _amplitudes(correlation, shape)
    out = np.empty((*weights.shape[:2], weights.shape[1]))
    for first in range(0, len(weights), _CHUNK):
        some = slice(first, first + _CHUNK)
        waves = fft.rfft2(weights[some], shape) * root
        flat = waves.reshape(*waves.shape[:2], -1)
        parts = np.concatenate([flat.real, flat.imag], -1)
        out[some] = parts @ parts.swapaxes(1, 2)
    return out


@functools.lru_cache(maxsize=64)
def _amplitudes(correlation: Correlation, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Roots of the power of the noise, per pixel, on the modes of a real image of a shape."""
    reach = correlation.reach
    kernel = np.zeros(shape)
    kernel[: 2 * reach + 1, : 2 * reach + 1] = correlation.values
    power = fft.rfft2(np.roll(kernel, (-reach, -reach), (0, 1))).real
    halves = np.full(power.shape[1], 2.0)  # each column but these stands for its mirror image too
    halves[0] = 1.0
    if shape[1] % 2 == 0:
        halves[-1] = 1.0
    return np.asarray(np.sqrt(np.maximum(power, 0) * halves / kernel.size))
