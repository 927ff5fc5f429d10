"""Train an adapter on for new rows without losing what it knows, and put it in use if it has lost nothing.

    python -m sft.update_adapter --config configs/sft/update_adapter.yaml
    alignment adapters rollback runs/adapters/id

The loss is that of the new rows, plus beta times that of replayed past rows, plus elastic weight consolidation
(sft.update_trainer, sft.ewc). The gate (sft.gate) then compares held-out losses before and after: an update that helps
and harms no group of old rows becomes the shelf's newest version and the one in use (alignment.versions); another ends
with `accepted: false`, stays in `output_dir/adapter` for inspection, and the version in use stays.

Writes `output_dir/adapter` (a peft folder), gate.json, replay.json (how many rows each group gave), ledger.json and
rejects.jsonl of the new rows, anchor.safetensors (the weights before and their Fisher information) and start.json (the
version that it started from).

Runs as one process.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig as TRLConfig

from alignment import adapters, atomic, attention, job, models, training, versions
from alignment.apportion import stratified
from alignment.errors import UserError, did_you_mean
from alignment.fingerprint import weights_hash
from alignment.rows import first_rows, local_inputs, read_rows
from alignment.versions import Version
from sft import data, ewc, gate
from sft.cache import TokenizedRows, prepare_source
from sft.config import UpdateConfig
from sft.mixture import Mixture, mix, write_rejects
from sft.update_trainer import UpdateTrainer, trained_parameters

ALL = "all"  # the group of rows that are not told apart
REPLAY, FISHER = 1, 2  # draws from the past, each by its own seed


@dataclass(frozen=True)
class Held:
    """Rows of which the usable ones are numbered, with the group of each of these."""

    rows: TokenizedRows
    usable: list[int]
    groups: list[str]

    def draw(self, count: int, seed: Sequence[int]) -> list[int]:
        """Usable rows whose groups keep their shares."""
        return [self.usable[place] for place in stratified(self.groups, count, np.random.default_rng(seed))]


@dataclass(frozen=True)
class Sources:
    """All rows of the run, tokenized."""

    mixture: Mixture  # the new rows
    past: Held
    old: Held
    new: Held


def run(config: UpdateConfig) -> None:
    _check_ranks()
    rows = (config.rows, config.past.rows, config.gate.old, config.gate.new)
    inputs = local_inputs(*rows, *filter(None, (config.model.path, config.model.tokenizer)))
    with job.Job.open("sft.update_adapter", config, inputs) as this:
        if this.done:
            return
        tokenizer = models.load_tokenizer(config.model)
        sources = _read(config, tokenizer)
        start = _start(this, config)
        written = this.dir / "adapter"
        if not (written / adapters.WEIGHTS).is_file():
            anchor = _anchor(this, config, start, sources.past, tokenizer)
            _train(this, config, start, sources, anchor, tokenizer)
        atomic.write_json(this.dir / "replay.json", _replayed(config, sources.past))
        verdict = _judge(config, start, written, sources, tokenizer)
        atomic.write_json(this.dir / "gate.json", verdict.as_dict())
        version = _publish(this, config, start) if verdict.accepted else start
        print(f"sft.update_adapter: {_outcome(verdict, version)}", flush=True)
        trained = json.loads((this.dir / "train.json").read_text(encoding="utf-8"))
        this.finish(trained | _metrics(verdict, version) | _account(this, sources.mixture))


def _check_ranks() -> None:
    if training.world_size() > 1:
        raise UserError("sft.update_adapter runs as one process; start it with `python -m sft.update_adapter`")


def _read(config: UpdateConfig, tokenizer: PreTrainedTokenizerBase) -> Sources:
    """
    Raises:
        UserError: no usable row, or a held-out group with too few of them.
    """
    new = TokenizedRows([prepare_source(config.rows, tokenizer, config.prepare)])
    mixture = mix(config.training_on(config.rows), new)
    past = _hold(config, config.past.rows, config.past.by, tokenizer)
    old = _hold(config, config.gate.old, config.gate.by, tokenizer)
    held = _hold(config, config.gate.new, None, tokenizer)
    _check_sizes("gate.old", config.gate.old, old)
    _check_sizes("gate.new", config.gate.new, held)
    return Sources(mixture, past, old, held)


def _hold(config: UpdateConfig, source: str, by: str | None, tokenizer: PreTrainedTokenizerBase) -> Held:
    rows = TokenizedRows([prepare_source(source, tokenizer, config.prepare)])
    usable = np.flatnonzero((rows.reasons == 0) & (rows.lengths <= config.packing.capacity)).tolist()
    if not usable:
        raise UserError(f"{source}: no row has something to train within packing.capacity {config.packing.capacity}")
    groups = [ALL] * len(rows) if by is None else [_group(row, by, source) for row in read_rows(source, "messages")]
    return Held(rows, usable, [groups[row] for row in usable])


def _group(row: dict[str, Any], by: str, source: str) -> str:
    if row.get(by) is None:
        raise UserError(f"{source}: a row has no {by!r}{did_you_mean(by, row)}")
    return str(row[by])


def _check_sizes(key: str, source: str, held: Held) -> None:
    for group, count in Counter(held.groups).items():
        if count < gate.MINIMUM_ROWS:
            raise UserError(
                f"{key}: {source}: group {group!r} has {count} usable rows, expected {gate.MINIMUM_ROWS} or more"
            )


def _start(this: job.Job, config: UpdateConfig) -> Version:
    """The version that this run starts from, the same when it is resumed."""
    path = this.dir / "start.json"
    if path.exists():
        return versions.version(config.shelf, json.loads(path.read_text(encoding="utf-8"))["version"])
    with versions.locked(config.shelf):
        start = _in_use(config)
        versions.use(config.shelf, start)
    atomic.write_json(path, {"version": start.number, "hash": start.hash})
    return start


def _in_use(config: UpdateConfig) -> Version:
    current = versions.current(config.shelf)
    if current is None and config.adapter is None:
        raise UserError(f"{config.shelf}: holds no adapter yet; name the first one as 'adapter'")
    if current is None:
        assert config.adapter is not None
        return versions.add(config.shelf, config.adapter, None, {"from": str(config.adapter)})
    if config.adapter is not None:
        adapters.check_adapter_folder(config.adapter)
        if weights_hash(config.adapter) != current.hash:
            raise UserError(
                f"adapter: {config.adapter} is not what {config.shelf} has in use, version {current.number}\n"
                "leave 'adapter' out to start from that, or name another shelf"
            )
    return current


def _load(config: UpdateConfig, folder: Any, tokenizer: PreTrainedTokenizerBase, *, trainable: bool) -> PeftModel:
    attention.register()
    model = models.load_model(config.model, tokenizer, seed=config.seed, attn_implementation=attention.SEGMENTS)
    return adapters.put_on(model, folder, str(config.model.path), trainable=trainable)


def _anchor(
    this: job.Job, config: UpdateConfig, start: Version, past: Held, tokenizer: PreTrainedTokenizerBase
) -> ewc.Anchor | None:
    """The weights before and their Fisher information, worked out once for a run."""
    if not config.ewc.weight:
        return None
    path = this.dir / "anchor.safetensors"
    if not path.exists():
        model = _load(config, start.folder, tokenizer, trainable=True).eval()
        generator = torch.Generator().manual_seed(config.seed)
        rows = (past.rows.take([row]) for row in past.draw(config.ewc.rows, [config.seed, FISHER]))
        weights = trained_parameters(model)
        fisher = ewc.diagonal_fisher(
            weights,
            (ewc.drawn_log_likelihood(model, *row, tokenizer.pad_token_id, generator) for row in rows),
        )
        ewc.Anchor({name: weight.detach() for name, weight in weights.items()}, fisher).save(path)
    return ewc.Anchor.load(path)


def _train(
    this: job.Job,
    config: UpdateConfig,
    start: Version,
    sources: Sources,
    anchor: ewc.Anchor | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plan = data.plan_packs(sources.mixture, config.packing, config.training.accumulation, config.seed)
    trainer = UpdateTrainer(
        model=_load(config, start.folder, tokenizer, trainable=True),
        args=_arguments(this, config),
        packs=data.PackedRows(sources.mixture.rows, plan, config.packing.limit, tokenizer.pad_token_id),
        processing_class=tokenizer,
        replay=_replay(config, sources.past, tokenizer.pad_token_id),
        replay_weight=config.replay.weight,
        anchor=anchor,
        anchor_weight=config.ewc.weight,
    )
    atomic.write_json(this.dir / "train.json", training.train(trainer, this))
    with atomic.replacing_folder(this.dir / "adapter") as folder:
        trainer.save_model(str(folder))


def _replay_rows(config: UpdateConfig, past: Held) -> list[list[int]]:
    """Of each epoch: drawn anew, for few rows that come again and again are learnt by heart."""
    count = round(config.replay.share * len(past.usable))
    return [past.draw(count, [config.seed, REPLAY, epoch]) for epoch in range(config.training.epochs)]


def _replay(config: UpdateConfig, past: Held, pad_id: int) -> data.PackedRows | None:
    """Packs of the replayed rows, which training takes in turns."""
    draws = [np.array(drawn, np.int64) for drawn in _replay_rows(config, past)]
    if not len(draws[0]) or not config.replay.weight:
        return None
    generators = [np.random.default_rng([config.seed, REPLAY])] * len(draws)  # one, which goes on
    plan = data.plan_epochs(past.rows.lengths, draws, config.packing, 1, generators)
    return data.PackedRows(past.rows, plan, None, pad_id)


def _replayed(config: UpdateConfig, past: Held) -> dict[str, dict[str, int]]:
    """Of each group its past rows and those drawn, the same rows of several epochs once."""
    group_of = dict(zip(past.usable, past.groups, strict=True))
    drawn = Counter(group_of[row] for row in set(chain.from_iterable(_replay_rows(config, past))))
    return {group: {"past": count, "drawn": drawn[group]} for group, count in Counter(past.groups).items()}


def _arguments(this: job.Job, config: UpdateConfig) -> TRLConfig:
    """The plan already holds every epoch, so the trainer walks it once."""
    return training.training_arguments(
        TRLConfig,
        this,
        config.training.model_copy(update={"epochs": 1}),
        config.model.dtype,
        per_device_train_batch_size=1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,
    )


def _judge(
    config: UpdateConfig, start: Version, written: Any, sources: Sources, tokenizer: PreTrainedTokenizerBase
) -> gate.Verdict:
    """Held-out losses of the two adapters as they are on disk."""
    found = []
    for name, folder in (("before", start.folder), ("after", written)):
        model = _load(config, folder, tokenizer, trainable=False)
        found.append(
            [
                gate.row_losses(model, held.rows, held.usable, tokenizer.pad_token_id, f"gate: {what} rows {name}")
                for what, held in (("new", sources.new), ("old", sources.old))
            ]
        )
        del model
    (new_before, old_before), (new_after, old_after) = found
    return gate.judge((new_before, new_after), (old_before, old_after), sources.old.groups, config.gate.limit)


def _publish(this: job.Job, config: UpdateConfig, start: Version) -> Version:
    """The accepted adapter as the newest version, in use.

    Raises:
        UserError: another version was put in use meanwhile.
    """
    with versions.locked(config.shelf):
        current = versions.current(config.shelf)
        version = versions.add(config.shelf, this.dir / "adapter", start, {"from": str(this.dir)})
        if current is None or current.number not in (start.number, version.number):
            number = None if current is None else current.number
            raise UserError(
                f"{config.shelf}: version {number} is in use by now; this update was made from {start.number}\n"
                f"it is there as version {version.number}; `alignment adapters rollback {config.shelf} --to N` chooses"
            )
        versions.use(config.shelf, version)
    return version


def _outcome(verdict: gate.Verdict, version: Version) -> str:
    if verdict.accepted:
        return f"accepted as version {version.number}, now in use"
    return f"refused, version {version.number} stays in use\n  " + "\n  ".join(verdict.refusals)


def _metrics(verdict: gate.Verdict, version: Version) -> dict[str, Any]:
    worst = max(verdict.old.values(), key=lambda change: change.rise.high)
    return {
        "accepted": verdict.accepted,
        "version": version.number,
        "version.hash": version.hash,
        "new.before": verdict.new.before,
        "new.after": verdict.new.after,
        **verdict.new.rise.as_metrics("new.rise"),
        **{f"old.{group}.before": change.before for group, change in verdict.old.items()},
        **{f"old.{group}.after": change.after for group, change in verdict.old.items()},
        **worst.rise.as_metrics("old.largest_rise"),
    }


def _account(this: job.Job, mixture: Mixture) -> dict[str, int]:
    """Write where every new row went; returns the counts."""
    mixture.ledger.write(this.dir / "ledger.json")
    write_rejects(mixture, this.dir / "rejects.jsonl")
    return {f"rows.{key}": value for key, value in mixture.ledger.as_dict().items() if isinstance(value, int)}


def plan(config: UpdateConfig) -> list[str]:
    _check_ranks()
    models.check_model(config.model)
    for source, by in (
        (config.rows, None),
        (config.past.rows, config.past.by),
        (config.gate.old, config.gate.by),
        (config.gate.new, None),
    ):
        for row in first_rows(source, "messages"):
            if by is not None:
                _group(row, by, source)
    start = versions.current(config.shelf)
    if start is None and config.adapter is None:
        raise UserError(f"{config.shelf}: holds no adapter yet; name the first one as 'adapter'")
    if config.adapter is not None:
        adapters.check_adapter_folder(config.adapter)
    return [
        f"model: {config.model.path}",
        f"start: {config.adapter if start is None else f'version {start.number} of {config.shelf}'}",
        f"new rows: {config.rows}",
        f"replay: {config.replay.share:.0%} of {config.past.rows}, weight {config.replay.weight:g}; "
        f"elastic weight consolidation: {config.ewc.weight:g}",
        f"gate: no group of {config.gate.old} may lose more than {config.gate.limit:g} nats a token",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(UpdateConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
