"""One round of online training: sample, judge, pair, train, load, evaluate. Every part that is there already is kept.

A round's folder: samples/, graded/, pairs.jsonl, rejects.jsonl, ledger.json, by_prompt.jsonl (each prompt's verdicts),
counts.json (once all of these are whole), train/ (a dpo.train job, with model/), evaluation/, and last metrics.json.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment import atomic, chat, launch, models
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.evaluate import by_prompt, evaluate
from alignment.fingerprint import weights_hash
from alignment.grading import read_graded
from alignment.ledger import Ledger
from alignment.rows import Row, read_rows, write_rows
from data_builders.pairs import CORRECT, INCORRECT
from data_builders.preferences import PairWriter, build, origin_of
from dpo.config import DPOConfig, OnlineConfig
from dpo.drawing import Seen
from dpo.likelihood import Answer, divergence
from dpo.policies import Policies

Numbers = dict[str, float | int]

KL_PROMPTS = 64  # of the evaluation: one answer each is taken


def run_round(
    policies: Policies,
    config: OnlineConfig,
    policy: Path,
    prompts: Sequence[Row],
    held_out: Sequence[Row],
    folder: Path,
    seed: int,
) -> Numbers | None:
    """Train `policy` on pairs of its own samples of `prompts`, and evaluate what came out.

    Returns the metrics; None where no prompt gave a pair.

    Raises:
        UserError: the pairs that are there are another policy's.
        job.RankFailed: the training failed; its message has been printed.
    """
    done = folder / "metrics.json"
    if done.exists():
        return _numbers(done)
    counts = _pair(policies, config, policy, prompts, folder, seed)
    if not counts["pairs"]:
        return None
    check_origin(folder / "pairs.jsonl", policy)
    policies.release()
    retokenized = _train(config, policy, folder, seed)
    trained = folder / "train" / "model"
    engine = policies.engine_with(trained, prompts)
    evaluated = evaluate(
        engine, trained, held_out, evaluation_sampling(config), config.engine, config.seed, folder / "evaluation"
    )
    found: Numbers = {
        **{f"sampling.{key}" if key in evaluated else key: value for key, value in counts.items()},
        **evaluated,
        "train_pass_rate": counts.get("pass_rate", 0.0),
        "logprob_gap": policies.gap,
        "pairs.retokenized": retokenized,
        **kl_to_initial(config, folder / "evaluation", held_out),
    }
    atomic.write_json(done, found)
    return found


def evaluation_sampling(config: OnlineConfig) -> Any:
    return config.sampling.model_copy(update={"n": config.evaluation.n})


def kl_to_initial(config: OnlineConfig, evaluation: Path, held_out: Sequence[Row]) -> dict[str, float]:
    """How far the evaluated policy is from the first one: the first answer to each of the first prompts."""
    tokenizer = models.load_tokenizer(ModelConfig(path=config.model))
    prompts = {
        row["id"]: chat.render_prompt(tokenizer, row["prompt"], **chat.template_options(row)) for row in held_out
    }
    graded = zip(range(KL_PROMPTS), read_graded(evaluation / "graded.parquet"), strict=False)
    first = [(prompts[name], samples[0]) for _, (name, samples) in graded]
    answers = [Answer(prompt, s.token_ids, s.logprob) for prompt, s in first]
    return divergence(answers, Path(config.model), config.dtype).as_metrics()


def seen_in(folder: Path) -> dict[str, Seen]:
    """The verdicts of a round on its prompts, those with an answer: correct ones, and all that count either way."""
    counted = {row["id"]: row["verdicts"] for row in read_rows(folder / "by_prompt.jsonl")}
    found = {name: _seen(verdicts) for name, verdicts in counted.items()}
    return {name: seen for name, seen in found.items() if seen.n}


def _seen(verdicts: Mapping[str, int]) -> Seen:
    correct = verdicts.get(CORRECT, 0)
    return Seen(correct, correct + sum(verdicts.get(name, 0) for name in INCORRECT))


def check_origin(pairs: Path, policy: Path) -> None:
    """Refuse pairs that another policy sampled: the loss takes their log-probabilities for its own at the start."""
    expected = weights_hash(policy)
    for row in read_rows(pairs, "preference"):
        if row.get("weights") != expected:
            raise UserError(
                f"{pairs}: row {row.get('id')} was sampled by weights {row.get('weights')}, not by those of {policy}, "
                f"{expected}\ndelete the round's folder to sample it again"
            )


def _pair(
    policies: Policies, config: OnlineConfig, policy: Path, prompts: Sequence[Row], folder: Path, seed: int
) -> Numbers:
    """Sample, judge and pair the round's prompts. Returns the counts, which are kept in counts.json."""
    kept = folder / "counts.json"
    if kept.exists():
        return _numbers(kept)
    began = time.monotonic()
    tokenizer = models.load_tokenizer(ModelConfig(path=str(policy)))
    engine = policies.engine_with(policy, prompts)
    writer = PairWriter(folder, config.pairing, 0.0, seed, Ledger(), origin_of(engine, tokenizer))
    counts = build(engine, tokenizer, prompts, config, folder, writer, seed=seed, total=len(prompts))
    write_rows(folder / "by_prompt.jsonl", by_prompt(folder / "graded", prompts))
    seen = seen_in(folder).values()
    counts |= {"prompts.both_verdicts": sum(0 < s.correct < s.n for s in seen) / len(seen)} if seen else {}
    counts |= {"sampling_seconds": time.monotonic() - began}
    atomic.write_json(kept, counts)
    return counts


def training_settings(config: OnlineConfig, policy: Path, folder: Path, seed: int) -> DPOConfig:
    """The config of a round's dpo.train job."""
    reference = {"reference": {"model": config.model}} if config.reference == "initial" else {}
    adapter = {"lora": config.lora} if config.lora is not None else {}
    return DPOConfig.model_validate(
        {
            "output_dir": folder / "train",
            "seed": seed,
            "model": ModelConfig(path=str(policy), dtype=config.dtype),
            "rows": str(folder / "pairs.jsonl"),
            "loss": config.loss,
            "batch_size": config.batch_size,
            "max_length": config.engine.max_model_len,
            "training": config.training,
            **reference,
            **adapter,
        }
    )


def _train(config: OnlineConfig, policy: Path, folder: Path, seed: int) -> int:
    """Run the round's dpo.train job as a command of its own. Returns the pairs whose text had to be tokenized anew."""
    settings = training_settings(config, policy, folder, seed)
    path = folder / "train.yaml"
    atomic.write_text(path, settings.as_yaml())
    launch.run_job("dpo.train", path, config.accelerate)
    ledger = json.loads((folder / "train" / "ledger.json").read_text(encoding="utf-8"))
    return int(ledger["retokenized"])


def _numbers(path: Path) -> Numbers:
    return dict(json.loads(path.read_text(encoding="utf-8")))
