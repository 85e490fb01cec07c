import os
import resource
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.wcs import WCS
from numpy.testing import assert_allclose, assert_array_equal
from regions import EllipseSkyRegion, Regions

from hyperjax import products
from hyperjax.config import Config
from hyperjax.errors import OutputError
from hyperjax.maps import Beam, Map
from hyperjax.products import Layout, copy_as_merged, write_extraction, write_merged

SHAPE = (40, 50)
ODD_NAMES = ["map [1] (b) v2.1", "field, 'a'; $x_1$ é", "-dash", ".hidden", "a/b"]
FORMATS = {".ecsv": "ascii.ecsv", ".txt": "ascii.ipac", ".csv": "ascii.csv"}
PRODUCTS = [
    "params/params_M1.ecsv",
    "params/params_M1.txt",
    "params/params_M1.csv",
    "regions/region_files_M1_centroids.reg",
    "regions/region_files_M1_ellipses.reg",
    "fits/M1_model.fits",
    "fits/M1_residual.fits",
    "fits/M1_background.fits",
    "fits/M1_rms.fits",
    "plots/M1_overview.png",
]


def make_wcs(frame="icrs", rotation=0.0, flip=False, scale_arcsec=2.0):
    wcs = WCS(naxis=2)
    longitude, latitude = ("GLON", "GLAT") if frame == "galactic" else ("RA--", "DEC-")
    wcs.wcs.ctype = [f"{longitude}-TAN", f"{latitude}-TAN"]
    wcs.wcs.crval = [83.8, -35.4]
    wcs.wcs.crpix = [25.5, 20.5]
    wcs.wcs.cdelt = [(1 if flip else -1) * scale_arcsec / 3600, scale_arcsec / 3600]
    cos, sin = np.cos(np.deg2rad(rotation)), np.sin(np.deg2rad(rotation))
    wcs.wcs.pc = [[cos, -sin], [sin, cos]]
    if frame != "galactic":
        wcs.wcs.radesys = frame.upper()
        if frame != "icrs":
            wcs.wcs.equinox = 1950 if frame == "fk4" else 2000
    wcs.wcs.set()
    return wcs


def make_catalog(n=3, wcs=None, name="M1"):
    """A catalogue with awkward numbers; the sources lie on the map of `make_wcs`."""
    rng = np.random.default_rng(n)
    wcs = wcs or make_wcs()
    sky = wcs.pixel_to_world(np.linspace(10, 40, n), np.linspace(30, 12, n))
    icrs = sky.icrs if n else SkyCoord([], [], unit="deg")
    peak, total = rng.lognormal(size=n) * 1e-5, rng.lognormal(size=n) / 3
    total[1:2] = np.nan
    catalog = QTable(
        {
            "MAP_ID": np.full(n, name),
            "HYPER_ID": np.arange(1, n + 1),
            "FLUX_PEAK": peak * u.mJy / u.beam,
            "FLUX_TOTAL": total * u.mJy,
            "CHI2_RED": rng.normal(size=n),
            "FWHM_1": np.full(n, 12.0) * u.arcsec,
            "FWHM_2": np.full(n, 8.0) * u.arcsec,
            "PA": np.linspace(20, 160, n) * u.deg,
            "RA": icrs.ra.to(u.deg),
            "DEC": icrs.dec.to(u.deg),
            "X_PIX": np.linspace(10, 40, n) * u.pix,
        }
    )
    catalog["FLUX_PEAK"].info.description = "Peak of the fitted Gaussian, " * 6
    catalog.meta = {
        "creator": "hyperjax",
        "recommended": "FLUX_TOTAL for total flux densities " * 3,
        "maps": [{"name": name, "beam_major_arcsec": 10.0}],
        "flags": {"BLENDED (256)": "fitted together with another source, or overlaps one"},
    }
    return catalog


