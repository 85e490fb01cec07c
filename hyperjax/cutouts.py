"""Cutouts of single fits: of each group, of each source, and of each background.

A `Scene` is what they are cut from: the images of a map and its sources, from an extraction or,
later, from the files that a run wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from astropy.io import fits

from hyperjax.maps import FWHM_PER_SIGMA
from hyperjax.sources import SourceFits, render_sources, source_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from astropy.wcs import WCS
    from numpy.typing import NDArray

    from hyperjax.maps import Beam
    from hyperjax.pipeline import Extraction

    Floats = NDArray[np.float64]

__all__ = ["KINDS", "PANELS", "Cutout", "Scene", "cutouts", "hdus", "scene_of"]

PANELS = {
    "fitting": ("DATA", "FITTED", "MODEL", "RESIDUAL"),
    "deblended": ("DATA", "DEBLENDED", "MODEL", "RESIDUAL"),
    "bg_separate": ("DATA", "MASKED", "BACKGROUND", "SUBTRACTED"),
}
"""The images of each kind of cutout, in their order."""

KINDS = tuple(PANELS)
"""What can be cut out, by the names that the configuration's keys have for it."""

_MEANING = {
    "DATA": "the map",
    "FITTED": "the pixels near the sources, without those of other groups",
    "DEBLENDED": "the map without background and without all other sources",
    "MASKED": "the map, sources masked",
    "MODEL": "the sources that were fitted, on their background",
    "RESIDUAL": "the map without background and sources",
    "BACKGROUND": "the background that was fitted separately",
    "SUBTRACTED": "the map without this background",
}
_LABEL = {"fitting": "group", "deblended": "source", "bg_separate": "group"}
_SOURCE_REACH = 2.5, 1.5  # half the side of a source's cutout: of the beam's, of its own FWHM
_LISTED = 8  # sources that a title names


@dataclass(frozen=True, eq=False)
class Scene:
    """The images of a map and its sources, in Jy/beam and pixels.

    Attributes
    ----------
    name, wcs, beam
        Of the map.
    data, model, background : ndarray (ny, nx)
        The map, its sources, and the background under them.
    separate : ndarray (ny, nx) or None
        The background that was fitted separately.
    fits : SourceFits
        The n sources.
    number, group : ndarray of int (n,)
        Their numbers (HYPER_ID), and the groups that they were fitted in (GROUP), 0 for none.
    fwhm_pix : float
        FWHM of the beam.
    reach : float
        How far from its sources a group was fitted, pixels.
    per_jy : float
        1000 where cutouts are in mJy/beam, 1 where in Jy/beam.
    """

    name: str
    wcs: WCS
    beam: Beam
    data: Floats
    model: Floats
    background: Floats
    separate: Floats | None
    fits: SourceFits
    number: NDArray[np.int_]
    group: NDArray[np.int_]
    fwhm_pix: float
    reach: float
    per_jy: float

    @property
    def unit(self) -> str:
        """Unit of the cutouts."""
        return "mJy/beam" if self.per_jy == 1e3 else "Jy/beam"


class Cutout(NamedTuple):
    """Images of one group or source, (ny, nx) each, in the unit of the scene.

    `kind` is one of `KINDS`, `number` that of the group or source, and `corner` the pixel (x, y) of
    the map that is the first here. `sources` are the rows of the scene that it is about, `title`
    says so.
    """

    kind: str
    number: int
    title: str
    corner: tuple[int, int]
    images: dict[str, Floats]
    sources: NDArray[np.int_]

    @property
    def stem(self) -> str:
        """What its files are named, after the map."""
        return f"{_LABEL[self.kind]}_{self.number:04d}"


def scene_of(extraction: Extraction) -> Scene:
    """Return the scene of an extraction."""
    map_, catalog = extraction.map, extraction.catalog
    return Scene(
        name=map_.name,
        wcs=map_.wcs,
        beam=map_.beam,
        data=map_.data,
        model=extraction.model,
        background=extraction.background,
        separate=extraction.separate,
        fits=extraction.fits,
        number=np.asarray(catalog["HYPER_ID"]),
        group=np.asarray(catalog["GROUP"]),
        fwhm_pix=map_.beam_fwhm_pix,
        reach=float(extraction.catalog.meta["fit_reach_pix"]),
        per_jy=extraction.config.units.per_jy,
    )


def cutouts(scene: Scene, kind: str, numbers: NDArray[np.int_] | None = None) -> Iterator[Cutout]:
    """Yield the cutouts of a kind.

    Parameters
    ----------
    scene
        What to cut from.
    kind
        One of `KINDS`. There are none of ``bg_separate`` in a scene without such backgrounds.
    numbers
        HYPER_IDs of the sources whose cutouts, or whose groups', are wanted; all if None.
    """
    wanted = scene.fits.is_drawable & (scene.group > 0)
    if numbers is not None:
        wanted &= np.isin(scene.number, numbers)
    if kind == "deblended":
        for row in np.flatnonzero(wanted):
            yield _source(scene, int(row))
        return
    if kind == "bg_separate" and scene.separate is None:
        return
    for group in np.unique(scene.group[wanted]):
        members = np.flatnonzero((scene.group == group) & scene.fits.is_drawable)
        make = _group if kind == "fitting" else _background
        yield make(scene, int(group), members)


