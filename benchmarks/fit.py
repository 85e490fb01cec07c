"""Speed, accuracy and memory of the fit alone, beside the fitters that one would otherwise call.

Two kinds of problem, both of source groups on a polynomial background in white noise, S/N 10 to 50,
with bounds on peaks, positions (+-1 pixel) and sizes (1 to 2 beams):

A   one elliptical Gaussian, order 1, 31 x 31 pixels;
B   two to four Gaussians in four slots, order 2, 48 x 48 pixels, 5 % of them masked.

    python benchmarks/fit.py                 # the table: fits per second, side by side
    python benchmarks/fit.py --accuracy      # easy and hard problems against tight scipy fits
    python benchmarks/fit.py --stream        # memory against the number of problems

The table: all fitters take the same problems from the same starts, in turns, a median of rounds.
Everything but the last rows runs in one process on one core. Compilation and the preparation of
inputs are outside the clock. lmfit, scipy and astropy are called in a loop over the problems,
optimistix on all at once by `jax.vmap`. A fit counts as "at best cost" if its cost is at most 1e-6
above the lower of two tight scipy fits, from the start and from the truth.
"""

import argparse
import functools
import itertools
import os
import resource
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import OptimizeResult, least_squares
from whole_map import positive, processor

from hyperjax.fitting import CONVERGED, FitResult, GroupBatch, fit_groups
from hyperjax.models import monomials
from hyperjax.runtime import configure_runtime, usable_cores

BEAM = 1.7  # sigma, pixels
CLOSEST = 5.0  # that two sources of a group may be, pixels
PEAK, X, Y, MAJOR, MINOR, THETA = range(6)
BEST = 1e-6  # relative excess over the best cost that counts as none
TIGHT, USUAL = 1e-13, 1e-8  # tolerances of scipy: for reference, and its default
PIECE = 4096  # problems per call in a stream
FLOOR_TRIPS, FLOOR_LANES = 50, (2, 8, 32)


# --- Problems ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Problems of one sort. Sizes are in beams, lengths in pixels, `snr` is that of the peaks."""

    slots: int
    side: int
    order: int
    spread: float  # positions are at most this far from the centre, along x and y
    masked: float = 0.0
    snr: tuple[float, float] = (10, 50)
    sizes: tuple[float, float] = (1.1, 1.9)
    circular: bool = False
    poor: bool = False  # starts off by 1 pixel, 1.7 in size, 2 in peak; wide bounds
    beyond: bool = False  # sizes and positions beyond their bounds
    factor: float = 1.0  # of data, noise, peaks and their bounds
    single: bool = False  # float32


A = Case(slots=1, side=31, order=1, spread=1.0)
B = Case(slots=4, side=48, order=2, spread=8.0, masked=0.05)
KINDS = {"A": A, "B": B}
CASES = {
    f"{kind}{label}": case._replace(**changes)
    for kind, case in KINDS.items()
    for label, changes in {
        "": {},
        ", poor starts": {"poor": True},
        ", S/N 3 to 5": {"snr": (3, 5)},
        ", S/N 3 to 5, poor starts": {"snr": (3, 5), "poor": True},
        ", beyond the bounds": {"beyond": True},
        ", circular": {"circular": True},
        ", order 3": {"order": 3},
        ", 30 % masked": {"masked": 0.3},
        ", float32": {"single": True},
        ", float32 of 1e-7": {"single": True, "factor": 1e-7},
        ", float32 of 1e+7": {"single": True, "factor": 1e7},
    }.items()
}


def make(case: Case, count: int, seed: int = 0) -> tuple[GroupBatch, np.ndarray]:
    """Make `count` problems, and the truth (group, slot, 6)."""
    rng = np.random.default_rng(seed)
    fewest = 1 if case.slots == 1 else 2
    present = np.arange(case.slots) < rng.integers(fewest, case.slots + 1, count)[:, None]
    truth = sources(rng, case, count)
    start, lower, upper = poor_starts(rng, truth) if case.poor else starts(rng, truth, case)
    smooth = 3 * rng.normal(size=(count, len(monomials(case.order))))
    data = images(truth * present[..., None], smooth, case)
    data += rng.normal(size=data.shape)
    weight = (rng.uniform(size=data.shape) >= case.masked).astype(float)
    unit = np.array([case.factor, 1, 1, 1, 1, 1])
    there = present[..., None]
    dtype = np.float32 if case.single else np.float64
    batch = GroupBatch(
        data=(data * case.factor).astype(dtype),
        weight=(weight / case.factor**2).astype(dtype),
        start=np.where(there, start * unit, 0).astype(dtype),
        lower=np.where(there, lower * unit, 0).astype(dtype),
        upper=np.where(there, upper * unit, 0).astype(dtype),
        free=np.broadcast_to(there, truth.shape),
        present=present,
        order=np.full(count, case.order),
    )
    return batch, np.where(there, truth * unit, 0)


