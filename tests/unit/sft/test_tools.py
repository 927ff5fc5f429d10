"""A row's `tools` and `chat_template_kwargs` reach the template wherever it is rendered: SFT, rewards, preferences."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment import chat
from alignment.errors import UserError
from alignment.rows import Row, located_rows, write_rows
from sft import rendering

TOOLS = [{"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}]
CALL: Row = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "price", "arguments": '{"item":"shirt"}'}}],
}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "3 shirts?"},
    CALL,
    {"role": "tool", "content": "12.5"},
    {"role": "assistant", "content": "37.5"},
]
OPTIONS = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}}


def rendered(path: Path, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Any]:
    write_rows(path, rows)
    chunks = rendering.chunks(str(path), located_rows(path, "messages"))
    return [row for batch in rendering.render(chunks, tokenizer, workers=1) for row in batch.to_pylist()]


def test_sft_trains_the_call_and_reads_the_tools(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with_tools, bare = rendered(
        tmp_path / "rows.jsonl", tiny_tokenizer, [{"messages": TURNS, **OPTIONS}, {"messages": TURNS}]
    )
    text = tiny_tokenizer.decode(with_tools["input_ids"])
    assert chat.THINKING_PROMPT in text and '"name": "price", "parameters"' in text
    assert with_tools["length"] > bare["length"]
    for row in (with_tools, bare):
        kept = [i for i, trained in zip(row["input_ids"], row["trained"], strict=True) if trained]
        call = '<tool_call>\n{"name": "price", "arguments": {"item": "shirt"}}\n</tool_call>'
        assert tiny_tokenizer.decode(kept) == f"{call}{chat.TURN_END}37.5{chat.TURN_END}"
        assert row["reason"] is None


def test_a_template_without_tools_is_refused_with_the_row(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tiny_tokenizer, "chat_template", "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    )
    rows = [{"messages": [TURNS[0], TURNS[-1]]}, {"messages": [TURNS[0], TURNS[-1]], "tools": TOOLS}]
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*its chat template has no place for a row's 'tools'"):
        rendered(tmp_path / "rows.jsonl", tiny_tokenizer, rows)
