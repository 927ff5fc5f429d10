"""Chat rendering: messages to token ids, with a mask over the tokens that the assistant wrote.

The template of the models we make is ChatML. A model of the hub keeps its own template.
"""

import bisect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from alignment.errors import UserError
from alignment.fingerprint import value_hash

Messages = list[dict[str, Any]]
Options = Mapping[str, Any]  # of a chat template
R = TypeVar("R")

TURN_START, TURN_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK_START, THINK_END = "<think>", "</think>"
ADD_MARKS = "add {% generation %} marks to the chat template"

THINKING_PROMPT = f"Think step by step between {THINK_START} and {THINK_END}, then answer."

TOOLS_BEFORE = "# Tools\\n\\nCall functions where they help. Their signatures:\\n<tools>"
TOOLS_BEHIND = (
    "\\n</tools>\\n\\nWrite each call as a JSON object:\\n"
    '<tool_call>\\n{"name": <function name>, "arguments": <arguments as an object>}\\n</tool_call>'
)

# `enable_thinking` adds THINKING_PROMPT to the system turn, where it is not there yet, and `tools` their signatures.
# Calls are written as Hermes and Qwen write them, which vLLM reads (`--tool-call-parser hermes`). Turns before the last
# user's lose their thinking; the model did not write them so, hence they are not trained. The stop token belongs to
# what the assistant wrote, so it is trained; the newline after it is not.
CHATML = (
    "{%- set thinking = '" + THINKING_PROMPT + "' if enable_thinking is defined and enable_thinking else '' -%}"
    "{%- set last = namespace(user=-1) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set head = namespace(parts=[messages[0]['content']] if messages[0]['role'] == 'system' else []) -%}"
    "{%- if thinking and thinking not in head.parts | join -%}"
    "{%- set head.parts = head.parts + [thinking] -%}"
    "{%- endif -%}"
    "{%- if tools -%}"
    "{%- set listed = namespace(text='') -%}"
    "{%- for tool in tools -%}{%- set listed.text = listed.text + '\\n' + tool | tojson -%}{%- endfor -%}"
    "{%- set head.parts = head.parts + ['" + TOOLS_BEFORE + "' + listed.text + '" + TOOLS_BEHIND + "'] -%}"
    "{%- endif -%}"
    "{%- if head.parts -%}{{- '<|im_start|>system\\n' + head.parts | join('\\n\\n') + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if not (loop.first and message['role'] == 'system') -%}"
    "{%- set said = namespace(text=message['content'] or '') -%}"
    "{%- set past = message['role'] == 'assistant' and loop.index0 < last.user and '</think>' in said.text -%}"
    "{%- if past -%}{%- set said.text = said.text.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- set function = call['function'] -%}"
    "{%- set said.text = said.text + ('\\n' if said.text else '') + '<tool_call>\\n{\"name\": ' -%}"
    "{%- set said.text = said.text + function['name'] | tojson + ', \"arguments\": ' -%}"
    "{%- set said.text = said.text + function['arguments'] | tojson + '}\\n</tool_call>' -%}"
    "{%- endfor -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' and not past -%}"
    "{%- generation -%}{{- said.text + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- said.text + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation and, beside each, whether the assistant wrote it."""

    input_ids: list[int]
    assistant_mask: list[bool]


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives the chat template besides its messages: its `chat_template_kwargs`, and its `tools`."""
    options = dict(row.get("chat_template_kwargs") or {})
    return options | {"tools": row["tools"]} if row.get("tools") else options


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> Rendered:
    """Render a whole conversation; see `render_all`."""
    return render_all(tokenizer, [messages], [options])[0]


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], options: Sequence[Options] = ()
) -> list[Rendered]:
    """Render whole conversations, tokenized together: many at once are far faster than one by one.

    The mask comes from the template's `{% generation %}` marks where it has them, else from the difference between
    each assistant turn's prefix and its end. `options` are those of the template, as `enable_thinking` and `tools`, of
    each conversation; none where there are none.

    Raises:
        UserError: no chat template, one that refuses a conversation or has no place for its tools, or one without
            marks whose prefixes change as the conversation grows.
    """
    way = _render_by_marks if _has_marks(str(tokenizer.chat_template)) else _render_by_prefix
    return _by_options(way, tokenizer, conversations, options)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> list[int]:
    """Token ids of a conversation, ending where the assistant is to answer. Options as `enable_thinking`."""
    return render_prompts(tokenizer, [messages], [options])[0]


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], options: Sequence[Options] = ()
) -> list[list[int]]:
    """`render_prompt` of each, tokenized together: far faster than one by one."""
    return _by_options(_render_prompts, tokenizer, conversations, options)


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


def _by_options(
    way: Callable[[PreTrainedTokenizerBase, Sequence[Messages], Options], list[R]],
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    options: Sequence[Options],
) -> list[R]:
    """Each conversation rendered: those with the same options together, in one group where none has any."""
    groups: dict[str, list[int]] = {}
    for index, each in enumerate(options or [{}] * len(conversations)):
        groups.setdefault(json.dumps(each, default=str), []).append(index)
    found: dict[int, R] = {}
    for group in groups.values():
        chosen = dict(options[group[0]]) if options else {}
        calling = [[_with_calls_as_objects(message) for message in conversations[index]] for index in group]
        _check_place(tokenizer, calling, chosen)
        found |= zip(group, way(tokenizer, calling, chosen), strict=True)
    return [found[index] for index in range(len(conversations))]


def _with_calls_as_objects(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI writes a call's arguments as JSON text; the template gets objects of either, as vLLM gives it."""
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    objects = [
        f | {"arguments": json.loads(f["arguments"])} if isinstance(f["arguments"], str) else f for f in functions
    ]
    return message | {"tool_calls": [{"type": "function", "function": function} for function in objects]}


def _check_place(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], options: Options) -> None:
    """Tools and calls that a template does not know it leaves out without a word."""
    used = {"tools"} if options.get("tools") else set()
    used |= {"tool_calls" for messages in conversations for message in messages if message.get("tool_calls")}
    for name in sorted(used):
        if not re.search(rf"\b{name}\b", str(tokenizer.chat_template)):
            raise UserError(f"{tokenizer.name_or_path}: its chat template has no place for a row's {name!r}")


def _render_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], options: Options
) -> list[list[int]]:
    texts = _texts(tokenizer, conversations, add_generation_prompt=True, **options)
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


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


def _render_by_marks(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], options: Options
) -> list[Rendered]:
    """What `apply_chat_template(return_assistant_tokens_mask=True)` gives; its search for tokens is slow."""
    render_texts = cast(Any, render_jinja_template)  # it is typed to return a str
    with _template_of(tokenizer):
        texts, marks = render_texts(
            list(conversations),
            chat_template=tokenizer.get_chat_template(tools=options.get("tools")),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
            **options,
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


def _render_by_prefix(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], options: Options
) -> list[Rendered]:
    if any(messages[0]["role"] == "assistant" for messages in conversations):
        raise UserError(f"{tokenizer.name_or_path}: nothing comes before the assistant's first turn; {ADD_MARKS}")
    turns = [
        (messages, index)
        for messages in conversations
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    befores = _texts(tokenizer, [messages[:index] for messages, index in turns], add_generation_prompt=True, **options)
    afters = _texts(tokenizer, [messages[: index + 1] for messages, index in turns], **options)
    wholes = _texts(tokenizer, conversations, **options)
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