def sources(rng: np.random.Generator, case: Case, count: int) -> np.ndarray:
    """Random sources (group, slot, 6), no two of a group closer than CLOSEST."""
    shape = (count, case.slots)
    xy = rng.uniform(-case.spread, case.spread, (*shape, 2))
    for slot in range(1, case.slots):
        while True:
            off = xy[:, :slot] - xy[:, slot : slot + 1]
            close = (np.hypot(off[..., 0], off[..., 1]) < CLOSEST).any(1)
            if not close.any():
                break
            xy[close, slot] = rng.uniform(-case.spread, case.spread, (close.sum(), 2))
    sizes = BEAM * rng.uniform(*case.sizes, (*shape, 2))
    if case.circular:
        sizes[..., 1] = sizes[..., 0]
    if case.beyond:  # too small, or too large
        sizes = np.where(rng.uniform(size=(*shape, 1)) < 0.5, sizes / 1.9, sizes * 1.6)
    sizes = -np.sort(-sizes, axis=-1)
    peak = np.exp(rng.uniform(*np.log(case.snr), shape))
    theta = rng.uniform(0, np.pi, shape)
    return np.concatenate(
        [peak[..., None], xy + (case.side - 1) / 2, sizes, theta[..., None]], axis=-1
    )


def starts(
    rng: np.random.Generator, truth: np.ndarray, case: Case
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and bounds: whole pixels, 1.4 beams, within 15 % of the peak; bounds about them."""
    start, lower, upper = (np.zeros_like(truth) for _ in range(3))
    peak = truth[..., PEAK]
    start[..., PEAK] = peak * rng.uniform(0.85, 1.15, peak.shape)
    lower[..., PEAK], upper[..., PEAK] = 0.4 * peak, 1.6 * peak
    start[..., X : Y + 1] = np.round(truth[..., X : Y + 1])
    if case.beyond:
        start[..., X] += rng.choice([-1, 0, 1], peak.shape)
    lower[..., X : Y + 1] = start[..., X : Y + 1] - 1
    upper[..., X : Y + 1] = start[..., X : Y + 1] + 1
    start[..., MAJOR:THETA] = 1.4 * BEAM
    lower[..., MAJOR:THETA], upper[..., MAJOR:THETA] = BEAM, 2 * BEAM
    return start, lower, upper


def poor_starts(
    rng: np.random.Generator, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and bounds: off by 1 pixel in x and y, by 1.7 in sizes, by 2 in peaks."""
    off = rng.choice([-1, 1], truth.shape)
    start = np.zeros_like(truth)
    start[..., PEAK] = truth[..., PEAK] * 2.0 ** off[..., PEAK]
    start[..., X : Y + 1] = truth[..., X : Y + 1] + off[..., X : Y + 1]
    start[..., MAJOR:THETA] = truth[..., MAJOR:THETA] * 1.7 ** off[..., MAJOR, None]
    lower, upper = start.copy(), start.copy()
    lower[..., PEAK], upper[..., PEAK] = 0.1 * truth[..., PEAK], 10 * truth[..., PEAK]
    lower[..., X : Y + 1] -= 2
    upper[..., X : Y + 1] += 2
    lower[..., MAJOR:THETA], upper[..., MAJOR:THETA] = 0.5 * BEAM, 4 * BEAM
    return start, lower, upper


def images(groups: np.ndarray, smooth: np.ndarray, case: Case) -> np.ndarray:
    """Groups (group, slot, 6) over polynomials (group, monomial), without noise."""
    y, x = np.mgrid[: case.side, : case.side].astype(float)
    out = np.einsum("gm,yxm->gyx", smooth, terms(x, y, case.side, case.order))
    for slot in range(case.slots):
        peak, x0, y0, major, minor, theta = groups[:, slot, :, None, None].swapaxes(0, 1)
        u = (x - x0) * np.cos(theta) + (y - y0) * np.sin(theta)
        v = (y - y0) * np.cos(theta) - (x - x0) * np.sin(theta)
        there = np.where(major > 0, 1, 0)
        scaled = (u / np.where(there, major, 1)) ** 2 + (v / np.where(there, minor, 1)) ** 2
        out += peak * np.exp(-0.5 * scaled)
    return out


def terms(x: np.ndarray, y: np.ndarray, side: int, order: int) -> np.ndarray:
    """The polynomial's monomials (last axis), on coordinates that span -1 to 1."""
    u, v = (2 * x - side + 1) / side, (2 * y - side + 1) / side
    return np.stack([u**a * v**b for a, b in monomials(order)], axis=-1)


class Single(NamedTuple):
    """One group for fitters of one group: its valid pixels, in units of the noise.

    Parameters (P,) are those of the sources that are there, then the polynomial's.
    """

    x: np.ndarray
    y: np.ndarray
    data: np.ndarray
    terms: np.ndarray  # (pixel, monomial)
    start: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    truth: np.ndarray

    @property
    def sources(self) -> int:
        return (self.start.size - self.terms.shape[1]) // 6


def single(batch: GroupBatch, truth: np.ndarray, group: int) -> Single:
    """Take one group out of a batch."""
    valid, there = batch.weight[group] > 0, batch.present[group]
    y, x = np.nonzero(valid)
    unit = noise(batch, group)
    data = batch.data[group][valid].astype(float) / unit
    smooth = terms(x, y, len(valid), int(batch.order[group]))
    level = np.append(data.mean(), np.zeros(smooth.shape[1] - 1))

    def vector(source: np.ndarray, background: np.ndarray) -> np.ndarray:
        scaled = source[there].astype(float) / np.array([unit, 1, 1, 1, 1, 1])
        return np.append(scaled.ravel(), background)

    lower, upper = batch.lower[group].copy(), batch.upper[group].copy()
    lower[:, THETA], upper[:, THETA] = -np.inf, np.inf
    end = np.full(level.size, np.inf)
    return Single(
        x=x.astype(float),
        y=y.astype(float),
        data=data,
        terms=smooth,
        start=vector(batch.start[group], level),
        lower=vector(lower, -end),
        upper=vector(upper, end),
        truth=vector(truth[group], level),  # `reference` fits the background
    )


def noise(batch: GroupBatch, group: int) -> float:
    """The noise of one pixel of a group."""
    return float(batch.weight[group].max()) ** -0.5


def vectors(batch: GroupBatch, fit: FitResult) -> list[np.ndarray]:
    """Fitted parameters as those of `Single`."""
    out = []
    for group, there in enumerate(batch.present):
        unit, order = noise(batch, group), int(batch.order[group])
        source = fit.params[group][there].astype(float) / np.array([unit, 1, 1, 1, 1, 1])
        smooth = fit.coefficients[group, : len(monomials(order))].astype(float) / unit
        out.append(np.append(source.ravel(), smooth))
    return out


# --- The model, for the fitters that know nothing of it --------------------------------------


def residual(params: np.ndarray, one: Single) -> np.ndarray:
    """Model minus data, in units of the noise."""
    out = one.terms @ params[6 * one.sources :] - one.data
    for peak, x, y, major, minor, theta in params[: 6 * one.sources].reshape(-1, 6):
        cos, sin = np.cos(theta), np.sin(theta)
        u = ((one.x - x) * cos + (one.y - y) * sin) / major
        v = ((one.y - y) * cos - (one.x - x) * sin) / minor
        out += peak * np.exp(-0.5 * (u * u + v * v))
    return out


def jacobian(params: np.ndarray, one: Single) -> np.ndarray:
    """Derivatives of `residual` (pixel, P)."""
    out = np.empty((one.data.size, params.size))
    out[:, 6 * one.sources :] = one.terms
    for k, (peak, x, y, major, minor, theta) in enumerate(params[: 6 * one.sources].reshape(-1, 6)):
        cos, sin = np.cos(theta), np.sin(theta)
        u = ((one.x - x) * cos + (one.y - y) * sin) / major
        v = ((one.y - y) * cos - (one.x - x) * sin) / minor
        unit = np.exp(-0.5 * (u * u + v * v))
        bright = peak * unit
        along, across = bright * u, bright * v
        columns = out[:, 6 * k : 6 * k + 6].T
        columns[PEAK] = unit
        columns[X] = along * (cos / major) - across * (sin / minor)
        columns[Y] = along * (sin / major) + across * (cos / minor)
        columns[MAJOR] = along * u / major
        columns[MINOR] = across * v / minor
        columns[THETA] = along * v * (major / minor - minor / major)
    return out


# --- Fitters -------------------------------------------------------------------------------------


class Fits(NamedTuple):
    """Fitted parameters of each group (as of `Single`), and the mean number of steps."""

    params: list[np.ndarray]
    steps: float


Run = Callable[[], Any]
Read = Callable[[Any], Fits]


class Fitter(NamedTuple):
    """A way to fit: `prepare` makes what is clocked, and what reads its result.

    A clocked run takes one in `every` problems of A and of B.
    """

    prepare: Callable[[GroupBatch, np.ndarray], tuple[Run, Read]]
    every: tuple[int, int]


def singles(batch: GroupBatch, truth: np.ndarray) -> list[Single]:
    return [single(batch, truth, group) for group in range(len(batch.data))]


def with_scipy(batch: GroupBatch, truth: np.ndarray) -> tuple[Run, Read]:
    """scipy's least_squares (trf), with the analytic Jacobian."""
    groups = singles(batch, truth)

    def read(fits: list[OptimizeResult]) -> Fits:
        return Fits([fit.x for fit in fits], float(np.mean([fit.njev for fit in fits])))

    return lambda: [by_scipy(one, one.start, USUAL) for one in groups], read


def by_scipy(one: Single, start: np.ndarray, tolerance: float) -> OptimizeResult:
    """One fit by scipy's trust region within the bounds."""
    return least_squares(
        residual,
        np.clip(start, one.lower, one.upper),
        jacobian,
        bounds=(one.lower, one.upper),
        x_scale="jac",
        ftol=tolerance,
        xtol=tolerance,
        gtol=tolerance,
        max_nfev=1000,
        args=(one,),
    )


def with_lmfit(batch: GroupBatch, truth: np.ndarray) -> tuple[Run, Read]:
    """lmfit's least_squares as hyper_py calls it: theta within a half turn, numeric Jacobian."""
    import lmfit

    groups = singles(batch, truth)
    starts = []
    for one in groups:
        start = lmfit.Parameters()
        for i, (value, low, high) in enumerate(zip(one.start, one.lower, one.upper, strict=True)):
            turn = i < 6 * one.sources and i % 6 == THETA
            low, high = (-np.pi / 2, np.pi / 2) if turn else (low, high)
            start.add(f"p{i}", value=value, min=low, max=high)
        starts.append(start)

    def distance(params: Any, one: Single) -> np.ndarray:
        return residual(np.array([p.value for p in params.values()]), one)

    def run() -> list[Any]:
        options = {"ftol": USUAL, "xtol": USUAL, "gtol": USUAL, "max_nfev": 50000}
        options |= {"method": "least_squares", "calc_covar": False}
        return [
            lmfit.minimize(distance, start, args=(one,), **options)
            for one, start in zip(groups, starts, strict=True)
        ]

    def read(fits: list[Any]) -> Fits:
        params = [np.array([p.value for p in fit.params.values()]) for fit in fits]
        return Fits(params, float(np.mean([fit.njev for fit in fits])))

    return run, read


def with_astropy(batch: GroupBatch, truth: np.ndarray) -> tuple[Run, Read]:
    """astropy's TRFLSQFitter on a sum of Gaussian2D and Polynomial2D, with its own Jacobian.

    In scaled coordinates: the derivatives of Polynomial2D forget its domain and window.
    """
    from astropy.modeling.fitting import TRFLSQFitter

    groups = singles(batch, truth)
    order, side = int(batch.order[0]), batch.data.shape[-1]
    middle, half = (side - 1) / 2, side / 2
    models = [astropy_model(one, order, middle, half) for one in groups]
    pixels = [((one.x - middle) / half, (one.y - middle) / half) for one in groups]
    fitter = TRFLSQFitter()
    steps: list[int] = []

    def run() -> list[Any]:
        steps.clear()
        out = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "the fit may be unsuccessful": the cost will tell
            for one, model, (u, v) in zip(groups, models, pixels, strict=True):
                out.append(fitter(model, u, v, one.data, maxiter=1000, acc=USUAL))
                steps.append(fitter.fit_info.njev)
        return out

    def read(fits: list[Any]) -> Fits:
        params = [
            from_astropy(fit, one.sources, order, middle, half)
            for fit, one in zip(fits, groups, strict=True)
        ]
        return Fits(params, float(np.mean(steps)))

    return run, read


def astropy_model(one: Single, order: int, middle: float, half: float) -> Any:
    """The start and bounds as an astropy model."""
    from astropy.modeling.models import Gaussian2D, Polynomial2D

    names = ("amplitude", "x_mean", "y_mean", "x_stddev", "y_stddev", "theta")
    zero = np.array([0, middle, middle, 0, 0, 0])
    unit = np.array([1, half, half, half, half, 1])
    model = Polynomial2D(order, c0_0=one.start[6 * one.sources])
    for k in range(one.sources):
        start, lower, upper = (
            (values[6 * k : 6 * k + 6] - zero) / unit
            for values in (one.start, one.lower, one.upper)
        )
        limits = dict(zip(names, zip(lower, upper, strict=True), strict=True))
        model = model + Gaussian2D(*start, bounds=limits)
    return model


def from_astropy(model: Any, sources: int, order: int, middle: float, half: float) -> np.ndarray:
    """Parameters of an astropy model as those of `Single`."""
    zero = np.array([0, middle, middle, 0, 0, 0])
    unit = np.array([1, half, half, half, half, 1])
    return np.concatenate(
        [
            *(model[k + 1].parameters * unit + zero for k in range(sources)),
            [getattr(model[0], f"c{a}_{b}").value for a, b in monomials(order)],
        ]
    )


def with_optimistix(cholesky: bool, batch: GroupBatch, truth: np.ndarray) -> tuple[Run, Read]:
    """optimistix' LevenbergMarquardt under vmap; a sigmoid keeps each parameter in its bounds."""
    import jax
    import jax.numpy as jnp
    import lineax as lx
    import optimistix as optx

    side, order, slots = batch.data.shape[-1], int(batch.order[0]), batch.present.shape[1]
    y, x = (axis.ravel().astype(float) for axis in np.mgrid[:side, :side])
    smooth = terms(x, y, side, order)
    present = batch.present[..., None]
    lower = np.where(present, batch.lower, -1)[..., :THETA]
    upper = np.where(present, batch.upper, 1)[..., :THETA]
    level = np.average(batch.data, axis=(1, 2), weights=batch.weight)

    def sources_of(free: Any, low: Any, high: Any) -> Any:
        boxed = low + (high - low) * jax.nn.sigmoid(free[:, :THETA])
        return jnp.concatenate([boxed, free[:, THETA:]], 1)

    def distance(free: Any, args: Any) -> Any:
        data, root, low, high, there = args
        model = smooth @ free[6 * slots :]
        for k, source in enumerate(sources_of(free[: 6 * slots].reshape(slots, 6), low, high)):
            peak, x0, y0, major, minor, theta = jnp.where(there[k], source, placeholder)
            cos, sin = jnp.cos(theta), jnp.sin(theta)
            u = ((x - x0) * cos + (y - y0) * sin) / major
            v = ((y - y0) * cos - (x - x0) * sin) / minor
            model += peak * jnp.exp(-0.5 * (u * u + v * v))
        return root * (model - data)

    placeholder = np.array([0.0, 0, 0, 1, 1, 0])
    share = (batch.start[..., :THETA] - lower) / (upper - lower)
    share = np.where(present, share, 0.5)
    free = np.concatenate([np.log(share / (1 - share)), batch.start[..., THETA:]], -1)
    background = np.zeros((len(level), smooth.shape[1]))
    background[:, 0] = level
    first = np.concatenate([free.reshape(len(level), -1), background], 1)
    linear = lx.Normal(lx.Cholesky()) if cholesky else lx.QR()
    solver = optx.LevenbergMarquardt(rtol=USUAL, atol=USUAL, linear_solver=linear)

    def solve(first: Any, args: Any) -> Any:
        fit = optx.least_squares(distance, solver, first, args, max_steps=256, throw=False)
        return fit.value, fit.stats["num_steps"]

    flat = (len(level), -1)
    root = np.sqrt(batch.weight).reshape(flat)
    args = (batch.data.reshape(flat), root, lower, upper, batch.present)
    together = jax.jit(jax.vmap(solve))

    def run() -> Any:
        with jax.enable_x64(True):
            return jax.block_until_ready(together(first, args))

    def read(fits: Any) -> Fits:
        params, steps = (np.asarray(leaf) for leaf in fits)
        free = params[:, : 6 * slots].reshape(-1, slots, 6)
        boxed = lower + (upper - lower) / (1 + np.exp(-free[..., :THETA]))
        source = np.concatenate([boxed, free[..., THETA:]], -1)
        out = [
            np.append(own[there].ravel(), tail)
            for own, there, tail in zip(source, batch.present, params[:, 6 * slots :], strict=True)
        ]
        return Fits(out, float(steps.mean()))

    return run, read


def with_hyperjax(dtype: type, batch: GroupBatch, truth: np.ndarray) -> tuple[Run, Read]:
    """`hyperjax.fit_groups`, covariances and all."""
    batch = in_type(batch, dtype)
    return lambda: fit_groups(batch), lambda fit: Fits(vectors(batch, fit), float(fit.steps.mean()))


def in_type(batch: GroupBatch, dtype: type) -> GroupBatch:
    floats = ("data", "weight", "start", "lower", "upper")
    return batch._replace(**{name: getattr(batch, name).astype(dtype) for name in floats})


FITTERS = {
    "lmfit": Fitter(with_lmfit, (64, 256)),
    "scipy": Fitter(with_scipy, (16, 64)),
    "astropy": Fitter(with_astropy, (32, 128)),
    "optimistix": Fitter(functools.partial(with_optimistix, False), (16, 512)),
    "optimistix, Cholesky": Fitter(functools.partial(with_optimistix, True), (16, 512)),
    "hyperjax": Fitter(functools.partial(with_hyperjax, np.float64), (1, 8)),
    "hyperjax, float32": Fitter(functools.partial(with_hyperjax, np.float32), (1, 8)),
}
OURS = {"hyperjax": np.float64, "hyperjax, float32": np.float32}


# --- Costs ---------------------------------------------------------------------------------------


def cost(params: np.ndarray, one: Single) -> float:
    """Half the sum of squared residuals, in units of the noise."""
    return 0.5 * float(np.sum(residual(params, one) ** 2))


def reference(one: Single) -> tuple[float, float]:
    """The costs of two tight scipy fits: from the start, and from the truth."""
    truth = one.truth.copy()
    truth[6 * one.sources :] = 0
    truth[6 * one.sources :] = np.linalg.lstsq(one.terms, -residual(truth, one))[0]
    from_start, from_truth = (by_scipy(one, first, TIGHT).cost for first in (one.start, truth))
    return from_start, from_truth


@functools.cache
def problems(name: str, count: int) -> tuple[GroupBatch, np.ndarray]:
    """The problems of a case, the same in every process."""
    return make(CASES[name], count)


def references(name: str, count: int, part: range) -> list[tuple[float, float]]:
    """The reference costs of a part of the problems of a case."""
    return [reference(single(*problems(name, count), group)) for group in part]


def all_references(pool: ProcessPoolExecutor, name: str, count: int, first: int) -> np.ndarray:
    """The reference costs (first, 2) of the first of `count` problems, by all workers."""
    parts = [range(first)[i : i + 16] for i in range(0, first, 16)]
    some = functools.partial(references, name, count)
    return np.array(list(itertools.chain.from_iterable(pool.map(some, parts))))


def excess(name: str, count: int, params: Sequence[np.ndarray], best: np.ndarray) -> np.ndarray:
    """Costs of the first fits of a case, relative to the best, minus 1."""
    batch, truth = problems(name, count)
    both = zip(params, best, strict=False)
    return np.array(
        [cost(own, single(batch, truth, i)) / low - 1 for i, (own, low) in enumerate(both)]
    )


# --- In the workers ------------------------------------------------------------------------------


class Clocked(NamedTuple):
    """Seconds of one run over `problems` problems."""

    problems: int
    wall: float
    cpu: float


def worker(cores: Sequence[int]) -> ProcessPoolExecutor:
    """A process of its own on some of the cores, a device on each."""
    context = get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=settle, initargs=(cores,))


