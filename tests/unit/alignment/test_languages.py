import pytest

from alignment.errors import UserError
from alignment.languages import OTHER, detector, without_noise

EIGHT = ["en", "zh", "id", "ms", "th", "vi", "tl", "pt"]
TEXTS = {
    "en": "I bought three shirts and paid in cash.",
    "zh": "今天天气很好，我们去公园散步吧。",
    "id": "Barangnya bagus banget, pengirimannya cepat, terima kasih.",
    "ms": "Kasut ini mahal kerana jenamanya, saya hendak beli esok sahaja.",
    "th": "ฉันซื้อเสื้อสามตัวเมื่อวานนี้",
    "vi": "Tôi đã mua ba cái áo vào ngày hôm qua.",
    "tl": "Bumili ako ng tatlong damit kahapon sa palengke.",
    "pt": "Comprei três camisas ontem e paguei em dinheiro.",
}


@pytest.mark.parametrize("language", EIGHT)
def test_each_language_among_the_others(language: str) -> None:
    found = detector(EIGHT).identify(TEXTS[language])
    assert found.language == language
    assert 0.5 <= found.confidence <= 1
    assert found.against(language) == pytest.approx(1 - found.confidence)
    assert sum(found.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "12 + 5 = 17", "Ok", "`import this`", "iPhone 15", "😀😀"])
def test_too_few_letters_to_tell(text: str) -> None:
    found = detector(EIGHT).identify(text)
    assert (found.language, found.confidence, found.against("en")) == (None, 0.0, 0.0)


def test_doubt_is_said_and_yet_excludes_what_it_is_not() -> None:
    """Words that Malay and Indonesian share: in doubt between the two, and certainly no English."""
    found = detector(EIGHT).identify("Ini kakak saya, itu adik saya")
    assert (found.language, sorted(found.probabilities, key=lambda c: -found.probabilities[c])[:2]) == (
        None,
        ["ms", "id"],
    )
    assert found.against("en") > 0.95 > 0.6 > found.against("id")


@pytest.mark.parametrize("text", ["Привет, как дела?", "こんにちは、お元気ですか", "안녕하세요"])
def test_letters_that_no_language_in_question_writes(text: str) -> None:
    found = detector(EIGHT).identify(text)
    assert (found.language, found.confidence, found.against("en")) == (OTHER, 1.0, 1.0)


def sentences(text: str) -> list[tuple[str | None, str]]:
    return [(sentence.language, sentence.text) for sentence in detector(EIGHT).sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            f"{TEXTS['id']} {TEXTS['en']}\n{TEXTS['tl']}",
            [("id", TEXTS["id"]), ("en", TEXTS["en"]), ("tl", TEXTS["tl"])],
        ),
        ("「你好。」他说。我走了！再见", [("zh", "你好。」"), ("zh", "他说。"), ("zh", "我走了！"), ("zh", "再见")]),
        ("ส่งฟรีไหม ราคา 12.50 บาท\nขอบคุณค่ะ", [("th", "ส่งฟรีไหม"), ("th", "ราคา 12.50 บาท"), ("th", "ขอบคุณค่ะ")]),
        ("ฉันชอบ Samsung Galaxy มาก", [("th", "ฉันชอบ Samsung Galaxy มาก")]),
        ("我喜欢 iPhone 15 Pro Max 手机", [("zh", "我喜欢 iPhone 15 Pro Max 手机")]),
        (f"很贵 {TEXTS['en']}", [("zh", "很贵"), ("en", TEXTS["en"])]),
        ("Tổng là 1.234,5 đồng. Ít hơn hôm qua.", [("vi", "Tổng là 1.234,5 đồng."), ("vi", "Ít hơn hôm qua.")]),
    ],
)  # fmt: skip
def test_sentences_and_parts_in_another_script(text: str, expected: list[tuple[str, str]]) -> None:
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("ms", "Kasut ini memang best kerana murah, seller pun baik, saya hendak order lagi esok."),
        ("tl", "Ang ganda ng product kahit late ang delivery, sana next time mas mabilis sila."),
        ("th", "ราคา sale ถูกมาก แต่ delivery ช้า"),
    ],
)
def test_words_of_english_do_not_make_a_sentence_english(language: str, text: str) -> None:
    found = detector(EIGHT).identify(text)
    assert found.language == language
    assert found.against("en") > 0.8


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a ```python\nfor x in y:\n``` b `c d` e", "a b e"),
        ("a https://b.c/d?e=f。我们 www.g.com, h", "a 。我们 h"),
        ("see x@y.com and @someone now", "see and now"),
        (r"so $x^2$ and \(y\) and \[z\] is \boxed{12} then", "so and and is then"),
        ("it costs $5 or $10 today", "it costs $5 or $10 today"),
        ("<b>bold</b> <think>thought</think> &nbsp; [name](folder/file)", "bold thought [name]"),
        (f"a {'x' * 80} b \ud800 c", "a b c"),
    ],
)
def test_what_says_nothing_of_a_language_is_taken_out(text: str, left: str) -> None:
    assert without_noise(text).split() == left.split()


@pytest.mark.parametrize(
    ("languages", "message"),
    [
        (["en"], "expected two different languages or more, found en"),
        (["en", "en"], "expected two different languages or more, found en, en"),
        ([], "found none"),
        (["en", "EN"], "'EN' is no ISO 639-1 code that can be identified; did you mean 'en'?"),
        (["en", "jv"], "'jv' is no ISO 639-1 code that can be identified"),
    ],
)
def test_languages_that_cannot_be_told_apart(languages: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        detector(languages)


def test_the_order_of_languages_changes_nothing() -> None:
    assert detector(["ms", "en"]) is detector(("en", "ms"))