def make_extraction(n=3, name="M1", unit=u.Jy / u.beam, native=1.0, wcs=None, frame="icrs"):
    rng = np.random.default_rng(5)
    wcs = wcs or make_wcs(frame)
    background = np.full(SHAPE, 0.25)
    model = rng.uniform(size=SHAPE)
    residual = rng.normal(size=SHAPE)
    residual[:3] = np.nan
    data = background + model + residual
    return SimpleNamespace(
        config=Config(),
        map=Map(name, None, data, wcs, Beam(12.0, 9.0, 30.0), unit, native, frame),
        catalog=make_catalog(n, wcs, name),
        model=model,
        background=background,
        residual=residual,
        rms=np.full(SHAPE, 0.5),
        separate=None,
        covariances=None,
    )


@pytest.fixture
def layout(tmp_path):
    return Layout.from_config(Config(), tmp_path / "out")


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# --- layout ---------------------------------------------------------------------------------------


def test_layout_is_hypers(tmp_path):
    layout = Layout.from_config(Config(), tmp_path)
    assert layout.table("A") == tmp_path / "params/params_A.ecsv"
    assert layout.table("ALL", ".txt") == tmp_path / "params/params_ALL.txt"
    assert layout.region("A", "ellipses") == tmp_path / "regions/region_files_A_ellipses.reg"
    assert layout.image("A", "rms") == tmp_path / "fits/A_rms.fits"
    assert layout.plot("A") == tmp_path / "plots/A_overview.png"
    assert layout.log("A") == tmp_path / "logs/A.log"


def test_layout_takes_names_from_the_configuration(tmp_path):
    output = SimpleNamespace(dir_table_out="t", dir_region_out=tmp_path / "r", dir_log_out="l")
    files = SimpleNamespace(file_table_base="tab", file_region_base="reg")
    config = SimpleNamespace(paths=SimpleNamespace(output=output), files=files)
    layout = Layout.from_config(config, tmp_path / "out")
    assert layout.table("A") == tmp_path / "out/t/tab_A.ecsv"
    assert layout.region("A", "centroids") == tmp_path / "r/reg_A_centroids.reg"


# --- what is written ------------------------------------------------------------------------------


def test_write_extraction_writes_the_products_and_nothing_else(layout, tmp_path):
    written = write_extraction(make_extraction(), layout)
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == PRODUCTS
    assert files_in(tmp_path / "out") == sorted(PRODUCTS)
    assert written[-1].read_bytes().startswith(b"\x89PNG")


def test_the_ecsv_table_appears_last(layout, monkeypatch):
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (renamed.append(args[1]), replace(*args)))
    write_extraction(make_extraction(), layout)
    assert renamed[-1] == layout.table("M1")


def test_images_and_plots_can_be_left_out(layout, tmp_path):
    write_extraction(make_extraction(), layout, images=False, plots=False)
    assert files_in(tmp_path / "out") == sorted(PRODUCTS[:5])


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_map_names(layout, name):
    extraction = make_extraction(name=name)
    for path in write_extraction(extraction, layout):
        assert path.is_file()
    for suffix, kind in FORMATS.items():
        table = Table.read(layout.table(name, suffix), format=kind)
        assert_array_equal(table["MAP_ID"], extraction.catalog["MAP_ID"])
    fits.getdata(layout.image(name, "model"))


def test_an_extraction_without_sources_is_written(layout):
    for path in write_extraction(make_extraction(n=0), layout):
        assert path.stat().st_size > 0


def test_writing_again_replaces(layout, tmp_path):
    write_extraction(make_extraction(n=3), layout, plots=False)
    write_extraction(make_extraction(n=1), layout, plots=False)
    assert len(Table.read(layout.table("M1"))) == 1
    assert files_in(tmp_path / "out") == sorted(PRODUCTS[:9])


