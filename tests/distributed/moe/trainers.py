"""One rank of a test: engines and real Trainer runs, many in one launch, each on a DeepSpeed config of its own.

    accelerate launch ... trainers.py OUT CASE...

Each case works in OUT/CASE and writes what it found to OUT/CASE{rank}.json.
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import deepspeed
import gates
import layouts
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed.utils import groups
from torch.utils.data import IterableDataset
from transformers import Ernie4_5_MoeForCausalLM, Trainer, TrainingArguments
from worker import collate, rows, tiny_config

from alignment import training
from alignment.config import JobConfig, TrainingConfig
from alignment.errors import UserError
from alignment.job import Job
from alignment.moe.autoep import install_autoep
from alignment.moe.trainer import ExpertParallelTrainerMixin, ddp_backend

STEPS, SAVE, ROWS = 6, 2, 8
Result = dict[str, Any]


class TinyTrainer(ExpertParallelTrainerMixin, Trainer):
    forwards = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.forwards += 1
        return super().training_step(*args, **kwargs)


def ds_config(ep: int, zero: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 10**9,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": zero},
        "expert_parallel": {"enabled": True, "autoep_size": ep},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
        },
    }


@contextmanager
def launched_with(config: dict[str, Any], folder: Path) -> Iterator[None]:
    """As if this process had been launched with another DeepSpeed config."""
    path = folder / f"ds{dist.get_rank()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    AcceleratorState._reset_state()
    for known in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS,
                  groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS):  # fmt: skip
        known.clear()  # DeepSpeed loads by the largest expert group there is
    yield
    gc.collect()


def make_trainer(
    job: Job, accumulate: int = 2, dataset: Any = None, step_rows: int = ROWS, **arguments: Any
) -> TinyTrainer:
    """The same rows a step, whatever the number of ranks is times `accumulate`."""
    torch.manual_seed(0)
    batch = step_rows // (training.world_size() * accumulate)
    config = TrainingConfig(
        learning_rate=1e-3, adam_epsilon=1e-6, max_grad_norm=0.1, schedule="linear", warmup_share=0.3,
        accumulation=accumulate, save_steps=SAVE, log_steps=1,
    )  # fmt: skip
    args = training.training_arguments(
        TrainingArguments, job, config, "float32", per_device_train_batch_size=batch, **arguments
    )
    args.save_total_limit = None
    return TinyTrainer(
        model=Ernie4_5_MoeForCausalLM(tiny_config()),
        args=args,
        train_dataset=rows(ROWS * STEPS) if dataset is None else dataset,
        eval_dataset=rows(ROWS),
        data_collator=collate,
    )


def run(folder: Path, accumulate: int = 2, **arguments: Any) -> TinyTrainer:
    """A job's training from its last whole checkpoint to its end."""
    with Job.open("test.moe", JobConfig(output_dir=folder)) as job:
        trainer = make_trainer(job, accumulate, **arguments)
        training.train(trainer, job)
        trainer.save_model(str(folder / "model"))
    return trainer


def record(trainer: TinyTrainer) -> Result:
    """What a run did; its engine is given back."""
    cast(Any, trainer).deepspeed.destroy()
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "norms": [float(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line],
        "forwards": trainer.forwards,
    }


def interrupted(whole: Path, folder: Path, at: int) -> Path:
    """A copy of a run as it was when its checkpoint of step `at` had been written."""
    if dist.get_rank() == 0:
        later = [f"checkpoint-{step}" for step in range(at + 1, STEPS + 1)]
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(*later, "model", ".lock"))
        settings = folder / "resolved_config.yaml"
        settings.write_text(settings.read_text().replace(str(whole), str(folder)))
    dist.barrier()
    return folder


def refused(attempt: Callable[[], Any]) -> str:
    """The UserError that an attempt ends in."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return "nothing was refused"


def resumed(
    source: Path, folder: Path, ep: int, zero: int, accumulate: int, at: int = SAVE, **arguments: Any
) -> Result:
    """The run of `source` taken up at step `at`, on this launch's ranks."""
    with launched_with(ds_config(ep, zero), folder):
        return record(run(interrupted(source, folder / "run", at), accumulate, **arguments))


def case_layouts(_: Path) -> Result:
    return layouts.measure()


def case_gates(_: Path) -> Result:
    return gates.measure()


