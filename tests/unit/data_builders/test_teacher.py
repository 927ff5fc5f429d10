"""A teacher's answers: each way to fail, and which good one is taken."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment.languages import detector
from alignment.rollout.sampling import Chunk
from alignment.rollout.store import Completion
from alignment.verify import Verdict, Verifier
from data_builders.teacher import Judge, Judged, choose, opens

LANGUAGES = ["en", "id", "th"]
QUESTION = "Three shirts cost 37.5 dollars together. How much does one shirt cost?"
THINKING, SUMMARY = "37.5 / 3 = 12.5", "One shirt costs 12.5 dollars. Answer: \\boxed{12.5}"
GOOD = f"<think>\n{THINKING}\n</think>\n{SUMMARY}"


def query(**changes: Any) -> dict[str, Any]:
    row = {"id": "q", "language": "en", "prompt": [{"role": "user", "content": QUESTION}], "answer": "12.5"}
    return {key: value for key, value in (row | changes).items() if value is not None}


def chunk(row: dict[str, Any], *texts: str, reason: Any = "stop") -> Chunk:
    samples = [Completion("q", i, 0, [], text, reason, math.nan) for i, text in enumerate(texts)]
    return Chunk("0", [{"id": "q", "prompt": row["prompt"], "query": row}], [samples or None])


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=1) as verifier:
        yield verifier


@pytest.fixture
def judge(verifier: Verifier, tiny_tokenizer: PreTrainedTokenizerFast) -> Judge:
    return Judge(verifier, detector(LANGUAGES), LANGUAGES, tiny_tokenizer, opened=False)


def reasons(judge: Judge, *texts: str, reason: Any = "stop", **changes: Any) -> list[str | None]:
    [answers] = judge(chunk(query(**changes), *texts, reason=reason))
    assert answers.samples is not None
    return [sample.reason for sample in answers.samples]


def test_a_good_answer_is_written_in_one_form_and_measured(
    judge: Judge, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    [answers] = judge(chunk(query(), f"  <think>{THINKING}</think>\n\n\n{SUMMARY}\n", "<think>no"))
    assert answers.language == "en" and answers.samples is not None
    count = {
        text: len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (GOOD, THINKING, SUMMARY)
    }
    broken = Judged(1, "<think>no", "thinking not closed", 1 + len(tiny_tokenizer("<think>no")["input_ids"]))
    assert answers.samples == [Judged(0, GOOD, None, 1 + count[GOOD], count[THINKING], count[SUMMARY]), broken]


def test_every_reason(judge: Judge) -> None:
    wrong = GOOD.replace("{12.5}", "{12}")
    indonesian = f"<think>\n{THINKING}\n</think>\nSatu baju harganya 12.5 dolar saja, jadi jawabannya \\boxed{{12.5}}"
    unstated = "<think>\n\\boxed{12.5}\n</think>\nAs I said above."
    texts = [GOOD, SUMMARY, "<think>\n3", f"{GOOD} {GOOD}", unstated, wrong, indonesian, GOOD.replace(" / ", "\ufffd")]
    assert reasons(judge, *texts) == [
        None, "no thinking", "thinking not closed", "not one block of thinking", "no answer in the summary",
        "wrong answer", "summary in id", "broken characters",
    ]  # fmt: skip
    assert reasons(judge, GOOD, reason="length") == ["cut off"]
    assert reasons(judge, "http://a:1/v1: 400: too long", reason="refused") == ["refused"]
    assert reasons(judge, GOOD, answer=" ") == ["bad gold"]
    assert judge(chunk(query()))[0].samples is None, "too long for the teacher"


def test_what_cannot_be_verified_is_not_called_wrong(
    judge: Judge, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verdict in (Verdict.TIMEOUT, Verdict.ERROR):
        monkeypatch.setattr(verifier, "verify_many", lambda claims, verdict=verdict: [verdict for _ in claims])
        assert reasons(judge, GOOD, "no") == [verdict.value, "no thinking"]


def test_the_summary_alone_is_verified(judge: Judge) -> None:
    """The right answer in the thinking does not help, a wrong one there does no harm."""
    assert reasons(
        judge,
        "<think>\n\\boxed{12.5}\n</think>\nOne shirt costs \\boxed{13} dollars.",
        "<think>\n\\boxed{13}? No.\n</think>\nOne shirt costs \\boxed{12.5} dollars.",
    ) == ["wrong answer", None]


def test_languages_in_doubt_pass_and_are_counted(judge: Judge) -> None:
    bare = f"<think>\n{THINKING}\n</think>\n\\boxed{{12.5}}"
    assert reasons(judge, bare, GOOD) == [None, None]
    assert judge.counts["language_undetermined"] == 1
    assert reasons(judge, GOOD, language="sw") == [None], "a language that is not looked for"
    assert judge.counts["language_undetermined"] == 2


def test_the_language_of_a_query_is_found_where_it_is_not_given(judge: Judge) -> None:
    thai = [{"role": "user", "content": "เสื้อสามตัวราคา 37.5 บาท เสื้อหนึ่งตัวราคาเท่าไร"}]
    [answers] = judge(chunk(query(language=None, prompt=thai), GOOD, GOOD.replace("One shirt costs", "เสื้อหนึ่งตัวราคา")))
    assert answers.language == "th" and answers.samples is not None
    assert [sample.reason for sample in answers.samples] == ["summary in en", None]


def test_numbers_are_read_as_the_language_writes_them(judge: Judge) -> None:
    comma = "<think>\nx\n</think>\nHarga satu baju itu adalah dua belas ribu rupiah: \\boxed{12.500}"
    assert reasons(judge, comma, language="id", answer="12500") == [None]


def test_a_template_that_opens_the_thinking(
    judge: Judge, verifier: Verifier, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    begun = GOOD.removeprefix("<think>\n")
    assert reasons(judge, begun) == ["not one block of thinking"]
    opened = Judge(verifier, detector(LANGUAGES), LANGUAGES, tiny_tokenizer, opened=True)
    [answers] = opened(chunk(query(), begun, GOOD, SUMMARY))
    assert answers.samples is not None and answers.samples[0].text == answers.samples[1].text == GOOD
    assert answers.samples[2].reason == "no thinking" and opened.counts["opened_by_the_prompt"] == 1

    prompt = {"prompt": [{"role": "user", "content": "?"}], "chat_template_kwargs": {"enable_thinking": True}}
    assert not opens(tiny_tokenizer, prompt)
    template = str(tiny_tokenizer.chat_template)
    try:
        tiny_tokenizer.chat_template = template + "{{- '<think>\\n' -}}"
        assert opens(tiny_tokenizer, prompt)
    finally:
        tiny_tokenizer.chat_template = template


def test_which_good_answers_are_kept() -> None:
    samples = [
        Judged(0, "a", "wrong answer", 2),
        Judged(1, "bbb", None, 5),
        Judged(2, "c", None, 3),
        Judged(3, "bbb", None, 5),
        Judged(4, "d", None, 3),
    ]
    assert [s.index for s in choose(samples, "shortest")] == [2]
    assert [s.index for s in choose(samples, "first")] == [1]
    assert [s.index for s in choose(samples, "all")] == [1, 2, 4]
    assert choose(samples[:1], "shortest") == choose(samples[:1], "first") == choose(samples[:1], "all") == []