def test_maps_can_be_written_at_the_same_time(layout, tmp_path):
    extractions = [make_extraction(name=f"M{i}") for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda e: write_extraction(e, layout, plots=False), extractions))
    assert len(files_in(tmp_path / "out")) == 8 * 9
    for i in range(8):
        assert Table.read(layout.table(f"M{i}"))["MAP_ID"][0] == f"M{i}"


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("suffix", FORMATS)
def test_tables_read_back_to_equal_values(layout, n, suffix):
    catalog = make_catalog(n)
    write_merged(catalog, layout)
    table = Table.read(layout.table("ALL", suffix), format=FORMATS[suffix])
    assert table.colnames == catalog.colnames
    assert len(table) == n
    for name in table.colnames:
        column = table[name]
        values = column.filled(np.nan) if getattr(column, "mask", np.False_).any() else column
        expected = getattr(catalog[name], "value", catalog[name])
        assert_array_equal(np.asarray(values, expected.dtype), expected, err_msg=name)
        if n and np.issubdtype(expected.dtype, np.number):
            assert column.dtype == expected.dtype


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("suffix", [".ecsv", ".txt"])
def test_tables_keep_units(layout, n, suffix):
    catalog = make_catalog(n)
    write_merged(catalog, layout)
    table = QTable.read(layout.table("ALL", suffix), format=FORMATS[suffix])
    for name in catalog.colnames:
        unit = getattr(catalog[name], "unit", None)
        assert unit is None or u.Unit(table[name].unit) == unit


def test_the_catalogue_of_a_single_map_becomes_the_merged_one(layout):
    write_extraction(make_extraction(), layout, plots=False)
    written = copy_as_merged(layout, "M1")
    assert written == [layout.table("ALL", suffix) for suffix in FORMATS]
    for suffix in FORMATS:
        assert layout.table("ALL", suffix).read_bytes() == layout.table("M1", suffix).read_bytes()


def test_a_map_that_is_named_nan_keeps_its_name(layout):
    write_merged(make_catalog(name="nan"), layout)
    table = Table.read(layout.table("ALL", ".txt"), format="ascii.ipac")
    assert list(table["MAP_ID"]) == ["nan"] * 3


def test_ecsv_keeps_everything(layout):
    catalog = make_catalog()
    write_merged(catalog, layout)
    table = QTable.read(layout.table("ALL"))
    assert dict(table.meta) == catalog.meta
    assert isinstance(table["RA"], u.Quantity)
    assert table["FLUX_PEAK"].info.description == catalog["FLUX_PEAK"].info.description


@pytest.mark.parametrize("n", [0, 3])
def test_ipac_header_is_valid(layout, n):
    write_merged(make_catalog(n), layout)
    lines = layout.table("ALL", ".txt").read_text().splitlines()
    header = [line for line in lines if line.startswith("\\")]
    names, types, units, nulls = (line for line in lines if line.startswith("|"))
    assert max(map(len, header)) <= 80
    assert "\\creator='hyperjax'" in header
    assert any("BLENDED (256): fitted together" in line for line in header)
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in (names, types, units, nulls)]
    assert bars[0] == bars[1] == bars[2] == bars[3]
    assert {t.strip() for t in types.split("|")} <= {"", "char", "long", "double"}
    assert nulls.count("null") == len(bars[0]) - 1
    for row in lines[len(header) + 4 :]:
        assert len(row) <= len(names)
        assert all(row[bar : bar + 1].isspace() or bar >= len(row) for bar in bars[0])


def test_not_a_number_is_null_in_ipac(layout):
    write_merged(make_catalog(), layout)
    text = layout.table("ALL", ".txt").read_text()
    assert "nan" not in text.lower()
    table = Table.read(layout.table("ALL", ".txt"), format="ascii.ipac")
    assert_array_equal(table["FLUX_TOTAL"].mask, [False, True, False])


# --- regions --------------------------------------------------------------------------------------

GEOMETRIES = [
    pytest.param("icrs", 0, False, id="icrs"),
    pytest.param("icrs", 37, False, id="icrs-rotated"),
    pytest.param("icrs", 0, True, id="icrs-flipped"),
    pytest.param("icrs", -110, True, id="icrs-flipped-rotated"),
    pytest.param("fk5", 12, False, id="fk5"),
    pytest.param("fk4", 0, False, id="fk4"),
    pytest.param("galactic", 0, False, id="galactic"),
    pytest.param("galactic", 65, True, id="galactic-flipped-rotated"),
]


