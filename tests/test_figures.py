import dataclasses
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.collections import PolyCollection
from matplotlib.image import imread
from matplotlib.patches import Polygon, Rectangle
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree

from hyperjax.config import Config
from hyperjax.config_io import config_from_dict
from hyperjax.errors import OutputError
from hyperjax.evaluate import Matches
from hyperjax.figures import (
    block_mean,
    comparison,
    ellipse_outlines,
    label_places,
    overview,
    save_figure,
)
from hyperjax.maps import Beam, Map
from hyperjax.simulation import Simulation, simulate

CASES = {
    "plain": Simulation(shape=(120, 130), n_sources=12),
    "galactic": Simulation(shape=(100, 100), n_sources=5, frame="galactic", offset=50),
    "rotated with a blank border": Simulation(
        shape=(120, 120), n_sources=5, rotation_deg=38, border_pix=9, n_holes=2
    ),
    "a quarter turned": Simulation(shape=(90, 110), n_sources=4, rotation_deg=90),
    "flipped": Simulation(shape=(90, 110), n_sources=4, flip=True, frame="fk5"),
    "fk4": Simulation(shape=(90, 110), n_sources=4, frame="fk4"),
    "tiny": Simulation(shape=(20, 20), n_sources=1, beam_fwhm_pix=3),
    "tall": Simulation(shape=(240, 60), n_sources=6),
    "strip": Simulation(shape=(30, 900), n_sources=6),
    "one column": Simulation(shape=(64, 1), n_sources=0),
    "no sources": Simulation(shape=(80, 80), n_sources=0),
    "no noise": Simulation(shape=(80, 80), n_sources=2, noise="none", gradient=0, structure=0),
    "a degree from the pole": Simulation(shape=(80, 80), n_sources=3, centre_deg=(10, 89)),
    "across 0 h": Simulation(shape=(80, 80), n_sources=3, centre_deg=(0, 0)),
}


def perfect_extraction(options, name="M1"):
    """What an extraction without errors would return for a simulation."""
    sim = simulate(options)
    blank = np.where(sim.valid, 0, np.nan)
    header = sim.header
    beam = Beam(header["BMAJ"] * 3600, header["BMIN"] * 3600, header["BPA"])
    catalog = sim.truth.copy()
    catalog["HYPER_ID"] = np.arange(1, len(catalog) + 1)
    map = Map(name, None, sim.data, sim.wcs, beam, u.Jy / u.beam, 1.0, options.frame)
    return SimpleNamespace(
        map=map,
        config=Config(),
        catalog=catalog,
        model=sim.model + blank,
        background=sim.background + blank,
        residual=sim.noise + blank,
        rms=np.full(sim.data.shape, sim.noise[sim.valid].std()),
    )