def case_resume(out: Path) -> Result:
    """For each ZeRO stage a run left alone, and one resumed from its first checkpoint on the same layout."""
    results: Result = {}
    for zero in range(4):
        with launched_with(ds_config(2, zero), out):
            results[f"zero{zero}"] = record(run(out / f"zero{zero}"))
        results[f"zero{zero} again"] = resumed(out / f"zero{zero}", out / f"zero{zero}-again", 2, zero, accumulate=2)
    return results


def case_change(out: Path) -> Result:
    """From expert-parallel size 2 on two ranks (case `resume`) to size 1 on two ranks."""
    results: Result = {}
    for zero in (1, 3):
        source = out.parent / "resume" / f"zero{zero}"
        results[f"zero{zero}"] = resumed(source, out / f"zero{zero}", 1, zero, accumulate=2)
    return results


def case_grow(out: Path) -> Result:
    """From expert-parallel size 2 on two ranks to four ranks, and once more from what was saved there."""
    before = out.parent
    return {
        "zero1-ep4": resumed(before / "change" / "zero1" / "run", out / "zero1-ep4", 4, 1, accumulate=1),
        "zero1-ep4 again": resumed(out / "zero1-ep4" / "run", out / "zero1-ep4-again", 4, 1, 1, at=2 * SAVE),
        "zero2-ep2": resumed(before / "resume" / "zero2", out / "zero2-ep2", 2, 2, accumulate=1),
        "zero3-ep4": resumed(before / "change" / "zero3" / "run", out / "zero3-ep4", 4, 3, accumulate=1),
    }


class Endless(IterableDataset[dict[str, list[int]]]):
    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from rows(ROWS)


def case_refused(out: Path) -> Result:
    """What is found out before the first step, on every rank."""
    found: Result = {}
    with launched_with(ds_config(2, 1), out), Job.open("test.moe", JobConfig(output_dir=out / "job")) as job:
        endless = make_trainer(job, dataset=Endless(), max_steps=2)
        found["endless"] = refused(endless.train)
        fewer = rows(ROWS * (1 + dist.get_rank()))
        found["unequal"] = refused(make_trainer(job, dataset=fewer).train)
        trainer = make_trainer(job, per_device_eval_batch_size=2)
        found["unequal evaluation"] = refused(lambda: trainer.get_eval_dataloader(fewer))
    source = out.parent / "resume"
    found["rows"] = refused(lambda: resumed(source / "zero1", out / "rows", 2, 1, accumulate=2, step_rows=4))
    found["stage"] = refused(lambda: resumed(source / "zero1", out / "stage", 2, 2, accumulate=2))
    found["zero0"] = refused(lambda: resumed(source / "zero0", out / "zero0", 1, 0, accumulate=2))
    return found


def case_saves(out: Path) -> Result:
    """Ways to save that end in a whole model, and those that are shut."""
    found: Result = {}
    best = {"eval_strategy": "steps", "eval_steps": SAVE, "load_best_model_at_end": True, "greater_is_better": True}
    for zero in (1, 3):
        with launched_with(ds_config(2, zero), out):
            trainer = run(out / f"best{zero}", metric_for_best_model="loss", per_device_eval_batch_size=2, **best)
            found[f"best{zero}"] = trainer.state.best_global_step
            record(trainer)
    with launched_with(ds_config(2, 1), out):
        trainer = run(out / "only", save_only_model=True)
        engine, folder = cast(Any, trainer).deepspeed, str(out / "half")
        found["shut"] = {
            "save_16bit_model": refused(lambda: engine.save_16bit_model(folder)),
            "save_fp16_model": refused(lambda: engine.save_fp16_model(folder)),
            "_zero3": refused(engine._zero3_consolidated_16bit_state_dict),
            "_consolidated": refused(engine._consolidated_16bit_state_dict),
            "get_state_dict": refused(lambda: trainer.accelerator.get_state_dict(engine)),
            "accelerator.save_model": refused(lambda: trainer.accelerator.save_model(engine, folder)),
            "save_pretrained": refused(lambda: trainer.model.save_pretrained(folder)),
            "_save": refused(lambda: trainer._save(folder)),
        }
        record(trainer)
    return found


def main() -> None:
    out = Path(sys.argv[1])
    ddp_backend()
    deepspeed.init_distributed(dist_backend="gloo")
    install_autoep()
    for case in sys.argv[2:]:
        result = globals()[f"case_{case}"](out / case)
        name = f"layouts-of-{dist.get_world_size()}-" if case == "layouts" else case
        (out / f"{name}{dist.get_rank()}.json").write_text(json.dumps(result, indent=1))
        dist.barrier()


if __name__ == "__main__":
    main()
    training.leave()
