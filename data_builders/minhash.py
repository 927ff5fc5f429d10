"""Near-duplicates of texts that come one after another, by datasketch's MinHash and its locality-sensitive index.

Two texts are as similar as the Jaccard index of their sets of runs of words and signs. A text is looked up among those
that were kept, so what is left out is always similar to one that stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import LeanMinHash, MinHash, MinHashLSH
from numpy.typing import NDArray
from xxhash import xxh32_intdigest

from data_builders.config import NearDuplicatesConfig
from data_builders.words import tokens

SEED, SCHEME = 1, "affine32"  # hashes of 32 bits
Signature = NDArray[np.uint64]  # [permutations]


def signatures(config: NearDuplicatesConfig, texts: Sequence[str]) -> list[Signature]:
    """The signature of each text. A text shorter than a run is one run."""
    empty = MinHash(num_perm=config.permutations, seed=SEED, hashfunc=xxh32_intdigest, scheme=SCHEME)
    found = []
    for text in texts:
        own = empty.copy()
        own.update_batch(runs(text, config.run))
        found.append(own.digest())
    return found


def runs(text: str, length: int) -> list[bytes]:
    """The different runs of words and signs of a text, in order."""
    found = tokens(text)
    starts = range(max(1, len(found) - length + 1))
    return list(
        dict.fromkeys(" ".join(found[start : start + length]).encode("utf-8", "surrogatepass") for start in starts)
    )


@dataclass(frozen=True)
class Similar:
    """A text that was kept, by its number, and the estimated similarity to it."""

    number: int
    similarity: float


class NearDuplicates:
    """The texts that were kept so far. About 4 kB each."""

    def __init__(self, config: NearDuplicatesConfig) -> None:
        self._config = config
        self._index = MinHashLSH(threshold=config.similarity, num_perm=config.permutations)
        self._kept: dict[int, LeanMinHash] = {}

    def similar(self, signature: Signature) -> Similar | None:
        """The kept text that is most similar, at least as much as the config says; of several the first."""
        own = self._lean(signature)
        found = [Similar(number, own.jaccard(self._kept[number])) for number in sorted(self._index.query(own))]
        enough = [similar for similar in found if similar.similarity >= self._config.similarity]
        return max(enough, key=lambda similar: similar.similarity, default=None)

    def keep(self, number: int, signature: Signature) -> None:
        self._kept[number] = self._lean(signature)
        self._index.insert(number, self._kept[number], check_duplication=False)

    @staticmethod
    def _lean(signature: Signature) -> LeanMinHash:
        return LeanMinHash(seed=SEED, hashvalues=signature, scheme=SCHEME)
