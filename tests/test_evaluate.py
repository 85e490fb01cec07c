"""Scores of catalogues made by hand, whose errors are known exactly."""

import dataclasses

import numpy as np
import pytest
from astropy import units as u
from astropy.table import MaskedColumn, QTable, Table
from numpy.testing import assert_allclose, assert_array_equal

from hyperjax.evaluate import Score, matches, score
from hyperjax.simulation import Simulation, simulate

RADIUS = 2.0  # arcsec


@pytest.fixture
def truth() -> QTable:
    """Eleven sources on the equator, 20 arcsec apart; the last two are a blend."""
    east = 20.0 * np.arange(11)
    east[-1] = east[-2] + 5.0
    count = len(east)
    neighbour = np.full(count, 5.0)
    neighbour[-2:] = 1.25
    return QTable(
        {
            "RA": (10.0 + east / 3600) * u.deg,
            "DEC": np.zeros(count) * u.deg,
            "FLUX_TOTAL": np.linspace(10.0, 110.0, count) * u.mJy,
            "FWHM_1": np.full(count, 6.0) * u.arcsec,
            "FWHM_2": np.full(count, 4.0) * u.arcsec,
            "PA": np.linspace(0.0, 175.0, count) * u.deg,
            "NEIGHBOUR": neighbour,
        }
    )


def copy_of(truth: QTable, rows: slice | list[int] = slice(None)) -> QTable:
    catalog = truth[rows].copy()
    catalog.remove_column("NEIGHBOUR")
    return catalog


# ---------------------------------------------------------------------------------------- matching


def test_order_of_the_catalogue_does_not_matter(truth: QTable) -> None:
    order = np.random.default_rng(0).permutation(len(truth))
    pairs = matches(copy_of(truth, list(order)), truth, RADIUS)
    assert_array_equal(pairs.truth, np.arange(len(truth)))
    assert_array_equal(order[pairs.catalog], pairs.truth)
    assert_allclose(pairs.separation_arcsec, 0, atol=1e-6)


def test_closest_pair_is_taken_first_and_once(truth: QTable) -> None:
    """Two detections of one source: the closer one matches, the other is false."""
    catalog = copy_of(truth, [3, 3])
    catalog["DEC"] = [0.8, 0.3] * u.arcsec
    pairs = matches(catalog, truth, RADIUS)
    assert_array_equal(pairs.catalog, [1])
    assert_array_equal(pairs.truth, [3])
    assert_allclose(pairs.separation_arcsec, [0.3], rtol=1e-6)


