"""The files of a completeness: tables and a figure.

::

    OUT/completeness/<map>_injections.ecsv    one row per injected source
    OUT/completeness/<map>_by_flux.ecsv       in bins of the injected flux
    OUT/completeness/<map>_by_snr.ecsv        in bins of the injected signal-to-noise ratio
    OUT/completeness/<map>_limits.ecsv        the flux at which a fraction is found
    OUT/completeness/<map>_completeness.png   the figure
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy import units as u
from astropy.stats import mad_std
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hyperjax.files import write_together
from hyperjax.injection import WELL_FOUND, Completeness, Curve, deviations

if TYPE_CHECKING:
    from pathlib import Path

    from astropy.table import QTable
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

__all__ = ["completeness_figure", "write_completeness"]

_TABLES = ("injections", "by_flux", "by_snr", "limits")
_BLUE, _VERMILLION, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#606060"
_DPI = 300
_INCHES = 7.1, 5.9  # across both columns of a journal's page
_LEAST_FOUND = 5  # of a bin whose median and scatter are drawn
_PULL_RANGE = 4.5
_MANY = 300  # sources, whose points are small
_PULL_LABEL = f"(measured − injected) / error, S/N ≥ {WELL_FOUND:g}"


def write_completeness(result: Completeness, folder: Path) -> list[Path]:
    """Write the tables (ECSV) and the figure (PNG), all of them or none.

    Parameters
    ----------
    result : Completeness
        What `hyperjax.completeness` returned.
    folder : Path
        Where; the files lie in its folder ``completeness``.

    Returns
    -------
    list of Path
        The files, the figure last.

    Raises
    ------
    OutputError
        If a folder or file cannot be written.
    """
    stem = result.injections.meta["map"].replace("/", "_")
    place = folder / "completeness"
    writers: dict[Path, Any] = {
        place / f"{stem}_{name}.ecsv": partial(_write_table, getattr(result, name))
        for name in _TABLES
    }
    figure = completeness_figure(result)
    writers[place / f"{stem}_completeness.png"] = partial(figure.savefig, dpi=_DPI)
    return write_together(writers)


def _write_table(table: QTable, path: Path) -> None:
    table.write(path, format="ascii.ecsv")


def completeness_figure(result: Completeness) -> Figure:
    """Draw completeness, reliability, and the errors of flux, position and size.

    Parameters
    ----------
    result : Completeness
        What `hyperjax.completeness` returned.

    Returns
    -------
    `~matplotlib.figure.Figure`
        Four panels, as wide as a page.
    """
    figure = Figure(_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    (first, second), (third, fourth) = figure.subplots(2, 2)
    _draw_completeness(first, result)
    _draw_fluxes(second, result)
    _draw_positions(third, result)
    _draw_pulls(fourth, result)
    for axes, letter in zip((first, second, third, fourth), "abcd", strict=True):
        axes.tick_params(direction="in", which="both", labelsize=8, width=0.7)
        axes.set_title(f"({letter})", loc="left", fontsize=8)
        for item in (axes.xaxis.label, axes.yaxis.label):
            item.set_fontsize(8.5)
    meta = result.injections.meta
    figure.suptitle(
        f"{meta['map']}: {len(result.injections)} injected sources, threshold "
        f"{meta['sigma_thres']:g}",
        fontsize=9,
        parse_math=False,
    )
    return figure


def _flux_axis(axes: Axes, result: Completeness) -> str:
    unit = result.injections["FLUX_TOTAL"].unit
    axes.set_xscale("log")
    axes.set_xlabel(f"Injected flux density ({unit})")
    _plain_logarithm(axes.xaxis)
    return str(unit)


def _plain_logarithm(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_completeness(axes: Axes, result: Completeness) -> None:
    """Draw the share of sources that is found, and the share of detections that is real."""
    unit = _flux_axis(axes, result)
    flux, found = result.injections["FLUX_TOTAL"].value, np.asarray(result.injections["FOUND"])
    grid = np.geomspace(flux.min(), flux.max(), 301)
    axes.plot(grid, Curve.fitted(flux, found).share(grid), color=_BLUE, lw=0.9, alpha=0.7)
    table = result.by_flux
    _draw_share(axes, table, "COMPLETENESS", "o", _BLUE, "completeness")
    _draw_share(
        axes, table[table["N_DETECTED"] > 0], "RELIABILITY", "s", _VERMILLION, "reliability"
    )
    for row in result.limits:
        if row["FRACTION"] in (0.5, 0.9) and np.isfinite(row["FLUX"]):
            at, share = row["FLUX"].value, row["FRACTION"]
            axes.plot([at, at], [0, share], color=_GREY, lw=0.7, ls=":")
            axes.axvspan(
                row["FLUX_LOW"].value, row["FLUX_HIGH"].value, color=_GREY, alpha=0.15, lw=0
            )
            label = f"{100 * share:.0f} %: {at:.3g} {unit}"
            axes.annotate(
                label,
                (at, share / 2),
                (4, 0),
                textcoords="offset points",
                ha="left",
                fontsize=7,
                color=_GREY,
            )
    axes.set(ylim=(-0.03, 1.05), ylabel="Fraction")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, 0.9))


def _draw_share(axes: Axes, table: QTable, name: str, marker: str, colour: str, label: str) -> None:
    share = table[name]
    error = np.maximum([share - table[f"{name}_LOW"], table[f"{name}_HIGH"] - share], 0)
    axes.errorbar(
        table["FLUX"].value, share, error, fmt=marker, ms=3, lw=0.8, color=colour, label=label
    )


def _draw_fluxes(axes: Axes, result: Completeness) -> None:
    """Draw measured over injected fluxes of what was found."""
    _flux_axis(axes, result)
    found = result.injections[result.injections["FOUND"]]
    ratio = 1 + deviations(found)["FLUX"]
    axes.axhline(1, color="black", lw=0.7)
    many = len(ratio) > _MANY
    style: dict[str, Any] = {"ms": 2, "alpha": 0.35} if many else {"ms": 6, "alpha": 0.8}
    axes.plot(found["FLUX_TOTAL"].value, ratio, ".", color=_BLUE, mew=0, **style)
    table = _measured(result.by_flux)
    centre = 1 + table["FLUX_BIAS"]
    at, scatter = table["FLUX"].value, table["FLUX_SCATTER"]
    axes.plot(at, centre, color=_VERMILLION, lw=1.2, label="median")
    style = {"color": _VERMILLION, "lw": 0.8, "ls": "--"}
    axes.plot(at, centre - scatter, **style, label="± scatter (1.48 MAD)")
    axes.plot(at, centre + scatter, **style)
    high = np.nanpercentile(ratio, 98) if len(ratio) else 2
    axes.set(ylabel="Measured / injected flux density", ylim=(0.4, float(np.clip(high, 1.6, 3))))
    if len(table):
        axes.legend(frameon=False, fontsize=7)


def _measured(table: QTable) -> QTable:
    """Bins with enough sources for a median."""
    return table[table["N_FOUND"] >= _LEAST_FOUND]


def _draw_positions(axes: Axes, result: Completeness) -> None:
    """Draw the scatter of position and size, and what the errors say of it, against S/N."""
    table = _measured(result.by_snr)
    beam = result.injections.meta["beam_fwhm_arcsec"] * u.arcsec
    found = result.injections[result.injections["FOUND"]]
    edges = np.append(result.by_snr["SNR_FROM"], result.by_snr["SNR_TO"][-1:])
    number = np.searchsorted(edges, found["SNR"], side="right") - 1
    bins = np.flatnonzero(result.by_snr["N_FOUND"] >= _LEAST_FOUND)
    position = np.hypot(table["RA_SCATTER"], table["DEC_SCATTER"]) / np.sqrt(2) / beam
    told = np.sqrt((found["RA_ERR"] ** 2 + found["DEC_ERR"] ** 2) / 2) / beam
    size_told = found["FOUND_FWHM_ERR"] / found["FOUND_FWHM"]
    for values, errors, marker, colour, label in (
        (position.to_value(u.one), told.to_value(u.one), "o", _BLUE, "position / beam FWHM"),
        (table["FWHM_SCATTER"], size_told.to_value(u.one), "s", _GREEN, "FWHM, relative"),
    ):
        axes.plot(table["SNR"], values, marker, ms=3, color=colour, label=label)
        stated = [np.nanmedian(errors[number == which]) for which in bins]
        axes.plot(table["SNR"], stated, color=colour, lw=0.9)
    axes.plot([], [], color="black", lw=0.9, label="stated errors (median)")
    axes.set(xlabel="Injected S/N", ylabel="Scatter (1.48 MAD)")
    if not len(table):
        _say_too_few(axes)
        return
    axes.set(xscale="log", yscale="log")
    _plain_logarithm(axes.xaxis)
    _plain_logarithm(axes.yaxis)
    axes.legend(frameon=False, fontsize=7)


def _say_too_few(axes: Axes) -> None:
    """Say why there is nothing to be seen."""
    axes.set(xticks=[], yticks=[])
    axes.text(
        0.5,
        0.5,
        "too few sources are found:\ninject more (-n)",
        ha="center",
        va="center",
        transform=axes.transAxes,
        fontsize=8,
        color=_GREY,
    )


def _draw_pulls(axes: Axes, result: Completeness) -> None:
    """Draw deviations over errors of the well detected, and the distribution they should have."""
    some = result.injections
    some = some[some["FOUND"] & (some["SNR"] >= WELL_FOUND)]
    off = deviations(some)
    names = {"FLUX": ("flux", _BLUE), "RA": ("RA", _VERMILLION)}
    names |= {"DEC": ("Dec", _GREEN), "FWHM": ("FWHM", _PURPLE)}
    if len(some) < _LEAST_FOUND:
        axes.set(xlabel=_PULL_LABEL, ylabel="Probability density")
        _say_too_few(axes)
        return
    for column, (name, colour) in names.items():
        _draw_pull(axes, off[f"PULL_{column}"], colour, name)
    grid = np.linspace(-_PULL_RANGE, _PULL_RANGE, 181)
    density = np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi)
    axes.plot(grid, density, color="black", ls="--", lw=0.9, label="unit Gaussian")
    axes.set(
        xlabel=_PULL_LABEL,
        ylabel="Probability density",
        xlim=(-_PULL_RANGE, _PULL_RANGE),
    )
    axes.set_ylim(0, 1.6 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)


def _draw_pull(axes: Axes, pull: NDArray[np.float64], colour: str, name: str) -> None:
    finite = pull[np.isfinite(pull)]
    if len(finite) < _LEAST_FOUND:
        return
    label = f"{name}: {np.median(finite):+.2f} ± {mad_std(finite):.2f}".replace("-", "−")
    axes.hist(
        np.clip(finite, -_PULL_RANGE, _PULL_RANGE),
        18,
        range=(-_PULL_RANGE, _PULL_RANGE),
        density=True,
        histtype="step",
        color=colour,
        lw=1,
        label=label,
    )
