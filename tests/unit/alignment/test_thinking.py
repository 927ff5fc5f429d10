import pytest

from alignment.thinking import Mode, in_mode, obeys

WHOLE, EMPTY, CUT = "<think>\na\n</think>\nb", "<think>\n\n</think>\n\nb", "<think>\na"


@pytest.mark.parametrize(
    ("text", "deep", "fast"),
    [
        (WHOLE, True, False),
        (CUT, True, False),
        (f"\n {WHOLE}", True, False),
        (EMPTY, False, True),
        ("b", False, True),
        ("", False, True),
        (f"b {WHOLE}", False, False),
        ("a</think>b", False, False),
    ],
)
def test_who_obeys(text: str, deep: bool, fast: bool) -> None:
    assert (obeys(text, "deep"), obeys(text, "fast")) == (deep, fast)


@pytest.mark.parametrize(("mode", "switch"), [("deep", True), ("fast", False)])
def test_the_mode_is_the_template_s_switch(mode: Mode, switch: bool) -> None:
    row = {"id": "a", "prompt": [{"role": "user", "content": "?"}]}
    assert in_mode(row, mode) == row | {"chat_template_kwargs": {"enable_thinking": switch}}
    assert "chat_template_kwargs" not in row
