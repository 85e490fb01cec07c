"""The covariance of all parameters of a group that were fitted together, as one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from astropy.io import fits

from hyperjax.groups import members_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from astropy.table import QTable
    from numpy.typing import NDArray

    from hyperjax.modelling import Modelled

PARAMETERS = ("peak", "x", "y", "sigma_major", "sigma_minor", "theta")
"""Of a source, in this order: Jy/beam (mJy/beam), pixel (twice), pixel (twice), rad."""


class GroupCovariance(NamedTuple):
    """Covariance of one group (or, of a very large one, of one of its blocks).

    Attributes
    ----------
    rows
        (k,) its sources, as rows of the catalogue.
    order
        Order of the polynomial background that was fitted with them, -1 for none.
    matrix
        (P, P): `PARAMETERS` of the first source, of the second ..., then the coefficients of the
        background: 1, x, y, x^2, x y, y^2 ... over the group's window, which is 2 wide.
    """

    rows: NDArray[np.int_]
    order: int
    matrix: NDArray[np.float64]


def group_covariances(modelled: Modelled, row_of: NDArray[np.int_]) -> list[GroupCovariance]:
    """Take the covariances of all groups from the fits, ordered by their first source.

    Parameters
    ----------
    modelled
        The fits.
    row_of
        (n,) row in the catalogue of each fitted source.
    """
    out = []
    for which, _, covariance in modelled.blocks:
        own, slots = members_of(modelled.placed, which), int(modelled.placed.slots[which[0]])
        for index, block in enumerate(which):
            count = int(np.sum(own.row == index))
            order = int(modelled.joint_orders[block])
            terms = (order + 1) * (order + 2) // 2
            kept = np.concatenate([np.arange(6 * count), 6 * slots + np.arange(terms)])
            matrix = covariance[index][np.ix_(kept, kept)]
            rows = row_of[modelled.placed.members[block]]
            out.append(GroupCovariance(rows, order, matrix))
    return sorted(out, key=lambda group: int(group.rows.min()))


def block_covariances(
    blocks: Sequence[tuple[NDArray[np.int_], NDArray[np.float64]]], row_of: NDArray[np.int_]
) -> list[GroupCovariance]:
    """The same of blocks of sources alone, each with its members and their covariance."""
    out = [GroupCovariance(row_of[members], -1, matrix) for members, matrix in blocks]
    return sorted(out, key=lambda group: int(group.rows.min()))


def covariance_hdus(
    groups: Sequence[GroupCovariance], catalog: QTable, per_jy: float
) -> fits.HDUList:
    """Make a FITS table of covariances, one row for each group.

    Parameters
    ----------
    groups
        The covariances.
    catalog
        The catalogue, for the sources' numbers and groups.
    per_jy
        1, or 1000 for mJy/beam.
    """
    numbers, labels = (np.asarray(catalog[name], np.int64) for name in ("HYPER_ID", "GROUP"))
    scaled = [_in_unit(group, per_jy) for group in groups]
    ids, matrices = np.empty(len(groups), object), np.empty(len(groups), object)
    for index, group in enumerate(groups):
        ids[index], matrices[index] = numbers[group.rows], scaled[index].ravel()
    first = np.array([group.rows[0] for group in groups], int)
    table = fits.BinTableHDU.from_columns(
        [
            fits.Column("GROUP", "K", array=labels[first]),
            fits.Column("N_SOURCES", "K", array=[len(group.rows) for group in groups]),
            fits.Column("POLYN", "K", array=[group.order for group in groups]),
            fits.Column("N_PAR", "K", array=[len(group.matrix) for group in groups]),
            fits.Column("HYPER_ID", "PK()", array=ids),
            fits.Column("COVARIANCE", "PD()", array=matrices),
        ],
        name="COVARIANCE",
    )
    unit = "mJy/beam" if per_jy == 1e3 else "Jy/beam"
    for line in (
        "COVARIANCE: N_PAR x N_PAR numbers, row by row. Of each source in HYPER_ID:",
        f"{', '.join(PARAMETERS)}",
        f"({unit}, pixel, pixel, pixel, pixel, rad); then, where POLYN is not",
        f"-1, the background's coefficients ({unit}) of 1, x, y, x^2, x y,",
        "y^2 ... with the window of the group from -1 to 1.",
        "0 for what was held fixed, NaN where there is no covariance.",
    ):
        table.header["COMMENT"] = line
    return fits.HDUList([fits.PrimaryHDU(), table])


def _in_unit(group: GroupCovariance, per_jy: float) -> NDArray[np.float64]:
    """The matrix with brightness in Jy/beam times `per_jy`."""
    scale = np.ones(len(group.matrix))
    sources = 6 * len(group.rows)
    scale[:sources:6], scale[sources:] = per_jy, per_jy
    return group.matrix * np.outer(scale, scale)
