"""Tables, families, and that what follows from a table is right, in every language."""

import gzip
import importlib.util
import json
import random
import re
import sys
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.answers import to_number
from alignment.errors import UserError
from alignment.verify import Claim, Verdict, settle
from data_builders.ecommerce.config import TablesConfig
from data_builders.ecommerce.drafts import Draft, draw_drafts, quotas, shuffled
from data_builders.ecommerce.families import SHARES, TASKS, missing, shares_of, tasks_for
from data_builders.ecommerce.products import round_down, round_up
from data_builders.ecommerce.quality import slot_left
from data_builders.ecommerce.tables import Tables, columns_of, read_tables
from data_builders.ecommerce.wordings import slots, words_of
from data_builders.synthesis.locales import LANGUAGES, Language

spec = importlib.util.spec_from_file_location("ecommerce_tables", Path(__file__).with_name("ecommerce_tables.py"))
tables_of = sys.modules.setdefault("ecommerce_tables", importlib.util.module_from_spec(spec))
spec.loader.exec_module(tables_of)

EACH = 12  # drafts of a family and a language


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TablesConfig:
    return TablesConfig(**tables_of.write_tables(tmp_path_factory.mktemp("tables")))


@pytest.fixture(scope="module")
def tables(config: TablesConfig) -> Tables:
    return read_tables(config)


@pytest.fixture(scope="module")
def drafts(config: TablesConfig, tables: Tables) -> list[Draft]:
    """Of every family in every language."""
    tasks = tasks_for(columns_of(config), written=True)
    cells = [(family, language) for family in SHARES for language in LANGUAGES]
    return [d for cell in cells for d in draw_drafts(tables, tasks, cell, EACH, seed=0, cross_lingual=True)]


# The words


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_task_with_its_slots(language: Language) -> None:
    own, english = words_of(language), words_of("en")
    assert {name: slots(text) for name, text in own.words.items()} == {n: slots(t) for n, t in english.words.items()}
    assert own.tasks.keys() == english.tasks.keys() == {task.words for task in TASKS}
    for name, task in own.tasks.items():
        same = english.tasks[name]
        assert {o: slots(t) for o, t in task.reply.items()} == {o: slots(t) for o, t in same.reply.items()}, name
        assert {frozenset(slots(ask)) for ask in task.ask} == {frozenset(slots(ask)) for ask in same.ask}, name
        assert slots(task.think or "") == slots(same.think or ""), name


def test_every_task_in_every_language_leaves_no_slot(drafts: list[Draft]) -> None:
    assert {(d.task, d.language) for d in drafts} == {
        (task.name, language) for task in TASKS for language in LANGUAGES if not task.native or language == "en"
    }
    for draft in drafts:
        whole = [draft.ask, draft.block, draft.reply or "", draft.reasoning or ""]
        assert not any(slot_left(text) for text in whole), whole
        assert draft.ask and (draft.reply is None) == (draft.task in ("pitch", "advertisement"))
        assert all(name in draft.ask for name in draft.kept)
    assert len({d.id for d in drafts}) == len(drafts)


# What follows from a table


def test_every_answer_is_verified_as_the_reply_states_it(drafts: list[Draft]) -> None:
    asked = [d for d in drafts if d.answer is not None]
    assert {d.language for d in asked} == set(LANGUAGES)
    for draft in asked:
        claim = Claim(draft.reply or "", draft.answer or "", draft.language, options=draft.options)
        assert settle(claim) is Verdict.CORRECT, draft
        other = "B" if draft.answer == "A" else "A" if draft.options else "17"
        assert settle(Claim(draft.reply or "", other, draft.language, options=draft.options)) is Verdict.WRONG


def test_arithmetic_is_that_of_the_question(drafts: list[Draft]) -> None:
    """The numbers are read from the English text, as a pupil would."""
    found = Counter[str]()
    for draft in (d for d in drafts if d.language == "en" and d.task in ("total", "discount", "change", "order_total")):
        ask = [amount(text) for text in re.findall(r"(?<!product )\b\d[\d,.]*\d\b|(?<!product )\b\d\b", draft.ask)]
        prices = [amount(text) for text in re.findall(r"(?:: |costs )(\d[\d,]*(?:\.\d+)?)", draft.block)]
        match draft.task:
            case "total":
                expected = ask[0] * prices[0] + ask[1] * prices[1]
            case "discount":
                expected = prices[0] * (1 - ask[0] / 100)
            case "change":
                expected = ask[1] - ask[0] * prices[0]
            case _:
                expected = prices[0] * int(re.findall(r"make that (\d)", draft.block)[0])
        assert amount(draft.answer or "") == expected, draft
        assert draft.reasoning is not None and to_number((draft.reply or "").split()[-1]) == expected
        found[draft.task] += 1
    assert len(found) == 4


def amount(text: str) -> Fraction:
    number = to_number(text)
    assert number is not None, text
    return number


