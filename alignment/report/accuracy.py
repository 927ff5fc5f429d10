"""How often each model is right: over all prompts, by language and template, and in samples side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.report import plots
from alignment.report.collect import Collected, Reader, Run, numbers
from alignment.report.page import Answer, Block, Comparison, Figure, Panel, Section, Table
from alignment.report.sources import interval, modes_of
from alignment.report.tables import compare, missing, with_span
from alignment.rows import Row, is_hub_id, read_rows
from alignment.stats import Interval, mean_interval

LANGUAGES = {
    "en": "English", "zh": "Chinese", "id": "Indonesian", "ms": "Malay",
    "th": "Thai", "vi": "Vietnamese", "tl": "Tagalog", "pt": "Portuguese",
}  # fmt: skip
MEASURED = ("pass_at_1", "samples", "verdict", "tokens", "truncated")  # by an evaluation: the first part of the key
VERDICTS = ("correct", "wrong", "no_answer")
LEAST_SAMPLES, MOST_SAMPLES = 4, 8  # prompts shown
MOST_LETTERS = 1500  # of an answer


@dataclass(frozen=True)
class Model:
    """An evaluated model: the folder of its evaluation, and what was measured there."""

    name: str
    run: Run
    metrics: dict[str, Any]

    @property
    def accuracy(self) -> Interval | None:
        return interval(self.metrics, "pass_at_1")


def models(collected: Collected) -> list[Model]:
    """Every evaluated model, in the order of the pipeline: evaluations, and the rounds of online training."""
    found: list[Model] = []
    for stage in collected.of("alignment.evaluate", "dpo.online"):
        if stage.job == "dpo.online":
            found += [Model(r.title, r.evaluation, r.metrics) for r in stage.rounds]
        else:
            found.append(Model(stage.name if found else "SFT", stage.run, stage.run.metrics))
    return [model for model in found if model.accuracy is not None]


def sections(collected: Collected) -> list[Section]:
    stages = [stage for stage in collected.of("alignment.evaluate", "dpo.online") if not modes_of(stage)]
    if not stages:
        return []
    evaluated = models(collected)
    if not evaluated:
        return [Section("Accuracy", "", [missing("evaluation", stages[0])])]
    lead = (
        "pass@1: the share of samples whose final answer equals the gold answer, averaged over prompts. "
        "Intervals are 95%, with the prompt as the unit that is drawn."
    )
    everything = [(model.name, {k: v for k, v in model.metrics.items() if of_evaluation(k)}) for model in evaluated]
    blocks = [
        _overall(evaluated),
        *by_group(evaluated, "language"),
        *by_group(evaluated, "template"),
        compare(everything, fold="Everything that the evaluations measured"),
    ]
    return [Section("Accuracy", lead, blocks), *_samples(evaluated, collected.reader)]


def of_evaluation(key: str) -> bool:
    """Whether a metric of a round was measured by its evaluation, and not in training."""
    return key.partition(".")[0] in MEASURED


def tones(count: int) -> list[float]:
    """From the quiet grey of what came first to the accent of what came last."""
    return [1.0] if count == 1 else [i / (count - 1) for i in range(count)]


def _overall(evaluated: Sequence[Model]) -> Figure:
    estimates = [(model.name, model.accuracy) for model in evaluated if model.accuracy is not None]
    panels = [Panel(lambda width: plots.steps(estimates, width, "pass@1 of each model"), "pass@1 of each model")]
    verdicts = [_verdicts(model.metrics) for model in evaluated]
    names = sorted({name for found in verdicts for name in found}, key=_verdict_order)
    caption = "pass@1 with its interval."
    if names:
        rows = [
            (model.name, [found.get(name, 0.0) for name in names])
            for model, found in zip(evaluated, verdicts, strict=True)
            if found
        ]
        key = [(f"part-{min(i, 3)}", name.replace("_", " ")) for i, name in enumerate(names)]
        label = "Verdicts of each model"
        panels.append(Panel(lambda width: plots.shares(rows, names, width, label), "What the samples were", key))
        caption = (
            "First: pass@1 with its interval. Second: every sample by its verdict; training should turn wrong and "
            "missing answers into correct ones."
        )
    return Figure(panels, caption, columns=2)


def _verdicts(metrics: dict[str, Any]) -> dict[str, float]:
    counts = {key.removeprefix("verdict."): n for key, n in numbers(metrics).items() if key.startswith("verdict.")}
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def _verdict_order(name: str) -> tuple[int, str]:
    return (VERDICTS.index(name), "") if name in VERDICTS else (len(VERDICTS), name)


def by_group(evaluated: Sequence[Model], field: str) -> list[Block]:
    """Dots and a table by language or template, where the prompts have two of them or more."""
    by_model = [_accuracy_of_groups(model.run.prompts, field) for model in evaluated]
    last = by_model[-1]
    shared = [group for group in last if all(group in groups for groups in by_model)]
    if len(shared) < 2:
        return []
    shared.sort(key=lambda group: -last[group].value)
    rows = [(_label(field, group), [groups[group] for groups in by_model]) for group in shared]
    shades = tones(len(evaluated))
    key = [(_swatch(tone), model.name) for model, tone in zip(evaluated, shades, strict=True)]
    caption = (
        f"pass@1 by {field}, ordered by the last model. Each row reads from the first model (grey) to the last. "
        "The thin lines are intervals: where those of two models overlap widely, they do not clearly differ."
    )
    figure = Figure([Panel(lambda width: plots.dots(rows, shades, width, caption), f"By {field}")], caption, key=key)
    cells = [[name, *(with_span(e) for e in estimates)] for name, estimates in rows]
    return [figure, Table([field, *(model.name for model in evaluated)], cells, fold=f"The numbers by {field}")]


def _swatch(tone: float) -> str:
    return "quiet" if tone < 0.25 else "accent" if tone > 0.75 else "middle"


def _label(field: str, group: str) -> str:
    return LANGUAGES.get(group, group) if field == "language" else group.replace("_", " ")


def _accuracy_of_groups(rows: Iterable[Row], field: str) -> dict[str, Interval]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.get(field) and row.get("n"):
            values.setdefault(str(row[field]), []).append(row["correct"] / row["n"])
    return {group: mean_interval(shares) for group, shares in values.items()}


def _samples(evaluated: Sequence[Model], reader: Reader) -> list[Section]:
    blocks = side_by_side(evaluated, evaluated[0].run.config.get("prompts"), reader)
    if not blocks:
        return []
    lead = (
        "Held-out prompts, each answered by every model. Not picked by hand: the first prompts of the file, one of "
        "each language before a second of any, and the first sample that each model drew."
    )
    return [Section("Samples", lead, blocks)]


def side_by_side(evaluated: Sequence[Model], source: Any, reader: Reader) -> list[Comparison]:
    """The first sample of each on the first prompts of every language of `source`: as drawn, not picked."""
    answers = [_first_answers(model.run) for model in evaluated]
    chosen = _first_prompts(evaluated[0].run.prompts, set.intersection(*(set(found) for found in answers)))
    prompts = _find_prompts(source, set(chosen), reader)
    return [
        _comparison(
            prompts.get(id, {}), id, [(model.name, found[id]) for model, found in zip(evaluated, answers, strict=True)]
        )
        for id in chosen
    ]


def _first_answers(run: Run) -> dict[str, Row]:
    names = ["id", "completion", "extracted", "verdict"]
    table = run.reader.columns(run.dir / "graded.parquet", names, [("index", "==", 0)])
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    return {str(row["id"]): row for row in rows}


def _first_prompts(rows: Iterable[Row], answered: set[str]) -> list[str]:
    """Ids of prompts in the order of the file, one of each language before a second of any."""
    by_language: dict[str, list[str]] = {}
    for row in rows:
        if str(row.get("id")) in answered:
            by_language.setdefault(str(row.get("language")), []).append(str(row["id"]))
    turns = zip_longest(*by_language.values())
    count = min(MOST_SAMPLES, max(LEAST_SAMPLES, len(by_language)))
    return [id for turn in turns for id in turn if id is not None][:count]


def _find_prompts(source: Any, wanted: set[str], reader: Reader) -> dict[str, Row]:
    """The rows of the wanted prompts. Prompts of the hub are left alone: a report reaches no network."""
    found: dict[str, Row] = {}
    if not source or is_hub_id(source):
        return found
    try:
        for row in read_rows(Path(source), "prompt"):
            if str(row.get("id")) in wanted:
                found[str(row["id"])] = row
            if len(found) == len(wanted):
                break
    except UserError as error:
        reader.problems.append(str(error))
    return found


def _comparison(prompt: Row, id: str, answers: Sequence[tuple[str, Row]]) -> Comparison:
    language = str(prompt.get("language") or "")
    about = [LANGUAGES.get(language, language), str(prompt.get("template") or "").replace("_", " "), id]
    return Comparison(
        language=language,
        title=" · ".join(filter(None, about)),
        prompt="\n\n".join(message["content"] for message in prompt.get("prompt", []))
        or "(the prompts' file is not here)",
        gold=str(prompt.get("answer") or "unknown"),
        answers=[
            Answer(name, _shortened(row["completion"] or ""), str(row["verdict"]), str(row["extracted"] or ""))
            for name, row in answers
        ],
    )


def _shortened(text: str) -> str:
    more = len(text) - MOST_LETTERS
    return text if more <= 0 else f"{text[:MOST_LETTERS]}\n[{more:,} more letters]"
