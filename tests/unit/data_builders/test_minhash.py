"""The estimate against the Jaccard index itself, and what is kept."""

import random

import pytest

from data_builders.config import NearDuplicatesConfig
from data_builders.minhash import NearDuplicates, runs, signatures

CONFIG = NearDuplicatesConfig(similarity=0.7, permutations=256)
WORDS = [f"w{i}" for i in range(500)]


def changed(words: list[str], count: int, draw: random.Random) -> list[str]:
    """`count` of the words are others."""
    out = list(words)
    for place in draw.sample(range(len(out)), count):
        out[place] = f"x{draw.random()}"
    return out


def jaccard(one: str, other: str) -> float:
    a, b = set(runs(one, CONFIG.run)), set(runs(other, CONFIG.run))
    return len(a & b) / len(a | b)


def test_runs_by_hand() -> None:
    assert runs("A b, c d.", 3) == [b"a b c", b"b c d"]
    assert runs("a b a b a", 2) == [b"a b", b"b a"]
    assert runs("only two", 3) == [b"only two"] and runs("", 3) == [b""]
    assert runs("5-3", 2) == [b"5 -", b"- 3"]
    assert runs("苹果多", 2) == ["苹 果".encode(), "果 多".encode()]


def test_the_estimate_is_near_the_jaccard_index() -> None:
    """Its standard error at 256 hashes is at most .5 / 16 = .031; the mean error of 40 pairs is far smaller."""
    draw = random.Random(0)
    errors = []
    for _ in range(40):
        text = draw.choices(WORDS, k=120)
        one, other = " ".join(text), " ".join(changed(text, draw.randint(0, 10), draw))
        found = NearDuplicates(CONFIG.model_copy(update={"similarity": 0.01}))
        first, second = signatures(CONFIG, [one, other])
        found.keep(7, first)
        similar = found.similar(second)
        assert similar is not None and similar.number == 7
        errors.append(similar.similarity - jaccard(one, other))
    assert max(map(abs, errors)) < 0.12 and abs(sum(errors) / len(errors)) < 0.015


def test_near_duplicates_are_found_and_others_are_not() -> None:
    draw = random.Random(1)
    texts = [draw.choices(WORDS, k=150) for _ in range(60)]
    kept = NearDuplicates(CONFIG)
    for number, signature in enumerate(signatures(CONFIG, [" ".join(text) for text in texts])):
        assert kept.similar(signature) is None
        kept.keep(number, signature)
    close = [" ".join(changed(text, 4, draw)) for text in texts]  # Jaccard of about 136 / 160
    far = [" ".join(changed(text, 30, draw)) for text in texts]
    found = [kept.similar(signature) for signature in signatures(CONFIG, close)]
    assert [similar and similar.number for similar in found] == list(range(60))
    assert [kept.similar(signature) for signature in signatures(CONFIG, far)] == [None] * 60


def test_the_most_similar_is_named_and_of_equal_ones_the_first() -> None:
    draw = random.Random(2)
    text = draw.choices(WORDS, k=100)
    near, nearer = " ".join(changed(text, 4, draw)), " ".join(changed(text, 1, draw))
    kept = NearDuplicates(CONFIG)
    for number, signature in enumerate(signatures(CONFIG, [near, nearer, nearer])):
        kept.keep(number, signature)
    similar = kept.similar(signatures(CONFIG, [" ".join(text)])[0])
    assert similar is not None and similar.number == 1
    assert similar.similarity == pytest.approx(jaccard(" ".join(text), nearer), abs=0.08)
