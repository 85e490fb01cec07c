"""The products of single fits: FITS and pictures of groups, sources and backgrounds.

They are written where the configuration asks for them, and drawn again from what a run wrote::

    OUT/fits/fitting/<map>_group_0003.fits      OUT/plots/fitting/<map>_group_0003.png
    OUT/fits/deblended/<map>_source_0007.fits   OUT/plots/deblended/<map>_source_0007.png
    OUT/fits/bg_separate/<map>_group_0003.fits  OUT/plots/bg_separate/<map>_group_0003.png

Groups have the number GROUP of the catalogue, sources their HYPER_ID.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS

from hyperjax.cutouts import KINDS, Scene, cutouts, hdus, header_of, scene_of
from hyperjax.errors import ConfigError, MissingFileError, OutputError
from hyperjax.files import atomic_path
from hyperjax.forced import pixel_axes, place, read_sources
from hyperjax.maps import (
    Beam,
    Map,
    brightness_unit,
    local_geometry,
    mended_headers_unsaid,
    pixel_area_map,
)
from hyperjax.products import SCALE_KEY
from hyperjax.sources import SourceFits

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from numpy.typing import NDArray

    from hyperjax.config import Config
    from hyperjax.pipeline import Extraction
    from hyperjax.products import Layout

    Floats = NDArray[np.float64]

_MANY = 60  # pictures that are worth another process

logger = logging.getLogger(__name__)

__all__ = [
    "draw_again",
    "finished_maps",
    "folders",
    "read_scene",
    "stem_without_spaces",
    "write_singles",
]


def write_singles(extraction: Extraction, root: Path, workers: int = 1) -> list[Path]:
    """Write the products of single fits that the configuration asks for.

    Parameters
    ----------
    extraction
        A map, with fits.
    root
        The output folder, in which those of the configuration lie.
    workers
        How many processes may draw pictures, this one included.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    OutputError
        If a folder or file cannot be written.
    """
    images, pictures = folders(extraction.config, root)
    if not (images or pictures):
        return []
    if extraction.config.control.detection_only:
        logger.warning(
            "%s: no products of single fits (fits_output, visualization): control.detection_only "
            "makes no fits",
            extraction.map.name,
        )
        return []
    separately = extraction.config.background.fit_gauss_and_bg_separately
    if "bg_separate" in {*images, *pictures} and not separately:
        logger.warning(
            "%s: no products of separate backgrounds (bg_separate): there are none without "
            "background.fit_gauss_and_bg_separately",
            extraction.map.name,
        )
    scene, written = scene_of(extraction), []
    header = header_of(scene)
    few = len(pictures) * len(scene.number) < _MANY
    workers = 1 if few else workers
    with _drawn_elsewhere(scene, pictures, workers) as elsewhere:
        for kind, folder in images.items():
            for cutout in cutouts(scene, kind):
                path = folder / f"{stem_without_spaces(scene.name)}_{cutout.stem}.fits"
                with atomic_path(path) as temporary:
                    hdus(cutout, header).writeto(temporary)
                written.append(path)
        written += _draw(scene, pictures, share=(0, workers))
    return written + elsewhere


def folders(config: Config, root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the folders of the FITS files and of the pictures that are asked for, by kind."""
    images, pictures = config.fits_output, config.visualization
    asked = (
        {
            kind: root / getattr(images, f"fits_output_dir_{kind}")
            for kind in KINDS
            if getattr(images, f"fits_{kind}")
        },
        {
            kind: root / getattr(pictures, f"output_dir_{kind}")
            for kind in KINDS
            if getattr(pictures, f"visualize_{kind}")
        },
    )
    return asked


def _draw(
    scene: Scene,
    pictures: dict[str, Path],
    numbers: NDArray[np.int_] | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Path]:
    """Draw every n-th picture, from the k-th on, for a share (k, n)."""
    if not pictures:
        return []
    from hyperjax.gallery import Gallery  # matplotlib only where something is drawn

    gallery, written = Gallery(scene), []
    for kind, folder in pictures.items():
        for cutout in islice(cutouts(scene, kind, numbers), share[0], None, share[1]):
            path = folder / f"{stem_without_spaces(scene.name)}_{cutout.stem}.png"
            with atomic_path(path) as temporary:
                gallery.save(cutout, temporary)
            written.append(path)
    return written


@contextmanager
def _drawn_elsewhere(scene: Scene, pictures: dict[str, Path], workers: int) -> Iterator[list[Path]]:
    """Let other processes draw their shares meanwhile; their files are known at the end.

    They are processes of their own, not of `multiprocessing`, which would import the script that
    called.
    """
    files: list[Path] = []
    if workers < 2 or not pictures:
        yield files
        return
    with TemporaryDirectory() as folder, ExitStack() as stack:
        task = Path(folder) / "task.pickle"
        task.write_bytes(pickle.dumps((scene, pictures)))
        path = os.pathsep.join(filter(None, sys.path))
        helpers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "hyperjax.singles", str(task), str(share), str(workers)],
                    env={**os.environ, "PYTHONPATH": path},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for share in range(1, workers)
        ]
        try:
            yield files
            for helper in helpers:
                drawn, problem = helper.communicate()
                if helper.returncode:
                    reason = problem.strip().splitlines()[-1:] or ["killed, or out of memory?"]
                    raise OutputError(f"{scene.name}: a process that drew pictures: {reason[0]}")
                files += map(Path, drawn.splitlines())
        finally:
            for helper in helpers:
                helper.kill()


