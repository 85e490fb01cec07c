"""How well a catalogue recovers the sources that a map is known to contain.

Sources are matched on the sky, one to one: of all pairs within the matching radius the closest is
taken first, then the closest of what remains, so no source is used twice. Fluxes are total flux
densities (FLUX_TOTAL). Scatters are 1.4826 times the median absolute deviation (MAD), the standard
deviation where errors are Gaussian.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord, search_around_sky
from astropy.table import Table
from astropy.utils.masked import get_data_and_mask
from numpy.typing import NDArray

__all__ = ["Matches", "Score", "matches", "score"]

FloatArray = NDArray[np.float64]

BLENDED_BEAMS = 2.0  # a true source with a neighbour closer than this is a blended one
ELONGATED_AXIS_RATIO = 1.2  # major over minor axis from which a position angle means something
FLUX_OUTLIER = 0.3  # relative error of a flux that is off
_MAD_TO_SIGMA = 1.4826
_TWO_SIGMA_PERCENT = 95.45


class Matches(NamedTuple):
    """Pairs of a catalogued and a true source, in the order of the truth; each has shape (n,)."""

    catalog: NDArray[np.intp]  # row of the catalogue
    truth: NDArray[np.intp]  # row of the truth
    separation_arcsec: FloatArray


def _quantity(meaning: str, unit: str = "") -> Any:
    """Declare a field of `Score`; fractions and relative errors are shown in per cent."""
    return dataclasses.field(metadata={"meaning": meaning, "unit": unit})


@dataclass(frozen=True)
class Score:
    """Comparison of a catalogue with the truth; NaN where there is nothing to measure.

    Fractions and relative errors are fractions of 1 here and per cent in `table` and `lines`.
    The meaning of each field is in its metadata and in `table`.
    """

    n_truth: int = _quantity("true sources")
    n_catalog: int = _quantity("catalogued sources")
    matched: int = _quantity("matched sources")
    false: int = _quantity("catalogued sources without a match")
    completeness: float = _quantity("true sources that were found", "%")
    completeness_blended: float = _quantity(
        f"the same, of blended sources: those with a neighbour within {BLENDED_BEAMS:g} beams", "%"
    )
    reliability: float = _quantity("catalogued sources that are true", "%")
    position_offset_arcsec: float = _quantity("median distance from the true position", "arcsec")
    flux_bias: float = _quantity("median error of the total flux", "%")
    flux_mad: float = _quantity("scatter of the total flux", "%")
    flux_mad_blended: float = _quantity("the same, of blended sources", "%")
    flux_half_width_95: float = _quantity("|error| that 95 % of the fluxes stay below", "%")
    flux_outliers: float = _quantity(
        f"fluxes off by more than {100 * FLUX_OUTLIER:g} %, or not measured", "%"
    )
    flux_pull_mad: float = _quantity("scatter of flux error over its uncertainty")
    flux_pull_std: float = _quantity("standard deviation of the same")
    fwhm_bias: float = _quantity("median error of the FWHM (geometric mean)", "%")
    fwhm_mad: float = _quantity("scatter of the FWHM", "%")
    n_elongated: int = _quantity(
        f"matched sources with a true axis ratio above {ELONGATED_AXIS_RATIO:g}"
    )
    pa_bias_deg: float = _quantity("median error of their position angle", "deg")
    pa_mad_deg: float = _quantity("scatter of their position angle", "deg")

    def table(self) -> Table:
        """Return a table of one row per quantity: name, value, unit and meaning."""
        names, values, units, meanings = [], [], [], []
        for quantity in dataclasses.fields(self):
            unit = quantity.metadata["unit"]
            names.append(quantity.name)
            values.append(getattr(self, quantity.name) * (100.0 if unit == "%" else 1.0))
            units.append(unit)
            meanings.append(quantity.metadata["meaning"])
        return Table(
            {
                "quantity": np.array(names, str),
                "value": np.array(values, float),
                "unit": np.array(units, str),
                "meaning": np.array(meanings, str),
            }
        )

    def lines(self) -> list[str]:
        """Return the summary for a terminal: one line per subject that was measured."""
        subjects = [
            (
                0.0,
                f"sources         {self.matched} of {self.n_truth} found "
                f"({_percent(self.completeness)}), {self.false} false "
                f"(reliability {_percent(self.reliability)})",
            ),
            (
                self.completeness_blended,
                f"blended         {_percent(self.completeness_blended)} found",
            ),
            (
                self.position_offset_arcsec,
                f"position        {self.position_offset_arcsec:.3g} arcsec off (median)",
            ),
            (
                self.flux_bias,
                f"total flux      {_percent(self.flux_bias, '+')} bias, "
                f"{_percent(self.flux_mad)} scatter, "
                f"95 % within {_percent(self.flux_half_width_95)}, "
                f"{_percent(self.flux_outliers)} off by more than {100 * FLUX_OUTLIER:g} %",
            ),
            (
                self.flux_pull_mad,
                f"flux error      {self.flux_pull_mad:.2f} (MAD), {self.flux_pull_std:.2f} (std) "
                "of the errors over their uncertainties",
            ),
            (
                self.fwhm_bias,
                f"FWHM            {_percent(self.fwhm_bias, '+')} bias, "
                f"{_percent(self.fwhm_mad)} scatter",
            ),
            (
                self.pa_bias_deg,
                f"position angle  {self.pa_bias_deg:+.1f} deg bias, "
                f"{self.pa_mad_deg:.1f} deg scatter ({self.n_elongated} elongated sources)",
            ),
        ]
        return [line for measured, line in subjects if np.isfinite(measured)]


def matches(catalog: Table, truth: Table, match_radius_arcsec: float) -> Matches:
    """Match a catalogue with the truth on the sky, closest pairs first, one to one.

    Parameters
    ----------
    catalog, truth : astropy.table.Table or QTable
        With columns RA and DEC (degrees, if they carry no unit).
    match_radius_arcsec : float
        Largest separation of a pair.

    Returns
    -------
    Matches
        Indices of the rows, sorted by the row of the truth.
    """
    found_rows, found = _coordinates(catalog)
    true_rows, true = _coordinates(truth)
    radius = match_radius_arcsec * u.arcsec
    in_found, in_true, separation, _ = search_around_sky(found, true, radius)
    free_found = np.ones(len(found), bool)
    free_true = np.ones(len(true), bool)
    kept = []
    for pair in np.argsort(separation, kind="stable"):
        if free_found[in_found[pair]] and free_true[in_true[pair]]:
            free_found[in_found[pair]] = free_true[in_true[pair]] = False
            kept.append(pair)
    chosen = np.array(kept, int)
    chosen = chosen[np.argsort(in_true[chosen])]
    return Matches(
        found_rows[in_found[chosen]],
        true_rows[in_true[chosen]],
        np.asarray(separation.to_value(u.arcsec), float)[chosen],
    )


def score(catalog: Table, truth: Table, match_radius_arcsec: float) -> Score:
    """Score a catalogue against the truth.

    Parameters
    ----------
    catalog : astropy.table.Table or QTable
        With RA, DEC and, where they were measured, FLUX_TOTAL, FLUX_TOTAL_ERR, FWHM_1, FWHM_2
        and PA, named as in hyperjax's catalogues (PA East of North in ICRS).
    truth : astropy.table.Table or QTable
        The same columns without the error, as in `hyperjax.simulation.truth_table`, and NEIGHBOUR
        (beams) if blended sources are to be scored.
    match_radius_arcsec : float
        Largest distance of a match; half a beam is usual.

    Returns
    -------
    Score
        NaN where there is nothing to measure.
    """
    pairs = matches(catalog, truth, match_radius_arcsec)
    matched = len(pairs.truth)
    found = np.zeros(len(truth), bool)
    found[pairs.truth] = True
    return Score(
        n_truth=len(truth),
        n_catalog=len(catalog),
        matched=matched,
        false=len(catalog) - matched,
        completeness=_fraction(found),
        completeness_blended=_fraction(found[_blended(truth)]),
        reliability=matched / len(catalog) if len(catalog) else np.nan,
        position_offset_arcsec=_median(pairs.separation_arcsec),
        **_flux_scores(catalog[pairs.catalog], truth[pairs.truth]),
        **_shape_scores(catalog[pairs.catalog], truth[pairs.truth]),
    )


def _flux_scores(found: Table, true: Table) -> dict[str, Any]:
    """Scores of the total fluxes of matched sources; rows correspond."""
    flux = _values(found, "FLUX_TOTAL", u.mJy)
    true_flux = _values(true, "FLUX_TOTAL", u.mJy)
    uncertainty = _values(found, "FLUX_TOTAL_ERR", u.mJy)
    error = flux / true_flux - 1
    usable = uncertainty > 0
    pull = _finite((flux - true_flux)[usable] / uncertainty[usable])
    measured = _finite(error)
    return {
        "flux_bias": _median(error),
        "flux_mad": _mad_sigma(error),
        "flux_mad_blended": _mad_sigma(error[_blended(true)]),
        "flux_half_width_95": (
            float(np.percentile(np.abs(measured), _TWO_SIGMA_PERCENT)) if len(measured) else np.nan
        ),
        "flux_outliers": (_fraction(~(np.abs(error) <= FLUX_OUTLIER)) if len(measured) else np.nan),
        "flux_pull_mad": _mad_sigma(pull),
        "flux_pull_std": float(np.std(pull)) if len(pull) else np.nan,
    }


def _shape_scores(found: Table, true: Table) -> dict[str, Any]:
    """Scores of the sizes and position angles of matched sources; rows correspond."""
    major, minor = (_values(found, name, u.arcsec) for name in ("FWHM_1", "FWHM_2"))
    true_major, true_minor = (_values(true, name, u.arcsec) for name in ("FWHM_1", "FWHM_2"))
    size_error = np.sqrt(major * minor / (true_major * true_minor)) - 1
    elongated = true_major > ELONGATED_AXIS_RATIO * true_minor
    angle = _values(found, "PA", u.deg) - _values(true, "PA", u.deg)
    turn = (angle[elongated] + 90.0) % 180.0 - 90.0
    return {
        "fwhm_bias": _median(size_error),
        "fwhm_mad": _mad_sigma(size_error),
        "n_elongated": int(elongated.sum()),
        "pa_bias_deg": _median(turn),
        "pa_mad_deg": _mad_sigma(turn),
    }


def _blended(truth: Table) -> NDArray[np.bool_]:
    """Whether each true source has a close neighbour; none if the truth doesn't say."""
    return _values(truth, "NEIGHBOUR", u.dimensionless_unscaled) < BLENDED_BEAMS


