"""Preference rows to token ids, the same ids that a policy reads and samples."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignment import chat
from alignment.errors import UserError
from alignment.rows import Row

SCHEMA = pa.schema(
    [
        ("chosen_ids", pa.list_(pa.int32())),  # prompt and answer, as TRL's RewardTrainer takes them
        ("rejected_ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("length", pa.int32()),  # of the longer of the two
        ("same", pa.bool_()),  # whether the two answers are
        ("key", pa.string()),  # the prompt's text, by which prompts are told apart
    ]
)
CHUNK_ROWS = 512


def render(rows: Iterable[tuple[str, Row]], tokenizer: PreTrainedTokenizerBase) -> Iterator[pa.RecordBatch]:
    """Batches of SCHEMA from rows with their places, tokenized many at once; answers end with the stop token.

    Raises:
        UserError: an answer that is not one message of the assistant's, or that the chat template refuses.
    """
    located = iter(rows)
    while chunk := list(islice(located, CHUNK_ROWS)):
        yield _render_chunk(chunk, tokenizer)


def _render_chunk(chunk: Sequence[tuple[str, Row]], tokenizer: PreTrainedTokenizerBase) -> pa.RecordBatch:
    answers = [_answer(row, column, where) for where, row in chunk for column in ("chosen", "rejected")]
    prompts = _prompts(chunk, tokenizer)
    rendered = iter(chat.render_completions(tokenizer, answers))
    pairs = [(prompt, prompt + next(rendered), prompt + next(rendered)) for prompt in prompts]
    columns = {
        "chosen_ids": [chosen for _, chosen, _ in pairs],
        "rejected_ids": [rejected for _, _, rejected in pairs],
        "prompt_tokens": [len(prompt) for prompt, _, _ in pairs],
        "length": [max(len(chosen), len(rejected)) for _, chosen, rejected in pairs],
        "same": [chosen == rejected for _, chosen, rejected in pairs],
        "key": [prompt_key(row["prompt"]) for _, row in chunk],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _prompts(chunk: Sequence[tuple[str, Row]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    try:
        return chat.render_prompts(
            tokenizer, [row["prompt"] for _, row in chunk], [chat.template_options(row) for _, row in chunk]
        )
    except UserError:
        return list(chain.from_iterable(_prompt(where, row, tokenizer) for where, row in chunk))


def _prompt(where: str, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    try:
        return chat.render_prompts(tokenizer, [row["prompt"]], [chat.template_options(row)])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _answer(row: Row, column: str, where: str) -> str:
    messages = row[column]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(f"{where}: {column!r} must be one message of the assistant's; earlier turns belong to 'prompt'")
    return str(messages[0]["content"])


def prompt_key(messages: chat.Messages) -> str:
    """A prompt's text, by which it counts as seen whatever its case and spacing."""
    text = " ".join(f"{message['role']}: {message['content']}" for message in messages)
    return " ".join(text.casefold().split())
