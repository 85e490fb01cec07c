"""Sizes without the beam: against Wild's formulae, draws from covariances, whole extractions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy import units as u
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from test_catalog import catalog_of, make_fits, make_map

from hyperjax.catalog import FLAGS
from hyperjax.deconvolution import Deconvolved, deconvolve
from hyperjax.maps import Beam, local_geometry, pixel_covariance, read_map
from hyperjax.pipeline import extract
from hyperjax.simulation import Simulation, simulate, write_simulation

FWHM = np.sqrt(8 * np.log(2))
BEAM = (12.0, 9.0, 20.0)
NO_SLOPES, NO_COVARIANCE = np.zeros((1, 3, 2, 2)), np.zeros((1, 3, 3))


def moments(major: float, minor: float, pa_deg: float) -> NDArray:
    """Second moments (2, 2) (East, North) of an ellipse given by its FWHMs."""
    pa = np.deg2rad(pa_deg)
    axes = np.array([[np.sin(pa), np.cos(pa)], [np.cos(pa), -np.sin(pa)]])
    return axes.T @ np.diag([(major / FWHM) ** 2, (minor / FWHM) ** 2]) @ axes


def wild(
    source: tuple[float, float, float], beam: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Deconvolution as Wild (1970) and AIPS have it, in FWHMs and angles from North (deg)."""
    (a, b, p), (c, d, q) = source, beam
    p, q = np.deg2rad(p), np.deg2rad(q)
    alpha = (a * np.cos(p)) ** 2 + (b * np.sin(p)) ** 2
    alpha -= (c * np.cos(q)) ** 2 + (d * np.sin(q)) ** 2
    beta = (a * np.sin(p)) ** 2 + (b * np.cos(p)) ** 2
    beta -= (c * np.sin(q)) ** 2 + (d * np.cos(q)) ** 2
    gamma = 2 * ((b**2 - a**2) * np.sin(p) * np.cos(p) - (d**2 - c**2) * np.sin(q) * np.cos(q))
    s, t = alpha + beta, np.hypot(alpha - beta, gamma)
    angle = np.rad2deg(0.5 * np.arctan2(-gamma, alpha - beta)) % 180
    return float(np.sqrt((s + t) / 2)), float(np.sqrt((s - t) / 2)), float(angle)


def exact(source: NDArray) -> Deconvolved:
    return deconvolve(source[None], NO_SLOPES, NO_COVARIANCE, moments(*BEAM)[None])


@pytest.mark.parametrize("own", [(8.0, 3.0, 70.0), (30.0, 20.0, 160.0), (5.0, 4.9, 1.0)])
def test_a_convolved_source_is_what_it_was(own: tuple[float, float, float]) -> None:
    seen = moments(*own) + moments(*BEAM)
    found = exact(seen)
    assert_allclose([found.major[0], found.minor[0], found.pa_deg[0]], own, rtol=1e-9)
    variance, axes = np.linalg.eigh(seen)
    pa = np.rad2deg(np.arctan2(*axes[:, 1]))
    assert_allclose(wild((*FWHM * np.sqrt(variance[::-1]), pa), BEAM), own, rtol=1e-8)
    assert not found.unresolved[0]


def test_the_beam_itself_has_no_size() -> None:
    found = exact(moments(*BEAM))
    assert found.major[0] < 1e-6
    assert found.unresolved[0]
    smaller = exact(moments(11.0, 8.0, 20.0))
    assert smaller.major[0] == smaller.minor[0] == 0
    assert np.isnan(smaller.pa_deg[0])
    assert smaller.unresolved[0]


def shaped(own: tuple[float, float, float]) -> tuple[NDArray, NDArray]:
    """Parameters of a fit of a convolved source in square pixels of 2 arcsec, and its moments."""
    jacobian = local_geometry(make_map().wcs, 60.0, 45.0).jacobian
    seen = moments(*own) + moments(*BEAM)
    variance, axes = np.linalg.eigh(seen)
    pa = np.rad2deg(np.arctan2(*axes[:, 1]))
    pixels = pixel_covariance(
        jacobian, *(np.array([v]) for v in FWHM * np.sqrt(variance[::-1])), pa
    )
    values, vectors = np.linalg.eigh(pixels[0])
    theta = np.arctan2(vectors[1, 1], vectors[0, 1])
    return np.array([0.3, 60.0, 45.0, np.sqrt(values[1]), np.sqrt(values[0]), theta]), jacobian[0]