def _group(scene: Scene, group: int, members: NDArray[np.int_]) -> Cutout:
    place = _window(scene, members, scene.reach)
    own = _render(scene, members, place)
    data, background = scene.data[place], scene.background[place]
    others = scene.model[place] - own
    near = _distance(scene, members, place) <= scene.reach
    images = (
        data,
        np.where(near, data - others, np.nan),
        own + background,
        np.where(near, data - others - own - background, np.nan),
    )
    return _cutout(scene, "fitting", group, members, place, images)


def _source(scene: Scene, row: int) -> Cutout:
    members = np.array([row])
    beams, own_size = _SOURCE_REACH
    half = max(
        beams * scene.fwhm_pix, own_size * FWHM_PER_SIGMA * float(scene.fits.sigma_major[row])
    )
    place = _window(scene, members, half)
    own = _render(scene, members, place)
    residual = scene.data[place] - scene.background[place] - scene.model[place]
    images = scene.data[place], residual + own, own, residual
    return _cutout(scene, "deblended", int(scene.number[row]), members, place, images)


def _background(scene: Scene, group: int, members: NDArray[np.int_]) -> Cutout:
    place = _window(scene, members, scene.reach)
    rows, columns = place
    x, y = scene.fits.x - columns.start, scene.fits.y - rows.start
    finite = np.isfinite(x) & np.isfinite(y)
    data = scene.data[place]
    masked = source_mask(data.shape, x[finite], y[finite], scene.fwhm_pix)
    smooth = np.asarray(scene.separate)[place]
    images = data, np.where(masked, np.nan, data), smooth, data - smooth
    return _cutout(scene, "bg_separate", group, members, place, images)


def _cutout(
    scene: Scene,
    kind: str,
    number: int,
    members: NDArray[np.int_],
    place: tuple[slice, slice],
    images: tuple[Floats, ...],
) -> Cutout:
    named = {name: scene.per_jy * image for name, image in zip(PANELS[kind], images, strict=True)}
    title = f"{scene.name}: {_LABEL[kind]} {number}"
    if kind != "deblended":
        listed = ", ".join(str(n) for n in scene.number[members][:_LISTED])
        more = ", ..." if len(members) > _LISTED else ""
        title += f" (source{'s' * (len(members) > 1)} {listed}{more})"
    return Cutout(kind, number, title, (place[1].start, place[0].start), named, members)


def _window(scene: Scene, members: NDArray[np.int_], margin: float) -> tuple[slice, slice]:
    """Rows and columns of the map round some sources, cut off at its edge."""
    sides = []
    for position, size in zip((scene.fits.y, scene.fits.x), scene.data.shape, strict=True):
        low, high = position[members].min() - margin, position[members].max() + margin
        first = int(np.clip(np.floor(low), 0, size - 1))
        sides.append(slice(first, int(np.clip(np.ceil(high) + 1, first + 1, size))))
    return sides[0], sides[1]


def _shape(place: tuple[slice, slice]) -> tuple[int, int]:
    rows, columns = place
    return rows.stop - rows.start, columns.stop - columns.start


def _render(scene: Scene, members: NDArray[np.int_], place: tuple[slice, slice]) -> Floats:
    """Some of the sources on a window."""
    some = scene.fits.take(members)
    some = some._replace(x=some.x - place[1].start, y=some.y - place[0].start)
    return render_sources(_shape(place), some)


def _distance(scene: Scene, members: NDArray[np.int_], place: tuple[slice, slice]) -> Floats:
    """Distance of the pixels of a window from the nearest of some sources."""
    y, x = np.mgrid[place]
    nearest = np.full(x.shape, np.inf)
    for row in members:
        nearest = np.minimum(nearest, np.hypot(x - scene.fits.x[row], y - scene.fits.y[row]))
    return nearest


# --- FITS ----------------------------------------------------------------------------------------


def header_of(scene: Scene) -> fits.Header:
    """Coordinates, unit and beam of a scene, for the headers of its cutouts."""
    header = scene.wcs.to_header(relax=True)
    header["BUNIT"] = scene.unit
    header["BMAJ"] = (scene.beam.major_arcsec / 3600, "[deg] FWHM of the beam")
    header["BMIN"] = (scene.beam.minor_arcsec / 3600, "[deg]")
    header["BPA"] = (scene.beam.pa_deg, "[deg] East of North")
    return header


def hdus(cutout: Cutout, header: fits.Header) -> fits.HDUList:
    """Return a cutout as FITS: an image in the primary HDU, the others as extensions.

    Parameters
    ----------
    cutout
        What to write, in float32.
    header
        That of its scene (`header_of`).
    """
    own = header.copy()
    for key, shift in zip(("CRPIX1", "CRPIX2"), cutout.corner, strict=True):
        own[key] = header.get(key, 0.0) - shift
    own["OBJECT"] = cutout.title.encode("ascii", "replace").decode()
    own["HISTORY"] = f"hyperjax {version('hyperjax')}"
    out = fits.HDUList()
    for name, image in cutout.images.items():
        kind = fits.ImageHDU if out else fits.PrimaryHDU
        hdu = kind(image.astype(np.float32), own)
        hdu.name = name
        hdu.header.comments["EXTNAME"] = _MEANING[name][:47]
        out.append(hdu)
    return out
