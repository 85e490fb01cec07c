"""Fit sources in noise that neighbouring pixels share.

What the present model of all sources leaves of the map is whitened with the noise's own spectrum.
Every block of sources is fitted to the Fourier modes of a window of that, to which its own part of
the model is added, each against what all the others are at present; those that overlap in turns.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from hyperjax.catalog import FLAGS
from hyperjax.config import Config
from hyperjax.detection import HighPass
from hyperjax.fitting import CONVERGED, STEP_LIMIT, FitOptions, FitResult, GroupBatch, fit_spectra
from hyperjax.groups import (
    Windows,
    blocks,
    buckets,
    cut_out,
    link,
    members_of,
    neighbourhoods,
    overlap,
    pairs_closer,
    turns,
    windows,
)
from hyperjax.maps import FWHM_PER_SIGMA
from hyperjax.models import LEAST_ELLIPTICITY
from hyperjax.noise import clipped_rms, local_rms
from hyperjax.runtime import at_once
from hyperjax.sources import SourceFits, nearest_values, overlap_reach, render_sources, stamps
from hyperjax.spectral import modes
from hyperjax.spectrum import (
    Beam,
    Spectrum,
    Waves,
    all_modes,
    between_modes,
    measure_spectrum,
    segment_side,
    stands_for,
    transform_of_beam,
)

ROUGH = FitOptions(ftol=2e-4, max_steps=15)
"""Options of fits on the way: they tell a gain in chi^2 of some units."""

SLOTS = (1, 2, 4, 8, 16)
"""Numbers of sources that blocks are padded to."""

_LINK_FWHM = 2.0  # sources that are closer are fitted jointly; 1.5 left wrong fits of pairs
_MOST_NEIGHBOURS = 7  # of a source, itself among them, that are tried with an alternative of it
_SURROUNDINGS_FWHM = 3.0  # margin of windows in which sources are tried with their neighbours
_MARGIN_FWHM = 2.5  # of windows, beyond the outermost positions
_LEAST_SIDE = 32  # of windows, pixels
_LEAST_NOISE = 1e-7  # of the brightest pixel: below, squares of noise are lost in rounding
_CLIP_SIGMA = 3.0  # of pixels, before the sources are known
_FIRST_ROUNDS = 2  # of the first spectrum, each whitened with the one before
_MOST_FITTED = 0.8  # share of the noise of the matched filter that fits may have taken
_LOCAL_FWHM = 10.0  # standard deviation of the bell that the local noise is told under
_ALIAS = 0.02  # a mode whose alias is a larger share of it is not used
_COARSE = 32, 64, 128  # sides of the modes that the power of fitted sources is computed on
_COARSE_FWHM = 8.0  # least of them, beam FWHM
_CUT_SIGMA = 3.0  # radius of a source that blank pixels cut into
_LEAST_VALID = 1e-3
_WHOLE = 0.97  # share of a source on valid pixels, from which nothing is missing
_CUT_SWEEPS = 4
_MOST_RELAXED = 2.5  # of a step of a source that is cut
_ROUNDING = 1e-12  # of correlations of parameters
_RANK = 1e-8  # of the products of a source's columns: below, they are the same
_CHUNK = 64  # sources whose modes are in memory at a time


@dataclass(frozen=True, eq=False)
class Field:
    """What is fitted.

    Attributes
    ----------
    data
        (ny, nx) brightness, NaN where blank, Jy/beam.
    beam
        Covariance of the beam: of x, of x and y, and of y, square pixels.
    box
        Side of the box of the high-pass filter, pixels.
    config
        The options.
    rms
        (ny, nx) how the noise varies, where that is given; NaN where blank.
    """

    data: NDArray[np.float64]
    beam: Beam
    box: int
    config: Config
    rms: NDArray[np.float64] | None = None

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """Where the map is not blank."""
        return np.isfinite(self.data)

    @cached_property
    def depth(self) -> NDArray[np.float64]:
        """Distance of every pixel from the edge and from blank pixels."""
        return np.asarray(ndimage.distance_transform_edt(np.pad(self.valid, 1))[1:-1, 1:-1])

    @cached_property
    def taper(self) -> NDArray[np.float64]:
        """Factor (ny, nx) by which noise fades to 0 towards blank pixels, over a beam FWHM.

        An edge of the noise would be amplified by the whitening. The edge of the map is none: there
        noise is continued by its mirror image.
        """
        if self.valid.all():
            return np.ones(self.data.shape)
        depth = ndimage.distance_transform_edt(self.valid)
        return np.asarray(np.sin(np.pi / 2 * np.minimum(depth / self.fwhm_pix, 1.0)) ** 2)

    @property
    def inner(self) -> NDArray[np.bool_]:
        """Where the noise is whole."""
        return self.taper == 1

    @cached_property
    def high_pass(self) -> HighPass:
        """The filter."""
        return HighPass(self.valid, self.box)

    @property
    def smallest_pix(self) -> float:
        """The smallest sigma of a source, pixels."""
        return self.config.photometry.aper_inf * self.sigma_pix

    @property
    def largest_pix(self) -> float:
        """The largest sigma of a source, pixels."""
        return self.config.photometry.aper_sup * self.sigma_pix

    @cached_property
    def sigma_pix(self) -> float:
        """Standard deviation of the beam, pixels: the geometric mean of the axes'."""
        xx, xy, yy = self.beam
        return float((xx * yy - xy**2) ** 0.25)

    @property
    def fwhm_pix(self) -> float:
        """FWHM of the beam, pixels."""
        return FWHM_PER_SIGMA * self.sigma_pix


