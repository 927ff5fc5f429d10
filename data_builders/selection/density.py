"""Compass-v2's selection: DBSCAN clusters of questions, and rows that add little drawn less often.

The report (Compass-v2 Technical Report, 2025) names the parts: BGE-M3 embeddings, PCA, DBSCAN, question clusters,
question/answer similarity, sampling by inverse similarity and fuzzy labels. The formulas are our reading of it:

1.  x_i = PCA(q_i): the question's vector in the first components.
2.  Clusters: DBSCAN on x (Ester et al. 1996). Core points have `min_samples` rows, themselves among them, within eps;
    core points within eps of each other are one cluster; a row within eps of a core point is of the nearest one's
    cluster; others are noise, and not drawn.
3.  Redundancy: r_i = max(0, cos(q_i, centre of its cluster)).
4.  Question/answer similarity: a_i = max(0, cos(q_i, answer_i)): an answer that repeats its question teaches little.
5.  Fuzzy labels: u_ik = d_ik^-2 / sum_j d_ij^-2, the membership of fuzzy c-means with m = 2 (Bezdek 1981), d_ik the
    distance of q_i from centre k. M_k = sum_i u_ik is how much of the pool is of category k.
6.  Weight: w_i = sum_k u_ik / M_k  x  1 / (SMOOTH + r_i)  x  1 / (SMOOTH + a_i). By the first factor alone every
    category would be drawn as often as any other.

Rows are drawn without replacement, in proportion to their weights.

DBSCAN over all pairs grows with the square of the rows. Core points and their connections are found among at most
`sample` rows by their nearest neighbours (faiss), and all rows are then compared with the core points. Connections
are looked for among the LINKS nearest neighbours of a core point alone.

Shapes: N rows, D dimensions, P components, K clusters, S rows of the sample, B rows of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.decomposition import PCA

from alignment.errors import UserError
from data_builders.selection.config import DBSCANConfig
from data_builders.vectors import Vectors, blocks, sample

NOISE = -1
LINKS = 64
SMOOTH = 0.1  # the smallest similarity that makes a difference: a row weighs at most 11 times another by one factor
LEAST_DISTANCE = 1e-6
LEAST_EPS = 1e-3  # what float32 leaves of the distance of equal rows is below it
FUZZY_ROWS = 2_048  # rows of a block whose memberships in all clusters are in memory together


@dataclass(frozen=True)
class Density:
    """DBSCAN's core points in PCA space, and what of them makes a cluster."""

    pca: PCA
    eps: float
    cores_SP: NDArray[np.float32]
    labels_S: NDArray[np.int64]

    @property
    def clusters(self) -> int:
        return int(self.labels_S.max()) + 1


def fit(questions_ND: Vectors, config: DBSCANConfig, seed: int) -> Density:
    """Clusters of a sample of the questions.

    Raises:
        UserError: fewer rows than `min_samples` or components, or no row with enough neighbours.
    """
    rows = sample(questions_ND, config.sample, np.random.default_rng(seed))
    components = min(config.components, rows.shape[1])
    if len(rows) <= max(components, config.min_samples):
        raise UserError(f"dbscan: {len(rows)} rows are too few for min_samples {config.min_samples}")
    pca = PCA(components, svd_solver="covariance_eigh").fit(rows)
    points = np.ascontiguousarray(pca.transform(rows), dtype=np.float32)
    neighbours = min(len(points), max(LINKS, config.min_samples))
    squares, which = _index(points).search(points, neighbours)
    distances = np.sqrt(np.maximum(squares, 0))
    reach = distances[:, config.min_samples - 1]  # to the row that makes each a core point
    eps = config.eps or max(LEAST_EPS, float(np.quantile(reach, config.core_share)))
    is_core = reach <= eps
    if not is_core.any():
        raise UserError(f"dbscan.eps: {eps:g} is too near: no row has {config.min_samples} rows within it")
    linked = (distances <= eps) & is_core[:, None] & is_core[which]
    first, second = np.nonzero(linked)[0], which[linked]
    graph = csr_array((np.ones(len(first), np.int8), (first, second)), shape=(len(points), len(points)))
    _, labels = connected_components(graph, directed=False)
    _, labels_S = np.unique(labels[is_core], return_inverse=True)
    return Density(pca, eps, points[is_core], labels_S.astype(np.int64))


