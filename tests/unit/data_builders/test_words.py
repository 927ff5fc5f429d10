import pytest

from data_builders.words import is_number, normalised, renumbered, tokens, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Natalia sold 1,000 of HER clips!", "natalia sold 1000 of her clips"),
        (r"$\frac{1}{2}x$ at 3.5%", "frac 1 2 x at 3.5"),
        ("小明有5个苹果。", "小 明 有 5 个 苹 果"),
        ("ราคา 25 บาท", "ร า ค า 25 บ า ท"),
        ("Ｆｕｌｌ ｗｉｄｔｈ　５", "full width 5"),
        ("naïve café", "naïve café"),
        ("1,2,3", "1,2,3"),
        ("+ - 😀", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert " ".join(words(text)) == expected


def test_operators_tell_texts_apart_and_punctuation_does_not() -> None:
    assert normalised("What is 5+3?") == normalised("what  is\n5+3") != normalised("What is 5-3?")
    assert normalised('He said: "no".') == "he said no"
    assert normalised("3.5") == "3.5" and normalised("f(x), g(x)") == "f(x) g(x)"
    assert normalised("Is 5! = n! odd!") == "is 5! = n! odd" and normalised("好，我们 走！") == "好 我们 走!"
    assert normalised("?..") == "?..", "what is nothing but punctuation stays"
    assert renumbered(normalised("3 of 1,200.50 for $7.")) == "0 of 0 for $0"


def test_tokens_are_words_and_signs() -> None:
    assert tokens("C++ is 5-3, or C?") == ["c", "+", "+", "is", "5", "-", "3", "or", "c"]


def test_a_number_is_a_word_that_begins_with_a_digit_of_any_script() -> None:
    assert [is_number(word) for word in words("five 5 ٣ x2 2x")] == [False, True, True, False, True, True, False]