def test_one_option_alone_is_right(drafts: list[Draft], tables: Tables) -> None:
    products = {p.title: p for p in tables.products}
    for draft in (d for d in drafts if d.options):
        right = draft.options["ABCD".index(draft.answer or "")]
        assert len(draft.options) == len(set(draft.options)) == 4
        match draft.task:
            case "category":
                title = draft.block.splitlines()[0].partition(": ")[2]
                assert products[title].category == right
            case "same_category":
                assert "“" in draft.ask
                [title] = [t for t in products if f"“{t}”" in draft.ask]
                alike = [o for o in draft.options if products[o].category == products[title].category]
                assert alike == [right] and right != title
            case "within_budget":
                [(category, budget)] = re.findall(r"(Kitchen|Garden|Toys|Office|Sport)”.*?([\d.,]*\d)", draft.ask) or [
                    (c, b) for b, c in re.findall(r"([\d.,]*\d).*?“(Kitchen|Garden|Toys|Office|Sport)", draft.ask)
                ]
                most = to_number(budget, draft.language)
                suits = [o for o in draft.options if f"({category}, " in o and price_of(o, products) <= most]
                assert suits == [right], draft


def price_of(option: str, products: dict[str, Any]) -> Decimal:
    [product] = [p for title, p in products.items() if option.startswith(f"{title} (")]
    return product.price


def test_replies_to_yes_and_no_questions_follow_the_table(drafts: list[Draft], tables: Tables) -> None:
    products = {p.title: p for p in tables.products}
    labels = {pair.place: pair.label for pair in tables.pairs}
    words = {language: words_of(language) for language in LANGUAGES}
    seen = Counter[tuple[str, bool]]()
    for draft in drafts:
        title = draft.block.partition("\n")[0].partition(": ")[2]
        match draft.task:
            case "under_budget":
                [budget] = draft.kept
                truth = to_number(budget, draft.language) >= products[title].price
            case "is_brand":
                truth = draft.kept == (products[title].brand,)
            case "request":
                truth = draft.kept[0].endswith(products[title].category)
            case "same_product" | "pair_as_query":
                truth = labels[draft.sources[0]]
            case _:
                continue
        template = words[draft.language].tasks["query" if draft.task in ("request", "pair_as_query") else draft.task]
        beginning = template.reply["right" if truth else "wrong"].partition("{")[0]
        assert (draft.reply or "").startswith(beginning), draft
        seen[draft.task, truth] += 1
    assert len(seen) == 2 * 5  # both outcomes of each task


def test_extracted_values_stand_in_the_text(drafts: list[Draft]) -> None:
    for draft in (d for d in drafts if d.family == "attribute_extraction"):
        found = json.loads(draft.reply or "")
        assert found and all(value in draft.block for value in found.values())
        assert "weight" not in found  # the text does not name it


def test_a_search_is_misspelt_and_put_right(drafts: list[Draft], tables: Tables) -> None:
    for draft in (d for d in drafts if d.task == "typos"):
        [wrong], right = draft.kept, draft.reply or ""
        assert wrong != right and len(wrong.split()) == len(right.split())
        assert any(p.title.casefold().startswith(right) for p in tables.products)


@given(st.integers(1, 10**9), st.integers(0, 2))
def test_rounded_budgets(cents: int, places: int) -> None:
    price = Decimal(cents) / 10**places
    up, down = round_up(price), round_down(price)
    assert down < price <= up
    assert up <= price * Decimal("1.1") and down >= price * Decimal("0.8")


# Quotas and draws


@given(st.integers(0, 500), st.dictionaries(st.tuples(st.sampled_from("abc"), st.sampled_from(LANGUAGES)),
                                            st.floats(0.01, 9), min_size=1))  # fmt: skip
def test_quotas_add_up_and_are_within_one_of_their_share(total: int, shares: dict[Any, float]) -> None:
    found = quotas(total, shares)
    assert sum(found.values()) == total
    exact = {cell: total * share / sum(shares.values()) for cell, share in shares.items()}
    assert all(abs(found[cell] - exact[cell]) < 1 + 1e-6 for cell in shares)


def test_draws_are_seeded_and_take_each_row_once(config: TablesConfig, tables: Tables) -> None:
    tasks = tasks_for(columns_of(config), written=False)

    def draw(seed: int, count: int) -> list[Draft]:
        cell = ("dialogue_understanding", "id")
        return draw_drafts(tables, tasks, cell, count, seed=seed, cross_lingual=True)

    assert draw(3, 9) == draw(3, 9) == draw(3, 30)[:9]
    assert draw(3, 9) != draw(4, 9)
    whole = draw(3, 10**6)
    assert len(whole) == 2 * tables_of.PRODUCTS  # its two tasks
    assert set(Counter((d.task, *d.sources) for d in whole).values()) == {1}


@given(st.integers(0, 30), st.integers())
def test_a_drawn_order_has_every_row_once(count: int, seed: int) -> None:
    assert sorted(shuffled(range(count), random.Random(seed))) == list(range(count))


