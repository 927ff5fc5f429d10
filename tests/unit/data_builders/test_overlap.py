"""The search against a plain comparison of every text with every evaluation row."""

import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders import overlap
from data_builders.overlap import EvaluationRow, Overlap, OverlapIndex, Shares
from data_builders.words import is_number

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHARES = Shares(0.6, 0.75)


def row(text: str, name: str = "0", source: str = "gsm8k") -> EvaluationRow:
    return EvaluationRow(source, name, text)


def found(text: str, *rows: EvaluationRow, shares: Shares = SHARES) -> Overlap | None:
    return OverlapIndex(rows, shares).search([text])[0]


def method(text: str, *rows: EvaluationRow) -> str | None:
    overlap = found(text, *rows)
    return overlap and overlap.method


OTHERS = [row(f"A quite different question about thing {c} with its own words and ends", c) for c in "abcdefgh"]


def test_a_copy_is_exact_whatever_stands_around_it() -> None:
    assert method(QUESTION.upper().replace(" ", "  "), row(QUESTION)) == "exact"
    assert method(f"Solve this. {QUESTION} Think first.", row(QUESTION), *OTHERS) == "exact"
    assert method("A question about something else altogether, with words of its own", row(QUESTION)) is None


def test_a_rewording_is_found_by_its_words_and_the_evidence_is_shown() -> None:
    text = QUESTION.replace("Natalia", "Minh").replace("and then she", "and later she")
    overlap = found(text, row(QUESTION, "7"), *OTHERS)
    assert overlap is not None and (overlap.method, overlap.row.id) == ("words", "7")
    assert overlap.evidence == "sold clips to 48 of her friends in april and"
    assert 0.6 <= overlap.share < 1


def test_the_share_by_hand() -> None:
    """Nine words of one row: each weighs log 2. The text holds the first five of them in a row: 5/9, and 7/9."""
    own = row("one two three four five six seven eight nine")
    assert found("one two three four five", own, shares=Shares(5 / 9, 1)) is not None
    assert found("one two three four five", own, shares=Shares(5.01 / 9, 1)) is None
    overlap = found("one two three four and five six seven", own, shares=Shares(0.1, 1))
    assert overlap is not None and overlap.share == pytest.approx(7 / 9)


def test_words_that_every_question_of_a_file_holds_weigh_little() -> None:
    """log(5/4) against log(5): the frame of ten words weighs 2.2, the two words of its own 3.2."""
    frame = "find the sum of all the positive integers such that it is {} {}"
    rows = [row(frame.format(f"x{c}", f"y{c}"), c) for c in "abcd"]
    assert method(frame.format("quite", "odd"), *rows) is None
    assert method(frame.format("quite", "odd"), rows[0]) == "words", "alone in its file nothing is common"


def test_other_numbers_are_found_and_told_apart() -> None:
    text = "In 3 days 17 birds ate 40 seeds of 12 kinds: how many of 9 such birds would eat 88 of them?"
    other = "In 5 days 21 birds ate 66 seeds of 31 kinds: how many of 4 such birds would eat 70 of them?"
    overlap = found(other, row(text), *OTHERS)
    assert overlap is not None and overlap.method == "renumbered" and overlap.share == 1
    assert found(text, row(text)).method == "exact"  # type: ignore[union-attr]


def test_short_questions_count_as_a_whole_only() -> None:
    short = row(r"Compute $\sin 60^\circ$.")
    assert method(r"Please: compute $\sin 60^\circ$. Thanks!", short) == "exact"
    assert method(r"Compute $\sin 45^\circ$.", short) == "renumbered"
    assert method(r"Please: compute $\sin 45^\circ$.", short) is None
    assert method("1 + 2 = ?", row("3 + 4 = ?")) is None, "without its numbers it says nothing"
    assert method("2 + 2", row("2 + 2")) == "exact"


def test_operators_are_no_words_but_tell_copies_apart() -> None:
    assert method("What is 5 - 3", row("What is 5 + 3")) is None


