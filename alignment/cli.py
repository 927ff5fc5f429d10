"""The console `alignment`: pipelines, inspection, the state of this machine, exports, evaluation and reports.

Commands import what they need when they run, so that `alignment --help` is quick.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Post-training alignment: run pipelines of jobs, look at models, rows and this machine, evaluate, report.",
)
inspect = typer.Typer(
    no_args_is_help=True,
    help="Look at a model without its weights, at rows as training sees them, at preference pairs with the weights of "
    "their tokens, or at stored samples.",
)
app.add_typer(inspect, name="inspect")
shelf = typer.Typer(no_args_is_help=True, help="An adapter's versions, as sft.update_adapter writes them.")
app.add_typer(shelf, name="adapters")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="STAGE.key=value", help="changes to the stages' configs", show_default=False),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's mistake, 1 ours, 128 + signal."""
    try:
        app(argv, prog_name="alignment")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help="a recipe of configs/pipelines")],
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="run this stage alone")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the stages' commands, run nothing")] = False,
) -> None:
    """Run a pipeline's stages in order, skipping those that are done."""

    def command() -> None:
        from alignment.pipeline import run_pipeline

        run_pipeline(pipeline, only, dry_run, Console(), overrides or ())
        if only is None and not dry_run:
            _report(pipeline, overrides or ())

    _end(command)


@inspect.command("model")
def inspect_model(name: Annotated[str, typer.Argument(help="a preset, a model folder or a hub id")]) -> None:
    """Shape, parameters (total and active) and memory of a model, without reading its weights."""

    def command() -> None:
        from alignment import inspect_model as model

        Console().print(model.table(model.inspect_model(name)))

    _end(command)


@inspect.command("rows")
def inspect_rows(
    file: Annotated[str, typer.Argument(help="a file or folder of rows, or a hub id")],
    tokenizer: Annotated[str | None, typer.Option(metavar="FOLDER", help="show tokens; default: characters")] = None,
    count: Annotated[int, typer.Option(min=0, help="rows to show")] = 3,
) -> None:
    """Rows with what is trained in them marked, and lengths, languages, kinds and anomalies of the whole file."""

    def command() -> None:
        from alignment import inspect_rows as rows
        from alignment import models
        from alignment.config import ModelConfig

        loaded = models.load_tokenizer(ModelConfig(path=tokenizer)) if tokenizer else None
        rows.show(rows.inspect_rows(file, loaded, count), Console())

    _end(command)


@inspect.command(
    "pairs", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def inspect_pairs(context: typer.Context) -> None:
    """Preference pairs with the weight of each token under a model: ROWS --model FOLDER --count 3 --reg 0.1."""

    def command() -> None:
        from alignment import job, launch

        code = launch.run_command(["python", "-m", "dpo.inspect_pairs", *context.args])
        if code:
            raise job.RankFailed(code)

    _end(command)


@inspect.command("samples")
def inspect_samples(
    folder: Annotated[Path, typer.Argument(help="a sample store, or a folder of stores")],
    count: Annotated[int, typer.Option(min=0, help="samples to show of each store")] = 3,
) -> None:
    """What made the samples of a store, how many there are, how they ended, and a few of them."""

    def command() -> None:
        from alignment import inspect_samples as samples

        samples.show(samples.inspect_samples(folder, count), Console())

    _end(command)


@app.command()
def doctor() -> None:
    """What this machine has, what will be used of it, and how to get what is missing."""

    def command() -> None:
        from alignment import doctor as checks
        from alignment.errors import UserError

        found = checks.examine()
        Console().print(checks.table(found))
        if wrong := [check.name for check in found if check.status == "wrong"]:
            raise UserError(f"not ready: {', '.join(wrong)}; the remedies stand above")

    _end(command)


@shelf.command("list")
def list_versions(folder: Annotated[Path, typer.Argument(metavar="SHELF", help="a folder of versions")]) -> None:
    """The versions of an adapter, and which of them is in use."""

    def command() -> None:
        from alignment import versions

        now = versions.current(folder)
        for one in versions.versions(folder):
            mark = "*" if now is not None and one.number == now.number else " "
            typer.echo(f"{mark} {one.number:>3}  {one.hash}  parent {one.parent or '-'}  from {one.facts['from']}")

    _end(command)


@shelf.command()
def rollback(
    folder: Annotated[Path, typer.Argument(metavar="SHELF", help="a folder of versions")],
    to: Annotated[int | None, typer.Option(metavar="N", help="default: the one it was made from")] = None,
) -> None:
    """Use an earlier version of an adapter again, its weights checked; nothing is deleted."""

    def command() -> None:
        from alignment import versions

        chosen = versions.rollback(folder, to)
        typer.echo(f"{folder}: version {chosen.number} is in use again ({chosen.hash})")

    _end(command)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="the model folder or hub id that the adapter was trained on")],
    adapter: Annotated[Path, typer.Argument(help="an adapter's folder")],
    out: Annotated[Path, typer.Argument(help="the model folder to write")],
) -> None:
    """Merge an adapter into its base, and check that the new folder answers as the two do together."""

    def command() -> None:
        from alignment import adapters

        gap = adapters.merge_folders(base, adapter, out)
        typer.echo(f"{out}: log-probabilities differ by {gap.max:.1e} at most, {gap.mean:.1e} on average")

    _end(command)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a training checkpoint or a model folder")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="the model folder to write; it must not exist")],
    check_prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="rows to compare log-probs on; default: tokens drawn at random")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="rows to compare on, at most")] = 32,
    gate: Annotated[float | None, typer.Option(help="largest mean gap allowed, in nats; default: by dtype")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="what to compute in: float32 or bfloat16; default: the weights' own")
    ] = None,
) -> None:
    """Turn a training checkpoint into a model folder, checked token by token against vLLM."""

    def command() -> None:
        from alignment import export as exports

        print(exports.export(source, target, check_prompts, limit, gate, dtype))

    _end(command)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(context: typer.Context) -> None:
    """Accuracy of a model on prompts with answers. Takes what a job takes: --config FILE key=value ... --dry-run."""
    from alignment import evaluate as job

    raise typer.Exit(job.main(context.args))


@app.command()
def report(
    pipeline: Annotated[Path, typer.Argument(help="a recipe of configs/pipelines that has been run")],
    overrides: Overrides = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="also draw the headline figure, a PNG")] = None,
) -> None:
    """Write the HTML report and metrics.json of a pipeline, and print its main results."""

    def command() -> None:
        _report(pipeline, overrides or ())
        if picture is not None:
            from alignment import report as pages

            pages.picture(pipeline, picture, overrides or ())

    _end(command)


def _report(pipeline: Path, overrides: Sequence[str]) -> None:
    from alignment import report as pages

    page = pages.build(pipeline, overrides)
    console = Console()
    console.print(pages.summary(pipeline, overrides))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _end(command: Callable[[], None]) -> None:
    from alignment import job

    raise typer.Exit(job.guarded(command))


if __name__ == "__main__":
    raise SystemExit(main())
