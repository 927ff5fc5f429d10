"""Language identification: precision and recall of each language, what the filter finds and flags wrongly, its speed.

    python -m benchmarks.languages

Real texts from SHARED_DATA, skipped where it is absent: nusax (id, en), prdect_id (id), wisesight (th), mgsm (en, zh),
vicuna_multilingual (en, id, pt, zh). It has no Malay, Vietnamese and Tagalog: those are the questions and thoughts of
our own templates (data_builders.synthesis), far easier than what people write. A text is one row of its file. Each
language weighs the same in a precision. The peer is lingua as it is, on the whole text.

Strays: three texts of one language (of nusax, mgsm, vicuna, wisesight or the templates) with one of another between
them that has at least .22 of the letters; the peer takes the sections that lingua's `detect_multiple_languages_of`
finds. Clean rows are the texts above.
"""

import csv
import gzip
import json
import random
import resource
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lingua import IsoCode639_1, LanguageDetectorBuilder

from alignment.languages import detector, letters
from alignment.rows import write_rows
from benchmarks import DATA, data_at_hand, report
from data_builders import languages
from data_builders.config import LanguagesConfig
from data_builders.synthesis import generate

CODES = ("en", "zh", "id", "ms", "th", "vi", "tl", "pt")
TEMPLATED = ("ms", "vi", "tl")
PER_SET, TEMPLATES, PLANTED, ROWS = 500, 3200, 20, 20_000
RULE = languages.Rule(CODES, stray=0.2, confidence=0.8)  # the job's defaults
PEER = LanguageDetectorBuilder.from_iso_codes_639_1(*(IsoCode639_1.from_str(code) for code in CODES)).build()

Texts = dict[str, list[str]]  # language -> texts


def main() -> None:
    if not data_at_hand():
        return
    texts = all_texts()
    accuracy(texts)
    strays(texts)
    speed(texts)


def accuracy(texts: Texts) -> None:
    ours = shares(texts, lambda text: detector(CODES).identify(text).language)
    theirs = shares(texts, peer_language)
    for code in CODES:
        settings: dict[str, Any] = {"texts": len(texts[code]), "templated": code in TEMPLATED}
        for name, of in (("recall", recall), ("precision", precision)):
            peer_value = round(of(theirs, code), 4)
            value = of(ours, code)
            report(f"languages.{name}_{code}", value, "of texts", "lingua", peer_value=peer_value, **settings)


def shares(texts: Texts, identify: Callable[[str], str | None]) -> dict[str, dict[str | None, float]]:
    """Of each language's texts the share that is taken for each language; None: in doubt."""
    counts = {code: Counter(map(identify, those)) for code, those in texts.items()}
    return {
        code: {found: count / found_all.total() for found, count in found_all.items()}
        for code, found_all in counts.items()
    }


def recall(found: dict[str, dict[str | None, float]], code: str) -> float:
    return found[code].get(code, 0.0)


def precision(found: dict[str, dict[str | None, float]], code: str) -> float:
    return recall(found, code) / sum(of.get(code, 0.0) for of in found.values())


def peer_language(text: str) -> str | None:
    found = PEER.detect_language_of(text)
    return None if found is None else found.iso_code_639_1.name.lower()


def strays(texts: Texts) -> None:
    clean = [(text, code) for code, those in texts.items() for text in those]
    planted = {pair: list(islice(with_a_stray(texts, *pair), PLANTED)) for pair in pairs()}
    near = {("id", "ms"), ("ms", "id")}
    kinds = {
        "flagged_clean": clean,
        "found": [
            (text, host) for (host, guest), rows in planted.items() if (host, guest) not in near for text in rows
        ],
        "found_ms_id": [(text, host) for host, guest in near for text in planted[host, guest]],
    }
    for name, rows in kinds.items():
        ours = sum(languages.check(text, code, RULE).stray is not None for text, code in rows) / len(rows)
        theirs = sum(peer_strays(text, code) for text, code in rows) / len(rows)
        better = "lower" if name == "flagged_clean" else "higher"
        counted: dict[str, Any] = {"peer_value": round(theirs, 4), "rows": len(rows)}
        report(f"languages.{name}", ours, "of rows", "lingua's detect_multiple_languages_of", better, **counted)


def pairs() -> Iterator[tuple[str, str]]:
    return ((host, guest) for host in CODES for guest in CODES if guest != host)


def with_a_stray(texts: Texts, host: str, guest: str) -> Iterator[str]:
    draw = random.Random(f"{host}/{guest}")
    while True:
        first, *rest = draw.sample(texts[host], 3)
        stray = draw.choice(texts[guest])
        if letters(stray) >= 0.22 * sum(map(letters, (first, *rest, stray))):
            yield "\n".join((first, stray, *rest))


def peer_strays(text: str, code: str) -> bool:
    sections = PEER.detect_multiple_languages_of(text)
    strange = [s for s in sections if s.language.iso_code_639_1.name.lower() != code]
    return sum(letters(text[s.start_index : s.end_index]) for s in strange) > RULE.stray * letters(text)


def speed(texts: Texts) -> None:
    """The job on rows of all languages, in as many processes as there are cores, beside lingua's own threads."""
    several = random.Random(0).choices([(text, code) for code, those in texts.items() for text in those], k=ROWS)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "rows.jsonl")
        write_rows(path, ({"text": text, "language": code} for text, code in several))
        config = LanguagesConfig(output_dir=Path(scratch, "out"), rows=str(path))
        began = time.perf_counter()
        languages.run(config)
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    PEER.compute_language_confidence_values_in_parallel([text for text, _ in several])
    theirs = time.perf_counter() - began
    settings: dict[str, Any] = {
        "peer_value": round(ROWS / theirs),
        "rows": ROWS,
        "letters": round(sum(letters(text) for text, _ in several) / ROWS),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
    }
    report("languages.rows_per_s", ROWS / seconds, "rows/s", "lingua's threads, whole texts alone", **settings)


def all_texts() -> Texts:
    texts: Texts = {code: [] for code in CODES}
    for code, found in real_texts():
        texts[code] += islice((text for text in found if letters(text)), PER_SET)
    for task in generate("train", TEMPLATES, seed=0):
        if task.language in TEMPLATED:
            texts[task.language].append(task.question)
    return texts


def real_texts() -> Iterator[tuple[str, Iterator[str]]]:
    for name, code in (("english", "en"), ("indonesian", "id")):
        yield code, csv_column(DATA / f"nusax/{name}_train.csv", "text")
    yield "id", csv_column(DATA / "prdect_id/prdect_id.csv.gz", "Customer Review")
    for name, code in (("Chinese", "zh"), ("English", "en"), ("Indonesian", "id"), ("Portuguese", "pt")):
        lines = (DATA / f"vicuna_multilingual/questions_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        yield code, (json.loads(line)["text"] for line in lines)
    for code in ("en", "zh"):
        lines = gzip.decompress((DATA / f"mgsm/mgsm_{code}.tsv.gz").read_bytes()).decode().splitlines()
        yield code, (line.partition("\t")[0] for line in lines)
    with zipfile.ZipFile(DATA / "wisesight/huggingface_data.zip") as archive:
        yield "th", iter([json.loads(line)["texts"] for line in archive.read("data/test.jsonl").splitlines()])


def csv_column(path: Path, column: str) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from (row[column] for row in csv.DictReader(file))


if __name__ == "__main__":
    main()
