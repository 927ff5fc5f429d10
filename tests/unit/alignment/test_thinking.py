import copy

import pytest
from transformers import PreTrainedTokenizerFast

from alignment.errors import UserError
from alignment.thinking import Mode, check_switch, in_mode, obeys

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
    tools = {"chat_template_kwargs": {"tools": [{"name": "price"}]}}
    assert in_mode(row | tools, mode)["chat_template_kwargs"] == tools["chat_template_kwargs"] | {
        "enable_thinking": switch
    }


def test_a_template_without_the_switch_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    check_switch(tiny_tokenizer)
    deaf = copy.deepcopy(tiny_tokenizer)
    deaf.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="the chat template has no switch between fast and deep"):
        check_switch(deaf)
