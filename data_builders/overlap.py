"""Which evaluation row a text repeats, reworded or renumbered: the runs of three words that both hold.

The share of an evaluation row that a text holds is the weight of its words that lie in such runs over the weight of all
its words. A word's weight is log((rows + 1) / rows that hold it), over the rows of its file, so that what all questions
of a benchmark say weighs little; a number weighs nothing. It decides whether two runs are the same, though; to find
the same question with other numbers, all numbers are one word. A question of few words shares runs with anything: it
counts only where a text repeats it as a whole, or is the same but for its numbers.

The search is exact. An evaluation row is looked up by its rarest runs, and what it leaves out covers less than the
share that counts, so a text that reaches it holds one of them (prefix filtering: Chaudhuri, Ganti and Kaushik 2006, A
primitive operator for similarity joins in data cleaning).

Suffixes: E evaluation rows that are looked up, W their words one after another, G different runs, P places of runs, Q
pairs of a text and an evaluation row.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_builders.words import is_number, normalised, renumbered, words

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

RUN = 3  # words
SHORT = 8  # a question of fewer words, numbers aside, has to be repeated as a whole
FEW = 2  # and of fewer than these it says nothing without its numbers
NUMBER = "0"  # stands for every number
PAIRS = 100_000  # compared at once
BITS = 21  # of a word's id in the key of a run


@dataclass(frozen=True)
class EvaluationRow:
    """One question that must not be trained on."""

    source: str
    id: str
    text: str


@dataclass(frozen=True)
class Shares:
    """How much of an evaluation row a text must hold."""

    words: float
    renumbered: float


@dataclass(frozen=True)
class Overlap:
    """A text repeats an evaluation row."""

    row: EvaluationRow
    method: str  # exact, words or renumbered; or embedding, by data_builders.decontaminate
    share: float  # or the cosine
    evidence: str  # the longest run of words that both hold, or the evaluation row's text


class OverlapIndex:
    """Evaluation rows to search for. Can be pickled."""

    def __init__(self, rows: Sequence[EvaluationRow], shares: Shares) -> None:
        """
        Raises:
            ValueError: more different words than fit a key, two million.
        """
        self._rows, self._shares = rows, shares
        self._words = [words(row.text) for row in rows]
        self._weights = _weights([row.source for row in rows], self._words)
        spoken = [sum(not is_number(word) for word in found) for found in self._words]
        self._long = [count >= SHORT for count in spoken]
        self._normalised = [normalised(row.text) for row in rows]
        self._whole = _first(enumerate(self._normalised))
        self._whole_renumbered = _first(
            (row, renumbered(self._normalised[row])) for row, count in enumerate(spoken) if count >= FEW
        )
        self._index()

    def search(self, texts: Sequence[str]) -> list[Overlap | None]:
        """For each text the evaluation row that it repeats most of, or None."""
        found = [words(text) for text in texts]
        candidates: defaultdict[int, list[int]] = defaultdict(list)
        for text, row in self._candidates(found):
            candidates[text].append(row)
        return [self._best(text, found[i], candidates[i]) for i, text in enumerate(texts)]

    def _best(self, text: str, found: Sequence[str], candidates: Sequence[int]) -> Overlap | None:
        whole = normalised(text)
        if whole in self._whole:
            return Overlap(self._rows[self._whole[whole]], "exact", 1.0, whole)
        overlaps = (self._overlap(whole, found, row) for row in candidates)
        best = max((o for o in overlaps if o is not None), key=lambda o: o.share, default=None)
        other = renumbered(whole)
        if best is None and other in self._whole_renumbered:
            return Overlap(self._rows[self._whole_renumbered[other]], "renumbered", 1.0, other)
        return best

    def _overlap(self, whole: str, found: Sequence[str], number: int) -> Overlap | None:
        row, own, weights = self._rows[number], self._words[number], self._weights[number]
        if f" {self._normalised[number]} " in f" {whole} ":
            return Overlap(row, "exact", 1.0, self._normalised[number])
        if not self._long[number]:
            return None
        shared = _shared(own, found)
        share = float(weights[shared].sum() / weights.sum())
        if share >= self._shares.words:
            return Overlap(row, "words", share, _longest(own, shared))
        shared = _shared(_masked(own), _masked(found))
        share = float(weights[shared].sum() / weights.sum())
        if share >= self._shares.renumbered:
            return Overlap(row, "renumbered", share, _longest(own, shared))
        return None

    # Candidates: the rows of which all texts of a call may hold enough, numbers masked

    def _index(self) -> None:
        rows = [row for row, found in enumerate(self._words) if len(found) >= RUN]
        masked = [_masked(self._words[row]) for row in rows]
        weights = [
            self._weights[row] if self._long[row] else np.ones(len(own)) for row, own in zip(rows, masked, strict=True)
        ]
        least = min(self._shares.words, self._shares.renumbered)
        self._id_of = {word: i for i, word in enumerate(dict.fromkeys(w for own in masked for w in own), start=1)}
        if len(self._id_of) >> BITS:
            raise ValueError(f"{len(self._id_of):,} different words in the evaluation rows")
        self._row_E = np.array(rows, dtype=np.int64)
        self._least_E = np.array([least if self._long[row] else 1.0 for row in rows])
        self._total_E = np.array([own.sum() for own in weights])
        self._words_E = _starts([len(own) for own in masked])
        self._weight_W = np.concatenate([*weights, np.zeros(0)])
        self._runs_E = _starts([len(own) - RUN + 1 for own in masked])
        keys = [_keys(self._ids(own)) for own in masked]
        self._key_G, self._run_P = np.unique(np.concatenate([*keys, np.zeros(0, np.int64)]), return_inverse=True)
        rows_with_G = np.bincount(
            np.concatenate([*(np.unique(self._runs(e)) for e in range(len(rows))), np.zeros(0, np.int64)]),
            minlength=len(self._key_G),
        )
        looked_up = [(run, e) for e in range(len(rows)) for run in self._rarest(e, rows_with_G)]
        run, self._posting = np.array(sorted(looked_up), dtype=np.int64).reshape(-1, 2).T
        self._postings_G = np.searchsorted(run, np.arange(len(self._key_G) + 1))

    def _runs(self, e: int) -> IntArray:
        return self._run_P[self._runs_E[e] : self._runs_E[e + 1]]

    def _rarest(self, e: int, rows_with_G: IntArray) -> list[int]:
        """The runs of row `e` but the most common ones, as many as cover together less than what counts."""
        runs = self._runs(e)
        weights = self._weight_W[self._words_E[e] : self._words_E[e + 1]]
        common_first = list(dict.fromkeys(runs[np.argsort(-rows_with_G[runs], kind="stable")].tolist()))
        covered = np.zeros(len(weights), dtype=bool)
        for left_out, run in enumerate(common_first):
            for place in np.flatnonzero(runs == run):
                covered[place : place + RUN] = True
            if weights[covered].sum() >= self._least_E[e] * self._total_E[e]:
                return common_first[left_out:]
        return []

    def _ids(self, masked: Sequence[str]) -> IntArray:
        """0 where no evaluation row has the word."""
        ids = self._id_of
        return np.array([ids.get(word, 0) for word in masked], dtype=np.int64)

    def _candidates(self, found: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
        if not len(self._key_G):
            return
        text_of = np.repeat(np.arange(len(found)), [len(own) for own in found])
        ids = self._ids(_masked([word for own in found for word in own]))
        keys = _keys(ids)
        whole = (text_of[: len(keys)] == text_of[RUN - 1 :]) & (keys > 0)
        runs = np.searchsorted(self._key_G, keys).clip(max=len(self._key_G) - 1)
        whole &= self._key_G[runs] == keys
        held = np.unique(text_of[: len(keys)][whole] * len(self._key_G) + runs[whole])  # text and run, once
        text, run = np.divmod(held, len(self._key_G))
        first, after = self._postings_G[run], self._postings_G[run + 1]
        rows = self._posting[_ranges(first, after)]
        pairs = np.unique(np.repeat(text, after - first) * len(self._row_E) + rows)
        for start in range(0, len(pairs), PAIRS):
            text_Q, e_Q = np.divmod(pairs[start : start + PAIRS], len(self._row_E))
            enough = self._share(text_Q, e_Q, held) >= self._least_E[e_Q] - 1e-9
            yield from zip(text_Q[enough].tolist(), self._row_E[e_Q[enough]].tolist(), strict=True)

    def _share(self, text_Q: IntArray, e_Q: IntArray, held: IntArray) -> FloatArray:
        """[Q] the share of each pair; `held` are the sorted text x run that occur."""
        first, after = self._runs_E[e_Q], self._runs_E[e_Q + 1]
        place, pair = _ranges(first, after), np.repeat(np.arange(len(e_Q)), after - first)
        wanted = text_Q[pair] * len(self._key_G) + self._run_P[place]
        hit = held[np.searchsorted(held, wanted).clip(max=len(held) - 1)] == wanted
        start_Q = _starts(self._words_E[e_Q + 1] - self._words_E[e_Q])
        begin = start_Q[pair[hit]] + place[hit] - first[pair[hit]]
        covered = np.zeros(start_Q[-1], dtype=bool)
        for offset in range(RUN):
            covered[begin + offset] = True
        weights = self._weight_W[_ranges(self._words_E[e_Q], self._words_E[e_Q + 1])]
        return np.add.reduceat(weights * covered, start_Q[:-1]) / self._total_E[e_Q]


def _first(rows: Iterable[tuple[int, str]]) -> dict[str, int]:
    """Text -> the first row that has it."""
    found: dict[str, int] = {}
    for row, text in rows:
        found.setdefault(text, row)
    return found


def _weights(sources: Sequence[str], found: Sequence[Sequence[str]]) -> list[FloatArray]:
    """For each row the weight of each word, by the rows of its source."""
    rows = Counter(sources)
    holding = Counter((source, word) for source, own in zip(sources, found, strict=True) for word in set(own))
    return [
        np.array([0.0 if is_number(word) else math.log((rows[source] + 1) / holding[source, word]) for word in own])
        for source, own in zip(sources, found, strict=True)
    ]


def _masked(found: Sequence[str]) -> list[str]:
    return [NUMBER if word[0].isnumeric() else word for word in found]


def _shared(own: Sequence[str], others: Sequence[str]) -> IntArray:
    """The places of `own` that lie in a run of three words of `others`."""
    runs = set(zip(others, others[1:], others[2:], strict=False))
    starts = [i for i, run in enumerate(zip(own, own[1:], own[2:], strict=False)) if run in runs]
    return np.array(sorted({i + offset for i in starts for offset in range(RUN)}), dtype=np.int64)


def _longest(own: Sequence[str], shared: IntArray) -> str:
    """The longest unbroken stretch of shared words."""
    stretches = np.split(shared, np.flatnonzero(np.diff(shared) > 1) + 1)
    return " ".join(own[place] for place in max(stretches, key=len))


def _keys(ids: IntArray) -> IntArray:
    """The key of each run; negative where it holds a word of id 0."""
    known = (ids[:-2] > 0) & (ids[1:-1] > 0) & (ids[2:] > 0)
    return np.where(known, ids[:-2] << 2 * BITS | ids[1:-1] << BITS | ids[2:], -1)


def _starts(lengths: Sequence[int] | IntArray) -> IntArray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _ranges(first: IntArray, after: IntArray) -> IntArray:
    """first[0] .. after[0] - 1, first[1] .. after[1] - 1, and so on, one after another."""
    lengths = after - first
    begin = _starts(lengths)[:-1]
    return np.repeat(first - begin, lengths) + np.arange(lengths.sum())
