"""What the documentation names is there: links, recipes, modules, make targets."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

LINK = re.compile(r"\]\(([^)\s]+)\)")
CONFIG = re.compile(r"(?<![\w/])configs/[\w./-]*\w")
MODULE = re.compile(r"(?:python -m|launch [^\n]*?-m) ([a-z_][\w.]*)")
JOB = re.compile(r"`((?:alignment|sft|reward|dpo|data_builders)\.\w+)`")
TARGET = re.compile(r"(?:^|`)make ((?:[a-z]+ ?)+)", re.MULTILINE)
PLACEHOLDERS = {"configs/accelerate/NAME.yaml"}
OTHERS = {"pip", "pytest", "venv"}


def broken_links(page: Path, text: str) -> list[str]:
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    return [target for target in targets if target and not (page.parent / target).exists()]


def absent_configs(text: str) -> list[str]:
    return [name for name in CONFIG.findall(text) if name not in PLACEHOLDERS and not (ROOT / name).exists()]


def absent_modules(text: str) -> list[str]:
    """Modules named in commands or as jobs that this checkout lacks; nothing is imported."""
    names = {*MODULE.findall(text), *JOB.findall(text)} - OTHERS
    return sorted(name for name in names if not has_module(name))


def has_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
        return True
    return "." not in name and importlib.util.find_spec(name) is not None


def absent_targets(text: str) -> list[str]:
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    return [name for names in TARGET.findall(text) for name in names.split()[:1] if name not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_named_on_a_page_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    absent = [*broken_links(page, text), *absent_configs(text), *absent_modules(text), *absent_targets(text)]
    assert absent == []


def test_the_index_links_every_page() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - linked == {"index.md"}


def test_the_checks_above_see_what_is_absent() -> None:
    text = "[a](gone.md) [b](https://x.y) `configs/sft/gone.yaml`\naccelerate launch --x y -m sft.gone\nmake gone now"
    assert broken_links(ROOT / "README.md", text) == ["gone.md"]
    assert absent_configs(text) == ["configs/sft/gone.yaml"]
    assert absent_modules(text + " `reward.lost`, python -m dpo.train") == ["reward.lost", "sft.gone"]
    assert absent_targets(text) == ["gone"]