def test_the_row_that_is_repeated_most_is_named() -> None:
    one, two = row(QUESTION, "one"), row(QUESTION.replace("half as many clips in May", "three boxes of them"), "two")
    text = QUESTION.replace("Natalia", "Minh")
    assert found(text, two, one).row.id == "one"  # type: ignore[union-attr]


def test_languages_without_spaces() -> None:
    text = "小明有五个苹果，他的妈妈又给了他三个苹果，现在他一共有几个苹果？"
    assert method(text.replace("小明", "小红"), row(text)) == "words"
    assert method("今天的天气很好，我们一起去公园里散步，然后回家吃饭。", row(text)) is None


def test_an_index_can_be_pickled_and_empty_texts_searched() -> None:
    index = pickle.loads(pickle.dumps(OverlapIndex([row(QUESTION), row("a")], SHARES)))
    assert [o and o.method for o in index.search(["", "a", QUESTION, "b c"])] == [None, "exact", "exact", None]
    assert OverlapIndex([row("a b")], SHARES).search([]) == []
    assert [o and o.method for o in OverlapIndex([row("a b")], SHARES).search(["", "a b"])] == [None, "exact"]


WORDS = ["the", "of", "sum", "red", "box", "3", "7", "cat", "dog", "sky", "runs"]


@given(
    rows=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=14), min_size=1, max_size=6),
    texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=30), min_size=1, max_size=5),
    shares=st.tuples(st.sampled_from([0.2, 0.5, 0.9]), st.sampled_from([0.3, 0.75])),
)
@settings(max_examples=300, deadline=None)
def test_the_search_misses_nothing(rows: list[list[str]], texts: list[list[str]], shares: tuple[float, float]) -> None:
    """What filters come before it, every pair that a plain comparison finds is found."""
    own = [row(" ".join(words), str(i), source=f"file{i % 2}") for i, words in enumerate(rows)]
    index = OverlapIndex(own, Shares(*shares))
    for text, repeated in zip(texts, index.search([" ".join(text) for text in texts]), strict=True):
        expected = plain(" ".join(text), own, index, Shares(*shares))
        assert (repeated and repeated.share) == pytest.approx(expected)


def plain(text: str, rows: list[EvaluationRow], index: OverlapIndex, shares: Shares) -> float | None:
    """The best share of any row, by sets of word triples and no index."""
    best = [share for i, row in enumerate(rows) if (share := plain_share(text, row.text, index._weights[i], shares))]
    return max(best, default=None)


def plain_share(text: str, own: str, weights: np.ndarray, shares: Shares) -> float | None:
    if text == own or (f" {own} " in f" {text} " and len(own.split()) >= overlap.RUN):
        return 1.0
    mask = [word.replace("7", "3") for word in text.split()]
    names = [word for word in own.split() if not is_number(word)]
    if len(names) >= overlap.SHORT:
        direct = plain_cover(text.split(), own.split(), weights)
        if direct >= shares.words:
            return direct
        masked = plain_cover(mask, [word.replace("7", "3") for word in own.split()], weights)
        if masked >= shares.renumbered:
            return masked
    if len(names) >= overlap.FEW and mask == [word.replace("7", "3") for word in own.split()]:
        return 1.0
    return None


def plain_cover(text: list[str], own: list[str], weights: np.ndarray) -> float:
    held = {tuple(text[i : i + 3]) for i in range(len(text) - 2)}
    covered = [
        any(tuple(own[j : j + 3]) in held for j in range(max(0, i - 2), min(i + 1, len(own) - 2)))
        for i in range(len(own))
    ]
    return float(weights[np.array(covered)].sum() / weights.sum())


def test_pairs_are_compared_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    rows = [row(" ".join(draw.choices(WORDS, k=12)), str(i)) for i in range(30)]
    texts = [" ".join(draw.choices(WORDS, k=20)) for _ in range(30)]
    whole = OverlapIndex(rows, Shares(0.3, 0.3)).search(texts)
    monkeypatch.setattr(overlap, "PAIRS", 3)
    assert OverlapIndex(rows, Shares(0.3, 0.3)).search(texts) == whole
    assert any(whole)
