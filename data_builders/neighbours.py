"""Which of other texts is nearest to a text by the cosine of their embeddings, by faiss.

Vectors come memory-mapped, of unit length, and are read in blocks.

Suffixes: N texts, E texts of an evaluation set, B texts of a block, D dimensions.
"""

from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from data_builders.minhash import Similar

BLOCK = 1024  # texts
EXACT = 100_000  # texts up to which each is compared with all that were kept
PROBES = 16  # cells of the inverted file that a text is looked up in
SAMPLE = 40  # texts for each cell, from which the cells are found

Vectors = NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True)
class Nearest:
    """Of each text the nearest one of the others, and their cosine."""

    row_N: NDArray[np.int64]
    similarity_N: NDArray[np.float32]


def nearest(vectors_ND: Vectors, others_ED: Vectors) -> Nearest:
    """Exact. The others are held in memory."""
    others_ED = np.ascontiguousarray(others_ED, dtype=np.float32)
    row_N = np.empty(len(vectors_ND), dtype=np.int64)
    similarity_N = np.empty(len(vectors_ND), dtype=np.float32)
    for first in range(0, len(vectors_ND), BLOCK):
        block_BD = np.ascontiguousarray(vectors_ND[first : first + BLOCK], dtype=np.float32)
        similarity, row = faiss.knn(block_BD, others_ED, 1, metric=faiss.METRIC_INNER_PRODUCT)
        row_N[first : first + BLOCK], similarity_N[first : first + BLOCK] = row[:, 0], similarity[:, 0]
    return Nearest(row_N, similarity_N.clip(max=1))  # in half precision the length of a vector is nearly 1


class KeptVectors:
    """The texts that were kept so far, of those that come one after another.

    Up to EXACT texts each is compared with all that were kept. Beyond, those are found by an inverted file (Sivic and
    Zisserman 2003; faiss), in half precision: 2 kB for each kept text of 1,024 dimensions. It may miss one.
    """

    def __init__(self, vectors_ND: Vectors, similarity: float) -> None:
        self._vectors_ND, self._least = vectors_ND, similarity
        self._index = _index(vectors_ND)
        self._first = self._after = 0  # texts of the block
        self._block_BD = np.zeros((0, vectors_ND.shape[1]), dtype=np.float32)
        self._kept: list[int] = []  # of the block

    def similar(self, text: int) -> Similar | None:
        """The kept text, numbered in the order of `keep`, that is most similar, at least as much as asked for.

        Of several the first. `text` may only grow from call to call.
        """
        if text >= self._after:
            self._begin(text)
        place = text - self._first
        found = [Similar(int(self._before_B[place]), float(self._similarity_B[place]))]
        if self._kept:
            with_kept = self._within_BB[place, self._kept]
            most = int(with_kept.argmax())
            found.append(Similar(self._index.ntotal + most, float(with_kept[most])))
        enough = [similar for similar in found if similar.similarity >= self._least]
        best = max(enough, key=lambda similar: similar.similarity, default=None)
        return best and replace(best, similarity=min(best.similarity, 1.0))

    def keep(self, text: int) -> None:
        """Keep the text that `similar` was last asked about."""
        self._kept.append(text - self._first)

    def _begin(self, text: int) -> None:
        """A new block; what was kept of the last one joins the index."""
        if self._kept:
            self._index.add(self._block_BD[self._kept])
        self._kept = []
        self._first, self._after = text, min(text + BLOCK, len(self._vectors_ND))
        self._block_BD = np.ascontiguousarray(self._vectors_ND[self._first : self._after], dtype=np.float32)
        self._within_BB = self._block_BD @ self._block_BD.T
        similarity, row = self._index.search(self._block_BD, 1)
        self._before_B, self._similarity_B = row[:, 0], similarity[:, 0]


def _index(vectors_ND: Vectors) -> Any:
    count, dimensions = vectors_ND.shape
    if count <= EXACT:
        return faiss.IndexFlatIP(dimensions)
    cells = int(4 * np.sqrt(count))
    drawn = np.sort(np.random.default_rng(0).choice(count, min(count, SAMPLE * cells), replace=False))
    index: Any = faiss.index_factory(dimensions, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(vectors_ND[drawn], dtype=np.float32))
    index.nprobe = PROBES
    return index