def test_what_a_closer_pair_took_leaves_the_next_best(truth: QTable) -> None:
    """The detection at +1" takes its neighbour at 0"; the one at +3" still matches that at +5"."""
    close = truth[-2:]
    catalog = copy_of(truth, [9, 9])
    catalog["RA"] = close["RA"][0] + [1.0, 3.0] * u.arcsec
    pairs = matches(catalog, close, 4.0)
    assert_array_equal(pairs.catalog, [0, 1])
    assert_allclose(pairs.separation_arcsec, [1.0, 2.0], rtol=1e-6)
    catalog["RA"] = close["RA"][0] + [1.0, 2.0] * u.arcsec  # both are nearest to the first
    pairs = matches(catalog, close, 4.0)
    assert_allclose(pairs.separation_arcsec, [1.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize(("radius", "count"), [(0.9, 0), (1.1, 1)])
def test_radius_is_on_the_sky(radius: float, count: int) -> None:
    """At 60 degrees 2 arcsec of right ascension are 1 arcsec on the sky."""
    first = QTable({"RA": [30.0] * u.deg, "DEC": [60.0] * u.deg})
    second = QTable({"RA": [30.0 + 2 / 3600] * u.deg, "DEC": [60.0] * u.deg})
    assert len(matches(first, second, radius).truth) == count


def test_across_the_origin_of_right_ascension() -> None:
    first = QTable({"RA": [359.9999] * u.deg, "DEC": [0.0] * u.deg})
    second = QTable({"RA": [0.0001] * u.deg, "DEC": [0.0] * u.deg})
    assert_allclose(matches(first, second, RADIUS).separation_arcsec, [0.72])


# ------------------------------------------------------------------------------------------ scores


def test_perfect_catalogue(truth: QTable) -> None:
    result = score(copy_of(truth), truth, RADIUS)
    assert (result.matched, result.false, result.n_elongated) == (11, 0, 11)
    assert result.completeness == result.completeness_blended == result.reliability == 1
    assert result.flux_outliers == 0
    for name in ("flux_bias", "flux_mad", "fwhm_bias", "fwhm_mad", "pa_bias_deg", "pa_mad_deg"):
        assert_allclose(getattr(result, name), 0, atol=1e-12)
    assert np.isnan(result.flux_pull_mad)


def test_completeness_and_reliability(truth: QTable) -> None:
    catalog = copy_of(truth, [0, 1, 2, 3, 4, 5, 6, 7, 9])
    catalog["DEC"][0] = 1 * u.arcmin
    result = score(catalog, truth, RADIUS)
    assert (result.n_truth, result.n_catalog, result.matched, result.false) == (11, 9, 8, 1)
    assert_allclose(result.completeness, 8 / 11)
    assert_allclose(result.completeness_blended, 1 / 2)
    assert_allclose(result.reliability, 8 / 9)


def test_flux_statistics(truth: QTable) -> None:
    """Relative errors of -5 ... +5 times 4 % round a bias of 9 %."""
    error = 0.09 + 0.04 * np.arange(-5, 6)
    catalog = copy_of(truth)
    catalog["FLUX_TOTAL"] *= 1 + error
    result = score(catalog, truth, RADIUS)
    assert_allclose(result.flux_bias, 0.09)
    assert_allclose(result.flux_mad, 1.4826 * 0.12)
    assert_allclose(result.flux_mad_blended, 1.4826 * 0.02)
    assert_allclose(result.flux_half_width_95, np.percentile(np.abs(error), 95.45))
    assert result.flux_outliers == 0
    catalog["FLUX_TOTAL"][:2] = [3.0, np.nan] * u.mJy
    assert_allclose(score(catalog, truth, RADIUS).flux_outliers, 2 / 11)


def test_pulls_of_gaussian_errors() -> None:
    rng = np.random.default_rng(5)
    truth = simulate(Simulation(shape=(600, 600), n_sources=400, noise="none")).truth
    catalog = QTable(truth["RA", "DEC", "FLUX_TOTAL"])
    sigma = rng.uniform(1.0, 5.0, len(truth)) * u.mJy
    catalog["FLUX_TOTAL"] += 2.0 * sigma * rng.standard_normal(len(truth))
    catalog["FLUX_TOTAL_ERR"] = sigma
    result = score(catalog, truth, RADIUS)
    assert_allclose([result.flux_pull_mad, result.flux_pull_std], 2.0, rtol=0.15)


def test_unusable_uncertainties_are_left_out(truth: QTable) -> None:
    catalog = copy_of(truth)
    catalog["FLUX_TOTAL"] += 3.0 * u.mJy
    catalog["FLUX_TOTAL_ERR"] = np.full(len(truth), 1.5) * u.mJy
    catalog["FLUX_TOTAL_ERR"][:3] = [0.0, np.nan, -1.0] * u.mJy
    result = score(catalog, truth, RADIUS)
    assert_allclose([result.flux_pull_mad, result.flux_pull_std], 0, atol=1e-12)


def test_sizes_and_angles(truth: QTable) -> None:
    catalog = copy_of(truth)
    catalog["FWHM_1"] *= 1.21
    catalog["PA"] = (catalog["PA"] + 10 * u.deg) % (180 * u.deg)
    catalog["PA"][0] = 175 * u.deg  # of a truth of 0: -5 degrees
    result = score(catalog, truth, RADIUS)
    assert_allclose([result.fwhm_bias, result.fwhm_mad], [0.1, 0], atol=1e-12)
    assert_allclose([result.pa_bias_deg, result.pa_mad_deg], [10.0, 0.0], atol=1e-9)


def test_angles_of_round_sources_do_not_count(truth: QTable) -> None:
    truth["FWHM_2"][2:] = 5.5 * u.arcsec
    catalog = copy_of(truth)
    catalog["PA"][2:] += 60 * u.deg
    result = score(catalog, truth, RADIUS)
    assert result.n_elongated == 2
    assert_allclose([result.pa_bias_deg, result.pa_mad_deg], 0, atol=1e-12)


def test_position_offset(truth: QTable) -> None:
    catalog = copy_of(truth)
    catalog["DEC"] = np.linspace(0.0, 1.0, len(truth)) * u.arcsec
    assert_allclose(score(catalog, truth, RADIUS).position_offset_arcsec, 0.5, rtol=1e-6)


# ----------------------------------------------------------------- units, missing and empty things


def test_units_are_converted(truth: QTable) -> None:
    catalog = copy_of(truth)
    catalog["FLUX_TOTAL"] = catalog["FLUX_TOTAL"].to(u.Jy)
    catalog["RA"] = catalog["RA"].to(u.rad)
    catalog["FWHM_1"] = catalog["FWHM_1"].to(u.deg)
    result = score(catalog, truth, RADIUS)
    assert result.matched == 11
    assert_allclose([result.flux_bias, result.fwhm_bias], 0, atol=1e-12)


def test_plain_tables_have_the_default_units(truth: QTable) -> None:
    catalog = Table({name: truth[name].value for name in ("RA", "DEC", "FLUX_TOTAL")})
    assert score(catalog, truth, RADIUS).flux_bias == pytest.approx(0)


def test_masked_values_are_missing(truth: QTable) -> None:
    catalog = Table(copy_of(truth), masked=True)
    flux = catalog["FLUX_TOTAL"].data.copy()
    flux[0] = 1e9
    mask = np.arange(len(truth)) == 0
    catalog["FLUX_TOTAL"] = MaskedColumn(flux, mask=mask, unit="mJy")
    result = score(catalog, truth, RADIUS)
    assert_allclose(result.flux_half_width_95, 0, atol=1e-12)
    assert_allclose(result.flux_outliers, 1 / 11)


def test_positions_alone(truth: QTable) -> None:
    """A catalogue of detections has positions only."""
    result = score(truth["RA", "DEC"], truth, RADIUS)
    assert result.matched == 11
    assert np.isnan([result.flux_bias, result.flux_outliers, result.fwhm_mad]).all()
    assert len(result.lines()) == 3


def test_rows_without_a_position_are_false(truth: QTable) -> None:
    catalog = copy_of(truth)
    catalog["RA"][4] = np.nan * u.deg
    result = score(catalog, truth, RADIUS)
    assert (result.matched, result.false) == (10, 1)
    assert 4 not in matches(catalog, truth, RADIUS).truth


@pytest.mark.parametrize(("found", "true"), [(0, 11), (11, 0), (0, 0)])
def test_empty_tables(truth: QTable, found: int, true: int) -> None:
    result = score(copy_of(truth, slice(found)), truth[:true], RADIUS)
    assert (result.n_catalog, result.n_truth, result.matched) == (found, true, 0)
    assert result.false == found
    assert_array_equal(result.reliability, 0.0 if found else np.nan)
    assert_array_equal(result.completeness, 0.0 if true else np.nan)
    assert np.isnan(result.flux_bias)
    assert result.lines()[0].startswith("sources")


def test_no_match(truth: QTable) -> None:
    catalog = copy_of(truth)
    catalog["DEC"] += 1 * u.deg
    result = score(catalog, truth, RADIUS)
    assert (result.matched, result.false, result.completeness) == (0, 11, 0.0)
    assert np.isnan(result.position_offset_arcsec)


# ------------------------------------------------------------------------------------ presentation


def test_table_has_every_quantity_in_per_cent(truth: QTable) -> None:
    result = score(copy_of(truth, slice(4)), truth, RADIUS)
    table = result.table()
    assert list(table["quantity"]) == [item.name for item in dataclasses.fields(Score)]
    value = dict(zip(table["quantity"], table["value"], strict=True))
    assert_allclose(value["completeness"], 400 / 11)
    assert value["matched"] == 4
    assert all(table["meaning"])


def test_lines_read_as_text(truth: QTable) -> None:
    catalog = copy_of(truth, slice(10))
    catalog["FLUX_TOTAL"] *= 1.02
    catalog["FLUX_TOTAL_ERR"] = 0.02 * catalog["FLUX_TOTAL"]
    lines = score(catalog, truth, RADIUS).lines()
    assert lines[0] == "sources         10 of 11 found (90.9 %), 0 false (reliability 100.0 %)"
    assert "+2.0 % bias" in lines[3]
    assert len(lines) == 7
    assert not any("nan" in line for line in lines)
