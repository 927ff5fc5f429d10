"""Look at rows as training will see them: tokens beside their loss mask, lengths, and what is odd about them.

    alignment inspect rows rows.jsonl --tokenizer runs/demo/tokenizer/tokenizer --count 3

`inspect_rows` returns data, `show` renders it.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from alignment import chat
from alignment.errors import UserError, did_you_mean
from alignment.progress import track
from alignment.rows import Kind, Row, first_rows, read_rows

BINS = 12
BAR_WIDTH = 40
REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens that one character may take


@dataclass(frozen=True)
class Piece:
    """A token, or the few tokens that share a character, and whether it is trained."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Sample:
    """One conversation to show."""

    name: str
    pieces: list[Piece]


@dataclass
class RowsReport:
    """What a file of rows holds. An anomaly's value is the numbers of its rows, from 1."""

    kind: Kind
    unit: str
    rows: int
    lengths: list[int] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    anomalies: dict[str, list[int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


def inspect_rows(source: str, tokenizer: PreTrainedTokenizerBase | None = None, count: int = 3) -> RowsReport:
    """Walk over all rows of `source`; keep the first `count` to show. A preference row is two conversations.

    Without a tokenizer lengths are characters of content, and what is trained is told by message.

    Raises:
        UserError: rows that no job could read, with file and line.
    """
    kind = _kind(source)
    rows = list(read_rows(source, kind))
    report = RowsReport(kind, "tokens" if tokenizer else "characters", len(rows))
    ids: set[Any] = set()
    for number, row in enumerate(track(rows, len(rows), "rows"), start=1):
        report.languages[str(row.get("language", "-"))] += 1
        report.kinds[str(row.get("kind", "-"))] += 1
        views = {label: _view(row, parts, tokenizer, number) for label, *parts in _conversations(row, kind)}
        report.lengths += [len(view) for view in views.values()]
        faults = {fault for view in views.values() for fault in view.faults()}
        if row.get("id") in ids:
            faults.add("duplicate id")
        ids |= {row["id"]} if "id" in row else set()
        for fault in sorted(faults):
            report.anomalies.setdefault(fault, []).append(number)
        if number <= count:
            name = str(row.get("id", f"row {number}"))
            report.samples += [Sample(f"{name} {label}".strip(), view.pieces()) for label, view in views.items()]
    return report


def _kind(source: str) -> Kind:
    row = first_rows(source, "any", 1)[0]
    kinds: dict[str, Kind] = {"messages": "messages", "chosen": "preference", "prompt": "prompt"}
    for column, kind in kinds.items():
        if column in row:
            return kind
    raise UserError(f"{source}: the first row has none of {', '.join(kinds)}{did_you_mean('messages', row)}")


def _conversations(row: Row, kind: Kind) -> Iterator[tuple[str, chat.Messages, chat.Messages]]:
    """For each conversation of a row: a label, what comes before the trained turns, and what may be trained."""
    match kind:
        case "messages":
            yield "", [], row["messages"]
        case "preference":
            yield "chosen", row["prompt"], row["chosen"]
            yield "rejected", row["prompt"], row["rejected"]
        case _:
            yield "", row["prompt"], []


@dataclass(frozen=True)
class CharacterView:
    """A conversation without a tokenizer."""

    context: chat.Messages
    answer: chat.Messages

    def __len__(self) -> int:
        return sum(len(message["content"]) for message in self.context + self.answer)

    def faults(self) -> Iterator[str]:
        messages = self.context + self.answer
        contents = [message["content"] for message in messages]
        if not all(message["content"].strip() or message.get("tool_calls") for message in messages):
            yield "empty content"
        if any(REPLACEMENT in content for content in contents):
            yield f"replacement character {REPLACEMENT}: the text was decoded wrongly"
        if self.answer and not any(message["role"] == "assistant" for message in self.answer):
            yield "no assistant turn: nothing to train"

    def pieces(self) -> list[Piece]:
        turns = [(m, False) for m in self.context] + [(m, m["role"] == "assistant") for m in self.answer]
        return [
            piece
            for message, trained in turns
            for piece in (Piece(f"{message['role']}: ", False), Piece(message["content"], trained), Piece("\n", False))
        ]


@dataclass(frozen=True)
class TokenView(CharacterView):
    """A conversation as its tokens, rendered as the jobs render it."""

    tokenizer: PreTrainedTokenizerBase
    rendered: chat.Rendered

    def __len__(self) -> int:
        return len(self.rendered.input_ids)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        limit = self.tokenizer.model_max_length
        if len(self) > limit:
            yield f"longer than the tokenizer's model_max_length of {limit} tokens"
        stop = chat.stop_token_id(self.tokenizer)
        stops = sum(kept and token == stop for token, kept in _tokens(self.rendered))
        if stops < sum(message["role"] == "assistant" for message in self.answer):
            yield "an assistant turn whose stop token is not trained"

    def pieces(self) -> list[Piece]:
        """The tokens' texts, each as trained as its last token is."""
        ids, trained = self.rendered.input_ids, self.rendered.assistant_mask
        pieces: list[Piece] = []
        end = 0
        for text, length in text_pieces(self.tokenizer, ids):
            end += length
            pieces.append(Piece(text, trained[end - 1]))
        return pieces


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The text of each token, and 1; tokens that hold parts of one character are one piece, and their number."""
    before: list[int] = []
    held: list[int] = []
    for token in ids:
        held.append(token)
        # Some tokenizers drop a leading space, so a piece is what it adds to the one before it.
        text = str(tokenizer.decode(before + held))[len(str(tokenizer.decode(before))) :]
        if not text.endswith(REPLACEMENT) or len(held) == LONGEST_CHARACTER:
            yield text, len(held)
            before, held = held, []
    if held:
        yield REPLACEMENT, len(held)


def _tokens(rendered: chat.Rendered) -> Iterator[tuple[int, bool]]:
    return zip(rendered.input_ids, rendered.assistant_mask, strict=True)


def _view(
    row: Row, parts: Sequence[chat.Messages], tokenizer: PreTrainedTokenizerBase | None, number: int
) -> CharacterView:
    context, answer = parts
    if tokenizer is None:
        return CharacterView(context, answer)
    try:
        return TokenView(context, answer, tokenizer, _render(context, answer, tokenizer, chat.template_options(row)))
    except UserError as error:
        raise UserError(f"row {number}: {error}") from None


def _render(
    context: chat.Messages, answer: chat.Messages, tokenizer: PreTrainedTokenizerBase, options: chat.Options
) -> chat.Rendered:
    """Tokens and loss mask; the assistant's turns in `context` are not trained."""
    start = chat.render_prompt(tokenizer, context, **options) if context else []
    if not answer:
        return chat.Rendered(start, [False] * len(start))
    whole = chat.render(tokenizer, context + answer, **options)
    mask = [kept and index >= len(start) for index, kept in enumerate(whole.assistant_mask)]
    return chat.Rendered(whole.input_ids, mask)


def show(report: RowsReport, console: Console) -> None:
    """Counts, anomalies and lengths of all rows, then the samples with what is trained marked."""
    console.print(f"{report.rows:,} rows of kind {report.kind!r}", style="bold", highlight=False)
    for name, counts in (("languages", report.languages), ("kinds", report.kinds)):
        listed = ", ".join(f"{key} {count:,}" for key, count in counts.most_common())
        console.print(f"{name}: {listed}", highlight=False, markup=False)
    for anomaly, numbers in report.anomalies.items():
        where = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        text = f"anomaly: {anomaly}: {len(numbers):,} of {report.rows:,} rows: {where}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if not report.anomalies:
        console.print("no anomalies", style="green")
    console.print(_summary(report), highlight=False)
    for line in histogram(report.lengths):
        console.print(line, highlight=False)
    colour = console.color_system is not None and not console.no_color
    for sample in report.samples:
        heading = f"\n-- {sample.name}" + ("" if colour else "   (trained: ⟦...⟧)")
        console.print(heading, style="bold", highlight=False, markup=False)
        console.print(marked(sample.pieces, colour), soft_wrap=True)


def _summary(report: RowsReport) -> str:
    lengths = sorted(report.lengths)
    p95 = lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)]
    middle = f"median {statistics.median(lengths):,.0f}, mean {statistics.fmean(lengths):,.0f}, 95% {p95:,}"
    return f"{report.unit}: {sum(lengths):,} in all; shortest {lengths[0]:,}, {middle}, longest {lengths[-1]:,}"


