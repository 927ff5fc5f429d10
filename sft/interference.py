"""What every adapter does to every language: held-out losses against the base's and against the joint adapter's.

A row's loss is the mean of -log p over its trained tokens, in nats (as in sft.gate); exp(loss) is the perplexity, and
exp(change) the factor of it. Changes are paired row by row; each interval is a 95% one for its own cell, so of 100
cells without any effect about five lie beside 0.

Shapes: R rows.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignment import adapters, atomic, attention, models
from alignment.errors import UserError
from alignment.rows import located_rows
from alignment.stats import Interval, paired_interval
from sft import by_language, gate
from sft.cache import TokenizedRows, prepare_source
from sft.config import BASE, JOINT, SFTSettings
from sft.gate import Losses


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows that can be measured, and the language of each."""

    rows: TokenizedRows
    usable: list[int]
    languages: list[str]


@dataclass(frozen=True)
class Cell:
    """A model on a language; the joint adapter is missing where none was trained."""

    rows: int
    loss: float
    over_base: Interval
    over_joint: Interval | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


Matrix = dict[str, dict[str, Cell]]  # model -> language


def held_out(source: str, settings: SFTSettings, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """
    Raises:
        UserError: a row without a language, or a language with too few usable rows.
    """
    rows = TokenizedRows([prepare_source(source, tokenizer, settings.prepare)])
    usable = np.flatnonzero((rows.reasons == 0) & (rows.lengths <= settings.packing.capacity)).tolist()
    languages = [by_language.given_language(row, where) for where, row in located_rows(source, "messages")]
    of_usable = [languages[row] for row in usable]
    for language in sorted(set(languages)):
        if of_usable.count(language) < gate.MINIMUM_ROWS:
            raise UserError(
                f"evaluation: {source}: {language} has {of_usable.count(language)} usable rows, expected "
                f"{gate.MINIMUM_ROWS} or more"
            )
    return HeldOut(rows, usable, of_usable)


def measure(
    settings: SFTSettings,
    folders: Mapping[str, Path],
    held: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    kept: Path,
) -> dict[str, Losses]:
    """The loss of every row under the base and under each adapter; those in the folder `kept` are not worked out again.

    Args:
        folders: name -> the adapter's folder.
    """
    found = {}
    for name, folder in {BASE: None, **folders}.items():
        path = kept / f"{name}.json"
        if not path.exists():
            losses_R = _losses(settings, name, folder, held, tokenizer)
            atomic.write_json(path, losses_R.tolist())
        found[name] = np.array(json.loads(path.read_text(encoding="utf-8")))
    return found


def _losses(
    settings: SFTSettings, name: str, folder: Path | None, held: HeldOut, tokenizer: PreTrainedTokenizerBase
) -> Losses:
    attention.register()
    model = models.load_model(settings.model, tokenizer, seed=0, attn_implementation=attention.SEGMENTS)
    measured = model if folder is None else adapters.put_on(model, folder, str(settings.model.path))
    return gate.row_losses(measured, held.rows, held.usable, tokenizer.pad_token_id, f"interference: {name}")


def matrix(losses: Mapping[str, Losses], languages: Sequence[str]) -> Matrix:
    """Every model on every language; `languages` are those of the rows."""
    of_row = np.array(languages)

    def cell(name: str, language: str) -> Cell:
        base, own = (losses[model][of_row == language] for model in (BASE, name))
        joint = losses[JOINT][of_row == language] if JOINT in losses else None
        return Cell(
            len(own),
            float(own.mean()),
            paired_interval(base.tolist(), own.tolist()),
            None if joint is None else paired_interval(joint.tolist(), own.tolist()),
        )

    return {name: {language: cell(name, language) for language in sorted(set(languages))} for name in losses}


def foreign(found: Matrix, groups: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, Cell]]:
    """The cells of the groups' adapters on languages that are not theirs."""
    for name, members in groups.items():
        for language, cell in found[name].items():
            if language not in members:
                yield name, language, cell


def table(found: Matrix, groups: Mapping[str, Sequence[str]]) -> str:
    """Markdown: the perplexities, and the changes with their intervals; an adapter's own languages are in bold."""
    perplexities = {
        name: {where: f"{cell.perplexity:.4g}" for where, cell in row.items()} for name, row in found.items()
    }
    lines = ["Perplexity on held-out rows, each row counting the same:", "", *_grid(found, perplexities, groups)]
    for other in filter(found.__contains__, (BASE, JOINT)):
        changes = {
            name: {where: shown(change(cell, other)) for where, cell in row.items()}
            for name, row in found.items()
            if name != other
        }
        lines += ["", f"Change of the loss against {other}, in nats a token, with 95% intervals:", ""]
        lines += _grid(found, changes, groups)
    return "\n".join([*lines, ""])


def change(cell: Cell, other: str) -> Interval:
    """The change of the loss against BASE or JOINT."""
    found = cell.over_joint if other == JOINT else cell.over_base
    assert found is not None
    return found


def shown(found: Interval) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _grid(found: Matrix, texts: Mapping[str, Mapping[str, str]], groups: Mapping[str, Sequence[str]]) -> list[str]:
    header = [f"{language} ({cell.rows} rows)" for language, cell in found[BASE].items()]
    rows = [["model", *header], ["---"] * (1 + len(header))]
    for name, row in texts.items():
        rows.append([name, *(f"**{text}**" if where in groups.get(name, ()) else text for where, text in row.items())])
    return [f"| {' | '.join(row)} |" for row in rows]


def as_metrics(found: Matrix, groups: Mapping[str, Sequence[str]]) -> dict[str, float | int]:
    """MODEL.LANGUAGE.loss, perplexity, over_base and over_joint; how many of the foreign cells are harmed for sure."""
    metrics: dict[str, float | int] = {}
    for name, row in found.items():
        for language, cell in row.items():
            key = f"{name}.{language}"
            metrics |= {f"{key}.rows": cell.rows, f"{key}.loss": cell.loss, f"{key}.perplexity": cell.perplexity}
            metrics |= cell.over_base.as_metrics(f"{key}.over_base") if name != BASE else {}
            metrics |= change(cell, JOINT).as_metrics(f"{key}.over_joint") if JOINT in found and name != JOINT else {}
    others = list(foreign(found, groups))
    harmed = sum(cell.over_base.low > 0 for _, _, cell in others)
    return metrics | {"interference.foreign": len(others), "interference.harmed": harmed}