def drawn(figure):
    """The pixels (height, width, 3) of a figure, as numbers from 0 to 255."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def inside(figure, axes):
    """The pixels of one panel."""
    image = drawn(figure)
    box = axes.get_window_extent()
    rows = slice(round(len(image) - box.y1) + 2, round(len(image) - box.y0) - 2)
    return image[rows, round(box.x0) + 2 : round(box.x1) - 2]


def ellipses(axes):
    return next(artist for artist in axes.collections if isinstance(artist, PolyCollection))


# --- overview -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_overview_draws_any_map_without_warnings(tmp_path, options):
    figure = overview(perfect_extraction(options))
    path = tmp_path / "overview.png"
    save_figure(figure, path)
    image = imread(path)
    width, height = figure.get_size_inches()
    assert_allclose(image.shape[:2], (120 * height, 120 * width), atol=1)
    assert max(width, height) < 18.5
    assert min(width, height) > 3
    assert image[..., :3].std() > 0.1


def test_all_panels_show_something():
    figure = overview(perfect_extraction(CASES["plain"]))
    for axes in figure.axes[:3]:
        assert inside(figure, axes).std(axis=(0, 1)).max() > 5
        assert len(axes.images) == 1
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["Map", "Model + background", "Residual"]


def test_the_colours_of_all_panels_are_those_of_the_bar():
    extraction = perfect_extraction(CASES["galactic"])
    *panels, bar = overview(extraction).axes
    colours = np.concatenate([axes.images[0].get_array().reshape(-1, 4) for axes in panels])
    level = np.median(extraction.background)
    model = extraction.model + extraction.background
    shown = [extraction.map.data - level, model - level, extraction.residual]
    ends = bar.yaxis.get_transform().transform(bar.get_ylim())
    place = bar.yaxis.get_transform().transform(1e3 * np.ravel(shown))
    expected = np.clip((place - ends[0]) / np.ptp(ends), 0, 1)
    table = colormaps["inferno"](np.arange(256), bytes=True)
    found = cKDTree(table).query(colours)[1] / 255
    assert_allclose(found, expected, atol=3 / 256)


def test_blank_pixels_are_grey():
    extraction = perfect_extraction(CASES["rotated with a blank border"])
    for array in (extraction.map.data, extraction.residual):
        array[:] = np.nan
    panel = inside(figure := overview(extraction), figure.axes[2])
    centre = panel[len(panel) // 4 : -len(panel) // 4, len(panel) // 4 : -len(panel) // 4]
    assert_array_equal(centre, np.full_like(centre, 0x90))


def test_the_title_tells_map_sources_noise_beam_and_level():
    extraction = perfect_extraction(CASES["galactic"], name="$odd_{name} [1]")
    extraction.rms[:] = 1.25e-3
    texts = [text.get_text() for text in overview(extraction).texts]
    assert texts[0] == "$odd_{name} [1]"
    assert "5 sources" in texts[1]
    assert "rms 1.25 mJy/beam" in texts[1]
    assert "4″ × 4″" in texts[1]
    assert "background level 50.1 mJy/beam subtracted" in texts[1]


def test_one_source_is_singular_and_no_level_is_not_mentioned():
    text = overview(perfect_extraction(CASES["tiny"])).texts[1].get_text()
    assert text.startswith("1 source  ")


@pytest.mark.parametrize("name", ["plain", "galactic", "flipped", "rotated with a blank border"])
def test_the_ellipses_lie_on_the_sources(name):
    """The half-maximum contour of the model is the ellipse that is drawn."""
    options = dataclasses.replace(CASES[name], min_separation_beams=5)
    axes = overview(perfect_extraction(options)).axes[0]
    outlines = np.array([path.vertices[:-1] for path in ellipses(axes).get_paths()])
    sim = simulate(options)
    peaks = sim.truth["FLUX_PEAK"].to_value(u.Jy / u.beam)
    for outline, peak in zip(outlines, peaks, strict=True):
        x, y = outline.T
        assert_allclose(map_coordinates(sim.model, [y, x], order=3), peak / 2, rtol=0.02)


def test_the_labels_of_the_panels_are_apart():
    """Also where a long label is at the left end of an axis, and one is at its right end."""
    options = (
        Simulation(shape=(360, 360), n_sources=2),
        Simulation(shape=(30, 30), n_sources=1, pixel_arcsec=0.01),
    )
    for case in (*CASES.values(), *options):
        figure = overview(perfect_extraction(case))
        figure.canvas.draw()
        boxes = [axes.get_tightbbox(figure.canvas.get_renderer()) for axes in figure.axes[:3]]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_all_ids_are_drawn_where_there_is_room():
    figure = overview(perfect_extraction(CASES["plain"]))
    assert [text.get_text() for text in figure.axes[0].texts] == [str(i) for i in range(1, 13)]
    assert figure.texts[1].get_text().startswith("12 sources  ")


def test_in_a_crowd_the_brightest_have_their_ids():
    options = Simulation(shape=(400, 400), n_sources=160, beam_fwhm_pix=3)
    figure = overview(perfect_extraction(options))
    numbers = [int(text.get_text()) for text in figure.axes[0].texts]
    assert len(numbers) == 60
    assert numbers == sorted(numbers)
    assert max(numbers) < 75
    assert len(ellipses(figure.axes[0]).get_paths()) == 160
    assert figure.texts[1].get_text().startswith("160 sources, 60 with their IDs  ")


def test_ids_cover_neither_each_other_nor_a_source():
    options = Simulation(shape=(300, 300), n_sources=60, blend_fraction=0.9, seed=4)
    figure = overview(perfect_extraction(options))
    figure.canvas.draw()
    axes = figure.axes[0]
    labels = [text.get_window_extent() for text in axes.texts]
    paths = ellipses(axes).get_paths()
    sources = [axes.transData.transform_path(path).get_extents() for path in paths]
    assert 30 < len(labels) < 60
    for index, label in enumerate(labels):
        inner = label.shrunk(0.8, 0.6)  # digits do not fill their box
        assert not any(inner.overlaps(other.shrunk(0.8, 0.6)) for other in labels[:index])
        assert sum(inner.overlaps(source) for source in sources) == 0


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 20), st.floats(1, 30)),
        max_size=30,
    ),
    st.integers(0, 20),
)
def test_labels_have_room(boxes, limit):
    x, y, size, widths = np.array(boxes).reshape(-1, 4).T
    low = np.stack([x, y], axis=-1)
    sources = np.stack([low, low + size[:, None]], axis=1)
    panel = np.array([[0.0, 0.0], [100.0, 100.0]])
    places = label_places(sources, widths, 7.0, panel, limit)
    assert len(places) <= limit
    taken = [(box[0], box[1]) for box in sources]
    for index, centre in places.items():
        half = np.array([widths[index], 7.0]) / 2
        low, high = centre - half, centre + half
        assert (low >= panel[0]).all()
        assert (high <= panel[1]).all()
        others = [box for n, box in enumerate(taken) if n != index]
        assert not any((low < b).all() and (high > a).all() for a, b in others)
        taken.append((low, high))


@pytest.mark.parametrize("convert", [True, False])
def test_the_picture_is_in_the_unit_of_the_catalogue(convert):
    extraction = perfect_extraction(CASES["galactic"])
    extraction.rms[:] = 1.25e-3
    extraction.config = config_from_dict({"units": {"convert_mJy": convert}})
    figure = overview(extraction)
    unit, rms, level = ("mJy", "1.25", "50.1") if convert else ("Jy", "0.00125", "0.0501")
    assert figure.axes[3].get_ylabel() == f"{unit}/beam"
    assert f"rms {rms} {unit}/beam" in figure.texts[1].get_text()
    assert f"background level {level} {unit}/beam subtracted" in figure.texts[1].get_text()
    figure.canvas.draw()
    labelled = figure.axes[3].get_tightbbox(figure.canvas.get_renderer())
    assert labelled.x1 < figure.bbox.x1
    top = np.nanmax(extraction.map.data) * (1e3 if convert else 1)
    assert 0.1 * top < figure.axes[3].get_ylim()[1] < 1.1 * top


def test_ids_of_neighbours_are_on_opposite_sides():
    options = Simulation(shape=(60, 60), positions=((25.0, 30.0), (32.0, 30.0)))
    left, right = overview(perfect_extraction(options)).axes[0].texts
    assert left.xy[0] < 25
    assert right.xy[0] > 32


def test_ids_stay_inside_the_panel():
    options = Simulation(shape=(60, 60), positions=((1.0, 30.0), (9.0, 30.0), (58.0, 10.0)))
    figure = overview(perfect_extraction(options))
    figure.canvas.draw()
    panel = figure.axes[0].get_window_extent()
    labels = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(labels) == 3
    assert all(panel.x0 < label.x0 < label.x1 < panel.x1 for label in labels)


def test_sources_without_a_shape_are_crosses():
    extraction = perfect_extraction(CASES["plain"])
    extraction.catalog["FWHM_1"][:3] = np.nan * u.arcsec
    extraction.catalog["RA"][11] = np.nan * u.deg
    axes = overview(extraction).axes[0]
    assert len(ellipses(axes).get_paths()) == 8
    (crosses,) = axes.lines
    assert_allclose(crosses.get_xdata(), extraction.catalog["X_PIX"][:3], atol=1e-6)
    assert_allclose(crosses.get_ydata(), extraction.catalog["Y_PIX"][:3], atol=1e-6)
    assert len(axes.texts) == 11


def test_the_beam_is_drawn_to_scale_in_its_box():
    options = Simulation(
        shape=(60, 80), n_sources=1, beam_fwhm_pix=6, beam_axis_ratio=0.5, beam_pa_deg=90
    )
    axes = overview(perfect_extraction(options)).axes[0]
    beam = next(p for p in axes.patches if isinstance(p, Polygon)).get_xy()
    box = next(p for p in axes.patches if isinstance(p, Rectangle))
    assert_allclose(np.ptp(beam, axis=0), [6 * np.sqrt(2), 6 / np.sqrt(2)], rtol=5e-3)
    assert box.get_xy() == (-0.5, -0.5)
    assert_allclose(beam[:-1].mean(axis=0), np.array([box.get_width(), box.get_height()]) / 2 - 0.5)


def test_the_colour_bar_has_round_values_that_are_apart():
    bar = overview(perfect_extraction(CASES["plain"])).axes[3]
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert "0" in labels
    assert 4 <= len(labels) <= 15
    values = bar.get_yticks()
    assert_allclose([float(text.replace("−", "-")) for text in labels], values)
    assert all(f"{abs(v):e}"[0] in "0125" for v in values)
    assert bar.get_ylabel() == "mJy/beam"


@pytest.mark.parametrize(
    ("name", "bottom", "left"),
    [
        ("plain", "Right ascension", "Declination"),
        ("a quarter turned", "Declination", "Right ascension"),
        ("galactic", "Galactic longitude", "Galactic latitude"),
        ("fk4", "Right ascension (FK4)", "Declination (FK4)"),
    ],
)
def test_the_axes_are_labelled_in_the_maps_frame(name, bottom, left):
    figure = overview(perfect_extraction(CASES[name]))
    figure.canvas.draw()
    labels = {}
    for coordinate in figure.axes[0].coords:
        labels[coordinate.get_axislabel_position()[0]] = coordinate.get_axislabel()
    assert labels == {"b": bottom, "l": left}


def test_large_maps_are_averaged_and_stay_in_place():
    options = Simulation(shape=(700, 2500), n_sources=20, edge_margin_beams=3)
    axes = overview(perfect_extraction(options)).axes[0]
    image = axes.images[0]
    assert image.get_array().shape[:2] == (700, 2500 // 3)
    assert image.get_extent() == [-0.5, 2498.5, -0.5, 699.5]
    assert axes.get_xlim() == (-0.5, 2499.5)


# --- parts ----------------------------------------------------------------------------------------


def test_block_mean_is_the_mean_of_the_valid_pixels():
    image = np.random.default_rng(0).normal(size=(25, 40))
    image[3, 5] = image[:8, :12] = np.nan
    image[8, 11] = 3.0
    mean = block_mean(image, (4, 6))
    assert mean.shape == (6, 6)
    for row, column in np.ndindex(mean.shape):
        block = image[4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        valid = block[np.isfinite(block)]
        expected = valid.mean() if valid.size else np.nan
        assert_allclose(mean[row, column], expected, rtol=1e-12)


@pytest.mark.parametrize("flip", [False, True])
def test_ellipse_outlines_are_ellipses_on_the_sky(flip):
    wcs = WCS(
        fits.Header(
            {
                "CTYPE1": "RA---SIN",
                "CTYPE2": "DEC--SIN",
                "CRVAL1": 40.0,
                "CRVAL2": 60.0,
                "CRPIX1": 300.0,
                "CRPIX2": -200.0,
                "CDELT1": (1 if flip else -1) * 0.01,
                "CDELT2": 0.01,
            }
        )
    )
    centre = SkyCoord([40, 50], [61, 63], unit="deg")
    (near, far) = ellipse_outlines(
        wcs, centre, [40, 80] * u.arcsec, [20, 30] * u.arcsec, [0, 70] * u.deg
    )
    for outline, at, major, minor, pa in zip(
        (near, far), centre, (40, 80), (20, 30), (0, 70), strict=True
    ):
        points = wcs.pixel_to_world(*outline.T)
        radius = at.separation(points).to_value(u.arcsec)
        angle = at.position_angle(points).to_value(u.rad) - np.deg2rad(pa)
        expected = 1 / np.hypot(np.cos(angle) / (major / 2), np.sin(angle) / (minor / 2))
        assert_allclose(radius, expected, rtol=1e-6)


def test_nothing_global_is_touched():
    """No pyplot, no backend: figures can be drawn in threads and without a display."""
    code = "import sys, hyperjax.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- saving ---------------------------------------------------------------------------------------


def test_save_figure_replaces_and_leaves_nothing_else(tmp_path):
    figure = overview(perfect_extraction(CASES["tiny"]))
    path = tmp_path / "new folder" / "a.png"
    save_figure(figure, path)
    save_figure(figure, path)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_other_formats_by_suffix(tmp_path, suffix):
    save_figure(overview(perfect_extraction(CASES["tiny"])), tmp_path / f"a.{suffix}")
    start = (tmp_path / f"a.{suffix}").read_bytes()[:5]
    assert start in (b"%PDF-", b"<?xml")


def test_a_figure_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="in the place of an output folder"):
        save_figure(overview(perfect_extraction(CASES["tiny"])), tmp_path / "file" / "a.png")


# --- comparison -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    """A truth, and a catalogue of it in Jy with known errors, a flux bias and a false source."""
    rng = np.random.default_rng(3)
    truth = simulate(Simulation(shape=(400, 400), n_sources=80)).truth
    catalog = truth[:71].copy()
    n = len(catalog)
    flux = catalog["FLUX_TOTAL"].to(u.Jy)
    catalog["FLUX_TOTAL_ERR"] = 0.1 * flux
    catalog["FLUX_TOTAL"] = 1.2 * flux * (1 + 0.1 / 1.2 * rng.standard_normal(n))
    error = 0.2 * u.arcsec
    catalog["RA_ERR"] = catalog["DEC_ERR"] = np.full(n, 0.2) * u.arcsec
    catalog["RA"] += error * rng.standard_normal(n) / np.cos(catalog["DEC"])
    catalog["DEC"] += error * rng.standard_normal(n)
    return catalog, truth, Matches(np.arange(70), np.arange(70), np.zeros(70))


def test_comparison_counts_and_measures(measured):
    catalog, truth, matches = measured
    figure = comparison(catalog, truth, matches)
    assert figure.get_suptitle() == "70 of 80 sources recovered, 1 false"
    flux, offsets, pulls = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "Signal-to-noise ratio",
        "ΔRA cos δ (arcsec)",
        "(measured − true) / error",
    ]
    ratio = (catalog["FLUX_TOTAL"] / truth["FLUX_TOTAL"][:71]).to_value(u.one)[:70]
    (median,) = flux.get_legend_handles_labels()[1]
    assert median == f"median {np.median(ratio):.3f}"
    (offset,) = offsets.get_legend_handles_labels()[1]
    sky = SkyCoord(catalog["RA"], catalog["DEC"])
    separation = sky.separation(SkyCoord(truth["RA"], truth["DEC"])[:71])[:70]
    assert offset == f"median offset {np.median(separation.arcsec):.3g}″"
    labels = dict(text.split(": ") for text in pulls.get_legend_handles_labels()[1][:-1])
    numbers = {name: [float(n) for n in text.split(" ± ")] for name, text in labels.items()}
    assert_allclose(numbers["flux density"], [2, 1], atol=0.4)
    assert_allclose(numbers["RA"], [0, 1], atol=0.4)
    assert_allclose(numbers["Dec"], [0, 1], atol=0.4)


@pytest.mark.parametrize(("low", "high"), [(8, 100), (11, 18), (30, 45), (3, 5000)])
def test_the_axis_of_signal_to_noise_has_labels(measured, low, high):
    catalog, truth, matches = measured
    catalog = catalog.copy()
    catalog["SNR"] = np.geomspace(low, high, len(catalog))
    figure = comparison(catalog, truth, matches)
    figure.canvas.draw()
    axis = figure.axes[0].xaxis
    shown = [
        text.get_text()
        for text, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        if axis.get_view_interval()[0] <= place <= axis.get_view_interval()[1]
    ]
    assert 2 <= len([text for text in shown if text]) <= 12


def test_east_is_left_in_the_offsets(measured):
    low, high = comparison(*measured).axes[1].get_xlim()
    assert low > high


def test_comparison_draws_points_with_error_bars(measured, tmp_path):
    figure = comparison(*measured)
    for axes in figure.axes:
        assert inside(figure, axes).std(axis=(0, 1)).max() > 5
    points = figure.axes[0].containers[0]
    assert_allclose(points.lines[0].get_xdata(), measured[0]["SNR"][:70])
    assert points.has_yerr
    save_figure(figure, tmp_path / "comparison.png")
    assert imread(tmp_path / "comparison.png").shape[:2] == (552, 1620)


@pytest.mark.parametrize("n", [0, 1])
def test_comparison_of_few_matches(measured, tmp_path, n):
    catalog, truth, _ = measured
    matches = Matches(np.arange(n), np.arange(n), np.zeros(n))
    figure = comparison(catalog[:n], truth, matches)
    save_figure(figure, tmp_path / "a.png")
    assert figure.get_suptitle() == f"{n} of 80 sources recovered, 0 false"


def test_comparison_lives_with_missing_errors(measured, tmp_path):
    catalog, truth, matches = measured
    catalog = catalog.copy()
    for name in ("FLUX_TOTAL_ERR", "RA_ERR", "DEC_ERR"):
        catalog[name][:] = np.nan
    catalog["FLUX_TOTAL"][0] = np.nan
    figure = comparison(catalog, truth, matches)
    save_figure(figure, tmp_path / "a.png")
    assert " sources recovered" in figure.get_suptitle()
    assert (tmp_path / "a.png").stat().st_size > 0
