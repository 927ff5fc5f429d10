"""Rows split by language: every one is accounted for."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from alignment.errors import UserError
from alignment.rows import Row, read_rows, write_rows
from sft import by_language
from sft.config import AdaptersConfig

TEXTS = {
    "id": "Berapa harga tiga baju yang sudah saya pesan kemarin di toko ini?",
    "th": "เสื้อสามตัวราคาเท่าไหร่ครับ ผมสั่งไว้เมื่อวานนี้",
    "en": "How much are the three shirts that I ordered yesterday in this shop?",
}


def row(language: str, *, labelled: bool = True) -> Row:
    messages = [{"role": "user", "content": TEXTS[language]}, {"role": "assistant", "content": "45"}]
    return {"messages": messages} | ({"language": language} if labelled else {})


def config(folder: Path, *sources: list[Row], **changes: Any) -> AdaptersConfig:
    for number, rows in enumerate(sources):
        write_rows(folder / f"{number}.jsonl", rows)
    base = {
        "model": {"path": str(folder / "model")},
        "sources": [{"rows": str(folder / f"{number}.jsonl"), "epochs": 1 + number} for number in range(len(sources))],
        "training": {"learning_rate": 1e-3},
        "lora": {"rank": 2},
    }
    return AdaptersConfig.model_validate({"output_dir": folder / "out", "base": base, "minimum_rows": 2} | changes)


def languages_in(path: Path) -> list[str]:
    return [found["language"] for found in read_rows(path)]


def test_each_group_has_its_rows_of_each_source(tmp_path: Path) -> None:
    first, second = [row("id"), row("th"), row("en"), row("id")], [row("th"), row("en")]
    settings = config(tmp_path, first, second, groups={"malay": ["id", "ms"], "thai": ["th"]})
    by_language.split(settings, tmp_path / "out")
    assert languages_in(tmp_path / "out/rows/source_0/malay.jsonl") == ["id", "id"]
    assert [source.rows for source in by_language.sources(settings, tmp_path / "out", "malay")] == [
        str(tmp_path / "out/rows/source_0/malay.jsonl")
    ]
    thai = by_language.sources(settings, tmp_path / "out", "thai")
    assert [(Path(source.rows).parent.name, source.epochs) for source in thai] == [("source_0", 1), ("source_1", 2)]
    joint = by_language.sources(settings, tmp_path / "out", "joint")
    assert sorted(languages_in(Path(joint[0].rows)) + languages_in(Path(joint[1].rows))) == ["id", "id", "th", "th"]
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    assert (ledger["rows_in"], ledger["rows_out"]) == (6, 4)
    assert ledger["dropped"] == {"language in no group": 2}
    rejects = list(read_rows(tmp_path / "out/rejects.jsonl"))
    assert [each["where"].rpartition("/")[2] for each in rejects] == ["0.jsonl:3", "1.jsonl:2"]
    assert by_language.groups(settings, tmp_path / "out")["malay"] == ["id", "ms"]


def test_by_default_each_language_is_a_group(tmp_path: Path) -> None:
    settings = config(tmp_path, [row("id"), row("th")] * 2)
    by_language.split(settings, tmp_path / "out")
    assert by_language.groups(settings, tmp_path / "out") == {"id": ["id"], "th": ["th"]}


def test_rows_without_a_language_are_refused_or_identified(tmp_path: Path) -> None:
    rows = [row("id"), row("id"), row("th"), row("th", labelled=False)]
    rows.append({"messages": [{"role": "user", "content": "45 x 3"}, {"role": "assistant", "content": "135"}]})
    with pytest.raises(UserError, match=r"0\.jsonl:4: row has no 'language'"):
        by_language.split(config(tmp_path, rows), tmp_path / "out")
    assert not (tmp_path / "out/ledger.json").exists()
    by_language.split(config(tmp_path, rows, identify=["id", "th", "en"]), tmp_path / "out")
    assert languages_in(tmp_path / "out/rows/source_0/th.jsonl") == ["th", "th"]
    [reject] = read_rows(tmp_path / "out/rejects.jsonl")
    assert (reject["reason"], reject["where"].rpartition(":")[2]) == ("language not identified", "5")


def test_what_a_killed_run_left_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "out/rows/source_0").mkdir(parents=True)
    write_rows(tmp_path / "out/rows/source_0/vi.jsonl", [row("th")])
    settings = config(tmp_path, [row("th"), row("th")])
    by_language.split(settings, tmp_path / "out")
    assert list(by_language.groups(settings, tmp_path / "out")) == ["th"]
    (tmp_path / "0.jsonl").unlink()
    by_language.split(settings, tmp_path / "out")  # the ledger says that it is done


def test_small_groups_and_bad_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"groups: th has 1 rows, expected 2 or more \(minimum_rows\)"):
        by_language.split(config(tmp_path, [row("id"), row("id"), row("th")]), tmp_path / "out")
    with pytest.raises(UserError, match="groups: malay has 0 rows"):
        by_language.split(config(tmp_path, [row("th")] * 2, groups={"malay": ["ms"]}), tmp_path / "out")
    with pytest.raises(UserError, match=r"0\.jsonl:1: the language '\.\./x' is no name for a folder"):
        by_language.split(config(tmp_path, [row("th") | {"language": "../x"}]), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {"joint": ["th"]}}, "'joint' is no name for a group"),
        ({"groups": {"a/b": ["th"]}}, "'a/b' is no name for a group"),
        ({"groups": {"a": ["th"], "b": ["id", "th"]}}, "'th' is in two groups"),
        ({"groups": {"a": []}}, "'a' has no language"),
    ],
)
def test_impossible_groups(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(tmp_path, [row("th")], **changes)


def test_a_recipe_without_an_adapter_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, [row("th")])
    base = settings.base.model_dump() | {"lora": None}
    with pytest.raises(ValidationError, match="base.lora is missing"):
        AdaptersConfig.model_validate({"output_dir": "out", "base": base})
