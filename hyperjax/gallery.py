"""Pictures of single fits: each cutout as images and as surfaces.

One figure is drawn again and again, with other data: to make a figure takes ten times as long as to
draw one. Nothing touches pyplot or needs a display.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy.stats import mad_std
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure

from hyperjax.figures import block_mean
from hyperjax.maps import FWHM_PER_SIGMA

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from numpy.typing import NDArray

    from hyperjax.cutouts import Cutout, Scene

    Floats = NDArray[np.float64]

__all__ = ["Gallery"]

_INCHES, _DPI = (11.0, 5.2), 80
_PIXELS, _CELLS = 256, 48  # larger images are averaged to so many pixels a side, surfaces to cells
_TURN, _TILT = np.deg2rad(-35.0), np.deg2rad(28.0)  # of the surfaces: about the vertical, to us
_HEIGHT = 0.75  # of a surface, over its width
_COLOURS = "inferno"
_BLANK = "#909090"
_INK = "#56B4E9"
_QUICK_PNG: dict[str, Any] = {"compress_level": 1, "compress_type": zlib.Z_RLE}
_LINEAR = 3.0  # times the scatter of the residual: from there on images are logarithmic
_SHARED = {
    "fitting": (0, 0, 0, 3),
    "deblended": (0, 1, 1, 3),
    "bg_separate": (0, 1, 1, 3),
}
"""The panel whose stretch each panel has: those that should look alike share one."""
_TITLES = {
    "DATA": "Map",
    "FITTED": "Pixels near the sources",
    "DEBLENDED": "Deblended",
    "MASKED": "Sources masked",
    "MODEL": "Model",
    "RESIDUAL": "Residual",
    "BACKGROUND": "Background",
    "SUBTRACTED": "Background subtracted",
}


class Gallery:
    """A figure of four images, above the same as surfaces, that draws any cutout of a scene.

    Images are linear up to three times the scatter of the residual and logarithmic above, surfaces
    linear; the lowest and the highest value are written beside these. Axes are offsets in
    arcseconds from the middle of the cutout, along the rows and columns of the map.
    """

    def __init__(self, scene: Scene) -> None:
        """Make the figure.

        Parameters
        ----------
        scene : Scene
            What the cutouts are of.
        """
        self._scene = scene
        self._scale = scene.beam.fwhm_arcsec / scene.fwhm_pix
        self._figure = Figure(_INCHES, dpi=_DPI)
        FigureCanvasAgg(self._figure)
        grid = self._figure.add_gridspec(
            2, 4, left=0.06, right=0.985, top=0.88, bottom=0.01, wspace=0.1, hspace=0.14
        )
        self._flat = [self._figure.add_subplot(grid[0, column]) for column in range(4)]
        self._deep = [self._figure.add_subplot(grid[1, column]) for column in range(4)]
        self._title = self._figure.text(0.06, 0.955, "", fontsize=11)
        self._images = [self._prepared(axes) for axes in self._flat]
        self._marks: list[EllipseCollection] = []
        self._meshes: list[QuadMesh] = []
        self._frames = [axes.plot([], [], color="#606060", lw=0.7)[0] for axes in self._deep]
        self._values = [
            [axes.text(0, 0, "", fontsize=7, ha="right", va="center") for _ in range(2)]
            for axes in self._deep
        ]
        for axes in self._deep:
            axes.set_axis_off()
            axes.set_xlim(-0.78, 0.7)
            axes.set_ylim(-0.42, 0.85)
            axes.set_aspect("equal")
        self._flat[0].set_ylabel("arcsec", fontsize=8)

    def _prepared(self, axes: Axes) -> Any:
        axes.set_facecolor(_BLANK)
        axes.tick_params(labelsize=7, direction="in", color="white")
        if axes is self._flat[0]:
            axes.locator_params(nbins=5)
        else:  # ticks take longer to draw than all the rest
            axes.set(xticks=[], yticks=[])
        return axes.imshow(np.zeros((2, 2)), origin="lower", cmap=_COLOURS, norm=AsinhNorm())

    def save(self, cutout: Cutout, path: Path) -> None:
        """Draw a cutout and write it as PNG.

        Parameters
        ----------
        cutout
            Of the scene.
        path
            The file.
        """
        self._draw(cutout)
        self._figure.savefig(path, format="png", dpi=_DPI, pil_kwargs=_QUICK_PNG)

    def _draw(self, cutout: Cutout) -> None:
        title = cutout.title.replace("$", r"\$")
        self._title.set_text(f"{title}, in {self._scene.unit}")
        images, shared = list(cutout.images.values()), _SHARED[cutout.kind]
        norms = {panel: _norm(images, shared, panel) for panel in set(shared)}
        for column, (name, panel) in enumerate(zip(cutout.images, shared, strict=True)):
            self._flat[column].set_title(_TITLES[name], fontsize=9, y=1.02)
            self._draw_image(column, images[column], norms[panel])
            self._draw_surface(column, images[column], norms[panel])
        self._draw_ellipses(cutout)

    def _draw_image(self, column: int, image: Floats, norm: AsinhNorm) -> None:
        ny, nx = image.shape
        half = np.array([nx, ny]) * self._scale / 2
        artist, axes = self._images[column], self._flat[column]
        artist.set_data(_averaged(image, _PIXELS))
        artist.set_norm(norm)
        artist.set_extent((-half[0], half[0], -half[1], half[1]))
        axes.set_xlim(-half[0], half[0])
        axes.set_ylim(-half[1], half[1])

    def _draw_ellipses(self, cutout: Cutout) -> None:
        """FWHM ellipses of the sources, on the images of the map and of what was fitted."""
        for mark in self._marks:
            mark.remove()
        fits, some = self._scene.fits, cutout.sources
        ny, nx = next(iter(cutout.images.values())).shape
        x = (fits.x[some] - cutout.corner[0] - (nx - 1) / 2) * self._scale
        y = (fits.y[some] - cutout.corner[1] - (ny - 1) / 2) * self._scale
        size = FWHM_PER_SIGMA * self._scale
        self._marks = [
            EllipseCollection(
                size * fits.sigma_major[some],
                size * fits.sigma_minor[some],
                np.rad2deg(fits.theta[some]),
                units="xy",
                offsets=np.column_stack([x, y]),
                offset_transform=axes.transData,
                facecolors="none",
                edgecolors=_INK,
                linewidths=0.9,
            )
            for axes in self._flat[:2]
        ]
        for axes, mark in zip(self._flat[:2], self._marks, strict=True):
            axes.add_collection(mark)

    def _draw_surface(self, column: int, image: Floats, norm: AsinhNorm) -> None:
        """The image as a surface in parallel projection, drawn from the back to the front."""
        if column < len(self._meshes):
            self._meshes[column].remove()
        cells = _averaged(image, _CELLS)
        low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
        level = np.clip((np.nan_to_num(cells, nan=low) - low) / (high - low), 0, 1)
        ny, nx = cells.shape
        longest = max(nx, ny)
        x, y = ((np.arange(n) - (n - 1) / 2) / max(longest - 1, 1) for n in (nx, ny))
        px, py = _projected(x[None, :], y[:, None], level)
        middles = (cells[1:, 1:] + cells[:-1, 1:] + cells[1:, :-1] + cells[:-1, :-1]) / 4
        middles = middles[::-1]
        mesh = self._deep[column].pcolormesh(
            px[::-1], py[::-1], np.ma.masked_invalid(middles), norm=norm, cmap=_COLOURS
        )
        ink = np.zeros((middles.size, 4))
        ink[:, 3] = 0.35 * np.isfinite(middles.ravel())
        mesh.set(edgecolor=ink, linewidth=0.2)
        self._meshes[column : column + 1] = [mesh]
        self._draw_frame(column, x[-1], y[-1], (low, high))

    def _draw_frame(
        self, column: int, half_x: float, half_y: float, limits: tuple[float, float]
    ) -> None:
        """The floor under a surface, and a vertical axis with its lowest and highest value."""
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * [half_x, half_y]
        px, py = _projected(corners[:, 0], corners[:, 1], np.zeros(5))
        top = _projected(np.array([-half_x]), np.array([-half_y]), np.ones(1))
        self._frames[column].set_data(np.append(px, top[0]), np.append(py, top[1]))
        for text, value, y in zip(self._values[column], limits, (py[0], top[1][0]), strict=True):
            text.set_position((px[0] - 0.03, y))
            text.set_text(f"{value:.3g}")


def _projected(x: Floats, y: Floats, level: Floats) -> tuple[Floats, Floats]:
    """Points in a room (x to the right, y away from us, level 0 to 1 up) on the paper."""
    across = x * np.cos(_TURN) - y * np.sin(_TURN)
    away = x * np.sin(_TURN) + y * np.cos(_TURN)
    up = away * np.sin(_TILT) + _HEIGHT * level * np.cos(_TILT)
    return np.broadcast_to(across, up.shape), up


def _averaged(image: Floats, most: int) -> Floats:
    """An image averaged to at most so many pixels a side."""
    block = [max(1, min(-(-side // most), side)) for side in image.shape]
    return block_mean(image, (block[0], block[1]))


def _norm(images: list[Floats], shared: tuple[int, ...], panel: int) -> AsinhNorm:
    """The stretch of the panels that share that of one of them."""
    together = [image for image, own in zip(images, shared, strict=True) if own == panel]
    finite = np.concatenate([image[np.isfinite(image)] for image in together])
    rest = images[-1][np.isfinite(images[-1])]
    if not finite.size:
        return AsinhNorm(1.0, vmin=0.0, vmax=1.0)
    low, high = float(finite.min()), float(finite.max())
    if not high > low:
        low, high = low - 1.0, high + 1.0
    scatter = float(mad_std(rest)) if rest.size else 0.0
    return AsinhNorm(_LINEAR * scatter or high - low, vmin=low, vmax=high)