def settle(cores: Sequence[int]) -> None:
    """Keep this process to the cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    configure_runtime(len(cores))


@functools.cache
def prepared(fitter: str, kind: str, count: int) -> tuple[int, Run, Read]:
    """How many problems a fitter takes, its run over them and how to read that."""
    prepare, every = FITTERS[fitter]
    batch, truth = problems(kind, count)
    first = max(count // every[kind == "B"], 1)
    few = GroupBatch(*(leaf[:first] for leaf in batch))
    return first, *prepare(few, truth[:first])


def fitted(fitter: str, kind: str, count: int) -> Fits:
    """The fits; whatever is compiled is compiled here."""
    _, run, read = prepared(fitter, kind, count)
    return read(run())


def clocked(fitter: str, kind: str, count: int) -> Clocked:
    first, run, _ = prepared(fitter, kind, count)
    wall, cpu = perf_counter(), process_time()
    run()
    return Clocked(first, perf_counter() - wall, process_time() - cpu)


# --- The floor: what one evaluation cannot do without --------------------------------------------


def floor(kind: str, dtype: type) -> dict[str, float]:
    """CPU seconds of each part of one evaluation, at its best number of lanes."""
    best: dict[str, float] = {}
    for lanes in FLOOR_LANES:
        for part, run in floor_runs(kind, dtype, lanes).items():
            cpu = process_time()
            run()
            spent = (process_time() - cpu) / lanes / FLOOR_TRIPS
            best[part] = min(spent, best.get(part, np.inf))
    return best


@functools.cache
def floor_runs(kind: str, dtype: type, lanes: int) -> dict[str, Callable[[], Any]]:
    """Loops over the parts of an evaluation, of so many problems together.

    exp: the Gaussians' exponentials. pixels: one pass over everything else that is elementwise
    (exponents, model, residuals, products). moments: the products of matrices (BLAS) that take
    the rows of products to their moments of degree 4, those with residuals of degree 2.
    cholesky: a factor and a solution.
    """
    import jax
    import jax.numpy as jnp

    slots, side, order = (getattr(CASES[kind], name) for name in ("slots", "side", "order"))
    size = 6 * slots + len(monomials(order))
    first, second = np.triu_indices(slots)
    rows = len(first) + 2 * slots + 1
    rng = np.random.default_rng(0)
    axis = np.linspace(-1, 1, side)
    x, y = (np.asarray(a.ravel(), dtype) for a in np.meshgrid(axis, axis))
    data, weight, smooth = np.asarray(rng.uniform(0.5, 1, (3, lanes, side**2)), dtype)

    def exp(values: Any) -> Any:
        return jnp.exp(-values)

    def pixels(carry: Any) -> Any:
        centre, _ = carry
        dx, dy = x - centre[..., None], y + centre[..., None]
        unit = jax.lax.optimization_barrier(dx * (dx + dy) + dy * dy)
        left = weight * (data - jnp.sum(unit, 1) - smooth)
        weighted = unit * weight[:, None]
        products = [weighted[:, first] * weighted[:, second], weighted * weight[:, None]]
        out = jnp.concatenate([*products, weighted * left[:, None], (left * weight)[:, None]], 1)
        return centre + 1e-20 * out[:, :slots, 0], out

    def cholesky(carry: Any) -> Any:
        matrix, _ = carry
        factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
        step = jax.vmap(lambda f: jax.scipy.linalg.cho_solve((f, True), f[0]))(factor)
        return matrix.at[:, 0, 0].add(1e-20 * step[:, 0]), step

    matrix = np.asarray(np.eye(size) * size + rng.uniform(size=(lanes, size, size)), dtype)
    carries = {
        exp: np.asarray(rng.uniform(size=(lanes, slots, side**2)), dtype),
        pixels: (np.zeros((lanes, slots), dtype), np.zeros((lanes, rows, side**2), dtype)),
        cholesky: (matrix, np.zeros((lanes, size), dtype)),
    }

    def looped(part: Callable[[Any], Any], carry: Any) -> Callable[[], Any]:
        loop = jax.jit(lambda c: jax.lax.fori_loop(0, FLOOR_TRIPS, lambda _, c: part(c), c))

        def run() -> Any:
            with jax.enable_x64(dtype == np.float64):
                return jax.block_until_ready(loop(carry))

        run()
        return run

    runs = {part.__name__: looped(part, carry) for part, carry in carries.items()}
    of_products = moments(lanes * (rows - slots - 1), side, 4, dtype)
    of_residuals = moments(lanes * (slots + 1), side, 2, dtype)
    return runs | {"moments": lambda: (of_products(), of_residuals())}


def moments(rows: int, side: int, degree: int, dtype: type) -> Callable[[], None]:
    """A loop over the products of matrices: along x to its powers, then along y."""
    rng = np.random.default_rng(0)
    powers, count = degree + 1, len(monomials(degree))
    products = np.asarray(rng.normal(size=(rows * side, side)), dtype)
    along_x = np.asarray(rng.normal(size=(side, powers)), dtype)
    along_y = np.asarray(rng.normal(size=(side * powers, count)), dtype)
    partial = np.empty((rows * side, powers), dtype)
    out = np.empty((rows, count), dtype)

    def run() -> None:
        for _ in range(FLOOR_TRIPS):
            np.matmul(products, along_x, out=partial)
            np.matmul(partial.reshape(rows, -1), along_y, out=out)

    return run


# --- The three measurements ----------------------------------------------------------------------


def compare(options: argparse.Namespace) -> list[str]:
    """The table of both kinds."""
    fitters = [name for name in FITTERS if name not in options.without]
    count = options.problems or 8192
    cores = available_cores()
    lines = []
    with ExitStack() as stack:
        one = stack.enter_context(worker(cores[:1]))
        all_cores = stack.enter_context(worker(cores)) if len(cores) > 1 else None
        for kind in KINDS:
            first = max(count // (8 if kind == "A" else 32), 1)
            with ProcessPoolExecutor(len(cores), get_context("spawn")) as pool:
                best = all_references(pool, kind, count, first).min(1)
            fits = {name: one.submit(fitted, name, kind, count).result() for name in fitters}
            for name in OURS if all_cores else ():
                all_cores.submit(clocked, name, kind, count).result()  # compiles
            rounds = [
                one_round(one, all_cores, fitters, kind, count) for _ in range(options.repeats)
            ]
            lines += ["", *kind_table(kind, count, fits, best, rounds, options.markdown)]
    notes = [
        "fits per second of wall time and of CPU time: medians of "
        f"{options.repeats} rounds, in each of which all take their turn; the ratios are those of "
        "CPU time within a round, for several cores of wall time",
        "one core and one process, unless other cores are named; compilation is not in the times",
        "at best cost: at most 1e-6 above the lower of two tight scipy fits, of the first "
        f"{max(count // 8, 1)} problems of A and {max(count // 32, 1)} of B, or as many as taken",
        "floor: part of the time that the exponentials, one pass over the pixels, the products of "
        "matrices and a Cholesky factor of each step take alone",
    ]
    return [*lines, "", *bullets(notes, options.markdown)]


class Round(NamedTuple):
    """One turn of all: by fitter on one core, ours on all cores, and the floor by type."""

    one: dict[str, Clocked]
    all_cores: dict[str, Clocked]
    floor: dict[str, dict[str, float]]


def one_round(
    one: ProcessPoolExecutor,
    all_cores: ProcessPoolExecutor | None,
    fitters: Sequence[str],
    kind: str,
    count: int,
) -> Round:
    alone, together, floors = {}, {}, {}
    for name in fitters:
        alone[name] = one.submit(clocked, name, kind, count).result()
        if name in OURS:
            floors[name] = one.submit(floor, kind, OURS[name]).result()
            if all_cores:
                together[name] = all_cores.submit(clocked, name, kind, count).result()
    return Round(alone, together, floors)


def kind_table(
    kind: str,
    count: int,
    fits: dict[str, Fits],
    best: np.ndarray,
    rounds: Sequence[Round],
    markdown: bool,
) -> list[str]:
    """The rows of one kind of problem."""
    headings = ["problems", "fits/s", "fits/CPU-s", "x lmfit", "at best cost", "steps", "floor"]
    rows = []
    for name, fit in fits.items():
        own = [a_round.one[name] for a_round in rounds]
        reached = excess(kind, count, fit.params, best) <= BEST
        over = [rate(a.one[name]) / rate(a.one["lmfit"]) for a in rounds if "lmfit" in a.one]
        floors = [
            sum(a.floor[name].values()) * fit.steps * rate(a.one[name])
            for a in rounds
            if name in a.floor
        ]
        rows.append(
            [
                name,
                str(own[0].problems),
                number(statistics.median(run.problems / run.wall for run in own)),
                number(statistics.median(map(rate, own))),
                spread(over, "{:.1f}"),
                f"{reached.mean():.3f} of {reached.size}",
                f"{fit.steps:.1f}",
                spread(floors, "{:.0%}"),
            ]
        )
    for name in rounds[0].all_cores:
        own = [a_round.all_cores[name] for a_round in rounds]
        faster = [a.one[name].wall / a.all_cores[name].wall for a in rounds]
        rows.append(
            [
                f"{name}, {len(available_cores())} cores",
                str(own[0].problems),
                number(statistics.median(run.problems / run.wall for run in own)),
                number(statistics.median(map(rate, own))),
                f"{spread(faster, '{:.2f}')} x one core",
                *[""] * 3,
            ]
        )
    parts = {
        name: ", ".join(
            f"{part} {1e6 * statistics.median(a.floor[name][part] for a in rounds):.1f}"
            for part in rounds[0].floor[name]
        )
        for name in rounds[0].floor
    }
    floors = [
        f"{kind}, {name}: floor of an evaluation in us: {text}" for name, text in parts.items()
    ]
    return [*table([kind, *headings], rows, markdown), "", *bullets(floors, markdown)]


def rate(run: Clocked) -> float:
    """Fits per CPU second."""
    return run.problems / run.cpu


def accuracy(options: argparse.Namespace) -> list[str]:
    """How many fits of each case end at the best cost."""
    count = options.problems or 2000
    cores = available_cores()
    rows = []
    with ExitStack() as stack:
        ours = stack.enter_context(worker(cores))
        pool = stack.enter_context(ProcessPoolExecutor(len(cores), get_context("spawn")))
        for name, case in CASES.items():
            if not any(name.startswith(prefix) for prefix in options.case):
                continue
            first = count if case.slots == 1 else -(-count // options.fewer_blends)
            print(name, file=sys.stderr)
            costs = all_references(pool, name, first, first)
            rows.append([name, *ours.submit(accuracy_row, name, first, costs).result()])
    headings = [
        "problems",
        "at best cost",
        "scipy's, from the start",
        "lower",
        "steps",
        "not ended",
    ]
    notes = [
        "at best cost: at most 1e-6 above the lower of two tight scipy fits, one from the start "
        "and one from the truth; scipy's own from the start alone beside it",
        "lower: fits that found a cost lower than both by more than 1e-6",
    ]
    return [*table(["", *headings], rows, options.markdown), "", *bullets(notes, options.markdown)]


def accuracy_row(name: str, count: int, costs: np.ndarray) -> list[str]:
    """Fractions of one case."""
    batch, _ = problems(name, count)
    fit = fit_groups(batch)
    best = costs.min(1)
    over = excess(name, count, vectors(batch, fit), best)
    return [
        str(count),
        f"{np.mean(over <= BEST):.4f}",
        f"{np.mean(costs[:, 0] <= best * (1 + BEST)):.4f}",
        str(np.sum(over < -BEST)),
        f"{fit.steps.mean():.1f}, at most {fit.steps.max()}",
        str(np.sum(fit.status != CONVERGED)),
    ]


def stream(options: argparse.Namespace) -> list[str]:
    """Peak memory against the number of problems, in one call and in a stream."""
    count = options.problems or 1_000_000
    cores = available_cores()
    calls = []
    for size in (PIECE // 4, PIECE, 4 * PIECE):
        with worker(cores) as process:
            calls.append(process.submit(one_call, size).result())
    ends = sorted({-(-count // share) for share in (100, 10, 3, 1)})
    with worker(cores) as process:
        flow = process.submit(streamed, ends).result()
    headings = ["problems", "peak memory [MiB]", "data [MiB]", "results [MiB]", "fits/s"]
    notes = [
        "peak memory of a whole process on all cores, float64, problems of A; each single call is "
        "a process of its own",
        f"in the stream, each piece of {PIECE} problems is made, fitted and dropped, but for its "
        "parameters; making the data is in the memory, not in the fits per second",
    ]
    rows = [["one call", *row] for row in calls] + [["stream", *row] for row in flow]
    return [*table(["", *headings], rows, options.markdown), "", *bullets(notes, options.markdown)]


def one_call(count: int) -> list[str]:
    """Memory of one call of `fit_groups`, on a few problems over and over."""
    few, _ = make(A, PIECE // 16)
    batch = GroupBatch(*(np.concatenate([leaf] * (16 * count // PIECE)) for leaf in few))
    start = perf_counter()
    fit = fit_groups(batch)
    return memory_row(count, [*batch], [*fit], count / (perf_counter() - start))


def streamed(ends: Sequence[int]) -> list[list[str]]:
    """Memory at several points of a stream of pieces."""
    rng = np.random.default_rng(1)
    first, _ = make(A, PIECE)
    fit_groups(first)
    kept: list[np.ndarray] = []
    rows, done, seconds = [], 0, 0.0
    while done < ends[-1]:
        piece = first._replace(data=first.data + rng.normal(size=first.data.shape))
        start = perf_counter()
        kept.append(fit_groups(piece).params)
        seconds += perf_counter() - start
        before, done = done, done + PIECE
        if any(before < end <= done for end in ends):
            rows.append(memory_row(done, [*piece], kept, done / seconds))
    return rows


def memory_row(
    count: int, data: Sequence[np.ndarray], results: Sequence[np.ndarray], speed: float
) -> list[str]:
    """What is printed of one point."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    sizes = [peak, *(sum(leaf.nbytes for leaf in leaves) for leaves in (data, results))]
    return [str(count), *(f"{size / 2**20:.0f}" for size in sizes), number(speed)]


