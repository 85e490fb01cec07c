"""Pictures of an extraction, and of how well a simulation was recovered.

Figures are drawn on their own Agg canvas: nothing here opens a window, touches pyplot or needs a
display, and several threads may draw at once.
"""

from __future__ import annotations

import zlib
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.visualization.wcsaxes import WCSAxes
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Affine2D

from hyperjax.files import atomic_path
from hyperjax.logs import counted
from hyperjax.products import has_shape

if TYPE_CHECKING:
    from pathlib import Path

    from astropy.table import QTable, Table
    from astropy.units import Quantity
    from astropy.wcs import WCS
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from hyperjax.config import Units
    from hyperjax.evaluate import Matches
    from hyperjax.maps import Map
    from hyperjax.pipeline import Extraction

_PANEL_INCHES = 4.4  # side of a square panel; others have the same area
_PANEL_PIXELS = 1024  # larger images are averaged to about this many pixels a side
_STACK_RATIO = 1.8  # panels of maps wider than this lie on top of each other
_EQUAL_RATIO = 6.0  # the pixels of maps longer than this are not drawn square
_CROWD = 150  # from so many sources their ellipses are drawn thin
_LABEL_LIMIT = 60  # IDs are drawn of so many sources, the brightest
_LABEL_POINTS = 7
_LABEL_REACH = 1.6, 1.0  # distance of an ID from its source, in semi-axes: preferred, and least
_LABEL_GAP = 1.5  # points between them, moreover
_DIGIT = 0.65  # width of a digit over the size of the type
_OUTLINE_POINTS = 48
_PULL_RANGE = 5.0  # deviations beyond are counted in the outermost bins
_TICK_INCHES = 0.9  # between the ticks of sky coordinates, about
_TICK_DISTANCE = 0.06  # of the ticks of the colour bar, as a fraction of its length
_DPI = 120
_QUICK_PNG: dict[str, Any] = {"compress_level": 1, "compress_type": zlib.Z_RLE}  # and as small

_HOURS_MINUTES_SECONDS = ("ʰ", "ᵐ", "ˢ")  # letters: superscripts are slow to typeset

_SKY_NAMES = {
    "icrs": ("Right ascension", "Declination"),
    "fk5": ("Right ascension (FK5)", "Declination (FK5)"),
    "fk4": ("Right ascension (FK4)", "Declination (FK4)"),
    "galactic": ("Galactic longitude", "Galactic latitude"),
}

# Okabe & Ito's colours, which people with any colour vision can tell apart
_BLUE, _VERMILLION, _GREEN, _SKY_BLUE = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
_POINTS: dict[str, Any] = {"fmt": "o", "ms": 3, "elinewidth": 0.5, "mew": 0, "alpha": 0.6}
_PULL_BINS = 20
_PULL_STYLE: dict[str, Any] = {
    "range": (-_PULL_RANGE, _PULL_RANGE),
    "density": True,
    "histtype": "step",
}
_COLOUR_MAP = "inferno"
_BLANK_COLOUR = "#909090"


class _Images(NamedTuple):
    """The images of the three panels, (ny, nx), above the level of the background."""

    map: NDArray[np.float32]
    model: NDArray[np.float32]
    residual: NDArray[np.float32]
    level: float
    noise: float


def overview(extraction: Extraction) -> Figure:
    """Draw a map with its fitted sources, the model and the residual, on one stretch.

    The sources are ellipses of their FWHM, drawn from the catalogue's sky positions and position
    angles; the brightest have their IDs, where these cover no other source. The median background
    is taken off the map and the model so that they compare with the residual; the stretch is linear
    over a few times the noise and logarithmic above. Maps of any size are averaged to about 1000
    pixels a side. Values are in mJy/beam, or in Jy/beam where the catalogue is in Jy.

    Parameters
    ----------
    extraction : Extraction
        What `hyperjax.extract` returned.

    Returns
    -------
    `~matplotlib.figure.Figure`
        Save it with `save_figure`.
    """
    map, catalog, units = extraction.map, extraction.catalog, extraction.config.units
    images = _panel_images(extraction)
    norm = _stretch(images)
    figure, panels, bar = _panel_grid(map)
    titles = ("Map", "Model + background", "Residual")
    for axes, image, title in zip(panels, images[:3], titles, strict=True):
        _draw_image(axes, image, map.shape, norm)
        axes.set_title(title, fontsize=10)
    labels = _draw_sources(panels[0], map.wcs, catalog)
    _draw_beam(panels[0], map)
    _draw_colour_bar(bar, norm, units)
    _draw_title(figure, map, _counted_sources(len(catalog), labels), images, units)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the file appears only when it is complete.

    Parameters
    ----------
    figure : `~matplotlib.figure.Figure`
        What to write.
    path : Path
        Where; its suffix sets the format (png, pdf, svg).

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    options: dict[str, Any] = {"pil_kwargs": _QUICK_PNG} if path.suffix == ".png" else {}
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, **options)