class Noise(NamedTuple):
    """Noise of the filtered map: (ny, nx) `scale`, Jy/beam, times stationary noise of `spectrum`.

    It is scaled to the noise of sources: such that the matched filter of the beam has the noise 1.
    """

    scale: NDArray[np.float64]
    spectrum: Spectrum


class Layout(NamedTuple):
    """The group of each source, the blocks' windows, and when each block is fitted."""

    group: NDArray[np.int_]
    placed: Windows
    turn: NDArray[np.int_]


def lay_out(field: Field, fits: SourceFits) -> Layout:
    """Link the sources and put windows round their blocks."""
    pairs = overlapping(field, fits)
    group = link(len(fits.x), pairs)
    members = blocks(group, fits.x, fits.y)
    turn = turns(members, pairs)
    return Layout(group, _placed(field, fits, members, _MARGIN_FWHM), turn)


def overlapping(field: Field, fits: SourceFits) -> NDArray[np.int_]:
    """Pairs (k, 2) of sources that are closer than linked ones, or overlap."""
    reach = np.maximum(overlap_reach(fits), _LINK_FWHM / 2 * field.fwhm_pix)
    return pairs_closer(fits.x, fits.y, reach)


def surroundings(field: Field, fits: SourceFits) -> tuple[Windows, NDArray[np.int_]]:
    """Windows round each source and its nearest neighbours, and which of them is whose (n,)."""
    distance = _LINK_FWHM * field.fwhm_pix
    members, own = neighbourhoods(fits.x, fits.y, distance, _MOST_NEIGHBOURS)
    return _placed(field, fits, members, _SURROUNDINGS_FWHM), own


def _placed(
    field: Field, fits: SourceFits, members: list[NDArray[np.int_]], margin_fwhm: float
) -> Windows:
    margin = margin_fwhm * field.fwhm_pix
    return windows(members, fits.x, fits.y, margin, least=_LEAST_SIDE, kinds=SLOTS)


# --- The noise --------------------------------------------------------------------------------