def histogram(lengths: Sequence[int]) -> list[str]:
    """Bars of at most BINS equal ranges of length, with their counts."""
    low, high = min(lengths), max(lengths)
    width = (high - low) // BINS + 1
    counts = Counter((length - low) // width for length in lengths)
    digits = len(str(low + width * (max(counts) + 1) - 1))
    most = max(counts.values())
    return [
        f"  {low + b * width:>{digits}}-{low + (b + 1) * width - 1:<{digits}} "
        f"{_bar(counts[b], most):<{BAR_WIDTH}} {counts[b]:,}"
        for b in range(max(counts) + 1)
    ]


def _bar(count: int, most: int) -> str:
    return "█" * -(-count * BAR_WIDTH // most)  # rounded up: a bin that holds anything shows


def marked(pieces: Sequence[Piece], colour: bool) -> Text:
    """Trained pieces bold green and the others dim; without colour, runs of trained pieces in ⟦brackets⟧."""
    text = Text()
    for trained, run in groupby(pieces, key=lambda piece: piece.trained):
        body = "▏".join(piece.text.replace("\n", "↵\n") for piece in run)
        opened, closed = ("⟦", "⟧") if trained and not colour else ("", "")
        text.append(opened + body + closed, style="bold green" if trained else "dim")
    text.rstrip()
    return text
