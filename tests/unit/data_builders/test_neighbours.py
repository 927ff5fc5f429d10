"""The nearest of others, and what each text duplicates of those kept before it: against plain loops."""

from collections.abc import Iterator

import numpy as np
import pytest

from data_builders import neighbours
from data_builders.minhash import Similar
from data_builders.neighbours import KeptVectors, nearest

LEAST = 0.9


def unit(count: int, dimensions: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, dimensions))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def clustered(texts: int, centres: int, noise: float, seed: int = 0) -> np.ndarray:
    """Texts around `centres`, with cosines on both sides of LEAST."""
    draw = np.random.default_rng(seed)
    vectors = unit(centres, 24, seed)[draw.integers(centres, size=texts)]
    vectors = vectors + draw.normal(size=vectors.shape) * noise * draw.random((texts, 1))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def run(vectors: np.ndarray, skipped: frozenset[int] = frozenset()) -> Iterator[Similar | None]:
    kept = KeptVectors(vectors, LEAST)
    for text in range(len(vectors)):
        if text in skipped:  # as rows that are exact duplicates
            continue
        similar = kept.similar(text)
        if similar is None:
            kept.keep(text)
        yield similar


def plain(vectors: np.ndarray, skipped: frozenset[int] = frozenset()) -> Iterator[Similar | None]:
    kept: list[int] = []
    for text in range(len(vectors)):
        if text in skipped:
            continue
        cosines = [float(vectors[text] @ vectors[other]) for other in kept]
        best = int(np.argmax(cosines)) if kept else -1
        if kept and cosines[best] >= LEAST:
            yield Similar(best, cosines[best])
        else:
            kept.append(text)
            yield None


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_of_those_alike_the_first_stays_as_in_a_plain_loop(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    vectors = clustered(400, 30, 0.13)
    skipped = frozenset(np.random.default_rng(1).choice(400, 80, replace=False).tolist())
    ours, theirs = list(run(vectors, skipped)), list(plain(vectors, skipped))
    assert [s and s.number for s in ours] == [s and s.number for s in theirs]
    assert [s.similarity for s in ours if s] == pytest.approx([s.similarity for s in theirs if s], abs=1e-5)
    assert 100 < sum(s is not None for s in ours) < 300


def test_a_chain_of_likeness_does_not_carry() -> None:
    """b is like a and c like b, but c is not like a: c stays."""
    angles = np.arccos(LEAST) * np.array([0.0, 0.9, 1.8])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert [similar and similar.number for similar in run(vectors)] == [None, 0, None]


def test_beyond_what_is_compared_exactly_few_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "EXACT", 500)
    monkeypatch.setattr(neighbours, "BLOCK", 128)
    vectors = np.concatenate([clustered(1000, 500, 0.05), unit(400, 24, 5)])
    ours, theirs = list(run(vectors)), list(plain(vectors))
    expected = sum(s is not None for s in theirs)
    found = sum(s is not None for s in ours)
    assert expected > 300
    assert 0.98 * expected <= found <= expected * 1.02
    assert all(similar.similarity >= LEAST for similar in ours if similar)


def test_the_nearest_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 16)
    texts, others = unit(50, 8, 0).astype(np.float16), unit(30, 8, 1).astype(np.float16)
    found = nearest(texts, others)
    cosines = texts.astype(np.float64) @ others.astype(np.float64).T
    assert found.row_N.tolist() == cosines.argmax(axis=1).tolist()
    assert found.similarity_N == pytest.approx(cosines.max(axis=1), abs=1e-5)


def test_no_cosine_exceeds_one() -> None:
    """Half precision leaves vectors that are longer than 1."""
    twice = np.repeat(unit(200, 8, 0).astype(np.float16), 2, axis=0)
    assert nearest(twice, twice).similarity_N.max() == 1
    assert max(similar.similarity for similar in run(twice.astype(np.float32)) if similar) == 1