def test_every_order_is_as_likely() -> None:
    """600 orders of 3 rows: 100 of each expected, 30 (above 3 standard deviations) either way allowed."""
    found = Counter(tuple(shuffled("abc", random.Random(seed))) for seed in range(600))
    assert len(found) == 6 and all(70 <= count <= 130 for count in found.values())


def test_without_cross_lingual_a_row_serves_its_own_language(config: TablesConfig, tables: Tables) -> None:
    tasks = tasks_for(columns_of(config), written=False)
    count = {
        code: len(draw_drafts(tables, tasks, ("classification", code), 5, seed=0, cross_lingual=False))
        for code in ("en", "th")
    }
    assert count == {"en": 5, "th": 0}


# What the tables hold


def test_a_family_is_used_where_the_tables_hold_what_it_needs(config: TablesConfig) -> None:
    held = columns_of(config)
    assert shares_of(None, held, written=False) == SHARES
    assert sum(SHARES[f] for f in ("query_product_matching", "product_questions", "product_similarity")) > 0.5
    assert sum(SHARES.values()) == pytest.approx(1)
    titles = {**held, "products": [{"title", "price"}], "reviews": [], "pairs": [], "queries": []}
    assert set(shares_of(None, titles, written=False)) == {
        "numerical_reasoning", "product_questions", "query_rewriting", "dialogue_understanding",
    }  # fmt: skip
    assert "information_generation" in shares_of(None, titles, written=True)
    assert missing("review_understanding", titles, False) == (
        "sentiment needs reviews with text, sentiment; rating needs reviews with text, rating"
    )
    with pytest.raises(UserError, match="families.classification: the tables do not hold .*category"):
        shares_of({"classification": 1}, titles, written=False)
    with pytest.raises(UserError, match="did you mean 'classification'"):
        shares_of({"clasification": 1}, titles, written=False)


def test_columns_of_two_tables_do_not_add_up_to_a_task() -> None:
    """A price here and a category there make no recommendation."""
    held = {"products": [{"title", "price"}, {"title", "category"}], "reviews": [], "pairs": [], "queries": []}
    assert "within_budget" not in {task.name for task in tasks_for(held, written=False)}
    assert "within_budget" in {
        task.name for task in tasks_for({**held, "products": [{"title", "price", "category"}]}, False)
    }


def test_ditto_pairs_are_pairs_and_products(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt.gz"
    left = "COL title VAL acme kettle COL maker VAL acme COL price VAL 12.5"
    with gzip.open(path, "wt") as file:
        file.write(f"{left} \tCOL title VAL kettle COL maker VAL  COL price VAL \t1\n{left}\t{left}\t0\n")
    named = {"rows": str(path), "columns": {"brand": "maker"}}
    tables = read_tables(TablesConfig(products=[named], pairs=[{"rows": str(path)}]))
    assert [(p.title, p.brand, p.price) for p in tables.products] == [
        ("acme kettle", "acme", Decimal("12.5")), ("kettle", None, None),
    ]  # fmt: skip
    assert [(p.left["title"], p.right, p.label) for p in tables.pairs] == [
        ("acme kettle", {"title": "kettle"}, True),
        ("acme kettle", {"title": "acme kettle", "maker": "acme", "price": "12.5"}, False),
    ]


@pytest.mark.parametrize(
    ("text", "table", "message"),
    [
        ("title,price\nkettle,cheap\n", {}, r"products.csv:2: price 'cheap' is not an amount of money"),
        ("title,price\nkettle\n", {}, r"products.csv:2: 2 columns expected"),
        (
            "name,price\nkettle,1\n",
            {},
            r"no column 'title'; name it by columns: \{title: \.\.\.\}, it has: name, price",
        ),
        ("title\nkettle\n", {"columns": {"brand": "maker"}}, r"no column 'maker' \(brand\)"),
        ("title\nkettle\n", {"columns": {"brnd": "maker"}}, r"unknown column 'brnd'; did you mean 'brand'"),
        ("title,attributes\nkettle,red\n", {}, r"products.csv:2: attributes must be a JSON object"),
        ("title\n", {}, "holds no rows"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, text: str, table: dict[str, Any], message: str) -> None:
    (tmp_path / "products.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_tables(TablesConfig(products=[{"rows": str(tmp_path / "products.csv"), **table}]))


def test_prices_are_read_as_their_language_writes_them_and_repeats_count_once(tmp_path: Path) -> None:
    path = tmp_path / "products.csv"
    path.write_text("title,price\nkettle,Rp 12.500\nkettle,Rp 12.500\nrake,\npuzzle,0\n")
    found = read_tables(TablesConfig(products=[{"rows": str(path), "values": {"language": "id"}}])).products
    assert [(p.title, p.price) for p in found] == [("kettle", Decimal(12500)), ("rake", None), ("puzzle", None)]
