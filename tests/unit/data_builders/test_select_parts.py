"""Clusters, DBSCAN, languages and distances: against scikit-learn, plain formulas, and by hand."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import DBSCAN

from data_builders import vectors
from data_builders.gaussian_kernel import median_distance
from data_builders.selection import clusters, density, proximity
from data_builders.selection.config import DBSCANConfig
from data_builders.selection.distances import squared_mmd, total_variation


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def blobs(sizes: list[int], spread: float, dimensions: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]
    return unit(np.repeat(centres[: len(sizes)], sizes, axis=0) + rng.normal(size=(sum(sizes), dimensions)) * spread)


@pytest.mark.parametrize("eps", [0.12, 0.2, 0.3])
def test_dbscan_is_scikit_learns(eps: float) -> None:
    """Where all rows are in the sample: the same core points, clusters of core points, and noise."""
    rows = np.concatenate([blobs([70, 50, 30], 0.06), unit(np.random.default_rng(1).normal(size=(30, 8)))])
    config = DBSCANConfig(components=8, min_samples=5, eps=eps, sample=1_000)
    found = density.fit(rows, config, seed=0)
    labels = density.assign(rows, found)
    theirs = DBSCAN(eps=eps, min_samples=5).fit(found.pca.transform(rows))
    assert len(found.cores_SP) == len(theirs.core_sample_indices_) > 20
    assert ((labels == density.NOISE) == (theirs.labels_ == -1)).all() and (labels == density.NOISE).any()
    pairs = {(labels[i], theirs.labels_[i]) for i in theirs.core_sample_indices_}
    assert len(pairs) == found.clusters == theirs.labels_.max() + 1


def test_rows_outside_the_sample_join_the_clusters() -> None:
    rows = blobs([300, 300, 300], 0.08)
    found = density.fit(rows, DBSCANConfig(components=8, min_samples=5, core_share=0.9, sample=200), seed=0)
    labels = density.assign(rows, found)
    assert found.clusters == 3 and (labels == density.NOISE).mean() < 0.1
    assert all(len(set(part[part != density.NOISE])) == 1 for part in labels.reshape(3, 300))


def test_weights_are_their_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equations 3 to 6, row by row; in blocks of four rows."""
    monkeypatch.setattr(density, "FUZZY_ROWS", 4)
    questions = blobs([6, 3], 0.1)
    answers = unit(np.random.default_rng(2).normal(size=(9, 8)))
    labels = np.array([0] * 6 + [1, 1, density.NOISE])
    centres = unit(np.stack([questions[labels == k].sum(0) for k in (0, 1)]))
    inverse = np.array([[((q - c) ** 2).sum() ** -1 for c in centres] for q in questions])
    memberships = inverse / inverse.sum(1, keepdims=True)
    expected = [
        (memberships[i] / memberships.sum(0)).sum()
        / (0.1 + max(0, questions[i] @ centres[labels[i]]))
        / (0.1 + max(0, questions[i] @ answers[i]))
        for i in range(8)
    ]
    assert density.weights(questions, answers, labels) == pytest.approx([*expected, 0], rel=1e-4)


def test_clusters_are_found_again_and_strangers_are_outside(tmp_path: Path) -> None:
    target, strangers = blobs([200] * 4, 0.1), blobs([200] * 8, 0.1, seed=0)[800:]
    np.save(tmp_path / "target.npy", target.astype(np.float16))
    read = vectors.load(tmp_path / "target.npy")
    found = clusters.find(read, [2, 4, 16], 0.98, seed=0)
    assert max(found.silhouettes, key=lambda k: found.silhouettes[k]) == len(found.centres_KD) == 4
    labels, _ = clusters.assign(read, found)
    assert all((part == np.bincount(part[part >= 0]).argmax()).mean() > 0.9 for part in labels.reshape(4, 200))
    assert (clusters.assign(strangers, found)[0] == clusters.OUTSIDE).all()
    again = clusters.find(read, [2, 4, 16], 0.98, seed=0)
    assert (again.centres_KD == found.centres_KD).all()


def test_the_limit_holds_for_rows_that_made_no_cluster() -> None:
    """40 clusters of 400 rows, ten each, in 64 dimensions: by the rows' own similarity half of others would be out."""
    rng = np.random.default_rng(0)
    seen, unseen = unit(rng.normal(size=(400, 64)) + 0.5), unit(rng.normal(size=(2_000, 64)) + 0.5)
    found = clusters.find(seen, [40], 0.9, seed=0)
    own = clusters.nearest(seen, found.centres_KD)[1]
    others = clusters.nearest(unseen, found.centres_KD)[1]
    assert (others < np.quantile(own, 0.1)).mean() > 0.5
    assert (others < found.similarity).mean() < 0.2


def test_blocks_and_samples_are_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    for given in (rows, vectors.load(tmp_path / "rows.npy")):
        read = np.concatenate([block for _, block in vectors.blocks(given, rows=4)])
        assert read == pytest.approx(unit(rows), abs=1e-6)
        assert vectors.take(given, np.array([7, 2])) == pytest.approx(unit(rows)[[7, 2]], abs=1e-6)
    sampled = vectors.sample(rows, 6, np.random.default_rng(1))
    assert len({tuple(row) for row in sampled.tolist()}) == 6


def test_proximity_by_hand() -> None:
    """Indonesian and Malay share three groups of four each, English and Portuguese one."""
    assert proximity.proximity("id", "ms") == 0.75 and proximity.proximity("en", "pt") == 0.25
    assert proximity.proximity("vi", "km") == pytest.approx(1 / 3)
    assert proximity.proximity("th", "vi") == proximity.proximity("xx", "yy") == 0
    assert proximity.proximity("xx", "xx") == 1
    for language in ("en", "zh", "id", "ms", "th", "vi", "tl", "pt"):
        assert max(proximity.PATHS, key=lambda other: proximity.proximity(language, other)) == language


def test_nearest_languages_first_by_hand() -> None:
    """Of 400 rows 300 are Thai's: 100 Lao, then all that is left; Malay's 100: its own 10, then Indonesian, 50, ..."""
    pool = {"id": 50, "lo": 100, "en": 1_000, "ms": 10, "tl": 5, "jv": 5}
    assert proximity.nearest_first({"th": 3, "ms": 1}, pool, 400) == pool | {"en": 230}
    assert proximity.nearest_first({"th": 1}, {"en": 30, "zh": 10}, 20) == {"en": 15, "zh": 5}
    assert proximity.nearest_first({"th": 1}, {"en": 3}, 20) == {"en": 3}


def test_distances_by_hand() -> None:
    """Kernel exp(-d^2 / 2): within x exp(-1/2), within y exp(-2), between 1, e^-2, exp(-1/2) twice."""
    assert total_variation(np.array([1, 3]), np.array([30, 10])) == pytest.approx(0.5)
    x, y = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])
    between = (1 + np.exp(-2) + 2 * np.exp(-0.5)) / 4
    assert squared_mmd(x, y, 1.0) == pytest.approx(np.exp(-0.5) + np.exp(-2) - 2 * between)
    assert median_distance(np.array([[0.0], [1.0], [5.0]])) == 4
