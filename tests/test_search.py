"""Sources in correlated noise: found, deblended and measured with errors that hold."""

from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.stats import mad_std
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree

from hyperjax import search
from hyperjax.catalog import FLAGS
from hyperjax.config_io import config_from_dict
from hyperjax.fitting import FitOptions
from hyperjax.maps import Map, read_map
from hyperjax.pipeline import Extraction, extract
from hyperjax.simulation import Simulation, simulate, write_simulation
from hyperjax.sources import SourceFits
from hyperjax.whitened import Field, Noise, Swept, filtered, first_noise, sweep, updated_noise

TRUTH_OF = {
    "FLUX_TOTAL": "FLUX_TOTAL",
    "FLUX_APCOR": "FLUX_TOTAL",
    "FLUX_PEAK": "FLUX_PEAK",
    "FWHM_1": "FWHM_1",
}


def made(folder: Path, **options: Any) -> tuple[Map, Any]:
    """A simulated map, read from its file, and its truth."""
    simulation = simulate(Simulation(**{"shape": (300, 300), "seed": 1} | options))
    write_simulation(simulation, folder / "map.fits", overwrite=True)
    return read_map(folder / "map.fits"), simulation.truth


def positions(table: Any) -> NDArray:
    x, y = (u.Quantity(table[name]).value for name in ("X_PIX", "Y_PIX"))
    return np.column_stack([x, y])


def matched_rows(found: Extraction, truth: Any) -> tuple[Any, Any]:
    """Rows of the catalogue and of the truth that are the same source, each once."""
    if len(found.catalog) == 0:
        return found.catalog, truth[:0]
    distance, index = KDTree(positions(found.catalog)).query(positions(truth))
    near = distance < 0.7 * found.map.beam_fwhm_pix
    _, first = np.unique(index[near], return_index=True)
    rows = np.flatnonzero(near)[first]
    return found.catalog[index[rows]], truth[rows]


