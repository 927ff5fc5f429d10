"""What the assistant wrote is trained, and its stop: kinds of conversations, in both modes, under three templates.

What each template makes of a turn is written down here; the trained tokens are decoded, run by run, and compared.
"""

import copy
import json
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment import chat, tokenizer
from alignment.errors import UserError

# As Qwen writes tools, without marks: masks come from prefixes.
CHATML = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if not (loop.first and message.role == 'system') %}"
    "<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}\n"
    "{% if message.role == 'tool' %}<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% else %}{{ message.content or '' }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ '\n' if not loop.first or message.content }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3 does: headers, a system turn always, contents trimmed, a call in place of content, a tool named ipython.
LLAMA = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ messages[0].content | trim if messages[0].role == 'system' else 'Be helpful.' }}"
    "{% for tool in tools or [] %}\n\n{{ tool | tojson }}{% endfor %}<|eot_id|>"
    "{% for message in messages %}{% if not (loop.first and message.role == 'system') %}<|start_header_id|>"
    "{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>\n\n"
    "{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ message.content | trim }}{% endif %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEMPLATES = {"ours": chat.CHATML, "chatml": CHATML, "llama": LLAMA}

TOOLS = [
    {"type": "function", "function": {"name": "price", "parameters": {"properties": {"item": {"type": "string"}}}}}
]
ARGUMENTS = {"item": "ส้ม 😀", "count": 3}
CALL_TEXT = '<tool_call>\n{"name": "price", "arguments": {"item": "ส้ม 😀", "count": 3}}\n</tool_call>'
LLAMA_CALL_TEXT = '{"name": "price", "parameters": {"item": "ส้ม 😀", "count": 3}}'
THOUGHT = "<think>\nOne and one.\n</think>\n\n"


