"""How many rows to draw of each cluster: deficits, quotas, and quotas within bounds. Pure integer arithmetic.

Shapes: C clusters, X cells (a cell is the rows of one cluster that the bounds do not tell apart).

A quota answers COMPASS (Flynn 2026, arXiv 2604.20720): rows go first where the target's share of a cluster is larger
than that of what is there already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds as VariableBounds
from scipy.optimize import LinearConstraint, milp

from alignment.apportion import FUZZ, apportion
from alignment.errors import UserError

Counts = NDArray[np.integer]
Amounts = NDArray[np.floating]

# What a row costs that is not drawn as the quotas say: moved within its cluster (the further a cell is from its amount,
# the more), drawn of another cluster, not drawn at all, or lacking under a minimum. Each is more than any chain of the
# cheaper ones that could mend it.
SEGMENTS = 4
OTHER_CLUSTER, UNDRAWN, LACKING = 20.0, 2_000.0, 200_000.0


@dataclass(frozen=True)
class Quotas:
    """Rows to draw of each cluster: `gap_C` fill deficits, `beyond_C` are what the budget holds beyond them."""

    gap_C: Counts
    beyond_C: Counts

    @property
    def total(self) -> Counts:
        return self.gap_C + self.beyond_C


@dataclass(frozen=True)
class Bounds:
    """Rows of one group, at least and at most."""

    name: str  # as the config says it, for messages
    members_X: NDArray[np.bool_]
    minimum: int
    maximum: int | None


def deficits(target_C: Amounts, training_C: Counts, budget: int) -> Amounts:
    """Rows that each cluster lacks for training + budget to be shared out as the target is: never negative.

    d_c = max(0, t_c (n + budget) - n_c), for target shares t_c and n_c of n training rows. They sum to budget or more.
    """
    return np.maximum(0.0, target_C * (training_C.sum() + budget) - training_C)


def gap_quotas(
    target_C: Amounts, training_C: Counts, available_C: Counts, budget: int, inverse: bool = False
) -> Quotas:
    """Rows of each cluster that bring training and selection nearest to the target's shares.

    No order of filling deficits changes the total variation that is left, so each cluster gets the same part of its
    own, as far as rows are available. `inverse` gives it in proportion to 1 / (n_c + 1) instead, over the clusters with
    a deficit. Budget that no deficit takes goes to the clusters in proportion to the target's shares.
    """
    wanted = deficits(target_C, training_C, budget)
    weights = np.where(wanted > 0, 1.0 / (training_C + 1.0), 0.0) if inverse else wanted
    caps = np.minimum(available_C, np.ceil(wanted - FUZZ).astype(np.int64))
    gap = apportion(weights, budget, caps)
    beyond = apportion(target_C, budget - int(gap.sum()), available_C - gap)
    return Quotas(gap, beyond)


def within_bounds(
    wanted_X: Counts, available_X: Counts, cluster_X: NDArray[np.int64], bounds: Sequence[Bounds]
) -> Counts:
    """Rows of each cell that hold every bound and are otherwise as near to `wanted_X` as they can be.

    A row moves within its cluster before clusters change, and from many cells rather than from one: a small integer
    programme (HiGHS). Fewer rows than wanted are drawn only where the maxima leave no others.

    Raises:
        UserError: a minimum that no draw of at most as many rows can hold; it says by how much.
    """
    if not bounds:
        return wanted_X
    total = int(wanted_X.sum())
    cells, clusters = len(wanted_X), int(cluster_X.max()) + 1
    room_X = available_X - wanted_X
    up = _segments([np.minimum(room_X, np.rint(part * wanted_X)) for part in (0.25, 0.5, 1)] + [room_X])
    down = _segments([np.rint(part * wanted_X) for part in (0.25, 0.5, 0.75, 1)])
    # The variables: rows more in each cell, rows fewer, each cluster's rows above and below, undrawn, lacking.
    each = sparse.eye_array(cells, format="csr")
    change = sparse.hstack([*[each] * SEGMENTS, *[-each] * SEGMENTS], format="csr")
    of_cluster = sparse.csr_array((np.ones(cells), (cluster_X, np.arange(cells))), shape=(clusters, cells))
    per_cluster = sparse.eye_array(clusters, format="csr")
    spare, lacking = 1, len(bounds)
    moves = np.tile(np.repeat(np.arange(1.0, SEGMENTS + 1), cells), 2)
    costs = np.concatenate([moves, np.full(2 * clusters, OTHER_CLUSTER), [UNDRAWN], np.full(lacking, LACKING)])
    upper = np.concatenate([up, down, np.full(2 * clusters + spare + lacking, np.inf)])
    clusters_hold = sparse.hstack(
        [of_cluster @ change, -per_cluster, per_cluster, sparse.csr_array((clusters, spare + lacking))], format="csr"
    )
    total_holds = np.concatenate([change.sum(axis=0), np.zeros(2 * clusters), [1.0], np.zeros(lacking)])[None, :]
    members = np.array([bound.members_X for bound in bounds], dtype=np.float64)
    bounds_hold = sparse.hstack(
        [members @ change, sparse.csr_array((lacking, 2 * clusters + spare)), sparse.eye_array(lacking)], format="csr"
    )
    drawn = members @ wanted_X
    low = np.array([bound.minimum for bound in bounds]) - drawn
    high = np.array([np.inf if bound.maximum is None else bound.maximum for bound in bounds]) - drawn
    solved = milp(
        costs,
        integrality=np.concatenate([np.ones(2 * SEGMENTS * cells), np.zeros(2 * clusters + spare + lacking)]),
        bounds=VariableBounds(0, upper),
        constraints=[
            LinearConstraint(clusters_hold, 0, 0),
            LinearConstraint(total_holds, 0, 0),
            LinearConstraint(bounds_hold, low, high),
        ],
        options={"mip_rel_gap": 0},
    )
    assert solved.success, solved.message  # nothing drawn and everything lacking is a solution
    result = wanted_X + np.rint(change @ solved.x[: 2 * SEGMENTS * cells]).astype(np.int64)
    _refuse_lacking(bounds, result, available_X, total)
    return result


def _segments(ends: Sequence[Amounts | Counts]) -> Amounts:
    """Upper bounds of the variables that part each cell's way to the last of `ends` into SEGMENTS."""
    return np.diff(np.stack([np.zeros(len(ends[0])), *ends]), axis=0).ravel()


def _refuse_lacking(bounds: Sequence[Bounds], result_X: Counts, available_X: Counts, total: int) -> None:
    short: Mapping[str, tuple[int, int, int]] = {
        bound.name: (bound.minimum, int(available_X[bound.members_X].sum()), int(result_X[bound.members_X].sum()))
        for bound in bounds
        if result_X[bound.members_X].sum() < bound.minimum
    }
    if not short:
        return
    parts = [
        f"{name}.minimum: {minimum} rows, but the pool has {available} that may be drawn"
        if available < minimum
        else f"{name}.minimum: {minimum} rows are {minimum - held} too many beside the other bounds, of {total} in all"
        for name, (minimum, available, held) in short.items()
    ]
    raise UserError("\n".join(parts[:3]))