# --- What is printed -----------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    if markdown:
        rule = ["---", *["---:"] * (len(headings) - 1)]
        return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (headings, *rows)
    ]


def bullets(lines: Sequence[str], markdown: bool) -> list[str]:
    return [f"- {line}" if markdown else line for line in lines]


def number(value: float) -> str:
    """Three digits, thousands apart."""
    return f"{float(f'{value:.3g}'):,.0f}".replace(",", " ")


def spread(values: Sequence[float], form: str) -> str:
    """Median and range; nothing of nothing."""
    if not values:
        return ""
    median, low, high = (
        form.format(v) for v in (statistics.median(values), min(values), max(values))
    )
    return median if len(values) == 1 else f"{median} ({low}..{high})"


def facts() -> list[str]:
    packages = ("hyperjax", "jax", "optimistix", "numpy", "scipy", "astropy", "lmfit")
    installed = [f"{name} {version(name)}" for name in packages if find_spec(name)]
    return [
        f"{date.today()}; {processor()}, load {os.getloadavg()[1]:.1f}",
        ", ".join(installed),
    ]


def available_cores() -> list[int]:
    """The first two cores that may be used."""
    every = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(usable_cores())
    return sorted(every)[:2]


def main() -> None:
    """Measure, and print."""
    options = parse_options()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # of the workers
    mode = accuracy if options.accuracy else stream if options.stream else compare
    lines = mode(options)
    print("\n".join([*lines, *bullets(facts(), options.markdown)]))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--accuracy", action="store_true", help="fractions at the best cost")
    modes.add_argument("--stream", action="store_true", help="memory of many problems")
    parser.add_argument(
        "--problems",
        type=positive,
        metavar="N",
        help="of A, for hyperjax; others take a fixed share; default: 8192, or 2000 of each case, "
        "or a stream of 1000000",
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="default: 5")
    parser.add_argument("--quick", action="store_true", help="few problems, one round")
    parser.add_argument(
        "--without", action="append", default=[], choices=FITTERS, help="a fitter to leave out"
    )
    parser.add_argument(
        "--case", action="append", metavar="START", help="cases whose names start so; default: all"
    )
    parser.add_argument(
        "--fewer-blends",
        type=positive,
        default=1,
        metavar="N",
        help="of the cases of B, whose references are slow, take one in N problems; default: 1",
    )
    parser.add_argument("--markdown", action="store_true", help="print for a README")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.problems = (
            1,
            options.problems or (20_000 if options.stream else 512),
        )
    options.case = options.case or [""]
    comparing = not (options.accuracy or options.stream)
    if comparing and "lmfit" not in options.without and find_spec("lmfit") is None:
        parser.error("lmfit is not installed: pip install lmfit, or add --without lmfit")
    return options


if __name__ == "__main__":
    main()