def first_noise(field: Field, image: NDArray[np.float64]) -> tuple[Noise, bool] | None:
    """Noise of a map, filtered, with all its sources in it; None if its spectrum cannot be had.

    It is the same in all directions and smooth in the wave number: where sources are a regular
    pattern, what stands out of that is theirs, and would be whitened away. Whether something does
    is told beside it.
    """
    valid = field.inner
    if not valid.any():
        return None
    scale = _given_scale(field)
    scale = scale * _local_noise(field, image / scale)
    if not np.all(scale > _LEAST_NOISE * np.abs(image).max()):
        return None
    unit = Waves.of(np.clip(image / scale, -_CLIP_SIGMA, _CLIP_SIGMA))
    spectrum: Spectrum | None = Spectrum.white(field.box)
    for _ in range(_FIRST_ROUNDS):
        if spectrum is None:
            return None
        spectrum = measure_spectrum(unit, valid, spectrum)
    if spectrum is None:
        return None
    return _normalised(field, Noise(scale, spectrum.in_rings()), unit), spectrum.stands_out


def updated_noise(
    field: Field,
    noise: Noise,
    fits: SourceFits,
    left: NDArray[np.float64],
    smooth: bool = False,
) -> Noise:
    """Noise of a map without the fitted sources, of which that is `left`.

    `smooth` noise is the same in all directions, as that of `first_noise`.
    """
    unit = Waves.of(left / noise.scale)
    fitted = fitted_power(field, noise, fits)
    spectrum = measure_spectrum(unit, field.inner, noise.spectrum, fitted) or noise.spectrum
    spectrum = spectrum.in_rings() if smooth else spectrum
    return _normalised(field, Noise(noise.scale, spectrum), unit, fitted)


def _normalised(
    field: Field,
    noise: Noise,
    unit: Waves,
    fitted: NDArray[np.float64] | None = None,
) -> Noise:
    """The noise, so that the matched filter's own is 1 everywhere, with what was `fitted` away."""
    snr, _ = unit.matched(noise.spectrum, field.beam)
    found = _local_noise(field, snr)
    if fitted is not None:
        k = fft.fftfreq(len(fitted))
        passed = (transform_of_beam(field.beam, k, k) * noise.spectrum.transfer(k, k)) ** 2
        found /= np.sqrt(1 - min(np.sum(passed * fitted) / np.sum(passed), _MOST_FITTED))
    return noise._replace(scale=noise.scale * found)