def turn(role: str, content: str | None, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def calls(content: str | None, arguments: Any = ARGUMENTS) -> dict[str, Any]:
    called = [{"type": "function", "function": {"name": "price", "arguments": arguments}}]
    return turn("assistant", content, tool_calls=called)


@dataclass(frozen=True)
class Case:
    """A conversation and what is trained of it, for each template or, in `every`, for all."""

    turns: list[dict[str, Any]]
    every: list[str] | None = None
    ours: list[str] | None = None
    chatml: list[str] | None = None
    llama: list[str] | None = None
    tools: bool = False

    def trained(self, template: str) -> list[str]:
        found = self.every or getattr(self, template)
        assert found is not None
        return list(found)


USER, ANSWER = turn("user", "1 + 1?"), turn("assistant", "Two. 二 😀")
TOOL_TURNS = [USER, calls(None), turn("tool", "12 baht"), turn("assistant", "It costs 12.")]
CASES = {
    "one turn": Case([USER, ANSWER], ["Two. 二 😀"]),
    "system": Case([turn("system", "Be kind."), USER, ANSWER], ["Two. 二 😀"]),
    "three turns": Case([USER, ANSWER, USER, turn("assistant", "2"), USER, ANSWER], ["Two. 二 😀", "2", "Two. 二 😀"]),
    "empty thinking": Case([USER, turn("assistant", "<think>\n\n</think>\n\nTwo.")], ["<think>\n\n</think>\n\nTwo."]),
    "thinking": Case([USER, ANSWER, USER, turn("assistant", f"{THOUGHT}Two.")], ["Two. 二 😀", f"{THOUGHT}Two."]),
    "earlier thinking": Case(
        [USER, turn("assistant", f"{THOUGHT}Two."), USER, turn("assistant", f"{THOUGHT}Yes.")],
        ours=[f"{THOUGHT}Yes."],  # the model did not write the earlier turn as it stands there
        chatml=[f"{THOUGHT}Two.", f"{THOUGHT}Yes."],
        llama=[f"{THOUGHT}Two.", f"{THOUGHT}Yes."],
    ),
    "tools": Case(
        TOOL_TURNS,
        ours=[CALL_TEXT, "It costs 12."],
        chatml=[CALL_TEXT, "It costs 12."],
        llama=[LLAMA_CALL_TEXT, "It costs 12."],
        tools=True,
    ),
    "thinking, then a call": Case(
        [USER, calls(f"{THOUGHT}Let me look."), *TOOL_TURNS[2:]],
        ours=[f"{THOUGHT}Let me look.\n{CALL_TEXT}", "It costs 12."],
        chatml=[f"{THOUGHT}Let me look.\n{CALL_TEXT}", "It costs 12."],
        llama=[LLAMA_CALL_TEXT, "It costs 12."],
        tools=True,
    ),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One token a byte, and the marks of both kinds."""
    made = {}
    for name, template in TEMPLATES.items():
        words = tokenizer.train(iter(["a"]), vocab_size=300, max_length=4096)
        if name == "llama":
            marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
            words.add_special_tokens({"additional_special_tokens": marks})
            words.bos_token, words.eos_token = marks[0], marks[-1]
        words.chat_template = template
        made[name] = words
    return made


def in_mode(template: str, turns: list[dict[str, Any]], deep: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Ours has a switch; under any template rows that think may have the prompt in their system turn."""
    if template == "ours" or not deep:
        return turns, {"enable_thinking": deep}
    system = turns[0]["content"] + "\n\n" if turns[0]["role"] == "system" else ""
    return [turn("system", system + chat.THINKING_PROMPT), *(t for t in turns if t["role"] != "system")], {}


@pytest.mark.parametrize("deep", [False, True], ids=["fast", "deep"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_the_assistant_wrote_is_trained(
    tokenizers: dict[str, PreTrainedTokenizerFast], template: str, case: Case, deep: bool
) -> None:
    words = tokenizers[template]
    turns, options = in_mode(template, case.turns, deep)
    options |= {"tools": TOOLS} if case.tools else {}
    rendered = chat.render(words, turns, **options)
    # What is trained, run by run.
    tokens = zip(rendered.input_ids, rendered.assistant_mask, strict=True)
    runs = [words.decode([i for i, _ in run]) for trained, run in groupby(tokens, lambda token: token[1]) if trained]
    assert runs == [text + words.eos_token for text in case.trained(template)]
    # The same text as transformers', the tools and the switch in it.
    assert rendered.input_ids == words.apply_chat_template(turns, return_dict=False, **options)
    text = words.decode(rendered.input_ids)
    assert (chat.THINKING_PROMPT in text) is deep
    assert (json.dumps(TOOLS[0]) in text) is case.tools
    # And what is sampled from is what training saw before each answer.
    prompt = chat.render_prompt(words, turns[:-1], **options)
    assert rendered.input_ids[: len(prompt)] == prompt
    completion = chat.render_completion(words, turns[-1]["content"])
    assert rendered.input_ids[len(prompt) :][: len(completion)] == completion


@pytest.mark.parametrize("template", TEMPLATES)
def test_arguments_as_json_text_are_what_they_are_as_an_object(
    tokenizers: dict[str, PreTrainedTokenizerFast], template: str
) -> None:
    """OpenAI's rows have text, with any spacing."""
    words, turns = tokenizers[template], copy.deepcopy(TOOL_TURNS)
    turns[1] = calls(None, json.dumps(ARGUMENTS, separators=(",", ":")))
    assert chat.render(words, turns, tools=TOOLS) == chat.render(words, TOOL_TURNS, tools=TOOLS)


def test_rows_of_several_options_in_one_batch(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    words = tokenizers["ours"]
    rows: list[dict[str, Any]] = [
        {"messages": TOOL_TURNS, "tools": TOOLS},
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [USER, ANSWER], "tools": [], "chat_template_kwargs": None},
        {"messages": TOOL_TURNS, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}},
    ]
    options = [chat.template_options(row) for row in rows]
    together = chat.render_all(words, [row["messages"] for row in rows], options)
    assert together == [chat.render(words, row["messages"], **each) for row, each in zip(rows, options, strict=True)]
    assert together[1] == together[3]
    assert len({tuple(rendered.input_ids) for rendered in together}) == 4
    prompts = chat.render_prompts(words, [row["messages"][:1] for row in rows], options)
    assert prompts == [chat.render_prompt(words, [USER], **each) for each in options]


@pytest.mark.parametrize(
    ("turns", "tools", "named"),
    [([USER, ANSWER], TOOLS, "tools"), (TOOL_TURNS, [], "tool_calls")],
    ids=["tools", "calls"],
)
def test_a_template_without_a_place_for_tools_is_refused(
    tokenizers: dict[str, PreTrainedTokenizerFast], turns: list[dict[str, Any]], tools: list[Any], named: str
) -> None:
    words = copy.deepcopy(tokenizers["ours"])
    words.chat_template = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    for call in (chat.render, chat.render_prompt):
        with pytest.raises(UserError, match=f"its chat template has no place for a row's '{named}'"):
            call(words, turns, tools=tools)
