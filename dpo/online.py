"""Online preference training: rounds of sample, verify, score, pair, train, load and evaluate.

    python -m dpo.online --config configs/dpo/demo-online.yaml

Round k samples from the policy that round k - 1 left behind, pairs the samples (data_builders.pairs) and trains on
them with a `dpo.train` job of its own, on the ranks of `accelerate` where that is given (dpo.rounds). One vLLM engine
lives through all rounds and takes each round's weights; none is believed before its log-probabilities are those of
transformers (dpo.policies). From round 2 on, prompts are drawn by what their samples were (dpo.drawing).

Writes a folder for each round (dpo.rounds), `baseline/` where the config names none, and `model`, a link to the model
of the round that is kept (dpo.stopping). A killed run goes on where it was.
"""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from alignment import job, launch, models, training
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.evaluate import check_room, evaluate, pass_rate, read_prompts
from alignment.rollout import place
from alignment.rows import Row, local_inputs, read_rows
from alignment.stats import Interval, paired_interval
from data_builders.preferences import measured, rule
from dpo.checks import check_loss
from dpo.config import OnlineConfig
from dpo.drawing import Seen, draw_prompts
from dpo.policies import Policies
from dpo.rounds import Numbers, evaluation_sampling, run_round, seen_in, training_settings
from dpo.stopping import Decision, decide


def run(config: OnlineConfig) -> None:
    inputs = local_inputs(config.model, config.prompts, config.evaluation.prompts, *config.reward_models)
    with job.Job.open("dpo.online", config, inputs) as this, Policies(config) as policies:
        if this.done:
            return
        prompts = list(read_rows(config.prompts, "prompt"))
        held_out = read_prompts(config.evaluation.prompts)
        baseline = _baseline(policies, config, this.dir, held_out)
        before = _pass_rates(baseline)
        metrics: Numbers = {}
        decision, stopped_by = Decision(None, 0, 0), "rounds"
        seen: dict[str, Seen] = {}
        accuracies, kls = [sum(before.values()) / len(before)], [0.0]
        for number in range(1, config.rounds + 1):
            folder = this.dir / f"round_{number}"
            policy = _model_of(number - 1, config, this.dir)
            drawn = draw_prompts(
                prompts, config.round.prompts, number, config.seed, redraw=config.round.redraw, seen=seen
            )
            found = run_round(policies, config, policy, drawn, held_out, folder, config.seed + number)
            if found is None and number == 1:
                raise UserError(f"{folder}: no prompt gave a pair; rejects.jsonl says why")
            if found is None:
                stopped_by = "no pairs"
                break
            seen |= seen_in(folder)
            accuracies.append(found["pass_at_1"])
            kls.append(found["kl"])
            decision = decide(accuracies, kls, config.stop)
            found |= _change(before, baseline, folder / "evaluation") | {"rounds_without_gain": decision.without_gain}
            this.rewind(number - 1)
            this.log(step=number, **found)
            metrics |= {f"round_{number}.{key}": value for key, value in found.items()}
            print(
                f"round {number}: pass@1 {found['pass_at_1']:.1%}, change {found['change']:+.1%}, KL {found['kl']:.2f}",
                flush=True,
            )
            if decision.stop is not None:
                stopped_by = decision.stop
                break
        _link(this.dir / "model", _model_of(decision.kept, config, this.dir))
        print(f"ended after round {len(kls) - 1} by {stopped_by}; model: of round {decision.kept}", flush=True)
        this.finish({**metrics, "rounds": len(kls) - 1, "stopped_by": stopped_by, "model.round": decision.kept})


def _model_of(number: int, config: OnlineConfig, folder: Path) -> Path:
    """The model that a round left behind; 0 is the starting policy."""
    return folder / f"round_{number}" / "train" / "model" if number else Path(config.model)


def _link(link: Path, target: Path) -> None:
    """Make `link` lead to the folder `target`, by a relative path, so that the run can be moved as a whole."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    temporary.replace(link)


def _baseline(policies: Policies, config: OnlineConfig, folder: Path, held_out: Sequence[Row]) -> Path:
    """The folder of the starting policy's evaluation: the one that the config names, or one made here."""
    if config.evaluation.baseline is not None:
        return Path(config.evaluation.baseline)
    target = folder / "baseline"
    if not (target / "by_prompt.jsonl").exists():
        model = Path(config.model)
        engine = policies.engine_with(model, held_out)
        evaluate(engine, model, held_out, evaluation_sampling(config), config.engine, config.seed, target)
    return target


