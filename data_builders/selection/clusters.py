"""Clusters of the target's rows by meaning, and the cluster of any other row.

Spherical k-means (Dhillon and Modha 2001, Concept decompositions for large sparse text data) with faiss on at most
ROWS_PER_CLUSTER rows a cluster; the number of clusters is given or the candidate of the highest silhouette (Rousseeuw
1987). A row that is less similar to every centre than the target's own rows are is outside all clusters.

Shapes: N rows, K clusters, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.metrics import silhouette_score

from alignment import atomic
from alignment.errors import UserError
from data_builders.vectors import Vectors, blocks, sample

ROWS_PER_CLUSTER = 256  # more move a centre by little: its error falls as the root of their number
ITERATIONS, STARTS = 20, 3
SILHOUETTE_ROWS = 4_000
OUTSIDE = -1


@dataclass(frozen=True)
class Clusters:
    """Centres of unit length; a row belongs to the nearest if its cosine similarity is at least `similarity`."""

    centres_KD: NDArray[np.float32]
    similarity: float
    silhouettes: dict[int, float]  # of each candidate number of clusters, where there were several


def find(target_ND: Vectors, candidates: Sequence[int], quantile: float, seed: int) -> Clusters:
    """Clusters of the target; `quantile` of its rows are to count as inside.

    Raises:
        UserError: fewer rows than clusters.
    """
    if len(target_ND) <= max(candidates):
        raise UserError(f"clusters: {max(candidates)} clusters need more rows of the target than its {len(target_ND)}")
    rng = np.random.default_rng(seed)
    rows = sample(target_ND, ROWS_PER_CLUSTER * max(candidates), rng)
    centres = {number: _centres(rows, number, seed) for number in candidates}
    judged = rows[np.sort(rng.permutation(len(rows))[:SILHOUETTE_ROWS])]
    silhouettes = {k: _silhouette(judged, found) for k, found in centres.items()} if len(centres) > 1 else {}
    best = centres[max(silhouettes, key=lambda k: silhouettes[k], default=candidates[0])]
    return Clusters(best, _least_similarity(rows, best, quantile), silhouettes)


def save(path: Path, clusters: Clusters) -> None:
    """`centres` [K, D] and `similarity`, for who wants to put other rows into these clusters."""
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, centres=clusters.centres_KD, similarity=clusters.similarity)


def _centres(rows_ND: NDArray[np.float32], number: int, seed: int) -> NDArray[np.float32]:
    kmeans = faiss.Kmeans(
        rows_ND.shape[1],
        number,
        niter=ITERATIONS,
        nredo=STARTS,
        spherical=True,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows_ND),
    )
    kmeans.train(rows_ND)
    assert kmeans.centroids is not None
    centres = kmeans.centroids
    used = np.unique(nearest(rows_ND, centres)[0])
    return centres[used]


def _silhouette(rows_ND: NDArray[np.float32], centres_KD: NDArray[np.float32]) -> float:
    labels = nearest(rows_ND, centres_KD)[0]
    if not 1 < len(np.unique(labels)) < len(rows_ND):
        return -1.0
    return float(silhouette_score(rows_ND, labels, metric="cosine"))


def _least_similarity(rows_ND: NDArray[np.float32], centres_KD: NDArray[np.float32], quantile: float) -> float:
    """The similarity that `quantile` of unseen rows of the target reach.

    A row pulls its centre towards itself, the more so the smaller its cluster: it is compared with its cluster's mean
    without it, which is what a row that was not there sees. Rows alone in their cluster say nothing.
    """
    labels, _ = nearest(rows_ND, centres_KD)
    ones, shape = np.ones(len(labels), np.float32), (len(centres_KD), len(labels))
    sums_KD: NDArray[np.float32] = csr_array((ones, (labels, np.arange(len(labels)))), shape=shape) @ rows_ND
    others_ND = sums_KD[labels] - rows_ND
    norms = np.linalg.norm(others_ND, axis=1)
    accompanied = np.bincount(labels, minlength=len(centres_KD))[labels] > 1
    if not accompanied.any():
        return -1.0
    similarities = (rows_ND * others_ND).sum(1)[accompanied] / np.maximum(norms[accompanied], 1e-12)
    return float(np.quantile(similarities, 1 - quantile))


def nearest(vectors_ND: Vectors, centres_KD: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each row the most similar centre [N] and its cosine similarity [N]; bounded memory."""
    index = faiss.IndexFlatIP(centres_KD.shape[1])
    index.add(np.ascontiguousarray(centres_KD))
    labels, similarities = np.empty(len(vectors_ND), np.int64), np.empty(len(vectors_ND), np.float32)
    for start, block in blocks(vectors_ND):
        found, which = index.search(block, 1)
        labels[start : start + len(block)] = which[:, 0]
        similarities[start : start + len(block)] = found[:, 0]
    return labels, similarities


def assign(vectors_ND: Vectors, clusters: Clusters) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each row its cluster [N], OUTSIDE where none is similar enough, and the similarity to the nearest centre."""
    labels, similarities = nearest(vectors_ND, clusters.centres_KD)
    return np.where(similarities >= clusters.similarity, labels, OUTSIDE), similarities
