"""Rows drawn by quota: without replacement, by weight, within bounds on languages and domains, and repeatably.

A row's place in the draw comes from the seed and the row itself, so neither the order of the pool nor other rows in it
change who goes before whom.

Shapes: N rows of the pool, S strata, X cells (rows of one stratum that the bounds do not tell apart).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from alignment.apportion import apportion
from alignment.errors import UserError
from alignment.rows import Row
from data_builders.selection.config import BoundsConfig, ConstraintsConfig
from data_builders.selection.quota import Bounds, within_bounds

NEVER = -1


@dataclass(frozen=True)
class Scheme:
    """What a method wants of the pool."""

    stratum_N: NDArray[np.int64]  # NEVER: not to be drawn
    quotas_S: NDArray[np.integer]
    reasons_S: Sequence[str]  # why a row of the stratum was drawn
    weights_N: NDArray[np.float64] | None = None  # rows of a stratum are drawn in proportion; None: alike
    never: str = "never"  # why rows of no stratum are not drawn


def row_draw(row: Row, seed: int) -> float:
    """A number in (0, 1), uniform over seeds and rows, the same for the same row."""
    text = json.dumps(row, sort_keys=True, default=str)
    return (xxh3_64_intdigest(text.encode(), seed=seed % 2**64) + 0.5) / 2**64


def draw(
    scheme: Scheme, draws_N: NDArray[np.float64], columns: dict[str, NDArray[np.str_]], constraints: ConstraintsConfig
) -> NDArray[np.bool_]:
    """Which rows are drawn. `columns` holds the rows' values of `languages` and `domains`.

    Raises:
        UserError: no row may be drawn, or bounds that cannot be held.
    """
    open_rows = np.flatnonzero(scheme.stratum_N != NEVER)
    if not len(open_rows):
        raise UserError(f"no row of the pool may be drawn: all {len(draws_N)} are {scheme.never}")
    weights = np.ones(len(draws_N)) if scheme.weights_N is None else scheme.weights_N
    groups = {name: _groups(columns[name], bounds) for name, bounds in named_bounds(constraints).items()}
    keys = np.stack([scheme.stratum_N, *groups.values()])[:, open_rows]
    cells_X, cell_of = np.unique(keys, axis=1, return_inverse=True)
    available_X = np.bincount(cell_of, minlength=cells_X.shape[1])
    weights_X = np.bincount(cell_of, weights[open_rows], minlength=cells_X.shape[1])
    wanted_X = np.zeros(cells_X.shape[1], np.int64)
    for stratum, quota in enumerate(scheme.quotas_S.tolist()):
        inside = np.flatnonzero(cells_X[0] == stratum)
        wanted_X[inside] = apportion(weights_X[inside], quota, available_X[inside])
    bounds = [
        Bounds(f"constraints.{name}.{value}", cells_X[place] == group, of_value.minimum, of_value.maximum)
        for place, (name, by_value) in enumerate(named_bounds(constraints).items(), start=1)
        for group, (value, of_value) in enumerate(by_value.items())
    ]
    counts_X = within_bounds(wanted_X, available_X, cells_X[0], bounds)
    order = -np.log(draws_N[open_rows]) / weights[open_rows]
    drawn_N = np.zeros(len(draws_N), np.bool_)
    drawn_N[open_rows[_first_of_each(cell_of, counts_X, order)]] = True
    return drawn_N


def named_bounds(constraints: ConstraintsConfig) -> dict[str, dict[str, BoundsConfig]]:
    return {"languages": constraints.languages, "domains": constraints.domains}


def _groups(values_N: NDArray[np.str_], bounds: dict[str, BoundsConfig]) -> NDArray[np.int64]:
    """The place of each row's value among those that are bounded, one more for all others."""
    groups_N = np.full(len(values_N), len(bounds), np.int64)
    for place, value in enumerate(bounds):
        groups_N[values_N == value] = place
    return groups_N


def _first_of_each(
    cell_of: NDArray[np.int64], counts_X: NDArray[np.integer], order: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Places of those whose `order` is lowest in their cell, as in Efraimidis and Spirakis 2006, IPL 97."""
    by_cell = np.lexsort((order, cell_of))
    sizes_X = counts_of(cell_of, len(counts_X))
    rank = np.arange(len(order)) - (np.cumsum(sizes_X) - sizes_X)[cell_of[by_cell]]
    return by_cell[rank < counts_X[cell_of[by_cell]]]


def counts_of(labels: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """How many there are of each label from 0; negative ones do not count."""
    return np.bincount(labels[labels >= 0], minlength=groups)
