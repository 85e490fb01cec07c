"""The power spectrum of a map's noise: measured, and taken out of the map.

Images are of noise in units of its local standard deviation, 0 where the map is blank. Power is
per pixel: white noise of unit variance has the power 1 at every wave number. Wave numbers are in
cycles per pixel.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from hyperjax.noise import Correlation
from hyperjax.runtime import cpu_threads

Beam = tuple[float, float, float]
"""Covariance of a Gaussian beam: of x, of x and y, and of y, square pixels."""

_SEGMENTS = 128, 64, 32  # sides of the squares that the spectrum is averaged over: the largest fits
_LEAST_SEGMENTS = 1.5  # of them along the shorter side of the map
_RING_OCTAVES = 0.5  # standard deviation of the bell that power is averaged over in rings
_STANDING_OUT = 4.0  # power of a mode over that of its ring; random sources and noise reach 3
_FLOOR = 1e-4  # of the peak of the power
_OUTLYING = 1.5  # power of a segment, of the median's, from which it holds more than noise
_SCATTER = 8.0  # what is added to that where there are few modes, over the root of their number
_DIVIDED = 500_000  # pixels of an image whose transform is divided over threads
_MOST_SEGMENTS = 1000  # that are transformed: more would tell nothing new
_FILLED = 0.5  # least valid share of a segment, tapered
_MOST_FITTED = 0.8  # share of the power of a mode that the fits may have taken with them
_AVERAGED = 200.0  # measurements that the power of each mode should be the mean of
_LEAST_WIDTH = 0.7  # standard deviation, in modes, of what they are averaged under


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Power spectrum of the stationary noise of a filtered map.

    Attributes
    ----------
    power
        (side, side) power of the noise after the filter, on the modes of a square in FFT order.
    box
        Side of the box whose mean the filter subtracts (`hyperjax.detection.high_pass`), pixels; 0
        where there is no filter.
    """

    power: NDArray[np.float64]
    box: int

    @classmethod
    def white(cls, box: int) -> "Spectrum":
        """Noise of unit variance, independent from pixel to pixel."""
        return cls(np.ones((2, 2)), box)

    def in_rings(self) -> "Spectrum":
        """The same in all directions, averaged under a bell over the octaves of the wave number."""
        octave, middle, shares = _rings(len(self.power))
        means = shares @ self.power.ravel()
        return Spectrum(np.exp(np.interp(octave, middle, np.log(means))), self.box)

    @functools.cached_property
    def stands_out(self) -> bool:
        """Whether the power of a mode is far above that of its ring (`in_rings`)."""
        return bool(np.max(self.power / self.in_rings().power) > _STANDING_OUT)

    def whitening(self, ky: NDArray[np.float64], kx: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the modes (ky, kx) of a filtered image are multiplied by: power^-1/2."""
        return between_modes(self.power**-0.5, ky, kx)

    def transfer(self, ky: NDArray[np.float64], kx: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the modes of an image are multiplied by that has not been filtered."""
        return self.high_pass(ky, kx) * self.whitening(ky, kx)

    def correlation(self, box: int, reach: int) -> Correlation:
        """That of the noise after a filter with another box, for offsets up to `reach`.

        The box is not larger than its own: what one takes away another cannot bring back.
        """
        side = len(self.power)
        k = fft.fftfreq(side)
        there, wanted = self.high_pass(k, k), replace(self, box=box).high_pass(k, k)
        passed = np.divide(wanted, there, out=np.ones_like(there), where=there > 0)
        values = fft.fftshift(fft.ifft2(self.power * passed**2).real)
        middle, reach = side // 2, min(reach, side // 2 - 1)
        near = slice(middle - reach, middle + reach + 1)
        return Correlation(values[near, near] / values[middle, middle])

    def high_pass(self, ky: NDArray[np.float64], kx: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the filter multiplies the modes of an image by."""
        return np.asarray(1 - _box_mean(ky, self.box)[:, None] * _box_mean(kx, self.box))


@functools.lru_cache(maxsize=4)
def _rings(
    side: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Octave (side, side) of each mode, those of rings, and the shares (ring, mode) in them."""
    k = fft.fftfreq(side)
    octave = np.log2(np.maximum(side * np.hypot(k[:, None], k), 1))
    middle = np.arange(0, octave.max() + _RING_OCTAVES, _RING_OCTAVES)
    shares = np.exp(-(((octave.ravel() - middle[:, None]) / _RING_OCTAVES) ** 2) / 2)
    return octave, middle, shares / shares.sum(axis=1, keepdims=True)


def transform_of_beam(
    beam: Beam, ky: NDArray[np.float64], kx: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Transform (ky, kx) of a Gaussian beam of unit peak about its centre."""
    xx, xy, yy = beam
    ky = ky[:, None]
    damping = np.exp(-2 * np.pi**2 * (xx * kx**2 + 2 * xy * kx * ky + yy * ky**2))
    return np.asarray(2 * np.pi * math.sqrt(xx * yy - xy**2) * damping)


def between_modes(
    values: NDArray[np.float64], ky: NDArray[np.float64], kx: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Interpolate (ky, kx) linearly between the values (side, side) on the modes of a square."""
    for k in (ky, kx):
        place = k * len(values)
        below = np.floor(place).astype(int)
        share = (place - below)[:, None]
        lower, upper = (values[(below + step) % len(values)] for step in (0, 1))
        values = (lower + share * (upper - lower)).T  # next the other axis
    return np.ascontiguousarray(values)


def _box_mean(k: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Transform of the mean over `side` pixels: Dirichlet's kernel."""
    if side == 0:
        return np.zeros_like(k)
    return np.asarray(np.sinc(k * side) / np.sinc(k))


def segment_side(shape: tuple[int, ...]) -> int:
    """Side of the segments for a map, 0 if it is too small."""
    return next((side for side in _SEGMENTS if min(shape) >= _LEAST_SEGMENTS * side), 0)


class _Room(NamedTuple):
    """An image in the middle of its own mirror images, as it is transformed."""

    before: int
    shape: tuple[int, int]
    total: tuple[int, int]

    @property
    def modes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Wave numbers (ky, kx) of the transform of a real image."""
        return fft.fftfreq(self.total[0]), fft.rfftfreq(self.total[1])


class Waves(NamedTuple):
    """The transform of an image of filtered noise, which is continued by its mirror image.

    Attributes
    ----------
    room
        Where the image is.
    modes
        The modes of all of the room.
    """

    room: _Room
    modes: NDArray[np.complex128]

    @classmethod
    def of(cls, image: NDArray[np.float64]) -> "Waves":
        """Transform an image (ny, nx), with room for the reach of the whitening."""
        ny, nx = image.shape
        before = min(max(segment_side(image.shape) // 2, 1), ny - 1, nx - 1)
        total = tuple(fft.next_fast_len(side + 2 * before, real=True) for side in (ny, nx))
        around = [
            (before, whole - before - side) for side, whole in zip(image.shape, total, strict=True)
        ]
        padded = np.pad(image, around, mode="symmetric")
        room = _Room(before, (ny, nx), (total[0], total[1]))
        return cls(room, np.asarray(fft.rfft2(padded, workers=_threads(padded.size))))

    def whitened(self, spectrum: Spectrum) -> NDArray[np.float64]:
        """The image made white."""
        return self._image(_whitener(spectrum, self.room))

    def matched(self, spectrum: Spectrum, beam: Beam) -> tuple[NDArray[np.float64], float]:
        """Signal-to-noise ratio of a point source at every pixel, and the noise of its peak.

        The matched filter of a source in noise of a known spectrum (Turin 1960, IRE Trans. Inf.
        Theory 6, 311): the whitened image, correlated with the whitened `beam`.
        """
        template, norm = _template(spectrum, self.room, beam)
        return self._image(template) / norm, 1 / norm

    def _image(self, factor: NDArray[np.float64]) -> NDArray[np.float64]:
        """The image with its modes multiplied by a factor."""
        before, (ny, nx), total = self.room
        image = fft.irfft2(self.modes * factor, total, workers=_threads(total[0] * total[1]))
        return np.asarray(image[before : before + ny, before : before + nx])


def _threads(pixels: int) -> int:
    """Threads that transform an image: one, where more would take longer to wake than they save."""
    return cpu_threads() if pixels >= _DIVIDED else 1


@functools.lru_cache(maxsize=2)
def _whitener(spectrum: Spectrum, room: _Room) -> NDArray[np.float64]:
    return spectrum.whitening(*room.modes)


@functools.lru_cache(maxsize=2)
def _template(spectrum: Spectrum, room: _Room, beam: Beam) -> tuple[NDArray[np.float64], float]:
    """Whitening, times the transform of the whitened source at unit peak; its norm."""
    (ky, kx), whitener = room.modes, _whitener(spectrum, room)
    template = transform_of_beam(beam, ky, kx) * spectrum.high_pass(ky, kx) * whitener
    power = np.sum(template**2 * stands_for(room.total[1]))
    norm = math.sqrt(power / (room.total[0] * room.total[1]))
    return template * whitener, norm


def measure_spectrum(
    waves: Waves,
    valid: NDArray[np.bool_],
    last: Spectrum,
    fitted: NDArray[np.float64] | None = None,
) -> Spectrum | None:
    """Welch's estimate of the power spectrum of an image (1967, IEEE Trans. AU-15, 70).

    The image is whitened with the `last` estimate first, so that little power leaks from mode to
    mode, cut into squares that overlap by half, tapered (Hann) and transformed. The mean power of
    the squares is averaged over neighbouring modes, until enough have been averaged. Squares of
    far more power than most hold something else than noise, and do not count.

    Parameters
    ----------
    waves, valid
        The noise, and where it is (ny, nx); squares that are blank for the most part do not count.
    last
        An estimate.
    fitted
        (side, side) share of the power of each mode that fits of sources have taken with them, on
        the modes of `segment_side`.

    Returns
    -------
    Spectrum or None
        None if no square is filled.
    """
    side = segment_side(waves.room.shape)
    if side == 0:
        return None
    white = waves.whitened(last).astype(np.float32)
    hann = np.hanning(side + 1)[:-1].astype(np.float32)
    hann = hann[:, None] * hann
    full = np.sum(hann**2)
    whole = bool(valid.all())
    squares, shares = [], []
    for y, x in _segments(valid, side):
        part = slice(y, y + side), slice(x, x + side)
        taper = hann if whole else np.where(valid[part], hann, np.float32(0))
        share = full if whole else np.sum(taper**2)
        if share < _FILLED * full:
            continue
        centred = white[part] - np.sum(taper * white[part]) / np.sum(taper)
        squares.append(taper * centred)
        shares.append(float(share))
    if not squares:
        return None
    modes = fft.rfft2(np.array(squares), workers=cpu_threads(), overwrite_x=True)
    power = _mean_of_noise(modes.real**2 + modes.imag**2, np.array(shares))
    total = np.sum(shares)
    ratio = all_modes(power)
    ratio[0, 0] = np.mean([ratio[0, 1], ratio[1, 0], ratio[0, -1], ratio[-1, 0]])
    if fitted is not None:
        ratio /= 1 - np.minimum(fitted, _MOST_FITTED)
    independent = max(total / full / 2, 1.0)  # of the squares: they overlap
    width = math.sqrt(_AVERAGED / independent / (4 * math.pi))
    ratio = ndimage.gaussian_filter(ratio, max(width, _LEAST_WIDTH), mode="wrap")
    k = fft.fftfreq(side)
    measured = ratio / last.whitening(k, k) ** 2
    return Spectrum(np.maximum(measured, _FLOOR * measured.max()), last.box)


def _mean_of_noise(powers: NDArray[np.float32], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean power per pixel of segments (n, side, side/2 + 1) of `shares` (n,) pixels.

    Octave by octave of the wave number, without those segments that hold far more than most: some
    of that is no noise.
    """
    side = powers.shape[1]
    k = side * np.hypot(fft.fftfreq(side)[:, None], fft.rfftfreq(side))
    octave = np.floor(np.log2(np.maximum(k, 1))).astype(int)
    modes = np.bincount(octave.ravel())
    strength = np.array([np.bincount(octave.ravel(), power.ravel()) for power in powers])
    strength /= shares[:, None]
    most = (_OUTLYING + _SCATTER / np.sqrt(modes)) * np.median(strength, axis=0)
    noise = strength <= most
    total = np.sum(noise[:, octave] * powers, axis=0, dtype=float)
    return np.asarray(total / (shares @ noise)[octave])


def _segments(valid: NDArray[np.bool_], side: int) -> list[tuple[int, int]]:
    """First pixels (y, x) of segments that are not blank for the most part: any, if too many."""
    y, x = (_starts(length, side) for length in valid.shape)
    sums = np.zeros((len(y), valid.shape[1] + 1), np.int64)
    for row, first in zip(sums, y, strict=True):
        np.cumsum(valid[first : first + side].sum(0), out=row[1:])
    there = sums[:, x + side] - sums[:, x] > _FILLED / 2 * side**2
    corners = [(int(y[i]), int(x[j])) for i, j in np.argwhere(there)]
    some = np.random.default_rng(0).permutation(len(corners))[:_MOST_SEGMENTS]
    return [corners[index] for index in np.sort(some)]


def _starts(length: int, side: int) -> NDArray[np.int_]:
    """First pixels of segments that overlap by half and cover a length."""
    count = max(math.ceil(2 * (length - side) / side), 0) + 1
    return np.rint(np.linspace(0, length - side, count)).astype(int)


def stands_for(side: int) -> NDArray[np.float64]:
    """How many modes each column of the transform of a real image of `side` columns stands for."""
    count = np.full(side // 2 + 1, 2.0)
    count[0] = 1.0
    if side % 2 == 0:
        count[-1] = 1.0
    return count


def all_modes(half: NDArray[np.float64]) -> NDArray[np.float64]:
    """All modes of the power of a real image of even sides, which is the same at k and at -k."""
    mirrored = np.roll(half[::-1, 1:-1], 1, axis=0)[:, ::-1]
    return np.concatenate([half, mirrored], axis=1)
