"""Read every text back as a person would, in the locale's own numbers, and do the sums again."""

import operator
import re
from collections import Counter
from fractions import Fraction
from functools import cache

import pytest

from data_builders.synthesis import LANGUAGES, TEMPLATES, Language, Task, generate

NUMBER = r"\d+(?:[.,]\d+)*"
EQUATION = re.compile(rf"({NUMBER}) ([-+x/]) ({NUMBER})(%?) = ({NUMBER})")
COMPARISON = re.compile(rf"({NUMBER}) (<|>=) ({NUMBER})")
BOXED = re.compile(rf"\\boxed\{{({NUMBER})\}}$")
OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}
COMMA_DECIMAL = ("id", "vi", "pt")
MONEY_UNIT = {"id": 1000, "vi": 1000}


@cache
def tasks(language: Language) -> tuple[Task, ...]:
    """Enough to meet every template, branch and wording."""
    both = (
        generate("train", 800, seed=1, languages=[language]),
        generate("held_out", 160, seed=1, languages=[language]),
    )
    return tuple(task for split in both for task in split)


def read(text: str, language: Language) -> Fraction:
    """Read a number strictly: thousands in groups of three, the right separators."""
    thousands, decimal = (".", ",") if language in COMMA_DECIMAL else (",", ".")
    grammar = rf"\d{{1,3}}({re.escape(thousands)}\d{{3}})*({re.escape(decimal)}\d{{1,2}})?"
    assert re.fullmatch(grammar, text), f"{text!r} is no number of {language}"
    return Fraction(text.replace(thousands, "").replace(decimal, "."))


def gold(task: Task) -> Fraction:
    """The answer worked out anew from the key, in the locale's currency."""
    n = [Fraction(part) for part in task.key.split("-")[1:]]
    match task.template:
        case "unit_price":
            weight, price, wanted = n
            answer = price * wanted / weight
        case "discount":
            count, price, percent = n
            answer = count * price * (1 - percent / 100)
        case "voucher":
            count, price, minimum, off = n
            answer = count * price - (off if count * price >= minimum else 0)
        case "bundle":
            first, second, pack, count = n
            answer = count * (first + second - pack)
        case "shipping":
            count, price, fee, free_from = n
            answer = count * price + (fee if count * price < free_from else 0)
        case "change":
            count, price, extra, paid = n
            answer = paid - (count * price + extra)
        case "stock":
            start, orders, each, delivered = n
            return start - orders * each + delivered
        case "comparison":
            small, small_price, large, large_price = n
            answer = abs(small_price / small - large_price / large)
    return answer * MONEY_UNIT.get(task.language, 1)


def check_sums(text: str, language: Language) -> list[tuple[Fraction, Fraction, Fraction]]:
    """Check every equation and comparison in a text; return left, right and result of the equations."""
    sums = []
    for left, sign, right, percent, result in EQUATION.findall(text):
        a, b, c = read(left, language), read(right, language) / (100 if percent else 1), read(result, language)
        assert OPERATIONS[sign](a, b) == c, text
        sums.append((a, b, c))
    for left, sign, right in COMPARISON.findall(text):
        assert (read(left, language) >= read(right, language)) == (sign == ">="), text
    assert text.replace(">=", "").count("=") == len(sums), f"an equation was not understood: {text}"
    return sums


def boxed(text: str, language: Language) -> Fraction:
    match = BOXED.search(text)
    assert match, text
    assert text.count("boxed") == 1, text
    return read(match[1], language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_hold_when_read_back(language: Language) -> None:
    for task in tasks(language):
        assert re.fullmatch(r"\d+(\.\d*[1-9])?", task.answer), task
        assert Fraction(task.answer) == gold(task), task

        short = check_sums(task.short_answer, language)
        left, right, result = short[-1]
        assert result == boxed(task.short_answer, language) == gold(task), task

        *worked, check = check_sums(task.thinking, language)
        assert worked == short, "thinking and short answer work the same sums"
        assert check == (result, right, left), "the check undoes the last sum"

        assert boxed(task.direct_answer, language) == gold(task), task
        assert task.short_answer.endswith(task.direct_answer), task


@pytest.mark.parametrize("language", LANGUAGES)
def test_question_states_every_number_in_the_locale(language: Language) -> None:
    """All numbers of the key, prices in the locale's currency, and nothing else but Thai `1 ใบ`."""
    for task in tasks(language):
        stated = Counter(read(number, language) for number in re.findall(NUMBER, task.question))
        unit = MONEY_UNIT.get(language, 1)
        drawn = [Fraction(part) for part in task.key.split("-")[1:]]
        scaled = Counter(value * unit for value in drawn)
        assert sum((stated - Counter(drawn) - scaled).values()) <= (1 if language == "th" else 0), task
        assert sum(stated.values()) - stated[Fraction(1)] == len(drawn), task


@pytest.mark.parametrize("language", LANGUAGES)
def test_thinking_takes_longer_than_the_short_answer(language: Language) -> None:
    rows = tasks(language)
    short = sum(len(task.short_answer) for task in rows)
    long = sum(len(task.thinking) + len(task.direct_answer) for task in rows)
    assert 1.3 < long / short < 2
    assert short / len(rows) < 90


def test_every_template_and_branch_occurs() -> None:
    rows = tasks("en")
    assert {task.template for task in rows} == set(TEMPLATES)
    for template, sign in (("voucher", ">="), ("shipping", ">=")):
        branch = [sign in task.short_answer for task in rows if task.template == template]
        assert 0.35 < sum(branch) / len(branch) < 0.65
    offers = [check_sums(task.short_answer, "en")[:2] for task in rows if task.template == "comparison"]
    first = [small[-1] < large[-1] for small, large in offers]
    assert 0.35 < sum(first) / len(first) < 0.65
    assert any("/ 2.5 =" in task.short_answer for task in rows), "some numbers are not whole"
    assert any("," in task.short_answer for task in tasks("id")), "in other locales too"


def test_reader_refuses_wrong_numbers_and_sums() -> None:
    """The oracle above can fail."""
    assert read("1.234,5", "pt") == read("1,234.5", "en") == Fraction("1234.5")
    for text, language in (("1234", "en"), ("1.234,5", "en"), ("1,234.5", "id"), ("12.34", "vi"), ("1,23", "th")):
        with pytest.raises(AssertionError):
            read(text, language)  # type: ignore[arg-type]
    for wrong in ("3 x 125 = 376.", "375 x 20% = 74", "200 >= 300", "about 375 = 375"):
        with pytest.raises(AssertionError):
            check_sums(wrong, "en")
