"""Numbers, scripts and wordings of each language, and the page that shows them."""

import re
import unicodedata
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from data_builders.synthesis import LANGUAGES, LOCALES, TEMPLATES, Language, Template, generate
from data_builders.synthesis.languages import WORDINGS
from data_builders.synthesis.locales import plain

PAGE = Path(__file__).parents[3] / "docs" / "demo-data.md"
SCRIPT = {"zh": "CJK", "th": "THAI"}
WRITTEN = {  # 1234.5, as a number and as money; 12000 as money
    "en": ("1,234.5", "$1,234.50", "$12,000"),
    "zh": ("1,234.5", "1,234.50元", "12,000元"),
    "id": ("1.234,5", "Rp1.234,50", "Rp12.000"),
    "ms": ("1,234.5", "RM1,234.50", "RM12,000"),
    "th": ("1,234.5", "1,234.50 บาท", "12,000 บาท"),
    "vi": ("1.234,5", "1.234,50 đồng", "12.000 đồng"),
    "tl": ("1,234.5", "₱1,234.50", "₱12,000"),
    "pt": ("1.234,5", "R$ 1.234,50", "R$ 12.000"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_and_money(language: Language) -> None:
    locale = LOCALES[language]
    written = (locale.number(Decimal("1234.5")), locale.money(Decimal("1234.5")), locale.money(Decimal(12000)))
    assert written == WRITTEN[language]
    assert locale.number(Decimal("1E+6")) == locale.number(Decimal("1000000.00")) != locale.number(Decimal(100000))


def test_canonical_form() -> None:
    assert [plain(Decimal(text)) for text in ("3250", "12.50", "1E+6", "100.0")] == ["3250", "12.5", "1000000", "100"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_wordings_are_complete(language: Language) -> None:
    wording = WORDINGS[language]
    assert wording.questions.keys() == set(TEMPLATES)
    texts = [*(text for variants in wording.questions.values() for text in variants), *wording.checks]
    assert [text for text, copies in Counter(texts).items() if copies > 1] == []
    assert min(len(variants) for variants in wording.questions.values()) >= 2
    assert len(set(wording.products)) >= 6


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_in_the_language_s_script(language: Language) -> None:
    """Chinese and Thai letters in every text of those languages, and in no other; no slot left unfilled."""
    for task in generate("train", 160, seed=2, languages=[language]):
        for text in (task.question, task.short_answer, task.thinking, task.direct_answer):
            names = [unicodedata.name(letter).split()[0] for letter in text if letter.isalpha()]
            share = Counter(names)
            for other, script in SCRIPT.items():
                assert (share[script] > 0) == (language == other), text
            assert "{" not in text.replace("\\boxed{", ""), text
            assert " ".join(text.split()) == text, "stray space"
            if language == "zh":
                assert not re.search(r"[,.?:](?!\d)", text), f"half-width punctuation: {text}"


def test_vietnamese_is_composed_and_accented() -> None:
    """Composed (NFC) letters, one token each: decomposed ones would split in two."""
    for language in LANGUAGES:
        for task in generate("train", 32, seed=2, languages=[language]):
            assert unicodedata.is_normalized("NFC", task.question + task.thinking + task.direct_answer)
    for task in generate("train", 64, seed=2, languages=["vi"]):
        assert any(ord(letter) > 0x1E00 for letter in task.question), task.question


@pytest.mark.parametrize(("language", "template"), list(zip(LANGUAGES, TEMPLATES, strict=True)))
def test_the_page_shows_what_the_code_renders(language: Language, template: Template) -> None:
    task = next(generate("train", 1, seed=0, languages=[language], templates=[template]))
    page = PAGE.read_text(encoding="utf-8")
    for text in (task.question, task.short_answer, task.thinking, task.direct_answer, f"`{task.answer}`"):
        assert text in page
    for text in WRITTEN[language][:2]:
        assert text in page