def _pass_rates(evaluation: Path) -> dict[str, float]:
    return {row["id"]: pass_rate(row) for row in read_rows(evaluation / "by_prompt.jsonl")}


def _change(before: dict[str, float], baseline: Path, evaluation: Path) -> Numbers:
    """The paired change of pass@1 against the starting policy, prompt by prompt."""
    after = _pass_rates(evaluation)
    if before.keys() != after.keys():
        raise UserError(f"{baseline}: evaluated other prompts than {evaluation}; the two cannot be paired")
    change: Interval = paired_interval(list(before.values()), [after[name] for name in before])
    return {**change.as_metrics("change")}


# What is refused before anything runs


def plan(config: OnlineConfig) -> list[str]:
    check_loss(config.loss)
    for folder in (config.model, *config.reward_models):
        models.check_model(ModelConfig(path=folder))
    check_room(config.engine, config.sampling)
    if config.accelerate is not None and not config.accelerate.is_file():
        raise UserError(f"accelerate: {config.accelerate}: no such launcher config")
    prompts = list(read_rows(config.prompts, "prompt"))
    held_out = read_prompts(config.evaluation.prompts)
    _check_disjoint(prompts, held_out, config)
    _check_baseline(held_out, config)
    draw_prompts(prompts, config.round.prompts, 1, config.seed, redraw="uniform", seen={})
    settings = training_settings(config, Path(config.model), config.output_dir / "round_1", config.seed)
    with launch.planned_ranks(config.accelerate):
        ranks, memory = training.world_size(), training.check_parallel(settings.model)
    batch = config.batch_size * ranks * config.training.accumulation
    pairs = config.round.prompts * config.pairing.per_prompt
    samples = config.round.prompts * config.sampling.n
    return [
        f"{config.rounds} rounds of {config.round.prompts} prompts x {config.sampling.n} = {samples} samples, drawn "
        f"{place(config.engine)}",
        f"prompts: {len(prompts)} to draw from, {config.round.redraw}; paired by {rule(config)}",
        f"evaluation: {len(held_out)} prompts x {config.evaluation.n} after each round",
        f"training: {config.loss.type}, at most {pairs} pairs a round, reference {config.reference}",
        f"step: {ranks} ranks x {config.training.accumulation} x {config.batch_size} = {batch} pairs, at most "
        f"{-(-pairs // batch) * config.training.epochs} steps a round",
        *memory,
    ]


def forecast(config: OnlineConfig) -> list[str]:
    """Tokens, time and disk of the sampling of all rounds, from a few prompts sampled and judged for real."""
    held_out = read_prompts(config.evaluation.prompts)
    evaluations = config.rounds + (config.evaluation.baseline is None)
    answers = len(held_out) * config.evaluation.n * evaluations
    prompts = config.rounds * config.round.prompts
    first = islice(read_rows(config.prompts, "prompt"), config.round.prompts)
    return [
        *measured(config, config.model, config.dtype, first, config.seed, prompts),
        f"and {evaluations} evaluations: {answers:,} samples, as many as of {answers / config.sampling.n:,.0f} prompts "
        "more; the training's time is not in it",
    ]


def _check_disjoint(prompts: Sequence[Row], held_out: Sequence[Row], config: OnlineConfig) -> None:
    trained = {str(row["prompt"]) for row in prompts}
    shared = [row["id"] for row in held_out if str(row["prompt"]) in trained]
    if shared:
        raise UserError(
            f"{config.evaluation.prompts}: {len(shared)} prompts are also in {config.prompts}, such as {shared[0]!r}"
        )


def _check_baseline(held_out: Sequence[Row], config: OnlineConfig) -> None:
    baseline = config.evaluation.baseline
    if baseline is None:
        return
    if not (Path(baseline) / "by_prompt.jsonl").is_file():
        raise UserError(f"evaluation.baseline: {baseline}: not an alignment.evaluate run: it has no by_prompt.jsonl")
    found, expected = set(_pass_rates(Path(baseline))), {row["id"] for row in held_out}
    if found != expected:
        raise UserError(
            f"evaluation.baseline: {baseline}: evaluated other prompts than {config.evaluation.prompts}: "
            f"only one of them has {min(found ^ expected)!r}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(OnlineConfig, run, plan, argv, forecast)


if __name__ == "__main__":
    raise SystemExit(main())
