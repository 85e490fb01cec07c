"""Bright sources that are no Gaussians, and what is made of them.

One of them at a time is put in the middle of a map of white noise with thirty others; what counts
is how many rows it becomes, how they are flagged, and whether other sources are lost or made up.
The table of docs/noise.md is made by this script.

    python benchmarks/not_gaussian.py --markdown
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from astropy.table import QTable
from fit import bullets, facts, table
from noise import as_map
from scipy.ndimage import distance_transform_edt, gaussian_filter

from hyperjax import Config, Simulation, extract, simulate
from hyperjax.catalog import FLAGS
from hyperjax.evaluate import matches
from hyperjax.runtime import configure_runtime

BEAM = 5.0  # FWHM, pixels
SIGMA = BEAM / np.sqrt(8 * np.log(2))
SIDE = 400
SNR = (30.0, 100.0, 300.0, 1000.0)
OTHERS: dict[str, Any] = {"n_sources": 30, "min_separation_beams": 3.0, "snr_range": (15.0, 60.0)}
REACH = 4.0  # beams from where it is a twentieth of its peak: rows there are its own
HEADINGS = ("source", "rows", "reduced chi^2", "flags of most rows", "others lost, false")

Image = np.ndarray


def disc(u: Image, v: Image, diameter: float, ratio: float = 1.0) -> Image:
    """An elliptical disc of a (major) diameter in beams, seen with the beam."""
    inside = np.hypot(u, v / ratio) < diameter / 2
    return gaussian_filter(inside.astype(float), SIGMA)


def moffat(u: Image, v: Image, beta: float, fwhm: float = 1.0) -> Image:
    """Moffat's profile (1969, A&A 3, 455)."""
    core = fwhm / (2 * np.sqrt(2 ** (1 / beta) - 1))
    return np.asarray((1 + (u**2 + v**2) / core**2) ** -beta)


def plateau(u: Image, v: Image, major: float, minor: float) -> Image:
    """A Gaussian of two FWHMs in beams, saturated at half of its peak."""
    return np.minimum(np.exp2(-4 * ((u / major) ** 2 + (v / minor) ** 2)), 0.5)


def ring(u: Image, v: Image, diameter: float) -> Image:
    """A thin ring, seen with the beam."""
    return gaussian_filter((np.abs(np.hypot(u, v) - diameter / 2) < 1 / BEAM).astype(float), SIGMA)


def filament(u: Image, v: Image, length: float) -> Image:
    """A thin curved line, seen with the beam."""
    line = (np.abs(u) < length / 2) & (np.abs(v - 1.5 * np.sin(0.45 * u)) < 1 / BEAM)
    return gaussian_filter(line.astype(float), SIGMA)


KINDS: dict[str, tuple[Callable[[Image, Image], Image], float]] = {
    "Moffat, beta 2.5, FWHM of the beam": (partial(moffat, beta=2.5), 1),
    "Moffat, beta 1.5, 1.2 beams": (partial(moffat, beta=1.5, fwhm=1.2), 1),
    "disc of 3 beams": (partial(disc, diameter=3.0), 1),
    "disc of 4 beams": (partial(disc, diameter=4.0), 1),
    "disc of 6 beams": (partial(disc, diameter=6.0), 1),
    "elliptical disc of 3.75 by 2.5 beams": (partial(disc, diameter=3.75, ratio=2 / 3), 1),
    "Gaussian of 1.5 beams, saturated at half of its peak": (
        partial(plateau, major=1.5, minor=1.5),
        1,
    ),
    "the same of 2.1 by 1.4 beams": (partial(plateau, major=2.1, minor=1.4), 1),
    "ring of 4 beams": (partial(ring, diameter=4.0), 1),
    "filament of 20 beams, curved, a third as bright": (partial(filament, length=20.0), 1 / 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the map; default: 1")
    parser.add_argument("--markdown", action="store_true", help="a table for a page")
    options = parser.parse_args()
    configure_runtime()
    rows = [row(name, options.seed) for name in KINDS]
    print("\n".join([*table(HEADINGS, rows, options.markdown), ""]))
    print("\n".join(bullets([f"S/N of the peak {SNR}", *facts()], options.markdown)))


def row(name: str, seed: int) -> list[str]:
    """One kind of source, at every brightness."""
    shape, share = KINDS[name]
    y, x = np.indices((SIDE, SIDE))
    u, v = (x - SIDE / 2) / BEAM, (y - SIDE / 2) / BEAM
    image = shape(u, v)
    image /= image.max()
    middle = distance_transform_edt(image < 0.05) < REACH * BEAM
    found = [found_of(share * snr * image, middle, seed) for snr in SNR]
    return [
        name,
        " ".join(str(len(own)) for own, _, _ in found),
        " ".join(f"{np.median(own['CHI2_RED']):.2g}" if len(own) else "-" for own, _, _ in found),
        each(flags_of_most(own) for own, _, _ in found),
        each(f"{lost}, {false}" for _, lost, false in found),
    ]


def each(texts: Iterable[str]) -> str:
    """One after another, or once where all are the same."""
    listed = list(texts)
    return "; ".join(listed if len(set(listed)) > 1 else listed[:1])


def flags_of_most(rows: QTable) -> str:
    """Those that at least half of the rows have."""
    flags = np.asarray(rows["FLAGS"])
    names = [f"`{flag.name}`" for flag in FLAGS if len(flags) and np.mean(flags & flag > 0) >= 0.5]
    return ", ".join(names) or "-"


def found_of(image: Image, middle: Image, seed: int) -> tuple[QTable, int, int]:
    """Rows of the source, and how many others, away from it, were lost and made up."""
    simulated = simulate(
        Simulation(
            shape=(SIDE, SIDE),
            beam_fwhm_pix=BEAM,
            noise="white",
            gradient=0.0,
            structure=0.0,
            seed=seed,
            **OTHERS,
        )
    )
    noise = float(np.std(simulated.noise))
    catalog = extract(as_map(simulated, simulated.data + noise * image), Config()).catalog
    truth = simulated.truth
    pair = matches(catalog, truth, simulated.options.beam_fwhm_arcsec / 2)
    others = np.isin(np.arange(len(catalog)), pair.catalog)
    missed = ~np.isin(np.arange(len(truth)), pair.truth)
    own = ~others & middle[at(catalog)]
    lost = int(np.sum(missed & ~middle[at(truth)]))
    return catalog[own], lost, int(np.sum(~others & ~own))


def at(rows: QTable) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that sources are on."""
    y, x = (np.rint(np.asarray(rows[name])).astype(int) for name in ("Y_PIX", "X_PIX"))
    return np.clip(y, 0, SIDE - 1), np.clip(x, 0, SIDE - 1)


if __name__ == "__main__":
    main()