def catalog_of_pixel_ellipses(wcs, x, y, major, minor, theta):
    """A catalogue of ellipses given in pixels, put on the sky by great circles between points."""
    along = np.array([np.cos(theta), np.sin(theta)]) * 0.5
    across = np.array([-np.sin(theta), np.cos(theta)]) * 0.5

    def sky(offset):
        return wcs.pixel_to_world(x + offset[0], y + offset[1]).icrs

    centre, tip = sky([0, 0]), sky(along * major)
    return QTable(
        {
            "HYPER_ID": np.arange(1, len(x) + 1),
            "RA": centre.ra.to(u.deg),
            "DEC": centre.dec.to(u.deg),
            "FWHM_1": tip.separation(sky(-along * major)).to(u.arcsec),
            "FWHM_2": sky(across * minor).separation(sky(-across * minor)).to(u.arcsec),
            "PA": centre.position_angle(tip).to(u.deg) % (180 * u.deg),
        }
    )


@pytest.mark.parametrize(("frame", "rotation", "flip"), GEOMETRIES)
def test_ellipses_lie_on_the_sources_in_pixels(tmp_path, frame, rotation, flip):
    wcs = make_wcs(frame, rotation, flip)
    x, y = np.array([12.0, 30.5, 41.0, 8.0]), np.array([30.0, 20.25, 8.0, 9.0])
    major, minor, theta = np.array([6.0, 9, 5, 7]), np.array([4.0, 3, 3, 5]), [0.1, 1.2, 2.4, 3.1]
    catalog = catalog_of_pixel_ellipses(wcs, x, y, major, minor, np.array(theta))
    path = tmp_path / "ellipses.reg"
    path.write_text(products.ellipse_regions(catalog, frame))
    regions = Regions.read(path, format="ds9")
    ellipses = [r.to_pixel(wcs) for r in regions if isinstance(r, EllipseSkyRegion)]
    assert_allclose([r.center.x for r in ellipses], x, atol=2e-4)
    assert_allclose([r.center.y for r in ellipses], y, atol=2e-4)
    assert_allclose([r.width for r in ellipses], major, rtol=1e-4)
    assert_allclose([r.height for r in ellipses], minor, rtol=1e-4)
    turn = np.array([r.angle.to_value(u.rad) for r in ellipses]) - theta
    assert_allclose(np.sin(turn), 0, atol=1e-4)  # angles are equal modulo 180 deg


@pytest.mark.parametrize(("frame", "rotation", "flip"), GEOMETRIES)
def test_crosses_lie_on_the_sources(tmp_path, frame, rotation, flip):
    wcs = make_wcs(frame, rotation, flip)
    catalog = make_catalog(3, wcs)
    path = tmp_path / "centroids.reg"
    path.write_text(products.centroid_regions(catalog, frame))
    regions = Regions.read(path, format="ds9")
    assert {region.center.frame.name for region in regions} == {frame}
    assert "point=cross" in path.read_text()
    pixels = [region.to_pixel(wcs).center for region in regions]
    assert_allclose([p.x for p in pixels], [10, 25, 40], atol=2e-4)
    assert_allclose([p.y for p in pixels], [30, 21, 12], atol=2e-4)


def test_ds9_gets_semi_axes_and_the_angle_from_west():
    catalog = make_catalog(1)
    catalog["PA"] = [100.0] * u.deg
    line = next(
        line
        for line in products.ellipse_regions(catalog, "icrs").splitlines()
        if line.startswith("ellipse")
    )
    numbers = [float(n) for n in line.partition("(")[2].partition(")")[0].split(",")]
    expected = [catalog["RA"][0].value, catalog["DEC"][0].value, 6 / 3600, 4 / 3600, 10.0]
    assert_allclose(numbers, expected, rtol=1e-9)


