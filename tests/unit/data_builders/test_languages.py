"""The job: rows whose sentences stray go, with the sentence; the others get the language they lack."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import pydantic
import pytest

from alignment.rows import Row, read_rows, write_rows
from data_builders import languages
from data_builders.config import LanguagesConfig

ENGLISH = "I bought three shirts and paid in cash."
LONGER = "She wants to know how much all of them cost together."
INDONESIAN = "Barangnya bagus banget, pengirimannya cepat, terima kasih."
THAI = "ฉันซื้อเสื้อสามตัวเมื่อวานนี้"


def row(answer: str, **others: object) -> Row:
    return {"messages": [{"role": "user", "content": ENGLISH}, {"role": "assistant", "content": answer}], **others}


ROWS = [
    row(f"{INDONESIAN} {INDONESIAN}", language="id"),
    row(f"{INDONESIAN} {ENGLISH} {LONGER}", language="id"),
    row(f"{ENGLISH} {LONGER}"),
    row(THAI, language="en"),
    row(f"{ENGLISH} {LONGER} ใช่", language="en"),  # two letters of 74
    row("12 + 5 = 17", language="vi"),
    row("12 + 5 = 17"),
    row("Nikmatono cicilan 0% sampek 12 sasi", language="jv"),
    row("Привет, как дела?"),
]


@pytest.fixture
def config(tmp_path: Path) -> LanguagesConfig:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return LanguagesConfig(output_dir=tmp_path / "out", rows=str(tmp_path / "rows.jsonl"), workers=1)


class Here:
    """In place of Processes, whose start takes long: the function in this process, item by item."""

    def __init__(self, _count: int, function: Callable[[Any, Any], Any], state: Any) -> None:
        self.ask = partial(function, state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map_each(self, items: Iterable[Any], part: Callable[[Any], Any], _size: int) -> Iterator[tuple[Any, Any]]:
        for item in items:
            yield item, *self.ask([part(item)])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "Processes", Here)


def test_rows_that_stray_go_and_the_others_are_labelled(config: LanguagesConfig) -> None:
    languages.run(config)
    kept = list(read_rows(config.output_dir / "rows.jsonl"))
    confidence = kept[1].pop("language_confidence")
    assert 0.8 < confidence < 1
    assert kept == [ROWS[0], ROWS[2] | {"language": "en"}, *ROWS[4:]]
    mixed, thai = read_rows(config.output_dir / "rejects.jsonl")
    letters = {text: sum(c.isalpha() for c in text) for text in (INDONESIAN, ENGLISH, LONGER)}
    assert mixed.pop("stray") == {
        "expected": "id",
        "share": round(1 - letters[INDONESIAN] / sum(letters.values()), 4),
        "sentence": LONGER,
        "language": "en",
        "confidence": pytest.approx(1, abs=0.05),
    }
    assert thai.pop("stray") == {"expected": "en", "share": 1, "sentence": THAI, "language": "th", "confidence": 1}
    assert [mixed, thai] == [ROWS[1], ROWS[3]]
    ledger = json.loads((config.output_dir / "ledger.json").read_text())
    assert (ledger["rows_in"], ledger["rows_out"], ledger["dropped"]) == (9, 7, {"stray": 2})
    assert json.loads((config.output_dir / "metrics.json").read_text()) == {
        "rows.in": 9,
        "rows.out": 7,
        "dropped.stray": 2,
        "rows.unchecked": 3,
        "language.en": 2,
        "language.id": 1,
        "language.in_doubt": 1,
        "language.jv": 1,
        "language.other": 1,
        "language.vi": 1,
    }
    assert json.loads((config.output_dir / "languages.json").read_text()) == {
        "en": {"th": 1, "en": 1},
        "id": {"id": 1, "en": 1},
        "jv": {"id": 1},
        "not given": {"en": 1, "in doubt": 1, "other": 1},
        "vi": {"in doubt": 1},
    }


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"stray": 0.9}, [0, 1, 2, 4, 5, 6, 7, 8]),
        ({"stray": 0.0}, [0, 2, 5, 6, 7, 8]),
        ({"language": "en"}, [2, 4, 5, 6]),  # the jv row too: all rows should be English
        ({"turns": "user"}, [2, 3, 4, 6, 7, 8]),  # the users all write English
        ({"turns": "user", "stray": 0.9, "confidence": 1.0}, list(range(9))),
    ],
)
@pytest.mark.usefixtures("here")
def test_settings(config: LanguagesConfig, changes: dict[str, object], kept: list[int]) -> None:
    languages.run(LanguagesConfig.model_validate(config.model_dump() | {"label": False} | changes))
    assert list(read_rows(config.output_dir / "rows.jsonl")) == [ROWS[i] for i in kept]


@pytest.mark.usefixtures("here")
def test_a_killed_run_starts_over_to_the_same_rows(config: LanguagesConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(languages, "labelled", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            languages.run(config)
    assert not (config.output_dir / "rows.jsonl").exists()
    languages.run(config)
    whole = LanguagesConfig.model_validate(config.model_dump() | {"output_dir": config.output_dir.parent / "other"})
    languages.run(whole)
    for name in ("rows.jsonl", "rejects.jsonl", "languages.json", "ledger.json"):
        assert (config.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()


@pytest.mark.usefixtures("here")
def test_mistakes_are_named(config: LanguagesConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"output_dir: {tmp_path / 'new'}\nrows: {config.rows}\nlanguages: [en, xx]\n")
    assert languages.main(["--config", str(path), "--dry-run"]) == 2
    assert "languages: 'xx' is no ISO 639-1 code that can be identified" in capsys.readouterr().err
    with pytest.raises(pydantic.ValidationError, match="language: 'ja' is not among 'languages'"):
        LanguagesConfig(output_dir=tmp_path, rows="x", language="ja")
    write_rows(tmp_path / "rows.jsonl", [*ROWS, row("Yes", language=3)])
    path.write_text(f"output_dir: {tmp_path / 'new'}\nrows: {config.rows}\nworkers: 1\n")
    assert languages.main(["--config", str(path)]) == 2
    assert "rows.jsonl:10: 'language' must be a code as 'en', found 3" in capsys.readouterr().err