def test_errors_are_those_of_draws_from_the_covariance() -> None:
    parameters, jacobian = shaped((15.0, 9.0, 70.0))
    rng = np.random.default_rng(4)
    mixing = rng.normal(size=(6, 6)) * np.array([0.1, 1, 1, 0.08, 0.06, 0.015])[:, None] / 3
    covariance = mixing @ mixing.T
    field = make_map(beam=Beam(*BEAM))
    (row,) = catalog_of(make_fits(parameters=parameters, covariance=covariance), field)
    major, minor, theta = rng.multivariate_normal(parameters, covariance, size=50_000)[:, 3:].T
    turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    root = jacobian @ np.moveaxis(turn, -1, 0) * np.column_stack([major, minor])[:, None]
    values, vectors = np.linalg.eigh(root @ root.swapaxes(1, 2) - moments(*BEAM))
    size = FWHM * np.sqrt(values)
    assert_allclose(row["FWHM_1_DECONV"].value, 15.0, rtol=1e-6)
    assert_allclose(row["FWHM_2_DECONV"].value, 9.0, rtol=1e-6)
    assert_allclose(row["PA_DECONV"].value, 70.0, rtol=1e-6)
    assert_allclose(row["FWHM_1_DECONV_ERR"].value, np.std(size[:, 1]), rtol=0.03)
    assert_allclose(row["FWHM_2_DECONV_ERR"].value, np.std(size[:, 0]), rtol=0.03)
    pa = np.rad2deg(np.arctan2(vectors[:, 0, 1], vectors[:, 1, 1]))
    off = (pa - 70 + 90) % 180 - 90
    assert_allclose(row["PA_DECONV_ERR"].value, np.std(off), rtol=0.05)
    assert not row["FLAGS"] & FLAGS.UNRESOLVED


@pytest.mark.parametrize("relative", [0.02, 0.05])
def test_few_point_sources_are_called_resolved(relative: float) -> None:
    """The largest excess of all directions is above 3 sigma for 0.5 % of them; sizes compared
    without errors would resolve most.
    """
    parameters, _ = shaped((1e-6, 1e-6, 0.0))
    covariance = np.zeros((6, 6))
    ratio = parameters[3] / parameters[4]
    turn = relative * ratio / (ratio**2 - 1)
    covariance[3:, 3:] = np.diag([relative * parameters[3], relative * parameters[4], turn]) ** 2
    draws = np.random.default_rng(5).multivariate_normal(parameters, covariance, size=20_000).T
    names = ("sigma_major", "sigma_minor", "theta")
    fits = make_fits(20_000, parameters, covariance, **dict(zip(names, draws[3:], strict=True)))
    catalog = catalog_of(fits, make_map(beam=Beam(*BEAM)))
    resolved = (catalog["FLAGS"] & FLAGS.UNRESOLVED) == 0
    assert 0.0005 < resolved.mean() < 0.015
    assert np.mean(catalog["FWHM_1_DECONV"] > 0) > 0.7


def test_without_errors_nothing_is_called_unresolved() -> None:
    unknown = make_fits(covariance=np.full((6, 6), np.nan))
    (row,) = catalog_of(unknown, make_map(beam=Beam(30.0, 30.0)))
    assert not row["FLAGS"] & FLAGS.UNRESOLVED
    assert row["FWHM_1_DECONV"] == 0
    assert np.isnan(row["FWHM_1_DECONV_ERR"])


GRID = tuple((30.0 + 40 * i, 32.0 + 40 * j) for i in range(7) for j in range(7))


def test_whole_extractions_give_the_sizes_before_the_beam(tmp_path: Path) -> None:
    """In a rotated Galactic map with an elongated beam: half of the sources are points."""
    options = Simulation(
        shape=(300, 300),
        positions=GRID,
        fluxes=(0.06,) * 49,
        frame="galactic",
        centre_deg=(30.0, 40.0),
        rotation_deg=35.0,
        beam_axis_ratio=0.7,
        beam_pa_deg=50.0,
        gradient=0,
        structure=0,
        seed=8,
    )
    blank = simulate(options)
    image = read_map(write_simulation(blank, tmp_path / "blank.fits")[0])
    beam = pixel_covariance(
        np.broadcast_to(np.eye(2), (49, 2, 2)),
        np.full(49, image.beam.major_arcsec),
        np.full(49, image.beam.minor_arcsec),
        image.beam_pa_at(blank.sources.coordinates),
    )
    own = np.array(
        [moments(5.0, 3.0, 20.0) if k % 2 else moments(1e-3, 1e-3, 0) for k in range(49)]
    )
    variance, axes = np.linalg.eigh(beam + own)
    pa = np.rad2deg(np.arctan2(axes[:, 0, 1], axes[:, 1, 1]))
    size = FWHM * np.sqrt(variance)
    shapes = tuple(map(tuple, np.column_stack([size[:, 1], size[:, 0], pa]).tolist()))
    seen = simulate(replace(options, shapes=shapes))
    result = extract(read_map(write_simulation(seen, tmp_path / "sky.fits")[0])).catalog
    place = np.array([[result["X_PIX"].value], [result["Y_PIX"].value]])[:, 0]
    which = np.hypot(*(place[:, :, None] - np.array(GRID).T[:, None])).argmin(axis=1)
    large = which % 2 == 1
    assert len(result) == 49
    unresolved = (result["FLAGS"] & FLAGS.UNRESOLVED) > 0
    assert unresolved[~large].mean() > 0.9
    assert not unresolved[large].any()
    some = result[large]
    for name, true in (("FWHM_1_DECONV", 5 * u.arcsec), ("FWHM_2_DECONV", 3 * u.arcsec)):
        pull = ((some[name] - true) / some[f"{name}_ERR"]).to_value(u.one)
        assert abs(np.median(pull)) < 4 * 1.25 / np.sqrt(len(some))
        assert 0.6 < np.std(pull) < 1.6
    turn = (some["PA_DECONV"].to_value("deg") - 20 + 90) % 180 - 90
    assert_allclose(np.median(turn), 0, atol=4 * np.median(some["PA_DECONV_ERR"].value) / 4)
