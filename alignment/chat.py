"""Chat rendering: messages to token ids, with a mask over the tokens that the assistant wrote.

The template of the models we make is ChatML. A model of the hub keeps its own template.
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, cast

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from alignment.errors import UserError
from alignment.fingerprint import value_hash

Messages = list[dict[str, Any]]

TURN_START, TURN_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK_START, THINK_END = "<think>", "</think>"
ADD_MARKS = "add {% generation %} marks to the chat template"

THINKING_PROMPT = f"Think step by step between {THINK_START} and {THINK_END}, then answer."

# `enable_thinking` adds THINKING_PROMPT to the system turn, where it is not there yet. Turns before the last user's
# lose their thinking; the model did not write them so, hence they are not trained. The stop token belongs to what the
# assistant wrote, so it is trained; the newline after it is not.
CHATML = (
    "{%- set thinking = '" + THINKING_PROMPT + "' if enable_thinking is defined and enable_thinking else '' -%}"
    "{%- set last = namespace(user=-1) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if thinking and messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n' + thinking + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' and loop.index0 < last.user and '</think>' in message['content'] -%}"
    "{{- message['content'].split('</think>')[-1].lstrip('\\n') + '<|im_end|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] -}}"
    "{%- if loop.first and message['role'] == 'system' and thinking and thinking not in message['content'] -%}"
    "{{- '\\n\\n' + thinking -}}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endif -%}"
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
    """Render a whole conversation; see `render_all`."""
    return render_all(tokenizer, [messages])[0]


def with_thinking(messages: Messages) -> Messages:
    """The conversation with THINKING_PROMPT in its system turn: what CHATML makes of it under `enable_thinking`."""
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": THINKING_PROMPT}, *messages]
    if THINKING_PROMPT in first["content"]:
        return list(messages)
    return [first | {"content": f"{first['content']}\n\n{THINKING_PROMPT}"}, *messages[1:]]


def render_all(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]) -> list[Rendered]:
    """Render whole conversations, tokenized together: many at once are far faster than one by one.

    The mask comes from the template's `{% generation %}` marks where it has them, else from the difference between
    each assistant turn's prefix and its end.

    Raises:
        UserError: no chat template, one that refuses a conversation, or one without marks whose prefixes change as
            the conversation grows.
    """
    if _has_marks(str(tokenizer.chat_template)):
        return _render_by_marks(tokenizer, conversations)
    return _render_by_prefix(tokenizer, conversations)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, **template_options: Any) -> list[int]:
    """Token ids of a conversation, ending where the assistant is to answer. Options as `enable_thinking`."""
    return list(_apply(tokenizer, messages, add_generation_prompt=True, **template_options)["input_ids"])


def render_prompts(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]) -> list[list[int]]:
    """`render_prompt` of each, tokenized together: far faster than one by one."""
    if not conversations:
        return []
    texts = _texts(tokenizer, conversations, add_generation_prompt=True)
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


def stop_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token to end a turn with")
    return int(tokenizer.eos_token_id)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, chat template and stop token: token ids mean the same wherever it is the same."""
    return value_hash([tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.eos_token_id])


def render_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an assistant's answer after `render_prompt`, stop token included."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], stop_token_id(tokenizer)]


def render_completions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`render_completion` of each, tokenized together."""
    if not texts:
        return []
    stop = stop_token_id(tokenizer)
    return [[*ids, stop] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> BatchEncoding:
    with _template_of(tokenizer):
        return cast(BatchEncoding, tokenizer.apply_chat_template(messages, return_dict=True, **options))


@contextmanager
def _template_of(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside the block a template that is missing, or refuses a conversation, is the user's mistake."""
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    try:
        yield
    except TemplateError as error:
        raise UserError(f"{tokenizer.name_or_path}: its chat template refuses a conversation: {error}") from None


@lru_cache
def _has_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _render_by_marks(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]) -> list[Rendered]:
    """What `apply_chat_template(return_assistant_tokens_mask=True)` gives; its search for tokens is slow."""
    render_texts = cast(Any, render_jinja_template)  # it is typed to return a str
    with _template_of(tokenizer):
        texts, marks = render_texts(
            list(conversations),
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    columns = zip(encoded["input_ids"], encoded["offset_mapping"], marks, strict=True)
    return [Rendered(ids, _marked(offsets, spans)) for ids, offsets, spans in columns]


def _marked(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a character of a span; `offsets` are the tokens' first characters and ends."""
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    mask = [False] * len(offsets)
    for start, end in spans:
        first, after = bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
        mask[first:after] = [True] * (after - first)
    return mask


def _render_by_prefix(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages]) -> list[Rendered]:
    if any(messages[0]["role"] == "assistant" for messages in conversations):
        raise UserError(f"{tokenizer.name_or_path}: nothing comes before the assistant's first turn; {ADD_MARKS}")
    turns = [
        (messages, index)
        for messages in conversations
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    befores = _texts(tokenizer, [messages[:index] for messages, index in turns], add_generation_prompt=True)
    afters = _texts(tokenizer, [messages[: index + 1] for messages, index in turns])
    wholes = _texts(tokenizer, conversations)
    different = list(dict.fromkeys([*befores, *afters, *wholes]))  # most often the last turn's end is the whole
    ids = dict(zip(different, tokenizer(different, add_special_tokens=False)["input_ids"], strict=True))
    ends = iter(zip(befores, afters, strict=True))
    rendered = []
    for messages, text in zip(conversations, wholes, strict=True):
        whole = list(ids[text])
        mask = [False] * len(whole)
        for before, after in islice(ends, sum(message["role"] == "assistant" for message in messages)):
            _check_prefix(tokenizer, ids[before], whole)
            _check_prefix(tokenizer, ids[after], whole)
            start = len(ids[before])
            end = _last_stop(ids[after], start, stop_token_id(tokenizer))
            mask[start:end] = [True] * (end - start)
        rendered.append(Rendered(whole, mask))
    return rendered


def _texts(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], **options: Any) -> list[str]:
    if not conversations:
        return []
    with _template_of(tokenizer):
        return cast(list[str], tokenizer.apply_chat_template(list(conversations), tokenize=False, **options))


def _check_prefix(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], whole: Sequence[int]) -> None:
    if list(whole[: len(prefix)]) != list(prefix):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template rewrites earlier turns as a conversation grows, so the "
            f"assistant's tokens cannot be told apart; {ADD_MARKS}"
        )


def _last_stop(ids: Sequence[int], start: int, stop: int) -> int:
    """The end of a turn: after its last stop token, so that a newline behind it is not trained."""
    return max((i + 1 for i in range(start, len(ids)) if ids[i] == stop), default=len(ids))
