"""A recipe's rows by language, or by group of languages: a file for each group of each source.

FOLDER/rows/source_0/GROUP.jsonl     the rows of the first source, untouched but for a `language` that was identified
FOLDER/rejects.jsonl                 those of no group: where each lies, and why
FOLDER/ledger.json                   written last: the files are whole
"""

import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from alignment import languages
from alignment.errors import UserError, did_you_mean
from alignment.ledger import Ledger
from alignment.progress import track
from alignment.rows import Row, count_rows, located_rows, writing_rows
from sft.config import BASE, GROUP_NAME, JOINT, AdaptersConfig, SourceConfig

NOT_IDENTIFIED, NO_GROUP = "language not identified", "language in no group"


def split(config: AdaptersConfig, folder: Path) -> None:
    """Write the rows of each group, once for a run.

    Raises:
        UserError: a row without a language where none is to be identified, or a group of too few rows.
    """
    if (folder / "ledger.json").exists():
        return
    shutil.rmtree(folder / "rows", ignore_errors=True)  # of a run that was killed
    language_of, group_of = _labels(config), _groups(config)
    ledger, sizes = Ledger(), Counter(dict.fromkeys(config.groups or {}, 0))
    with writing_rows(folder / "rejects.jsonl") as reject:
        for number, source in enumerate(config.base.sources):
            with ExitStack() as files:
                write: dict[str, Callable[[Row], None]] = {}
                rows = located_rows(source.rows, "messages")
                for where, row in track(rows, count_rows(source.rows), f"by language: {source.rows}"):
                    language = language_of(row, where)
                    group = None if language is None else group_of(language, where)
                    ledger.rows_in += 1
                    if group is None:
                        reason = NOT_IDENTIFIED if language is None else NO_GROUP
                        ledger.drop(reason)
                        reject({"where": where, "id": row.get("id"), "language": language, "reason": reason})
                        continue
                    if group not in write:
                        path = _file(folder, number, group)
                        write[group] = files.enter_context(writing_rows(path))
                    write[group](row | {"language": language})
                    sizes[group] += 1
                    ledger.rows_out += 1
    _check_sizes(config, sizes)
    ledger.write(folder / "ledger.json")


def groups(config: AdaptersConfig, folder: Path) -> dict[str, list[str]]:
    """The groups with their languages, once the rows are split."""
    if config.groups is not None:
        return config.groups
    return {name: [name] for name in sorted({path.stem for path in (folder / "rows").glob("*/*.jsonl")})}


def sources(config: AdaptersConfig, folder: Path, name: str) -> list[SourceConfig]:
    """The recipe's sources with the rows of one group alone, or of all (JOINT); those that have none are left out."""
    files = [_file(folder, number, name) for number in range(len(config.base.sources))]
    paths = [file.parent for file in files] if name == JOINT else files
    return [
        source.model_copy(update={"rows": str(path)})
        for source, path in zip(config.base.sources, paths, strict=True)
        if path.exists()
    ]


def given_language(row: Row, where: str) -> str:
    """
    Raises:
        UserError: the row has no `language`, or one that is no text.
    """
    language = row.get("language")
    if not isinstance(language, str) or not language:
        raise UserError(f"{where}: row has no 'language'{did_you_mean('language', row)}")
    return language


def _file(folder: Path, number: int, group: str) -> Path:
    return folder / "rows" / f"source_{number}" / f"{group}.jsonl"


def _labels(config: AdaptersConfig) -> Callable[[Row, str], str | None]:
    if not config.identify:
        return given_language
    detector = languages.detector(config.identify)

    def labelled(row: Row, where: str) -> str | None:
        if row.get("language"):
            return given_language(row, where)
        return detector.identify("\n".join(message["content"] for message in row["messages"])).language

    return labelled


def _groups(config: AdaptersConfig) -> Callable[[str, str], str | None]:
    if config.groups is None:
        return _own_group
    named = {language: name for name, members in config.groups.items() for language in members}
    return lambda language, _: named.get(language)


def _own_group(language: str, where: str) -> str:
    if not GROUP_NAME.fullmatch(language) or language in (BASE, JOINT):
        raise UserError(f"{where}: the language {language!r} is no name for a folder; name its group in 'groups'")
    return language


def _check_sizes(config: AdaptersConfig, sizes: Counter[str]) -> None:
    for name, count in sorted(sizes.items()):
        if count < config.minimum_rows:
            raise UserError(
                f"groups: {name} has {count} rows, expected {config.minimum_rows} or more (minimum_rows)\n"
                "put its languages into a group with related ones, or name the groups that are wanted"
            )