def assign(questions_ND: Vectors, density: Density) -> NDArray[np.int64]:
    """Of each row the cluster of the nearest core point, NOISE where none is within eps."""
    index = _index(density.cores_SP)
    labels = np.empty(len(questions_ND), np.int64)
    for start, block in blocks(questions_ND):
        points = np.ascontiguousarray(density.pca.transform(block), dtype=np.float32)
        squares, which = index.search(points, 1)
        near = np.sqrt(np.maximum(squares[:, 0], 0)) <= density.eps
        labels[start : start + len(block)] = np.where(near, density.labels_S[which[:, 0]], NOISE)
    return labels


def weights(questions_ND: Vectors, answers_ND: Vectors | None, labels_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """w_N of equation 6; noise has 0. Without answers their factor is left out."""
    centres_KD = _centres(questions_ND, labels_N)
    mass_K = np.zeros(len(centres_KD))
    for _, block in blocks(questions_ND, FUZZY_ROWS):
        mass_K += _memberships(block, centres_KD).sum(0)
    weights_N = np.empty(len(labels_N))
    for start, questions, answers in _side_by_side(questions_ND, answers_ND):
        labels = labels_N[start : start + len(questions)]
        redundancy = np.maximum(0, (questions * centres_KD[labels]).sum(1))
        weight = (_memberships(questions, centres_KD) / mass_K).sum(1) / (SMOOTH + redundancy)
        if answers is not None:
            weight /= SMOOTH + np.maximum(0, (questions * answers).sum(1))
        weights_N[start : start + len(questions)] = np.where(labels == NOISE, 0, weight)
    return weights_N


def _index(points_SP: NDArray[np.float32]) -> faiss.IndexFlatL2:
    index = faiss.IndexFlatL2(points_SP.shape[1])
    index.add(points_SP)
    return index


def _centres(vectors_ND: Vectors, labels_N: NDArray[np.int64]) -> NDArray[np.float32]:
    clusters = int(labels_N.max()) + 1
    sums_KD = np.zeros((clusters, vectors_ND.shape[1]))
    for start, block in blocks(vectors_ND):
        inside = np.flatnonzero(labels_N[start : start + len(block)] != NOISE)
        ones, shape = np.ones(len(inside), np.float32), (clusters, len(block))
        sums_KD += csr_array((ones, (labels_N[start + inside], inside)), shape=shape) @ block
    return (sums_KD / np.maximum(np.linalg.norm(sums_KD, axis=1), 1e-12)[:, None]).astype(np.float32)


def _memberships(block_BD: NDArray[np.float32], centres_KD: NDArray[np.float32]) -> NDArray[np.float64]:
    """u_BK of equation 5: of unit vectors, d^2 = 2 - 2 cos."""
    squares = np.maximum(2 - 2 * (block_BD @ centres_KD.T).astype(np.float64), LEAST_DISTANCE**2)
    inverse = 1 / squares
    return inverse / inverse.sum(1, keepdims=True)


def _side_by_side(
    questions_ND: Vectors, answers_ND: Vectors | None
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32] | None]]:
    if answers_ND is None:
        yield from ((start, block, None) for start, block in blocks(questions_ND, FUZZY_ROWS))
        return
    pairs = zip(blocks(questions_ND, FUZZY_ROWS), blocks(answers_ND, FUZZY_ROWS), strict=True)
    for (start, questions), (_, answers) in pairs:
        yield start, questions, answers
