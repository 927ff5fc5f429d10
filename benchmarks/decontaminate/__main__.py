"""Decontamination: what it finds of known edits, what it flags wrongly, and its speed.

    python -m benchmarks.decontaminate [FOLDER]

Evaluation rows: math500, aime24, amc23 and the test rows of gsm8k; unrelated rows: gsm8k's training questions and
gpteacher, bare and with boilerplate of the evaluation rows. They are read from SHARED_DATA and skipped where it is
absent. The peer is what open-r1 does: one shared word 8-gram is a hit. What embeddings add is measured by meaning.py.

Speed: the job on a million rows of sentences of gsm8k's training questions against ten thousand of its test sentences,
all its processes' memory at its peak. FOLDER (default: a temporary one) takes 1 GB.
"""

import gzip
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from alignment.rows import write_rows
from benchmarks import DATA, data_at_hand, report
from benchmarks.decontaminate import edits, meaning
from data_builders import decontaminate
from data_builders.config import DecontaminateConfig
from data_builders.overlap import EvaluationRow, OverlapIndex, Shares
from data_builders.words import words

PEER = "one shared word 8-gram is a hit (open-r1)"
DEFAULTS = Shares(
    DecontaminateConfig.model_fields["words"].default, DecontaminateConfig.model_fields["renumbered"].default
)
ROWS, EVALUATION_ROWS, PEER_ROWS = 1_000_000, 10_000, 20_000


def main(folder: Path | None = None) -> None:
    if not data_at_hand():
        return
    with tempfile.TemporaryDirectory() as scratch:
        speed(folder or Path(scratch))  # before an embedding model counts as this process's memory
    accuracy()


def accuracy() -> None:
    rows = evaluation_rows()
    index, peer = OverlapIndex(rows, DEFAULTS), EightGrams([row.text for row in rows])
    settings: dict[str, Any] = {
        "evaluation_rows": len(rows),
        "words": DEFAULTS.words,
        "renumbered": DEFAULTS.renumbered,
    }
    kinds: dict[str, tuple[edits.Edit, ...]] = {
        "copies": (edits.verbatim, edits.respaced, edits.framed),
        "renumbered": (edits.renumbered,),
        "reworded": (edits.reworded,),
    }
    for kind, makers in kinds.items():
        draw = random.Random(0)
        texts = [maker(row.text, draw) for maker in makers for row in rows]
        found = share(overlap is not None for overlap in index.search(texts))
        theirs = share(map(peer.hits, texts))
        report(f"decontaminate.recall_{kind}", found, "of the rows", PEER, peer_value=round(theirs, 4), **settings)
    unrelated = unrelated_rows()
    shared, draw = edits.boilerplate([row.text for row in rows]), random.Random(0)
    texts = [*unrelated, *(edits.sharing_boilerplate(text, shared, draw) for text in unrelated)]
    false = share(overlap is not None for overlap in index.search(texts))
    theirs = share(map(peer.hits, texts))
    settings |= {"peer_value": round(theirs, 4), "rows": len(texts)}
    report("decontaminate.false_hit_rate", false, "of the rows", PEER, "lower", **settings)
    meaning.measure(rows, index, unrelated, DATA)


class EightGrams:
    """The peer: every run of eight words of the evaluation rows."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._grams = {gram for text in texts for gram in self._of(text)}

    def hits(self, text: str) -> bool:
        return any(gram in self._grams for gram in self._of(text))

    @staticmethod
    def _of(text: str) -> Iterator[tuple[str, ...]]:
        found = words(text)
        return zip(*(found[i:] for i in range(8)), strict=False)


def speed(folder: Path) -> None:
    draw = random.Random(0)
    train, test = (
        [s for text in questions(name) for s in edits.SENTENCE.split(text.strip())]
        for name in ("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl.gz")
    )
    write_rows(folder / "rows.jsonl", ({"text": composed(train, draw)} for _ in range(ROWS)))
    held_out = [composed(test, draw) for _ in range(EVALUATION_ROWS)]
    write_rows(folder / "evaluation.jsonl", ({"text": text} for text in held_out))
    config = {
        "output_dir": str(folder / "out"),
        "rows": str(folder / "rows.jsonl"),
        "evaluation": {"test": {"rows": str(folder / "evaluation.jsonl")}},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    with Peak() as peak:
        began = time.perf_counter()
        assert decontaminate.main(["--config", str(folder / "job.yaml")]) == 0
        seconds = time.perf_counter() - began
    settings: dict[str, Any] = {
        "peer_value": round(peer_rows_per_second(held_out, [composed(train, draw) for _ in range(PEER_ROWS)])),
        "rows": ROWS,
        "evaluation_rows": EVALUATION_ROWS,
        "seconds": round(seconds, 1),
        "peak_gb": round(peak.bytes / 1e9, 2),
    }
    report("decontaminate.rows_per_s", ROWS / seconds, "rows/s", f"{PEER}, in memory, one process", **settings)


def peer_rows_per_second(held_out: Sequence[str], texts: Sequence[str]) -> float:
    peer = EightGrams(held_out)
    began = time.perf_counter()
    for text in texts:
        peer.hits(text)
    return len(texts) / (time.perf_counter() - began)


def composed(sentences: Sequence[str], draw: random.Random) -> str:
    return " ".join(draw.choices(sentences, k=draw.randint(2, 6)))


class Peak:
    """The most memory that this process and its children hold together inside the block, looked at now and then."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(0.5):
            processes = [this, *this.children(recursive=True)]
            self.bytes = max(self.bytes, sum(p.memory_info().rss for p in processes if p.is_running()))


def evaluation_rows() -> list[EvaluationRow]:
    files = ("math500/test.jsonl.gz", "decontamination/aime24.jsonl.gz", "decontamination/amc23.jsonl.gz")
    return [
        EvaluationRow(name, str(number), text)
        for name in (*files, "gsm8k/test.jsonl.gz")
        for number, text in enumerate(questions(name))
    ]


def unrelated_rows() -> list[str]:
    """gsm8k's training questions, and gpteacher."""
    other = [
        f"{row['instruction']} {row['input']}"
        for path in sorted((DATA / "gpteacher").glob("*.json.gz"))
        for row in json.loads(gzip.decompress(path.read_bytes()))
    ]
    return [*questions("gsm8k/train.jsonl.gz"), *other]


def questions(name: str) -> list[str]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    return [str(row.get("problem") or row["question"]) for row in rows]


def share(hits: Iterator[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