@pytest.fixture(scope="module", params=["white", "beam", "1/f"])
def isolated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Isolated sources in three maps with one kind of noise."""
    folder, rows, extractions = tmp_path_factory.mktemp("isolated"), [], []
    for seed in (1, 2, 3):
        options = {"n_sources": 36, "min_separation_beams": 5.0, "snr_range": (12, 80)}
        map, truth = made(folder, noise=request.param, seed=seed, **options)
        extractions.append(extract(map))
        rows.append((*matched_rows(extractions[-1], truth), truth))
    return request.param, extractions, rows


def test_isolated_sources_are_found_and_nothing_else(isolated: Any) -> None:
    _, extractions, rows = isolated
    for extraction, (found, _, truth) in zip(extractions, rows, strict=True):
        assert len(found) == len(truth)
        assert len(extraction.catalog) == len(truth)
        assert extraction.catalog.meta["noise_model"] == "correlated"


@pytest.mark.parametrize("column", TRUTH_OF)
def test_errors_are_those_of_the_noise(isolated: Any, column: str) -> None:
    """The deviations from the truth over the errors have the width 1."""
    pulls = np.concatenate(
        [
            (found[column] - truth[TRUTH_OF[column]]) / found[f"{column}_ERR"]
            for found, truth, _ in isolated[2]
        ]
    )
    # 108 sources: the width of a Gaussian is known to 9 %
    assert 0.75 < mad_std(u.Quantity(pulls).to_value("")) < 1.3


def test_errors_on_a_structured_background_are_those_of_the_noise(tmp_path: Path) -> None:
    """Of fits and of sums over apertures: what is in the background is in neither."""
    pulls: dict[str, list[NDArray]] = {"FLUX_TOTAL": [], "FLUX_APCOR": []}
    sources = {"n_sources": 30, "min_separation_beams": 4.0, "snr_range": (12, 80)}
    for seed in (1, 2):
        map, truth = made(
            tmp_path,
            seed=seed,
            gradient=100.0,
            structure=10.0,
            structure_scale_beams=8.0,
            **sources,
        )
        found, true = matched_rows(extract(map), truth)
        for column, deviations in pulls.items():
            off = (found[column] - true["FLUX_TOTAL"]) / found[f"{column}_ERR"]
            deviations.append(u.Quantity(off).to_value(""))
    for deviations in pulls.values():  # 60 sources: the width is known to 9 %
        assert 0.65 < np.std(np.concatenate(deviations)) < 1.4


def test_fluxes_are_unbiased(isolated: Any) -> None:
    ratio = np.concatenate(
        [found["FLUX_TOTAL"] / truth["FLUX_TOTAL"] for found, truth, _ in isolated[2]]
    )
    ratio = u.Quantity(ratio).to_value("")
    assert np.median(ratio) == pytest.approx(1, abs=0.01)
    assert np.mean(np.abs(ratio - 1) > 0.3) <= 0.01


def test_positions_are_as_good_as_their_errors(isolated: Any) -> None:
    pulls = []
    for found, truth, _ in isolated[2]:
        offset = (positions(found) - positions(truth))[:, 0]
        pulls.append(offset / found["RA_ERR"].to_value(u.arcsec))  # pixels of 1 arcsec
    assert 0.75 < mad_std(np.concatenate(pulls)) < 1.3


@pytest.mark.parametrize("noise", ["white", "beam", "1/f"])
def test_noise_alone_has_no_sources(noise: str, tmp_path: Path) -> None:
    """At 5 sigma less than one is expected in a thousand such maps, at the edges, too."""
    for seed in (1, 2, 3):
        map, _ = made(tmp_path, n_sources=0, noise=noise, seed=seed)
        assert len(extract(map).catalog) == 0


def test_edges_make_no_sources_where_noise_has_directions(tmp_path: Path) -> None:
    """There three rows of this map were none, with a chi^2 of 8 to 15 sigma."""
    options = {"beam_fwhm_pix": 5.0, "beam_axis_ratio": 0.6, "beam_pa_deg": 30.0, "noise": "beam"}
    options |= {"snr_range": (5.0, 80.0), "min_separation_beams": 4.0, "n_sources": 60}
    options |= {"gradient": 0.0, "structure": 0.0, "shape": (400, 400), "seed": 206}
    map, truth = made(tmp_path, **options)
    found = extract(map)
    assert len(found.catalog) == len(matched_rows(found, truth)[0]) > 50
    assert found.catalog.meta["residual_peaks"] < min(5, len(truth) - len(found.catalog))


def test_two_sources_closer_than_the_beam_are_told_apart(tmp_path: Path) -> None:
    options = {"noise": "white", "beam_fwhm_pix": 5.0, "shape": (200, 200), "rms_mjy_beam": 1.0}
    places, flux = ((60.0, 60.0), (64.0, 61.0), (140.0, 130.0), (140.0, 134.2)), 0.1
    shapes = ((5.0, 5.0, 0.0),) * 4
    map, truth = made(tmp_path, positions=places, fluxes=(flux,) * 4, shapes=shapes, **options)
    found = extract(map)
    assert len(found.catalog) == 4
    rows, true = matched_rows(found, truth)
    assert_allclose(rows["FLUX_TOTAL"] / true["FLUX_TOTAL"], 1, atol=0.1)
    error = np.hypot(*(positions(rows) - positions(true)).T)
    assert (error < 0.25).all()


def test_sources_beside_each_other_are_measured_as_well_as_their_errors_say(
    tmp_path: Path,
) -> None:
    """In a map where most sources have a neighbour at 1.5 to 2.5 beams."""
    options = {"shape": (400, 400), "n_sources": 190, "blend_fraction": 0.6, "seed": 5}
    map, truth = made(tmp_path, **options)
    found, true = matched_rows(extract(map), truth)
    assert len(found) >= 186
    pulls = u.Quantity((found["FLUX_TOTAL"] - true["FLUX_TOTAL"]) / found["FLUX_TOTAL_ERR"])
    offset = (positions(found) - positions(true))[:, 0] / found["RA_ERR"].to_value(u.arcsec)
    for deviation in (pulls.to_value(""), offset):
        assert np.sum(np.abs(deviation) > 4) <= 3
        assert 0.75 < mad_std(deviation) < 1.3
        assert np.std(deviation) < 2


def test_the_noise_is_measured_when_all_sources_have_been_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a fit takes of the noise is told from what was free in it: from its covariance."""
    seen = []

    def recorded(field: Field, noise: Any, fits: Any, left: NDArray, **smooth: bool) -> Any:
        seen.append((fits.niter > 0).all())
        return updated_noise(field, noise, fits, left, **smooth)

    monkeypatch.setattr(search, "updated_noise", recorded)
    map, _ = made(tmp_path, n_sources=60, blend_fraction=0.8, min_separation_beams=0.8)
    extract(map)
    assert len(seen) >= 3  # sources are added between
    assert all(seen)


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_a_regular_pattern_of_sources_is_not_taken_for_noise(jitter: float, tmp_path: Path) -> None:
    """What stands out of the first spectrum may be the pattern, which whitening would take away."""
    shift = np.random.default_rng(4).uniform(-jitter, jitter, (121, 2))
    places = [
        (20.0 + 16 * i + dx, 20.0 + 16 * j + dy)
        for (i, j), (dx, dy) in zip(np.ndindex(11, 11), shift, strict=True)
    ]
    sources = {
        "positions": tuple(places),
        "fluxes": (0.08,) * len(places),
        "shapes": ((4.6, 4.4, 0.0),) * len(places),
    }
    map, truth = made(tmp_path, shape=(200, 200), beam_fwhm_pix=4.0, noise="white", **sources)
    extraction = extract(map)
    found, true = matched_rows(extraction, truth)
    assert len(found) == len(extraction.catalog) == len(places)
    ratio = (found["FLUX_TOTAL"] / true["FLUX_TOTAL"]).to_value("")
    assert np.median(ratio) == pytest.approx(1, abs=0.03)
    assert (found["STATUS"] == 1).all()


