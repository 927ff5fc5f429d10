"""Chat rendering: messages to token ids, with a mask over the tokens that the assistant wrote.

The template of the models we make is ChatML. A model of the hub keeps its own template.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from alignment.errors import UserError

Messages = list[dict[str, Any]]

TURN_START, TURN_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK_START, THINK_END = "<think>", "</think>"
ADD_MARKS = "add {% generation %} marks to the chat template"

# The stop token belongs to what the assistant wrote, so it is trained; the newline after it is not.
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation and, beside each, whether the assistant wrote it."""

    input_ids: list[int]
    assistant_mask: list[bool]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Rendered:
    """Render a whole conversation.

    The mask comes from the template's `{% generation %}` marks where it has them, else from the difference between
    each assistant turn's prefix and its end.

    Raises:
        UserError: no chat template, one that refuses the conversation, or one without marks whose prefixes change as
            the conversation grows.
    """
    if _has_marks(str(tokenizer.chat_template)):
        encoded = _apply(tokenizer, messages, return_assistant_tokens_mask=True)
        return Rendered(list(encoded["input_ids"]), [bool(bit) for bit in encoded["assistant_masks"]])
    return _render_by_prefix(tokenizer, messages)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a conversation, ending where the assistant is to answer."""
    return list(_apply(tokenizer, messages, add_generation_prompt=True)["input_ids"])


def stop_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token to end a turn with")
    return int(tokenizer.eos_token_id)


def render_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an assistant's answer after `render_prompt`, stop token included."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], stop_token_id(tokenizer)]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> BatchEncoding:
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    try:
        return cast(BatchEncoding, tokenizer.apply_chat_template(messages, return_dict=True, **options))
    except TemplateError as error:
        raise UserError(f"{tokenizer.name_or_path}: its chat template refuses a conversation: {error}") from None


@lru_cache
def _has_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _render_by_prefix(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Rendered:
    if messages[0]["role"] == "assistant":
        raise UserError(f"{tokenizer.name_or_path}: nothing comes before the assistant's first turn; {ADD_MARKS}")
    whole = list(_apply(tokenizer, messages)["input_ids"])
    mask = [False] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_prompt(tokenizer, messages[:index])
        after = list(_apply(tokenizer, messages[: index + 1])["input_ids"])
        _check_prefix(tokenizer, before, whole)
        _check_prefix(tokenizer, after, whole)
        end = _last_stop(after, len(before), stop_token_id(tokenizer))
        mask[len(before) : end] = [True] * (end - len(before))
    return Rendered(whole, mask)


def _check_prefix(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], whole: Sequence[int]) -> None:
    if list(whole[: len(prefix)]) != list(prefix):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template rewrites earlier turns as a conversation grows, so the "
            f"assistant's tokens cannot be told apart; {ADD_MARKS}"
        )


def _last_stop(ids: Sequence[int], start: int, stop: int) -> int:
    """The end of a turn: after its last stop token, so that a newline behind it is not trained."""
    return max((i + 1 for i in range(start, len(ids)) if ids[i] == stop), default=len(ids))