def _coordinates(table: Table) -> tuple[NDArray[np.intp], SkyCoord]:
    """Rows with a finite position, and those positions."""
    ra, dec = _values(table, "RA", u.deg), _values(table, "DEC", u.deg)
    rows = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    return rows, SkyCoord(ra[rows], dec[rows], unit="deg", frame="icrs")


def _values(table: Table, name: str, unit: u.UnitBase) -> FloatArray:
    """Return a column (n,) in `unit`, the default if it has none; NaN where masked or absent."""
    if name not in table.colnames:
        return np.full(len(table), np.nan)
    column = table[name]
    data, mask = get_data_and_mask(column)
    values = np.array(data, float)
    if mask is not None:
        values[mask] = np.nan
    return values * (getattr(column, "unit", None) or unit).to(unit)


def _finite(values: FloatArray) -> FloatArray:
    """Keep the finite values."""
    return values[np.isfinite(values)]


def _median(values: FloatArray) -> float:
    """Median of the finite values, NaN if there are none."""
    finite = _finite(values)
    return float(np.median(finite)) if len(finite) else np.nan


def _mad_sigma(values: FloatArray) -> float:
    """Scatter of the finite values, NaN if there are none."""
    return _MAD_TO_SIGMA * _median(np.abs(values - _median(values)))


def _fraction(hits: NDArray[np.bool_]) -> float:
    """Fraction of true elements, NaN of none."""
    return float(np.mean(hits)) if len(hits) else np.nan


def _percent(fraction: float, sign: str = "") -> str:
    """Format a fraction in per cent; a dash if there is none."""
    return f"{100 * fraction:{sign}.1f} %" if np.isfinite(fraction) else "-"