@pytest.mark.parametrize("frame", products.DS9_FRAMES)
def test_regions_are_those_that_the_regions_package_writes(frame):
    catalog = make_catalog(5)
    centre = SkyCoord(catalog["RA"], catalog["DEC"]).transform_to(frame)
    angle = products.position_angles(catalog, frame) - 90 * u.deg
    shapes = zip(centre, catalog["FWHM_1"], catalog["FWHM_2"], angle, strict=True)
    theirs = Regions([EllipseSkyRegion(*shape) for shape in shapes])
    expected = Regions.parse(theirs.serialize(format="ds9", precision=12), format="ds9")
    ours = Regions.parse(products.ellipse_regions(catalog, frame), format="ds9")
    for ellipse, other in zip(ours, expected, strict=True):
        assert ellipse.center.frame.name == other.center.frame.name == frame
        assert ellipse.center.separation(other.center) < 1e-6 * u.arcsec
        for name in ("width", "height", "angle"):
            got, wanted = (getattr(e, name).to_value(u.arcsec) for e in (ellipse, other))
            assert_allclose(got, wanted, rtol=1e-8, atol=1e-5, err_msg=name)


def test_small_ellipses_keep_their_size():
    catalog = make_catalog(1)
    catalog["FWHM_1"] = [0.012345678] * u.arcsec
    region = Regions.parse(products.ellipse_regions(catalog, "icrs"), format="ds9")[0]
    assert_allclose(region.width.to_value(u.arcsec), 0.012345678, rtol=1e-6)


def test_the_ellipse_file_has_crosses_with_the_id_too(layout):
    extraction = make_extraction()
    write_extraction(extraction, layout, images=False, plots=False)
    both, crosses = (
        Regions.read(layout.region("M1", kind), format="ds9") for kind in ("ellipses", "centroids")
    )
    ids = [str(i) for i in extraction.catalog["HYPER_ID"]]
    for regions in (both[len(ids) :], crosses):
        assert [str(region.meta["text"]) for region in regions] == ids
    assert [type(region) for region in both[: len(ids)]] == [EllipseSkyRegion] * len(ids)


def test_sources_without_shape_are_crosses_and_without_position_nothing():
    catalog = make_catalog(4)
    catalog["FWHM_1"][0] = np.nan * u.arcsec
    catalog["FWHM_2"][1] = 0 * u.arcsec
    catalog["PA"][2] = np.nan * u.deg
    catalog["RA"][3] = np.nan * u.deg
    assert len(Regions.parse(products.ellipse_regions(catalog, "galactic"), format="ds9")) == 0
    assert len(Regions.parse(products.centroid_regions(catalog, "galactic"), format="ds9")) == 3


def test_no_sources_are_an_empty_region_file():
    for text in (
        products.ellipse_regions(make_catalog(0), "fk5"),
        products.centroid_regions(make_catalog(0), "fk5"),
    ):
        assert text.startswith("# Region file format: DS9")
        assert len(Regions.parse(text, format="ds9")) == 0


def test_regions_of_a_frame_unknown_to_ds9_are_icrs(layout):
    extraction = make_extraction(frame="icrs")
    extraction.map = SimpleNamespace(**{**vars(extraction.map), "frame": "fk4noeterms"})
    assert products.region_frame(extraction.map) == "icrs"


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "native", "bunit"),
    [
        (u.Jy / u.beam, 1.0, "Jy beam-1"),
        (u.MJy / u.sr, 7.5, "MJy sr-1"),
        (u.K, 0.02, "K"),
        (u.Jy / u.pix, np.linspace(0.1, 0.2, 2000).reshape(SHAPE), None),
    ],
    ids=["Jy/beam", "MJy/sr", "K", "Jy/pixel"],
)
def test_images_are_in_the_unit_and_on_the_grid_of_the_map(layout, unit, native, bunit):
    wcs = make_wcs("galactic", 20)
    extraction = make_extraction(unit=unit, native=native, wcs=wcs, frame="galactic")
    write_extraction(extraction, layout, plots=False)
    for kind in products.IMAGES:
        with fits.open(layout.image("M1", kind)) as hdus:
            image, header = hdus[0].data, hdus[0].header
        assert image.dtype == np.dtype(">f4")
        valid = np.isfinite(extraction.map.data)
        assert_array_equal(np.isfinite(image), valid)
        expected = (getattr(extraction, kind) * native)[valid]
        assert_allclose(image[valid], expected, rtol=3e-7)
        assert u.Unit(header["BUNIT"]) == unit
        assert bunit is None or header["BUNIT"] == bunit
        beam = np.array([header["BMAJ"], header["BMIN"]]) * 3600
        assert_allclose([*beam, header["BPA"]], [12, 9, 30])
        assert header["HISTORY"][0].startswith("hyperjax ")
        sky, true = (
            WCS(header).pixel_to_world([3, 44], [2, 31]),
            wcs.pixel_to_world([3, 44], [2, 31]),
        )
        assert sky.separation(true).arcsec.max() < 1e-6