def _panel_images(extraction: Extraction) -> _Images:
    ny, nx = extraction.map.shape
    block = -(-ny // _PANEL_PIXELS), -(-nx // _PANEL_PIXELS)
    coarse = np.s_[:: block[0], :: block[1]]
    level, noise = (_median(image[coarse]) for image in (extraction.background, extraction.rms))
    data = block_mean(extraction.map.data, block) - level
    residual = block_mean(extraction.residual, block)
    model = data - residual  # with its background
    per_jy = extraction.config.units.per_jy

    def shown(image: NDArray[np.float64]) -> NDArray[np.float32]:
        return (per_jy * image).astype(np.float32)

    return _Images(shown(data), shown(model), shown(residual), per_jy * level, per_jy * noise)


def _median(values: NDArray[np.float64]) -> float:
    """Median of the finite values, 0 if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else 0.0


def block_mean(image: NDArray[np.float64], block: tuple[int, int]) -> NDArray[np.float64]:
    """Average an image over blocks of pixels.

    Parameters
    ----------
    image : ndarray
        (ny, nx), NaN where blank.
    block : tuple of int
        Rows and columns of a block.

    Returns
    -------
    ndarray
        (ny // rows, nx // columns): the mean of the finite pixels of each block, NaN where there
        is none. Rows and columns of the image that fill no block are left out.
    """
    if block == (1, 1):
        return image
    rows, columns = block
    ny, nx = image.shape[0] // rows, image.shape[1] // columns
    strips = image[: ny * rows, : nx * columns].reshape(ny, rows, nx, columns)
    return np.stack([_strip_mean(strip) for strip in strips])


def _strip_mean(tiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average a row of blocks, (rows, nx, columns), to (nx,)."""
    mean = tiles.mean(axis=0).mean(axis=1)
    (holed,) = np.nonzero(np.isnan(mean))
    seen = np.isfinite(tiles[:, holed]).sum(axis=(0, 2))
    total = np.nansum(tiles[:, holed], axis=(0, 2))
    mean[holed] = np.divide(total, seen, out=np.full(len(seen), np.nan), where=seen > 0)
    return mean


def _stretch(images: _Images) -> AsinhNorm:
    """Return the shared stretch: linear to about three times the noise, logarithmic above."""
    finite = images.map[np.isfinite(images.map)]
    if not finite.size:
        return AsinhNorm(vmin=-1.0, vmax=1.0)
    noise = images.noise or float(np.std(finite)) or 1.0
    low, high = np.percentile(finite, (0.5, 99.95))
    return AsinhNorm(3 * noise, vmin=min(low, -3 * noise), vmax=max(high, 10 * noise))


def _panel_grid(map: Map) -> tuple[Figure, list[WCSAxes], Axes]:
    """Make a figure of three panels and a colour bar.

    The panels have the map's proportions and lie side by side, or on top of each other for wide
    maps. All lengths are inches.
    """
    ratio = map.shape[1] / map.shape[0]
    shown = min(max(ratio, 1 / _EQUAL_RATIO), _EQUAL_RATIO)
    width, height = _PANEL_INCHES * np.sqrt(shown), _PANEL_INCHES / np.sqrt(shown)
    rows, columns = (3, 1) if ratio > _STACK_RATIO else (1, 3)
    left, right, bottom, top, gap, title = 1.1, 1.1, 0.55, 0.6, 0.7, 0.25
    inside_x = columns * (width + gap) - gap
    inside_y = rows * (height + title) - title
    figure = Figure((left + inside_x + right, bottom + inside_y + title + top))
    FigureCanvasAgg(figure)

    def place(x: float, y: float, w: float, h: float, **kwargs: Any) -> Axes:
        size = figure.get_size_inches()
        return figure.add_axes((x / size[0], y / size[1], w / size[0], h / size[1]), **kwargs)

    panels = []
    for row, column in np.ndindex(rows, columns):
        x = left + column * (width + gap)
        y = bottom + (rows - 1 - row) * (height + title)
        axes = place(x, y, width, height, projection=map.wcs)
        _label_sky(axes, map, bottom=row == rows - 1, left=column == 0)
        panels.append(axes)
    return figure, panels, place(left + inside_x + 0.12, bottom, 0.16, inside_y)


def _label_sky(axes: WCSAxes, map: Map, *, bottom: bool, left: bool) -> None:
    """Label the sky coordinates of a panel on the sides that are asked for."""
    wcs = map.wcs.wcs
    slope = map.wcs.pixel_scale_matrix[wcs.lng]
    sides = "bl" if abs(slope[0]) >= abs(slope[1]) else "lb"
    names = _SKY_NAMES.get(map.frame, ("Longitude", "Latitude"))
    for index, name, side in zip((wcs.lng, wcs.lat), names, sides, strict=True):
        labelled = bottom if side == "b" else left
        coordinate = axes.coords[index]
        length = (axes.bbox.width if side == "b" else axes.bbox.height) / axes.figure.dpi
        coordinate.set_ticks(number=max(3, round(length / _TICK_INCHES)), color="white")
        coordinate.tick_params(direction="in")
        coordinate.set_ticks_position("bt" if side == "b" else "lr")
        coordinate.set_ticklabel_position(side)
        coordinate.set_axislabel_position(side)
        coordinate.set_ticklabel(size=8, exclude_overlapping=True)
        coordinate.set_ticklabel_visible(labelled)
        if coordinate.get_format_unit() == u.hourangle:
            coordinate.set_separator(_HOURS_MINUTES_SECONDS)
        coordinate.set_axislabel(name if labelled else " ", fontsize=9)


def _draw_image(
    axes: WCSAxes, image: NDArray[np.float32], shape: tuple[int, int], norm: AsinhNorm
) -> None:
    """Draw an image, averaged or not, over the pixels of a map of the given shape."""
    rows, columns = shape[0] // image.shape[0], shape[1] // image.shape[1]
    extent = (-0.5, columns * image.shape[1] - 0.5, -0.5, rows * image.shape[0] - 0.5)
    colours = colormaps[_COLOUR_MAP](norm(image), bytes=True)  # quicker than to have them resampled
    axes.set_facecolor(_BLANK_COLOUR)
    axes.imshow(colours, origin="lower", extent=extent, aspect="auto")
    axes.set_xlim(-0.5, shape[1] - 0.5)
    axes.set_ylim(-0.5, shape[0] - 0.5)


def ellipse_outlines(
    wcs: WCS, centre: SkyCoord, major: Quantity, minor: Quantity, angle: Quantity
) -> NDArray[np.float64]:
    """Project ellipses on the sky into a map.

    Parameters
    ----------
    wcs : `~astropy.wcs.WCS`
        The map's coordinates.
    centre : `~astropy.coordinates.SkyCoord`
        (n,) positions.
    major, minor : Quantity
        (n,) full axes.
    angle : Quantity
        (n,) position angles of the major axes, East of North in the frame of ``centre``.

    Returns
    -------
    ndarray
        (n, points, 2) 0-based pixel coordinates x, y along the ellipses, which are not closed.
    """
    phase = np.linspace(0, 2 * np.pi, _OUTLINE_POINTS, endpoint=False)
    along, across = np.cos(phase) * major[:, None] / 2, np.sin(phase) * minor[:, None] / 2
    points = centre[:, None].directional_offset_by(
        angle[:, None] + np.arctan2(across, along), np.hypot(along, across)
    )
    return np.stack(wcs.world_to_pixel(points), axis=-1)


def _draw_sources(axes: WCSAxes, wcs: WCS, catalog: QTable) -> int:
    """Draw a catalogue, FWHM ellipses or crosses where there is no shape; count the IDs drawn."""
    sources = catalog[np.isfinite(catalog["RA"]) & np.isfinite(catalog["DEC"])]
    if len(sources) == 0:
        return 0
    shaped = has_shape(sources)
    shape = [np.where(shaped, sources[name], 0) for name in ("FWHM_1", "FWHM_2", "PA")]
    centre = SkyCoord(sources["RA"], sources["DEC"], frame="icrs")
    outlines = ellipse_outlines(wcs, centre, *shape)  # of no size where there is no shape
    few = len(sources) <= _CROWD
    width = 1.0 if few else 0.6
    style: dict[str, Any] = {"verts": list(outlines[shaped]), "facecolors": "none"}
    axes.add_collection(PolyCollection(**style, ec="black", lw=width + 0.8, alpha=0.6))
    axes.add_collection(PolyCollection(**style, ec=_SKY_BLUE, lw=width))
    axes.plot(*outlines[~shaped, 0].T, "+", color=_SKY_BLUE, ms=6 if few else 3)
    return _draw_labels(axes, outlines, [str(number) for number in sources["HYPER_ID"]])


def _draw_labels(axes: WCSAxes, outlines: NDArray[np.float64], labels: list[str]) -> int:
    """Write labels beside their outlines, brightest first, where there is room; count them."""
    to_points = axes.transData + Affine2D().scale(72 / axes.figure.dpi)
    points = to_points.transform(outlines.reshape(-1, 2)).reshape(outlines.shape)
    sources = np.stack([points.min(axis=1), points.max(axis=1)], axis=1)
    widths = np.array([_DIGIT * _LABEL_POINTS * len(label) for label in labels])
    panel = axes.bbox.get_points() * 72 / axes.figure.dpi
    places = label_places(sources, widths, _LABEL_POINTS, panel, _LABEL_LIMIT)
    for index, place in places.items():
        axes.annotate(
            labels[index],
            to_points.inverted().transform(place),
            ha="center",
            va="center_baseline",
            color="white",
            fontsize=_LABEL_POINTS,
            path_effects=[withStroke(linewidth=1.2, foreground="black")],
        )
    return len(places)


def label_places(
    sources: NDArray[np.float64],
    widths: NDArray[np.float64],
    height: float,
    panel: NDArray[np.float64],
    limit: int,
) -> dict[int, NDArray[np.float64]]:
    """Find places for labels beside their sources that cover neither a source nor another label.

    Parameters
    ----------
    sources : ndarray
        (n, 2, 2) lower left and upper right corners of the sources, the most important first.
    widths, height : ndarray (n,), float
        Of the labels.
    panel : ndarray
        (2, 2) corners of the panel that the labels must stay in.
    limit : int
        The largest number of labels.

    Returns
    -------
    dict
        Index of a source, and centre (x, y) of its label, which is to the right of it, to the left,
        above or below. Sources that have no such place are left out.
    """
    taken = sources.copy()
    places: dict[int, NDArray[np.float64]] = {}
    for index, (low, high) in enumerate(sources):
        if len(places) == limit:
            break
        half = np.array([widths[index], height]) / 2
        for reach, side in product(_LABEL_REACH, ((1, 0), (-1, 0), (0, 1), (0, -1))):
            away = reach * (high - low) / 2 + half + _LABEL_GAP
            centre = (low + high) / 2 + side * away
            box = np.array([centre - half, centre + half])
            inside = np.all(box[0] >= panel[0]) and np.all(box[1] <= panel[1])
            if inside and not np.any(_overlaps(box, np.delete(taken, index, axis=0))):
                places[index] = centre
                taken = np.append(taken, box[None], axis=0)
                break
    return places


def _overlaps(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a box (2, 2) overlaps each of other boxes (n, 2, 2)."""
    return np.all((box[0] < others[:, 1]) & (box[1] > others[:, 0]), axis=-1)


def _draw_beam(axes: WCSAxes, map: Map) -> None:
    """Draw the beam at the lower left, in the size and angle that it has at the map's centre."""
    ny, nx = map.shape
    beam = map.beam
    centre = map.wcs.pixel_to_world([(nx - 1) / 2], [(ny - 1) / 2])
    sizes = ([beam.major_arcsec] * u.arcsec, [beam.minor_arcsec] * u.arcsec)
    (outline,) = ellipse_outlines(map.wcs, centre, *sizes, [beam.pa_deg] * u.deg)
    pixels_per_inch = np.array([nx, ny]) * axes.figure.dpi / axes.bbox.size
    box = np.maximum(1.4 * np.ptp(outline, axis=0), 0.2 * pixels_per_inch)
    axes.add_patch(Rectangle((-0.5, -0.5), *box, facecolor="white", edgecolor="black", lw=0.8))
    axes.add_patch(Polygon(outline - outline.mean(axis=0) + box / 2 - 0.5, facecolor="black"))


def _draw_colour_bar(axes: Axes, norm: AsinhNorm, units: Units) -> None:
    bar = axes.figure.colorbar(ScalarMappable(norm, _COLOUR_MAP), cax=axes, extend="both")
    ticks = _colour_ticks(norm)
    bar.set_ticks(ticks, labels=[f"{tick:g}".replace("-", "−") for tick in ticks])
    bar.minorticks_off()
    bar.set_label(f"{units.flux_unit}/beam", fontsize=9)
    axes.tick_params(labelsize=8)


def _colour_ticks(norm: AsinhNorm) -> list[float]:
    """Choose round values that are well apart on a stretch: 0, powers of ten, then 2 and 5."""
    low, high = np.asarray(norm.inverse([0.0, 1.0]), float)
    span = max(-low, high)
    powers = 10.0 ** np.arange(np.floor(np.log10(span)), np.floor(np.log10(span)) - 6, -1)
    steps = np.array([1, -1, 5, -5, 2, -2])
    ladder = np.append(0.0, np.outer(steps, powers))
    ladder = ladder[(ladder >= low) & (ladder <= high)]
    chosen: dict[float, float] = {}
    for value, place in zip(ladder, np.asarray(norm(ladder), float), strict=True):
        if all(abs(place - other) > _TICK_DISTANCE for other in chosen.values()):
            chosen[float(value)] = place
    return sorted(chosen)


def _counted_sources(sources: int, labels: int) -> str:
    """Say how many sources there are, and whether some are drawn without their ID."""
    words = counted(sources, "source")
    return words if labels == sources else f"{words}, {labels} with their IDs"


def _draw_title(figure: Figure, map: Map, sources: str, images: _Images, units: Units) -> None:
    beam, unit = map.beam, f"{units.flux_unit}/beam"
    facts = [
        sources,
        f"rms {images.noise:.3g} {unit}",
        f"beam {beam.major_arcsec:.3g}″ × {beam.minor_arcsec:.3g}″",
    ]
    if abs(images.level) > 0.1 * images.noise:
        level = f"{images.level:.3g}".replace("-", "−")
        facts.append(f"background level {level} {unit} subtracted")
    height = figure.get_figheight()
    size = min(12.0, 120 * figure.get_figwidth() / max(len(map.name), 1))  # a long name shrinks
    figure.text(
        0.5, 1 - 0.22 / height, map.name, ha="center", weight="bold", size=size, parse_math=False
    )
    figure.text(0.5, 1 - 0.43 / height, "  ·  ".join(facts), ha="center", size=9)


def comparison(catalog: QTable, truth: Table, matches: Matches) -> Figure:
    """Compare a catalogue with the truth of a simulation.

    Parameters
    ----------
    catalog : `~astropy.table.QTable`
        What was found: FLUX_TOTAL, FLUX_TOTAL_ERR, RA, DEC, RA_ERR, DEC_ERR, SNR.
    truth : `~astropy.table.Table`
        What was put in: FLUX_TOTAL, RA, DEC (mJy and degrees where it has no units).
    matches : Matches
        The rows that belong together, from `hyperjax.evaluate.matches`.

    Returns
    -------
    `~matplotlib.figure.Figure`
        Three panels: flux density over its true value against signal to noise, offsets in
        position, and the distribution of the deviations in units of their errors.
    """
    found = catalog[matches.catalog]
    deviations = _deviations(found, truth[matches.truth])
    figure = Figure((13.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _draw_flux_ratios(left, found["SNR"], deviations)
    _draw_offsets(middle, deviations)
    _draw_pulls(right, deviations)
    figure.suptitle(
        f"{len(found)} of {len(truth)} sources recovered, {len(catalog) - len(found)} false",
        fontsize=11,
    )
    return figure


class _Deviations(NamedTuple):
    """What was measured less the truth, and its errors; (n,) each."""

    flux: NDArray[np.float64]  # fraction of the true flux density
    flux_err: NDArray[np.float64]
    east: NDArray[np.float64]  # arcsec on the sky
    east_err: NDArray[np.float64]
    north: NDArray[np.float64]
    north_err: NDArray[np.float64]


def _deviations(found: QTable, true: Table) -> _Deviations:
    """Compare rows that belong together."""
    true_flux = u.Quantity(true["FLUX_TOTAL"], u.mJy)
    east, north = SkyCoord(
        u.Quantity(true["RA"], u.deg), u.Quantity(true["DEC"], u.deg)
    ).spherical_offsets_to(SkyCoord(found["RA"], found["DEC"]))
    return _Deviations(
        (found["FLUX_TOTAL"] / true_flux).to_value(u.one) - 1,
        (found["FLUX_TOTAL_ERR"] / true_flux).to_value(u.one),
        east.arcsec,
        found["RA_ERR"].to_value(u.arcsec),
        north.arcsec,
        found["DEC_ERR"].to_value(u.arcsec),
    )


def _draw_flux_ratios(axes: Axes, snr: ArrayLike, deviations: _Deviations) -> None:
    """Draw flux densities over their true values against signal to noise."""
    ratio = 1 + deviations.flux
    axes.axhline(1, color="black", lw=1)
    axes.errorbar(snr, ratio, deviations.flux_err, color=_BLUE, **_POINTS)
    if len(ratio):
        median = float(np.nanmedian(ratio))
        axes.axhline(median, color=_VERMILLION, ls="--", lw=1.5, label=f"median {median:.3f}")
        axes.legend(frameon=False, fontsize=9)
    axes.set(xscale="log", xlabel="Signal-to-noise ratio", ylabel="Flux density / true")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # few decades: enough labels
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_offsets(axes: Axes, deviations: _Deviations) -> None:
    """Draw measured less true positions, East to the left."""
    east, north = deviations.east, deviations.north
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.errorbar(east, north, deviations.north_err, deviations.east_err, color=_BLUE, **_POINTS)
    if len(east):
        radius = float(np.nanmedian(np.hypot(east, north)))
        phase = np.linspace(0, 2 * np.pi, 101)
        label = f"median offset {radius:.3g}″"
        circle = radius * np.cos(phase), radius * np.sin(phase)
        axes.plot(*circle, color=_VERMILLION, ls="--", lw=1.5, zorder=3, label=label)
        axes.legend(frameon=False, fontsize=9)
    axes.set(xlabel="ΔRA cos δ (arcsec)", ylabel="ΔDec (arcsec)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.invert_xaxis()


def _draw_pulls(axes: Axes, deviations: _Deviations) -> None:
    """Draw the distributions of deviations over their errors, and the one they should have."""
    pulls = {
        "flux density": (deviations.flux / deviations.flux_err, _BLUE),
        "RA": (deviations.east / deviations.east_err, _VERMILLION),
        "Dec": (deviations.north / deviations.north_err, _GREEN),
    }
    for name, (pull, colour) in pulls.items():
        finite = pull[np.isfinite(pull)]
        if len(finite):
            label = f"{name}: {finite.mean():+.2f} ± {finite.std():.2f}".replace("-", "−")
            shown = np.clip(finite, -_PULL_RANGE, _PULL_RANGE)
            axes.hist(shown, _PULL_BINS, color=colour, lw=1.4, label=label, **_PULL_STYLE)
    grid = np.linspace(-_PULL_RANGE, _PULL_RANGE, 201)
    gaussian = np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi)
    axes.plot(grid, gaussian, color="black", ls="--", lw=1.2, label="unit Gaussian")
    axes.set(xlabel="(measured − true) / error", ylabel="Probability density")
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=9, loc="upper left")
