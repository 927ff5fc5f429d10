"""Answers that think: one block of thinking, then a summary; and whether a model obeys the switch of the modes."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from alignment.chat import THINK_END, THINK_START, render_prompt
from alignment.errors import UserError
from alignment.rows import Row

Mode = Literal["fast", "deep"]


@dataclass(frozen=True)
class Thought:
    """An answer in its two parts."""

    thinking: str
    summary: str


@dataclass(frozen=True)
class Fault:
    """Why an answer has not the two parts."""

    reason: str


def parse(text: str) -> Thought | Fault:
    """The two parts of an answer, whitespace around them dropped."""
    starts, ends = text.count(THINK_START), text.count(THINK_END)
    if not starts and not ends:
        return Fault("no thinking")
    if starts > ends:
        return Fault("thinking not closed")
    if (starts, ends) != (1, 1):
        return Fault("not one block of thinking")
    before, _, rest = text.partition(THINK_START)
    thinking, closed, summary = rest.partition(THINK_END)
    if before.strip() or not closed:
        return Fault("text before the thinking")
    if not thinking.strip():
        return Fault("empty thinking")
    return Thought(thinking.strip(), summary.strip()) if summary.strip() else Fault("no summary")


def in_mode(prompt: Row, mode: Mode) -> Row:
    """The prompt with the chat template's switch set; its other options stay."""
    options = prompt.get("chat_template_kwargs") or {}
    return prompt | {"chat_template_kwargs": options | {"enable_thinking": mode == "deep"}}


def check_switch(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that asks both modes the same.

    Raises:
        UserError: it does not read `enable_thinking`.
    """
    prompt = [{"role": "user", "content": "1 + 1?"}]
    fast, deep = (render_prompt(tokenizer, prompt, enable_thinking=thinks) for thinks in (False, True))
    if fast == deep:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template has no switch between fast and deep: a prompt is the same "
            "with enable_thinking and without"
        )


def obeys(text: str, mode: Mode) -> bool:
    """Deep: the answer begins to think before it says anything. Fast: it has no thinking, or an empty block.

    An answer that thinks and is cut off obeys all the same; that it gives no answer is counted as a verdict.
    """
    before, begun, rest = text.partition(THINK_START)
    thought = rest.partition(THINK_END)[0].strip()
    if mode == "deep":
        return bool(begun) and not before.strip() and bool(thought)
    return not thought and THINK_END not in before