# --- atomicity and refusals -----------------------------------------------------------------------


def test_files_get_the_permissions_of_any_new_file(layout, tmp_path):
    (tmp_path / "plain").touch()
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for path in write_extraction(make_extraction(), layout):
        assert stat.S_IMODE(path.stat().st_mode) == usual


def test_a_long_map_name_is_no_problem_for_the_temporary_file(layout):
    name = "m" * 225  # a file name may have 255 bytes
    assert all(path.is_file() for path in write_extraction(make_extraction(name=name), layout))


@pytest.mark.parametrize("failing", ["_write_table", "_write_image", "_write_overview"])
def test_a_failure_in_the_middle_leaves_nothing(layout, tmp_path, monkeypatch, failing):
    def fail(*args):
        args[-1].write_text("half")
        raise RuntimeError

    monkeypatch.setattr(products, failing, fail)
    with pytest.raises(RuntimeError):
        write_extraction(make_extraction(), layout)
    assert files_in(tmp_path) == []


def test_a_failure_in_the_middle_leaves_the_earlier_run(layout, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in write_extraction(make_extraction(1), layout)}

    def fail(*args):
        raise RuntimeError

    monkeypatch.setattr(products, "_write_overview", fail)
    with pytest.raises(RuntimeError):
        write_extraction(make_extraction(3), layout)
    assert files_in(tmp_path / "out") == sorted(PRODUCTS)
    assert {path: path.read_bytes() for path in before} == before


@contextmanager
def largest_file(size):
    """Make the system refuse to write more than so many bytes to a file, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [100, 4000])
def test_a_full_disk_is_one_line_and_leaves_nothing(layout, tmp_path, size):
    extraction = make_extraction()
    write_extraction(extraction, Layout.from_config(Config(), tmp_path / "warm-up"))
    with largest_file(size), pytest.raises(OutputError, match=r"M1.*cannot be written") as caught:
        write_extraction(extraction, layout)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or files_in(tmp_path / "out") == []


def test_a_file_in_the_place_of_the_folder(layout, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"out: a file is in the place of .*; remove it, or"):
        write_extraction(make_extraction(), layout)
    assert files_in(tmp_path) == ["out"]


def test_a_file_in_the_place_of_one_folder_leaves_nothing(layout, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plots").write_text("a file")
    with pytest.raises(OutputError, match="plots: a file is in the place"):
        write_extraction(make_extraction(), layout)
    assert files_in(tmp_path) == ["out/plots"]


def test_a_folder_in_the_place_of_a_file(layout):
    layout.table("ALL").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"params_ALL.ecsv: a folder is in the place"):
        write_merged(make_catalog(), layout)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(layout, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write_merged(make_catalog(), layout)
    finally:
        tmp_path.chmod(0o700)


def test_a_refusal_of_the_system_names_file_reason_and_remedy(layout, monkeypatch):
    def refuse(self, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError) as caught:
        write_merged(make_catalog(), layout)
    message = str(caught.value)
    assert "params_ALL" in message
    assert "(Permission denied)" in message
    assert "choose another output folder" in message
    assert caught.value.exit_code == 2
