"""Alternatives for a block of sources: that they start from the same flux and second moments."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from hyperjax.config import Config
from hyperjax.deblending import halves, merged
from hyperjax.sources import SourceFits, render_sources
from hyperjax.whitened import Field

FIELD = Field(np.zeros((61, 71)), 4.0, 41, Config())
ELONGATED = np.array([3.0, 33.0, 29.0, 4.0, 2.2, 0.7])


def moments(sources: NDArray) -> NDArray:
    """Flux, centroid and second moments (xx, xy, yy) of an image of sources."""
    image = render_sources(FIELD.data.shape, SourceFits.guess(np.atleast_2d(sources)))
    y, x = np.indices(image.shape)
    flux = image.sum()
    u, v = x - (image * x).sum() / flux, y - (image * y).sum() / flux
    second = [(image * p).sum() / flux for p in (u * u, u * v, v * v)]
    return np.array([flux, (image * x).sum() / flux, (image * y).sum() / flux, *second])


def test_halves_have_the_flux_the_place_and_the_length_of_the_whole() -> None:
    one, two = moments(ELONGATED), moments(halves(ELONGATED, FIELD))
    assert_allclose(two[:3], one[:3], rtol=1e-4)
    axis = np.array([np.cos(0.7), np.sin(0.7)])

    def along(values: NDArray) -> float:
        xx, xy, yy = values[3:]
        return float(axis @ np.array([[xx, xy], [xy, yy]]) @ axis)

    assert along(two) == pytest.approx(along(one), rel=1e-3)


def test_halves_of_a_point_source_are_apart() -> None:
    point = np.array([3.0, 33.0, 29.0, FIELD.sigma_pix, FIELD.sigma_pix, 0.0])
    first, second = halves(point, FIELD)
    assert np.hypot(*(first - second)[1:3]) == pytest.approx(FIELD.sigma_pix)


def test_one_in_the_place_of_several_has_their_moments() -> None:
    several = np.array(
        [ELONGATED, [1.5, 38.0, 33.0, 2.5, 2.0, 2.0], [2.0, 30.0, 25.0, 3.0, 1.8, 1.2]]
    )
    one = merged(several)
    assert one.shape == (1, 6)
    assert one[0, 3] >= one[0, 4]
    assert_allclose(moments(one), moments(several), rtol=2e-3)