def _local_noise(field: Field, image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Noise of an image round every pixel, or that of all of it where its variation is given."""
    if field.rms is not None:
        return np.full(image.shape, clipped_rms(np.where(field.inner, image, np.nan)))
    return local_rms(image, field.inner, _LOCAL_FWHM * field.fwhm_pix)


def local_variation(field: Field, unit: NDArray[np.float64]) -> float:
    """By what factor noise that should be the same all over the map varies, for nine tenths of it.

    `unit` (ny, nx) is NaN where there is none.
    """
    local = local_rms(np.nan_to_num(unit), np.isfinite(unit), _LOCAL_FWHM * field.fwhm_pix)
    least, most = np.percentile(local[field.valid], [5, 95])
    return float(most / least)


def _given_scale(field: Field) -> NDArray[np.float64]:
    """The noise that is given, 1 where none is; its median where the map is blank."""
    if field.rms is None:
        return np.ones(field.data.shape)
    return np.where(field.valid, field.rms, np.nanmedian(field.rms))


def filtered(field: Field, fits: SourceFits | None) -> NDArray[np.float64]:
    """The high-pass filtered map without sources, faded to 0 where blank."""
    left = field.data if fits is None else field.data - render_sources(field.data.shape, fits)
    return np.nan_to_num(field.high_pass(left)) * field.taper


def refiltered(
    field: Field, left: NDArray[np.float64], before: SourceFits, after: SourceFits
) -> NDArray[np.float64]:
    """`filtered` with the sources as they are after, from what they left as they were before."""
    changed = np.flatnonzero(np.not_equal(before[:6], after[:6]).any(axis=0))
    if not len(changed):
        return left
    if 2 * len(changed) > len(after.x):
        return filtered(field, after)
    shape = field.data.shape
    more = render_sources(shape, before.take(changed)) - render_sources(shape, after.take(changed))
    return left + np.nan_to_num(field.high_pass(more)) * field.taper


def waves_of(noise: Noise, left: NDArray[np.float64]) -> Waves:
    """What is left of the filtered map, in units of the noise, as its transform."""
    return Waves.of(left / noise.scale)


def whitened(field: Field, noise: Noise, waves: Waves) -> NDArray[np.float64]:
    """What is left of the filtered map, whitened: noise of unit variance, 0 where blank."""
    return np.where(field.valid, waves.whitened(noise.spectrum), 0.0)


def fitted_power(field: Field, noise: Noise, fits: SourceFits) -> NDArray[np.float64]:
    r"""Share of the noise's power, by mode, that the fits of the sources have taken with them.

    A fit takes the projection of the noise on the columns J of its Jacobian, whose power is
    :math:`J (J^\dagger J)^{-1} J^\dagger`, as many modes as it has parameters. Each source counts
    as if it were alone: the errors of those in a blend are large, but what they take together is
    not.

    Returns
    -------
    ndarray (side, side)
        On the modes of `segment_side`.
    """
    side = segment_side(field.data.shape)
    coarse = next((c for c in _COARSE if c >= _COARSE_FWHM * field.fwhm_pix), _COARSE[-1])
    drawn = fits.elliptical(LEAST_ELLIPTICITY)
    k, half, fine = fft.fftfreq(coarse), fft.rfftfreq(coarse), fft.fftfreq(side)
    share = stands_for(coarse) / coarse**2
    free = np.diagonal(fits.covariance, axis1=1, axis2=2) > 0
    known = np.flatnonzero(np.isfinite(fits.covariance).all(axis=(1, 2)) & fits.is_drawable)
    passed = noise.spectrum.transfer(k, half)
    total = np.zeros(passed.shape)
    for first in range(0, len(known), _CHUNK):
        some = known[first : first + _CHUNK]
        for parameters, columns in _gradients(drawn.take(some), k[:, None], half):
            own = columns * free[some][:, parameters, None, None]
            products = _products(own, passed**2 * share)
            size = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
            scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
            scale = scale[:, :, None] * scale[:, None, :]
            inverse = scale * np.linalg.pinv(scale * products, _RANK, hermitian=True)
            flat = own.reshape(*own.shape[:2], -1)
            total += np.sum((inverse @ flat) * flat, axis=(0, 1)).reshape(total.shape)
    smooth = between_modes(all_modes(total), fine, fine)
    return np.asarray(noise.spectrum.transfer(fine, fine) ** 2 * smooth / field.valid.sum())


def _products(columns: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted products (source, k, k) of each source's own columns (source, k, ky, kx)."""
    flat = columns.reshape(*columns.shape[:2], -1)
    return np.asarray((flat * weight.ravel()) @ flat.transpose(0, 2, 1))


def _gradients(
    fits: SourceFits, ky: NDArray[np.float64], kx: NDArray[np.float64]
) -> list[tuple[list[int], NDArray[np.float64]]]:
    """Slopes of the sources' transforms about their own centres, by their parameters.

    Those of peak and shape (source, 4, ky, kx), which are real, and those of the position
    (source, 2, ky, kx), which are imaginary, each with the places of the parameters.
    """
    shape = (fits.peak, fits.sigma_major, fits.sigma_minor, fits.theta)
    peak, major, minor, theta = (column[:, None, None] for column in shape)
    u, v = _principal(theta, ky, kx)
    unit = _transform(major, minor, u, v)
    wave = peak * unit
    along, across = major * (2 * np.pi * u) ** 2, minor * (2 * np.pi * v) ** 2
    turn = (2 * np.pi) ** 2 * (minor**2 - major**2) * u * v
    real = [unit, wave * (1 / major - along), wave * (1 / minor - across), wave * turn]
    imaginary = [-2 * np.pi * kx * wave, -2 * np.pi * ky * wave]
    return [([0, 3, 4, 5], np.stack(real, 1)), ([1, 2], np.stack(imaginary, 1))]


def _principal(
    theta: NDArray[np.float64], ky: NDArray[np.float64], kx: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wave numbers along the major and the minor axis."""
    cos, sin = np.cos(theta), np.sin(theta)
    return kx * cos + ky * sin, ky * cos - kx * sin


def _transform(
    major: NDArray[np.float64],
    minor: NDArray[np.float64],
    u: NDArray[np.float64],
    v: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Transform of a Gaussian of unit peak about its centre."""
    damping = np.exp(-2 * np.pi**2 * ((major * u) ** 2 + (minor * v) ** 2))
    return np.asarray(2 * np.pi * major * minor * damping)


# --- The windows of the blocks ----------------------------------------------------------------


def window_data(
    white: NDArray[np.float64],
    field: Field,
    noise: Noise,
    fits: SourceFits,
    placed: Windows,
    which: NDArray[np.int_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Data and weights of blocks of one side, as `fit_spectra` takes them.

    The data are the modes of the whitened residual, and the whitened model of the block's own
    sources; their peaks are in units of the local noise.
    """
    side = int(placed.side[which[0]])
    weight = mode_weights(side, noise.spectrum, field.sigma_pix)
    data = _modes_of(cut_out(white, placed, which, fill=0.0)) * np.where(
        weight > 0, _per_mode(side), 0
    )
    own = members_of(placed, which)
    start = in_windows(fits, noise, placed, which)
    for slot in range(int(placed.slots[which].max())):
        of_slot = np.flatnonzero(own.slot == slot)
        for first in range(0, len(of_slot), _CHUNK):
            some = of_slot[first : first + _CHUNK]
            data[own.row[some]] += _source_modes(start[some], side) * weight
    return data, np.broadcast_to(weight, (len(which), len(weight)))


def _per_mode(side: int) -> float:
    """What brings a mode of a window of white noise to unit variance, in either part."""
    return float(np.sqrt(2) / side)


@functools.lru_cache(maxsize=32)
def mode_weights(side: int, spectrum: Spectrum, sigma_pix: float) -> NDArray[np.float64]:
    """Weights (mode,) of the transform of a source (`SpectralGroup`), 0 for modes without use.

    Those are the mean, the second of two conjugates, and modes where the alias of a sampled
    Gaussian of `sigma_pix`, exp(-2 pi^2 sigma^2 (1 - 2 k)) of it, is too large a share.
    """
    kx, ky = modes(side)
    weight = _per_mode(side) * spectrum.transfer(ky, kx)
    highest = 0.5 * (1 + np.log(_ALIAS) / (2 * (np.pi * sigma_pix) ** 2))
    weight[np.abs(ky) > highest] = 0
    weight[:, kx > highest] = 0
    weight[ky <= 0, 0] = 0
    return weight.ravel()


def _modes_of(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Real and imaginary parts (window, 2, mode) of transforms about the windows' centres."""
    side = images.shape[-1]
    kx, ky = modes(side)
    rows = np.rint(ky * side).astype(int)
    waves = fft.rfft2(images)[:, rows, : len(kx)]
    waves *= np.exp(1j * np.pi * (side - 1) * (ky[:, None] + kx))
    flat = waves.reshape(len(images), -1)
    return np.stack([flat.real, flat.imag], 1)


def _source_modes(start: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """The same (source, 2, mode) of sources (source, 6) in the pixels of their windows."""
    kx, ky = modes(side)
    peak, x, y, major, minor, theta = (column[:, None, None] for column in start.T)
    u, v = _principal(theta, ky[:, None], kx)
    size = peak * _transform(major, minor, u, v)
    centre = (side - 1) / 2
    columns, rows = np.exp(-2j * np.pi * kx * (x - centre)), np.exp(-2j * np.pi * ky * (y - centre))
    waves = (size * rows.swapaxes(1, 2) * columns).reshape(len(start), -1)
    return np.stack([waves.real, waves.imag], 1)


def in_windows(
    fits: SourceFits, noise: Noise, placed: Windows, which: NDArray[np.int_]
) -> NDArray[np.float64]:
    """Parameters (k, 6) of the sources of some blocks, in their windows and units of the noise."""
    own = members_of(placed, which)
    block = which[own.row]
    out = np.column_stack([column[own.source] for column in fits[:6]])
    out[:, 0] /= nearest_values(noise.scale, out[:, 1], out[:, 2])
    out[:, 1] -= placed.x0[block]
    out[:, 2] -= placed.y0[block]
    return out


def on_map(
    params: NDArray[np.float64], noise: Noise, x0: NDArray[np.int_], y0: NDArray[np.int_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Undo `in_windows`: parameters (..., 6) on the map, and the unit (...,) of their peaks."""
    out = params.copy()
    out[..., 1] += x0
    out[..., 2] += y0
    unit = nearest_values(noise.scale, out[..., 1], out[..., 2])
    out[..., 0] *= unit
    return out, unit


def fit_windows(
    field: Field,
    data: NDArray[np.float64],
    weight: NDArray[np.float64],
    starts: NDArray[np.float64],
    row: NDArray[np.int_],
    slots: int,
    side: int,
    options: FitOptions,
) -> FitResult:
    """Fit the sources `starts` (k, 6) to windows, `row` (k,) being the window of each, in order."""
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    low, high = _bounds(field, starts)
    shape = (len(data), slots, 6)

    def padded(values: NDArray[np.float64]) -> NDArray[np.float64]:
        out = np.zeros(shape)
        out[row, slot] = values
        return out

    present = np.zeros(shape[:2], bool)
    present[row, slot] = True
    free = np.repeat(present[..., None], 6, axis=2)
    free[..., 1:3] &= field.config.positions_vary
    batch = GroupBatch(
        data=data,
        weight=weight,
        start=padded(starts),
        lower=padded(low),
        upper=padded(high),
        free=free,
        present=present,
        order=np.full(len(data), -1),
    )
    return fit_spectra(batch, side, options)


def _bounds(
    field: Field, start: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper bounds of sources (k, 6)."""
    shift = max(1.0, field.config.fit_options.position_range_fwhm * field.fwhm_pix)
    lower, upper = start.copy(), start.copy()
    lower[:, 0], upper[:, 0] = 0.0, np.inf
    lower[:, 1:3] -= shift
    upper[:, 1:3] += shift
    lower[:, 3:5], upper[:, 3:5] = field.smallest_pix, field.largest_pix
    lower[:, 5], upper[:, 5] = 0.0, np.pi
    return lower, upper


# --- One sweep --------------------------------------------------------------------------------


def is_cut(field: Field, fits: SourceFits) -> NDArray[np.bool_]:
    """Whether blank pixels cut into a source (n,)."""
    return np.asarray(valid_share(field, fits) < _WHOLE)


def filled_in(field: Field, noise: Noise, fits: SourceFits) -> SourceFits:
    """Fit the sources that blank pixels cut into, until what is filled in there is their model."""
    for _ in range(_CUT_SWEEPS):
        cut = is_cut(field, fits)
        if not cut.any():
            break
        fits = sweep(field, noise, fits, ROUGH, among=cut).fits
    return fits


class Swept(NamedTuple):
    """Fitted sources, and of each block its members and the covariance (6 k, 6 k) of them all."""

    fits: SourceFits
    blocks: list[tuple[NDArray[np.int_], NDArray[np.float64]]]

    def take(self, keep: NDArray[np.bool_]) -> "Swept":
        """Some of the sources, and the blocks that have lost none of theirs."""
        place = np.cumsum(keep) - 1
        whole = [(place[own], matrix) for own, matrix in self.blocks if keep[own].all()]
        return Swept(self.fits.take(np.flatnonzero(keep)), whole)


def sweep(
    field: Field,
    noise: Noise,
    fits: SourceFits,
    options: FitOptions,
    left: NDArray[np.float64] | None = None,
    among: NDArray[np.bool_] | None = None,
) -> Swept:
    """Fit all blocks to what the other sources leave; in turns those whose sources overlap.

    Or only the blocks that have one of some sources, where these are named. What the sources leave
    of the map as they are (`filtered`) may be given.
    """
    among = np.ones(len(fits.x), bool) if among is None else among
    return _swept(field, noise, fits, lay_out(field, fits), among, options, left)


def _swept(
    field: Field,
    noise: Noise,
    fits: SourceFits,
    layout: Layout,
    among: NDArray[np.bool_],
    options: FitOptions,
    left: NDArray[np.float64] | None,
) -> Swept:
    """`sweep` of sources that are laid out."""
    group, placed, turn = layout
    fits, fitted, drawn = fits.copy(), [], fits  # the copy changes turn by turn
    wanted = np.array([among[members].any() for members in placed.members], bool)
    for now in np.unique(turn[wanted]):
        left = filtered(field, fits) if left is None else refiltered(field, left, drawn, fits)
        drawn = fits.copy()
        white = whitened(field, noise, waves_of(noise, left))
        some = buckets(placed, wanted & (turn == now)).values()
        fitted += _fit_blocks(field, noise, white, fits, fits, placed, some, options)
    return Swept(fits.in_groups(group), fitted)


def sweep_again(
    field: Field,
    noise: Noise,
    swept: Swept,
    among: NDArray[np.bool_],
    options: FitOptions,
    left: NDArray[np.float64] | None = None,
) -> Swept:
    """Fit blocks that have one of some sources, and those that were no block in the last sweep.

    The others are as they were. For `left` see `sweep`.
    """
    layout, among = lay_out(field, swept.fits), among.copy()
    members = layout.placed.members
    known = {own.tobytes(): (own, matrix) for own, matrix in swept.blocks}
    for own in members:
        among[own] |= own.tobytes() not in known
    if not among.any():
        return swept
    again = _swept(field, noise, swept.fits, layout, among, options, left)
    known |= {own.tobytes(): (own, matrix) for own, matrix in again.blocks}
    return again._replace(blocks=[known[own.tobytes()] for own in members])


def fit_new(field: Field, noise: Noise, white: NDArray[np.float64], new: SourceFits) -> SourceFits:
    """Fit sources to a residual in which they still are, all others as they are."""
    new = new.copy()
    group, placed, _ = lay_out(field, new)
    absent = new._replace(peak=0 * new.peak)
    _fit_blocks(field, noise, white, absent, new, placed, buckets(placed).values(), ROUGH)
    return new.in_groups(group)


def _fit_blocks(
    field: Field,
    noise: Noise,
    white: NDArray[np.float64],
    taken: SourceFits,
    fits: SourceFits,
    placed: Windows,
    some: Iterable[NDArray[np.int_]],
    options: FitOptions,
) -> list[tuple[NDArray[np.int_], NDArray[np.float64]]]:
    """Fit blocks of some buckets from where their sources are, and put the results there.

    `white` is what is left without the sources as `taken`.
    """

    def fit(which: NDArray[np.int_]) -> FitResult:
        data, weight = window_data(white, field, noise, taken, placed, which)
        starts, row = in_windows(fits, noise, placed, which), members_of(placed, which).row
        slots, side = int(placed.slots[which[0]]), int(placed.side[which[0]])
        return fit_windows(field, data, weight, starts, row, slots, side, options)

    some = list(some)
    fitted = []
    for which, result in zip(some, at_once(fit, some), strict=True):
        fitted += _store(field, noise, fits, result, placed, which)
    return fitted


def _store(
    field: Field,
    noise: Noise,
    fits: SourceFits,
    result: FitResult,
    placed: Windows,
    which: NDArray[np.int_],
) -> list[tuple[NDArray[np.int_], NDArray[np.float64]]]:
    """Put the results of blocks in the places of their sources; the covariances of the blocks."""
    row, slot, source = members_of(placed, which)
    params, unit = on_map(
        result.params[row, slot], noise, placed.x0[which[row]], placed.y0[which[row]]
    )
    share = valid_share(field, fits.take(source))
    _relaxed(field, fits, source, params, share)
    scale = np.ones((*result.params.shape[:2], 6))
    scale[row, slot, 0] = unit
    scale[row, slot] /= np.sqrt(share)[:, None]
    flat = scale.reshape(len(scale), -1)
    covariance = result.covariance * flat[:, :, None] * flat[:, None, :]
    own = 6 * slot[:, None] + np.arange(6)
    fits.covariance[source] = covariance[row[:, None, None], own[:, :, None], own[:, None]]
    fits.order[source] = -1
    fits.nmse[source] = result.nmse[row]
    fits.chi2_red[source] = result.chi2_red[row]
    fits.bic[source] = result.bic[row]
    fits.niter[source] = result.steps[row]
    fits.status[source] = np.where(result.status[row] == CONVERGED, 1, 0)
    fits.flags[source] = FLAGS.on_bound(result.on_bound[row, slot])
    fits.flags[source] |= FLAGS.STEP_LIMIT * (result.status[row] == STEP_LIMIT)
    members = [placed.members[block] for block in which]
    return [
        (block, matrix[: 6 * len(block), : 6 * len(block)])
        for block, matrix in zip(members, covariance, strict=True)
    ]


def _relaxed(
    field: Field,
    fits: SourceFits,
    source: NDArray[np.int_],
    params: NDArray[np.float64],
    share: NDArray[np.float64],
) -> None:
    """Put new parameters in the places of the old ones; further on, where pixels are missing.

    The old model stands in for the missing pixels, so that a step is too short by their share.
    """
    old = np.column_stack([column[source] for column in fits[:5]])
    factor = np.minimum(1 / share, _MOST_RELAXED)[:, None]
    low, high = _bounds(field, params)
    stepped = np.clip(old + factor * (params[:, :5] - old), low[:, :5], high[:, :5])
    stepped[:, 4] = np.minimum(stepped[:, 4], stepped[:, 3])
    params = np.where((factor > 1) & (np.arange(6) < 5), np.pad(stepped, ((0, 0), (0, 1))), params)
    for column, values in zip(fits[:6], params.T, strict=True):
        column[source] = values


def valid_share(field: Field, fits: SourceFits) -> NDArray[np.float64]:
    """Share (n,) of each source's own power that lies on valid pixels, as far as these count.

    The fit takes blank pixels for what the model says there, so that its errors are too small: by
    the root of the share.
    """
    out = np.ones(len(fits.x))
    reach = _CUT_SIGMA * fits.sigma_major + field.fwhm_pix
    near = nearest_values(field.depth, fits.x, fits.y) < reach
    fits = fits._replace(peak=np.where(np.isfinite(fits.peak), 1.0, np.nan))
    for index in np.flatnonzero(near & fits.is_drawable):
        half = int(np.ceil(_CUT_SIGMA * fits.sigma_major[index]))
        x0, y0 = (np.rint(at[[index]]).astype(int) - half for at in (fits.x, fits.y))
        power = stamps(fits, np.array([index]), x0, y0, 2 * half + 1)[0] ** 2
        here, there = overlap(int(x0[0]), int(y0[0]), 2 * half + 1, field.valid.shape)
        out[index] = np.sum(power[here] * field.taper[there] ** 2) / np.sum(power)
    return np.maximum(out, _LEAST_VALID)


def significance(fits: SourceFits) -> NDArray[np.float64]:
    """Signal-to-noise ratio (n,) of each source's peak, with its position and shape as they are."""
    out = np.zeros(len(fits.x))
    deviation = np.sqrt(np.diagonal(fits.covariance, axis1=1, axis2=2))
    known = np.isfinite(fits.covariance).all(axis=(1, 2)) & (deviation[:, 0] > 0)
    scale = np.where(deviation[known] > 0, deviation[known], 1)
    correlation = fits.covariance[known] / scale[:, :, None] / scale[:, None, :]
    held = np.diagonal(correlation, axis1=1, axis2=2) == 0  # not fitted
    correlation += (held[:, None, :] + _ROUNDING) * np.eye(6)
    inverse = np.linalg.inv(correlation)[:, 0, 0]
    out[known] = fits.peak[known] / scale[:, 0] * np.sqrt(np.maximum(inverse, 0))
    return out