@pytest.mark.parametrize(
    ("noise", "beams", "share", "least", "told"),
    [
        ("beam", 4.0, 0.84, 0.98, True),
        ("white", 3.0, 0.99, 0.96, True),
        ("beam", 2.5, 0.9, 0.98, True),
        ("beam", 2.5, 0.9, 0.98, False),
    ],
)
def test_a_map_full_of_rows_of_sources(
    noise: str,
    beams: float,
    share: float,
    least: float,
    told: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Faint and bright ones; with their pattern in the noise fluxes were 17 to 25 % too low.

    Where it is not told from the noise (here if some become fainter) there is a warning.
    """
    if not told:
        monkeypatch.setattr(search, "_MOST_FAINTER", 0.0)
    count = int(360 / (4 * beams))
    rng = np.random.default_rng(1)
    sources = {
        "positions": tuple(
            (20 + 4 * beams * i, 20 + 4 * beams * j) for i, j in np.ndindex(count, count)
        ),
        "fluxes": tuple(0.01 * np.exp(rng.uniform(np.log(5), np.log(80), count**2))),
        "shapes": ((4.6, 4.4, 0.0),) * count**2,
    }
    map, truth = made(
        tmp_path, shape=(400, 400), beam_fwhm_pix=4.0, noise=noise, rms_mjy_beam=10.0, **sources
    )
    found, true = matched_rows(extract(map), truth)
    bright = (found["FLUX_TOTAL"] / found["FLUX_TOTAL_ERR"]).to_value("") > 8
    ratio = (found["FLUX_TOTAL"] / true["FLUX_TOTAL"]).to_value("")[bright]
    assert len(found) > share * len(truth)
    assert least < np.median(ratio) < 1.02
    assert told != any("form a pattern" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("count", "fainter", "told"), [(40, 32, True), (40, 28, False), (16, 16, False)]
)
def test_a_pattern_is_in_the_noise_if_most_sources_become_fainter(
    count: int, fainter: int, told: bool
) -> None:
    """More than three of four, of twenty and more."""
    before = SourceFits.guess(np.tile([1.0, 50.0, 50.0, 2.0, 1.8, 0.0], (count, 1)))
    after = before._replace(peak=np.where(np.arange(count) < fainter, 0.9, 1.1))
    assert search._are_in_noise(before, after) == told


def test_fits_go_on_until_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that lean on each other, from wrong peaks; what moves to the last has the flag."""
    map, _ = made(tmp_path, n_sources=80, min_separation_beams=2.2, snr_range=(30, 60))
    (xx, xy), (_, yy) = map.beam_covariance_pix.tolist()
    field = Field(map.data, (xx, xy, yy), 41, config_from_dict({}))
    found = search.find_sources(field)
    assert found is not None
    wrong = Swept(found.fits._replace(peak=1.5 * found.fits.peak), [])
    stale = np.ones(len(found.fits.x), bool)
    again = search._settled(field, found.noise, wrong, stale, FitOptions(), wrong.fits)
    assert (again.fits.status == 1).all()
    error = np.sqrt(again.fits.covariance[:, 0, 0])
    assert np.max(np.abs(again.fits.peak - found.fits.peak) / error) < 0.5
    monkeypatch.setattr(search, "_SWEEPS", 1)
    stopped = search._settled(field, found.noise, wrong, stale, FitOptions(), wrong.fits)
    assert (stopped.fits.status == 0).all()


@pytest.mark.parametrize(("errors", "told"), [(0.3, False), (1.0, True), (3.0, True)])
def test_a_source_that_goes_to_and_fro_has_not_converged(
    errors: float, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By half its error and more; however far it goes, it ends at once."""
    map, _ = made(tmp_path, n_sources=12, min_separation_beams=5.0, snr_range=(30, 60))
    (xx, xy), (_, yy) = map.beam_covariance_pix.tolist()
    field = Field(map.data, (xx, xy, yy), 41, config_from_dict({}))
    found = search.find_sources(field)
    assert found is not None
    fits, calls = found.fits, []
    one = np.arange(len(fits.x)) == 3
    step = np.where(one, errors * np.sqrt(fits.covariance[:, 0, 0]), 0.0)

    def to_and_fro(field: Field, noise: Noise, swept: Swept, *_: Any) -> Swept:
        calls.append(1)
        peak = fits.peak + step * (len(calls) % 2)
        return swept._replace(fits=swept.fits._replace(peak=peak, status=fits.status.copy()))

    monkeypatch.setattr(search, "sweep_again", to_and_fro)
    settled = search._settled(field, found.noise, Swept(fits, []), one, FitOptions(), fits)
    assert len(calls) < 5
    assert list(settled.fits.status == 0) == list(one & told)


def test_the_noise_is_not_measured_again_for_few_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are fitted to the end then, as they are after more measurements."""
    map, _ = made(tmp_path, n_sources=60, min_separation_beams=1.2, snr_range=(10, 60))
    measured: list[Noise] = []

    def noted(*args: Any, **options: Any) -> Noise:
        measured.append(updated_noise(*args, **options))
        return measured[-1]

    monkeypatch.setattr(search, "updated_noise", noted)
    monkeypatch.setattr(search, "better_sources", with_a_change_each(search.better_sources))
    often = extract(map).catalog
    assert len(measured) == search._NOISES
    measured.clear()
    monkeypatch.setattr(search, "_FEW", 0.1)
    once, again = matched_rows(extract(map), often)
    assert len(measured) == 2
    assert len(once) == len(often)
    assert (once["STATUS"] == 1).all()
    off = (once["FLUX_TOTAL"] - again["FLUX_TOTAL"]) / again["FLUX_TOTAL_ERR"]
    assert np.abs(off.to_value("")).max() < 0.5


def with_a_change_each(compare: Any) -> Any:
    """What finds better sources, that says the first time in each noise that one has changed."""
    seen: list[int] = []

    def compared(field: Field, noise: Noise, *args: Any) -> Any:
        verdict = compare(field, noise, *args)
        new = id(noise) not in seen
        seen.append(id(noise))
        return verdict._replace(changed=verdict.changed + new)

    return compared


def test_what_is_beside_a_source_that_goes_far_is_fitted_again(tmp_path: Path) -> None:
    """Two that do not overlap: one fitted while the other was five errors off."""
    places, shapes = ((60.0, 64.0), (72.0, 64.0)), ((4.6, 4.4, 0.0),) * 2
    map, _ = made(
        tmp_path,
        positions=places,
        fluxes=(0.5, 0.5),
        shapes=shapes,
        shape=(128, 128),
        noise="white",
    )
    (xx, xy), (_, yy) = map.beam_covariance_pix.tolist()
    field = Field(map.data, (xx, xy, yy), 41, config_from_dict({}))
    found = search.find_sources(field)
    assert found is not None
    right = found.fits
    assert len(right.x) == 2
    first, second = np.arange(2) == 0, np.arange(2) == 1
    off = 5 * np.sqrt(np.diagonal(right.covariance, axis1=1, axis2=2)) * second[:, None]
    wrong = right._replace(peak=right.peak + off[:, 0], sigma_major=right.sigma_major + off[:, 3])
    swept = sweep(field, found.noise, wrong, FitOptions(), among=first)
    assert search._change(right, swept.fits)[0] > 0.15
    swept = Swept(swept.fits, [(np.array([i]), right.covariance[i]) for i in range(2)])
    settled = search._settled(field, found.noise, swept, second, FitOptions(), swept.fits)
    assert search._change(right, settled.fits).max() < 0.1


def test_one_round_source_stays_one(tmp_path: Path) -> None:
    """At any brightness, of the size of the beam and twice that."""
    places = tuple((40.0 + 55 * i, 40.0 + 55 * j) for i in range(4) for j in range(4))
    fluxes = tuple(0.1 * 1.3**i for i in range(16))
    shapes = tuple((4.0 * (1 + i % 2),) * 2 + (0.0,) for i in range(16))
    options = {"shape": (250, 250), "noise": "beam", "rms_mjy_beam": 1.0}
    map, truth = made(tmp_path, positions=places, fluxes=fluxes, shapes=shapes, **options)
    found = extract(map)
    assert len(found.catalog) == len(truth)


def lump(kind: str, radius: NDArray, fwhm: float) -> NDArray:
    """A round source that is no Gaussian, of unit peak, in a beam of `fwhm` pixels."""
    sigma = fwhm / np.sqrt(8 * np.log(2))
    if kind == "disc":  # of three beams
        seen = gaussian_filter((radius < 1.5 * fwhm).astype(float), sigma)
        return np.asarray(seen / seen.max())
    if kind == "plateau":  # saturated at half of its peak
        return np.minimum(2 * np.exp(-(radius**2) / (2 * (1.5 * sigma) ** 2)), 1.0)
    return np.asarray((1 + (radius / fwhm) ** 2 / 0.55) ** -2.5)  # Moffat, beta = 2.5


@pytest.mark.parametrize("snr", [100, 300])
@pytest.mark.parametrize("kind", ["disc", "plateau", "Moffat"])
def test_a_bright_source_that_is_no_gaussian_is_not_cut_to_pieces(
    kind: str, snr: float, tmp_path: Path
) -> None:
    """It is a source or two, with a flag unless they fit (core and halo); no other is lost."""
    options = {"noise": "white", "beam_fwhm_pix": 5.0, "n_sources": 12, "snr_range": (20, 40)}
    path, shape = tmp_path / "map.fits", (400, 400)
    _, truth = made(tmp_path, shape=shape, **options)
    y, x = np.indices(shape)
    place = np.array([200.0, 190.0])
    assert (np.hypot(*(positions(truth) - place).T) > 40).all()
    with fits.open(path, mode="update") as hdus:
        data = hdus[0].data
        data += snr * mad_std(data) * lump(kind, np.hypot(x - place[0], y - place[1]), 5.0)
    found = extract(read_map(path))
    near = np.hypot(*(positions(found.catalog) - place).T) < 40
    own = found.catalog[near]
    assert 1 <= len(own) <= 2
    if kind != "Moffat":
        assert (own["FLAGS"] & FLAGS.POOR_FIT).all()
    assert not (found.catalog[~near]["FLAGS"] & FLAGS.POOR_FIT).any()
    assert np.sum(~near) == len(truth)


@pytest.mark.parametrize("blank", ["nan", "zero"])
def test_blank_pixels_make_no_sources_and_spoil_none(blank: str, tmp_path: Path) -> None:
    options = {
        "noise": "beam",
        "n_sources": 40,
        "min_separation_beams": 4.0,
        "snr_range": (15, 60),
        "border_pix": 12,
        "n_holes": 6,
        "hole_radius_beams": 2.0,
        "edge_margin_beams": 1.0,
    }
    map, truth = made(tmp_path, blank=blank, **options)
    found = extract(map)
    rows, true = matched_rows(found, truth)
    assert len(found.catalog) == len(rows)
    assert len(rows) >= 0.9 * len(truth)
    pulls = ((rows["FLUX_TOTAL"] - true["FLUX_TOTAL"]) / rows["FLUX_TOTAL_ERR"]).to_value("")
    assert 0.6 < mad_std(pulls) < 1.5
    assert np.isnan(found.residual).sum() == np.isnan(map.data).sum()


def test_noise_that_varies_over_the_map(tmp_path: Path) -> None:
    """Errors follow it, and faint peaks of the noisy side are no sources."""
    map, truth = made(
        tmp_path,
        noise="white",
        n_sources=40,
        min_separation_beams=4.0,
        snr_range=(30, 90),
        rms_mjy_beam=1.0,
    )
    ramp = np.linspace(1, 5, map.shape[1])
    rng, rms = np.random.default_rng(5), 1e-3
    with fits.open(tmp_path / "map.fits", mode="update") as hdus:
        scale = map.native_per_jy_beam
        more = rng.normal(size=map.shape) * rms * np.sqrt(ramp**2 - 1)
        hdus[0].data = (hdus[0].data + more * scale).astype(hdus[0].data.dtype)
    found = extract(read_map(tmp_path / "map.fits"))
    ratio = found.rms[:, 40:-40] / (rms * ramp[40:-40])
    assert np.abs(ratio - 1).max() < 0.35
    assert np.median(ratio) == pytest.approx(1, abs=0.05)
    rows, true = matched_rows(found, truth)
    assert len(found.catalog) == len(rows)
    pulls = ((rows["FLUX_TOTAL"] - true["FLUX_TOTAL"]) / rows["FLUX_TOTAL_ERR"]).to_value("")
    assert 0.7 < mad_std(pulls) < 1.4


@pytest.mark.parametrize(
    ("options", "taken_for"),
    [
        ({}, "correlated"),
        ({"noise": {"model": "correlated"}}, "correlated"),
        ({"noise": {"model": "white"}}, "white"),
        ({"fit_options": {"loss": "cauchy"}}, "white"),
        ({"background": {"polynomial_orders": [1]}}, "white"),
        (
            {"detection": {"use_manual_rms": True, "rms_value": 1.0, "rms_unit": "mJy/beam"}},
            "white",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_the_noise_is_taken_for(
    options: dict[str, Any], taken_for: str, tmp_path: Path
) -> None:
    map, truth = made(tmp_path, shape=(120, 120), n_sources=4, snr_range=(50, 60), rms_mjy_beam=1.0)
    found = extract(map, config_from_dict(options))
    assert found.catalog.meta["noise_model"] == taken_for
    assert len(found.catalog) == len(truth)


@pytest.mark.parametrize("asked", ["auto", "correlated"])
def test_a_map_without_a_spectrum_is_fitted_by_pixels(
    asked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    map, _ = made(tmp_path, shape=(40, 60), n_sources=1, snr_range=(50, 60), edge_margin_beams=3.0)
    with caplog.at_level("INFO"):
        found = extract(map, config_from_dict({"noise": {"model": asked}}))
    assert found.catalog.meta["noise_model"] == "white"
    said = [record for record in caplog.records if "too small for the spectrum" in record.message]
    assert [record.levelname for record in said] == ["WARNING"]


def test_the_spectrum_is_measured_without_the_sources(tmp_path: Path) -> None:
    """The noise that is found under many sources is that of the same map without them."""
    options = {"noise": "beam", "shape": (260, 260)}
    crowded, _ = made(tmp_path, n_sources=120, snr_range=(10, 60), **options)
    empty, _ = made(tmp_path, n_sources=0, **options)
    config = config_from_dict({})
    (xx, xy), (_, yy) = crowded.beam_covariance_pix.tolist()
    fields = [Field(map.data, (xx, xy, yy), 41, config) for map in (crowded, empty)]
    of_both = [first_noise(field, filtered(field, None)) for field in fields]
    assert of_both[0] is not None
    assert of_both[1] is not None
    (with_sources, pattern), (alone, none) = of_both
    assert not pattern
    assert not none
    fits_of = extract(crowded, config).fits
    cleaned = updated_noise(fields[0], with_sources, fits_of, filtered(fields[0], fits_of))

    def middle(noise: Any) -> float:
        return float(np.median(noise.scale * np.sqrt(np.mean(noise.spectrum.power))))

    assert middle(with_sources) > 1.1 * middle(alone)
    assert middle(cleaned) == pytest.approx(middle(alone), rel=0.05)


def test_the_same_map_in_other_units_has_the_same_sources(tmp_path: Path) -> None:
    """The fit is scale-invariant, and a constant changes nothing."""
    map, _ = made(tmp_path, shape=(150, 150), n_sources=8, snr_range=(20, 60))
    scaled = Map(**{**vars(map), "data": 1e-7 * (map.data + 3 * np.nanmax(map.data))})
    one, other = extract(map).fits, extract(scaled).fits
    assert_allclose(other.peak, 1e-7 * one.peak, rtol=1e-6)
    assert_allclose(other.x, one.x, atol=1e-5)


def test_companions_of_extended_sources_are_found(tmp_path: Path) -> None:
    """Sources of two beams, each with a fainter one at its side, of a sixth of its peak."""
    rng = np.random.default_rng(4)
    places, fluxes, shapes = [], [], []
    for x in (60.0, 150.0, 240.0):
        for y in (60.0, 150.0, 240.0):
            turn = rng.uniform(0, 2 * np.pi)
            places += [(x, y), (x + 8 * np.cos(turn), y + 8 * np.sin(turn))]
            fluxes += [0.24, 0.01]  # 60 and 10 times the noise of 1 mJy/beam
            shapes += [(8.0, 8.0, 0.0), (4.0, 4.0, 0.0)]
    options = {"positions": tuple(places), "fluxes": tuple(fluxes), "shapes": tuple(shapes)}
    map, truth = made(tmp_path, noise="white", **options)
    found = extract(map)
    own, true = matched_rows(found, truth)
    assert len(own) == len(found.catalog) == len(truth)
    pull = u.Quantity((own["FLUX_TOTAL"] - true["FLUX_TOTAL"]) / own["FLUX_TOTAL_ERR"]).value
    assert (np.abs(pull) < 5).all()


def test_what_is_left_above_the_threshold_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of peaks in no source there is a warning."""
    map, _ = made(tmp_path, n_sources=12, min_separation_beams=5.0, snr_range=(30, 60))
    assert extract(map).catalog.meta["residual_peaks"] == 0
    assert not caplog.records
    as_it_is, lost = search._found, {}

    def without_one(field: Field, noise: Noise, swept: Swept, left: NDArray) -> search.Found:
        lost["place"] = swept.fits.x[3], swept.fits.y[3]
        fits = swept.fits.take(np.flatnonzero(np.arange(12) != 3))
        return as_it_is(field, noise, swept._replace(fits=fits), filtered(field, fits))

    monkeypatch.setattr(search, "_found", without_one)
    count = extract(map).catalog.meta["residual_peaks"]
    assert count > 0
    (record,) = caplog.records
    assert f"{count} peak" in record.message
    assert "of 5 sigma or more left in the residual" in record.message
    place = [float(value) for value in record.message.split("pixel (")[1].rstrip(")").split(", ")]
    assert np.hypot(*np.subtract(place, lost["place"])) < 1


def test_a_source_is_found_beside_a_bright_extended_one(tmp_path: Path) -> None:
    """Of a twelfth of its signal-to-noise ratio, 1.25 of its FWHMs away."""
    bright = [(50.0 + 75 * i, 50.0 + 75 * j) for i in range(4) for j in range(4)]
    beside = [(x + 7.3, y) for x, y in bright]
    options: dict[str, Any] = {
        "positions": tuple(bright + beside),
        "fluxes": (0.08,) * 16 + (0.0055,) * 16,
        "shapes": ((5.9, 5.6, 0.0),) * 16 + ((4.1, 4.0, 0.0),) * 16,
    }
    map, truth = made(tmp_path, shape=(330, 330), noise="white", beam_fwhm_pix=4.0, **options)
    found = extract(map)
    own, _ = matched_rows(found, truth)
    assert len(own) == len(found.catalog) >= 31


def test_a_bright_source_that_the_edge_cuts_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot be measured; and what the spectrum of so small a map makes of it is no noise."""
    places = ((0.3, 60.0), (60.0, 60.0), (100.0, 30.0), (90.0, 90.0))
    map, _ = made(tmp_path, positions=places, fluxes=(0.03,) * 4, shape=(128, 128), noise="white")
    meta = extract(map).catalog.meta
    assert meta["residual_peaks"] == 0
    assert meta["edge_peaks"] == 1
    assert meta["noise_correlation_fwhm_pix"] == 0
    (record,) = caplog.records
    assert "1 bright peak left at edges" in record.message
    x, y = record.message.split("pixel (")[1].rstrip(")").split(", ")
    assert np.hypot(float(x) - 0.3, float(y) - 60.0) < 1


def test_what_is_left_beside_a_poor_fit_is_not_told_again(tmp_path: Path) -> None:
    """The flag tells it. Without the flag, peaks all round a disc would be in no source."""
    shape = (400, 400)
    made(tmp_path, shape=shape, beam_fwhm_pix=5.0, n_sources=12, snr_range=(20, 40))
    y, x = np.indices(shape)
    with fits.open(tmp_path / "map.fits", mode="update") as hdus:
        data = hdus[0].data
        data += 300 * mad_std(data) * lump("disc", np.hypot(x - 200.0, y - 190.0), 5.0)
    map = read_map(tmp_path / "map.fits")
    (xx, xy), (_, yy) = map.beam_covariance_pix.tolist()
    field = Field(map.data, (xx, xy, yy), 51, config_from_dict({}))
    found = search.find_sources(field)
    assert found is not None
    fine = found.fits._replace(chi2_red=np.ones(len(found.fits.x)))
    left = search._found(field, found.noise, Swept(fine, found.blocks), filtered(field, fine)).peaks
    assert (np.hypot(left.x - 200, left.y - 190) < 40).any()
    assert len(found.peaks.x) == 0


def test_of_faint_members_of_a_group_the_faintest_goes_first() -> None:
    faint, ratio = np.array([True, True, False, True, True]), np.array([3.0, 1.0, 0.5, 2.0, 1.5])
    group = np.array([0, 0, 0, 1, 2])
    assert list(search._first_of_groups(faint, ratio, group)) == [False, True, False, True, True]
    assert not search._first_of_groups(np.zeros(5, bool), ratio, group).any()


@pytest.mark.parametrize(
    ("snr", "of_flux", "chi2", "away", "x", "kept"),
    [
        (6.0, 5.1, 1.0, 10.0, 48.0, True),  # by its flux
        (6.0, 4.9, 1.0, 10.0, 48.0, False),
        (6.4, 4.9, 1.0, 10.0, 48.0, True),  # by its chi^2: 39.4 are asked
        (6.2, 4.9, 1.0, 10.0, 48.0, False),
        (9.0, 2.2, 1.0, 10.0, 48.0, False),
        (7.0, 4.9, 1.0, 10.0, 2.0, False),  # at an edge
        (6.0, 1.1, 1.0, 9.3, 48.0, True),  # within two beams of another
        (6.0, 0.9, 1.0, 9.3, 48.0, False),
        (18.0, 14.0, 9.0, 9.3, 48.0, False),  # of a poor fit: 15 of the flux, or 18.8
        (20.0, 14.0, 9.0, 9.3, 48.0, True),
        (6.0, 15.1, 9.0, 10.0, 48.0, True),
    ],
)
def test_what_is_significant(
    snr: float,
    of_flux: float,
    chi2: float,
    away: float,
    x: float,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Total flux over its error, the peak with the shape held over its error, reduced chi^2."""
    field = Field(np.zeros((96, 96)), (4.0, 0.0, 4.0), 41, config_from_dict({}))
    sources = SourceFits.guess(np.array([[1.0, x, y, 2.0, 2.0, 0.0] for y in (48.0, 48.0 - away)]))
    sources = sources._replace(chi2_red=np.full(2, chi2))
    monkeypatch.setattr(search, "model_flux", lambda _: (np.full(2, of_flux), np.ones(2)))
    monkeypatch.setattr(search, "significance", lambda _: np.full(2, snr))
    assert search._is_significant(field, sources, 5.0).tolist() == [kept, kept]


def test_a_member_that_blank_pixels_cut_needs_a_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than sqrt(5) times its error: the model stands in for most of it."""
    data = np.zeros((96, 96))
    data[:, :46] = np.nan
    field = Field(data, (4.0, 0.0, 4.0), 41, config_from_dict({}))
    sources = SourceFits.guess(np.array([[1.0, x, 48.0, 2.0, 2.0, 0.0] for x in (47.0, 56.0)]))
    sources = sources._replace(chi2_red=np.ones(2))
    for ratio, kept in ((1.5, [False, True]), (2.3, [True, True])):
        flux = np.full(2, ratio), np.ones(2)
        monkeypatch.setattr(search, "model_flux", lambda _, flux=flux: flux)
        assert search._is_significant(field, sources, 5.0).tolist() == kept


def test_sources_that_come_near_are_told() -> None:
    """Those that have another within two beams (of 4.7 pixels) that was not there before."""
    field = Field(np.zeros((96, 96)), (4.0, 0.0, 4.0), 41, config_from_dict({}))

    def at(*x: float) -> SourceFits:
        return SourceFits.guess(np.array([[1.0, column, 48.0, 2.0, 2.0, 0.0] for column in x]))

    before, after = at(20, 28, 38, 60, 70), at(20, 28, 37, 60, 69)
    assert search._has_come_near(field, before, after).tolist() == [False, True, True, True, True]
    assert not search._has_come_near(field, after, before).any()


def test_large_sources_that_overlap_are_flagged_as_blended(tmp_path: Path) -> None:
    """2.6 beams apart: sources of two beams overlap there, and those of the beam do not."""
    places = ((60.0, 60.0), (70.5, 60.0), (60.0, 140.0), (70.5, 140.0))
    shapes = ((8.0, 7.6, 0.0),) * 2 + ((4.3, 4.2, 0.0),) * 2
    sources = {"positions": places, "fluxes": (0.3, 0.3, 0.1, 0.1), "shapes": shapes}
    map, truth = made(tmp_path, shape=(200, 200), noise="white", beam_fwhm_pix=4.0, **sources)
    found, _ = matched_rows(extract(map), truth)
    assert len(found) == 4
    blended = (found["FLAGS"] & FLAGS.BLENDED) > 0
    assert list(blended) == [True, True, False, False]