def _draw_share(task: str, share: str, workers: str) -> None:
    """Draw one share of a task, in a process of `_drawn_elsewhere`, and say which files."""
    scene, pictures = pickle.loads(Path(task).read_bytes())
    for path in _draw(scene, pictures, share=(int(share), int(workers))):
        sys.stdout.write(f"{path}\n")


def stem_without_spaces(name: str) -> str:
    """Return a map's name in those of files of single fits: without spaces and slashes."""
    return re.sub(r"[\s/\0]+", "_", name)


# --- From a finished run -------------------------------------------------------------------------


def finished_maps(layout: Layout) -> list[str]:
    """Names of the maps of a finished run whose images are there."""
    ending = "_residual.fits"
    return sorted(path.name[: -len(ending)] for path in layout.images.glob(f"*{ending}"))


def draw_again(
    layout: Layout,
    config: Config,
    names: Iterable[str],
    numbers: Collection[int],
    kinds: Collection[str],
) -> list[Path]:
    """Draw single fits of a finished run, from the tables and images that it wrote.

    Parameters
    ----------
    layout, config
        Where the files of the run are, and its configuration, for the folders of the pictures.
    names
        The maps.
    numbers
        HYPER_IDs of the sources that are wanted; all if empty.
    kinds
        Some of `hyperjax.cutouts.KINDS`.

    Returns
    -------
    list of Path
        The pictures.

    Raises
    ------
    MissingFileError
        A file of the run is not there.
    ConfigError
        None of the maps has one of the sources.
    """
    wanted, found, written = np.array(sorted(numbers), int), set(), []
    visualization = config.visualization
    pictures = {kind: layout.root / getattr(visualization, f"output_dir_{kind}") for kind in kinds}
    for name in names:
        scene = read_scene(layout, name)
        found |= set(scene.number.tolist())
        written += _draw(scene, pictures, wanted if len(wanted) else None)
    missing = sorted(set(wanted.tolist()) - found)
    if missing:
        raise ConfigError(
            f"{layout.tables}: no source {', '.join(map(str, missing))}; sources go by their "
            f"HYPER_ID, which is 1 to {max(found, default=0)} there"
        )
    return written


def read_scene(layout: Layout, name: str) -> Scene:
    """Read the scene of a map from the files of a finished run.

    Parameters
    ----------
    layout
        Where they are.
    name
        The map.

    Raises
    ------
    MissingFileError
        One of them is not there.
    """
    table = layout.table(name)
    images = {kind: layout.image(name, kind) for kind in ("model", "background", "residual")}
    for path in (table, *images.values()):
        if not path.is_file():
            raise MissingFileError(f"{path}: not there, or not a finished run")
    catalog = QTable.read(table)
    map_ = _map_of(images["residual"], name, catalog)
    planes = {kind: _plane(path, map_) for kind, path in images.items()}
    data = planes["model"] + planes["background"] + planes["residual"]
    map_.data[:] = data
    separate = layout.image(name, "background_separate")
    per_jy = float((1 * u.Jy / u.beam).to_value(catalog["FLUX_PEAK"].unit))
    return Scene(
        name=name,
        wcs=map_.wcs,
        beam=map_.beam,
        data=data,
        model=planes["model"],
        background=planes["background"],
        separate=_plane(separate, map_) if separate.is_file() else None,
        fits=_fits_of(table, catalog, map_),
        number=np.asarray(catalog["HYPER_ID"]),
        group=np.asarray(catalog["GROUP"]),
        fwhm_pix=map_.beam_fwhm_pix,
        reach=float(catalog.meta["fit_reach_pix"]),
        per_jy=per_jy,
    )


def _map_of(path: Path, name: str, catalog: QTable) -> Map:
    """The map that an image was made from, its data not yet."""
    with fits.open(path) as file:
        header, shape = file[0].header, file[0].shape
    with mended_headers_unsaid():
        wcs, meta = WCS(header), catalog.meta
    beam = Beam(
        meta["beam_major_arcsec"],
        meta["beam_minor_arcsec"],
        meta["beam_pa_map_deg"],
        meta["beam_area_arcsec2"],
    )
    unit = brightness_unit(header["BUNIT"])
    native: float | Floats = header.get(SCALE_KEY, 0.0)
    if SCALE_KEY not in header:
        native = pixel_area_map(wcs, shape) * unit.to(u.Jy / u.pix) ** -1 / beam.area_arcsec2
    return Map(name, None, np.zeros(shape), wcs, beam, unit, native, meta["map_frame"])


def _plane(path: Path, map_: Map) -> Floats:
    return np.asarray(fits.getdata(path), float) / map_.native_per_jy_beam


def _fits_of(path: Path, catalog: QTable, map_: Map) -> SourceFits:
    """The sources of a catalogue in pixels."""
    every = SourceFits.unknown(len(catalog))._replace(
        peak=catalog["FLUX_PEAK"].to_value(u.Jy / u.beam),
        x=catalog["X_PIX"].value,
        y=catalog["Y_PIX"].value,
    )
    shapes = np.full((len(catalog), 3), np.nan)
    if catalog.meta.get("sizes") == "given":
        placed = place(read_sources(path), map_)
        given = placed.model_shapes()
        if given is not None:
            shapes[placed.measured] = given
    else:
        columns = [catalog[name].value for name in ("FWHM_1", "FWHM_2", "PA")]
        good = np.isfinite([every.x, every.y, *columns]).all(axis=0)
        jacobian = local_geometry(map_.wcs, every.x[good], every.y[good]).jacobian
        shapes[good] = pixel_axes(jacobian, *(column[good] for column in columns))
    major, minor, theta = shapes.T
    return every._replace(sigma_major=major, sigma_minor=minor, theta=theta)


if __name__ == "__main__":
    _draw_share(*sys.argv[1:])
