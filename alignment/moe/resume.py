"""Resuming a checkpoint on another layout: another number of ranks or another expert-parallel size.

A checkpoint of DeepSpeed's holds what each rank held, so it fits one layout. `ds_to_universal` rewrites it by
parameter, every one whole; any layout takes its share of that. It stands in the checkpoint as `global_stepN_universal`,
beside `global_stepN`.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from transformers import Trainer

from alignment.atomic import replacing_folder, write_json, write_text
from alignment.errors import UserError
from alignment.moe.config import expert_parallel_size, launcher_config, zero_stage

FILE = "layout.json"


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks; `expert_parallel_size` is 0 without, `zero_stage` None without DeepSpeed."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int | None
    rows_per_step: int

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        args = trainer.args
        stage = zero_stage(launcher_config()) if trainer.is_deepspeed_enabled else None
        rows = args.world_size * args.gradient_accumulation_steps * args.per_device_train_batch_size
        return cls(args.world_size, expert_parallel_size(), stage, rows)

    @classmethod
    def read(cls, checkpoint: Path) -> Self | None:
        """The layout that a checkpoint was saved on; None where that was not written down."""
        path = checkpoint / FILE
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def write(self, checkpoint: Path) -> None:
        write_json(checkpoint / FILE, asdict(self))

    def __str__(self) -> str:
        stage = "without DeepSpeed" if self.zero_stage is None else f"ZeRO {self.zero_stage}"
        return f"{self.world_size} ranks, expert-parallel size {self.expert_parallel_size}, {stage}"


def prepare_resume(trainer: Trainer, checkpoint: Path) -> None:
    """Make `checkpoint` loadable on the layout of `trainer`; collective, before `trainer.train`.

    Nothing to do where the layouts are the same. Parameters, optimizer states, schedule and place in the data carry
    over; the states of the random number generators do not, so dropout would draw anew.

    Raises:
        UserError: on every rank, where the run could not go on as it was.
    """
    saved, present = Layout.read(checkpoint), Layout.of(trainer)
    if saved is None or saved == present:
        return
    check_change(saved, present, checkpoint)
    if present.zero_stage is None:
        return  # every rank loads the whole of it
    problem: list[str | None] = [None]
    if trainer.args.process_index == 0:
        print(f"{checkpoint}: from {saved} to {present}", flush=True)
        try:
            convert(checkpoint)
        except subprocess.CalledProcessError as error:  # the other ranks are waiting for a word
            problem = [error.stderr.strip().rpartition("\n")[2]]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(f"{checkpoint}: it could not be converted to another layout: {problem[0]}")
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True


def check_change(saved: Layout, present: Layout, checkpoint: Path) -> None:
    """Raise UserError unless a run can go on from one layout to the other, equal to the one left alone."""
    if saved.rows_per_step != present.rows_per_step:
        raise UserError(
            f"{checkpoint}: a step was {saved.rows_per_step} rows (on {saved}), is {present.rows_per_step} "
            f"(on {present})\n"
            "set training.accumulation so that ranks x accumulation stays the same"
        )
    if saved.zero_stage != present.zero_stage:
        raise UserError(f"{checkpoint}: saved on {saved}; resume with the same ZeRO stage, not on {present}")
    if saved.zero_stage is None:
        return
    if saved.zero_stage == 0:
        raise UserError(
            f"{checkpoint}: saved on {saved}: DeepSpeed cannot convert what ZeRO 0 saves\n"
            f"resume on the same layout, not on {present}"
        )
    if not (saved.expert_parallel_size and present.expert_parallel_size):
        raise UserError(
            f"{checkpoint}: saved on {saved}: the layout changes only between launches with expert parallelism\n"
            'keep it on with {"enabled": true, "autoep_size": 1}'
        )


def convert(checkpoint: Path) -> None:
    """Write the universal form of a checkpoint beside it, whole or not at all; once is enough."""
    tag = (checkpoint / "latest").read_text().strip()
    universal = checkpoint / f"{tag}_universal"
    if not universal.exists():
        with replacing_folder(universal) as folder:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            folders = ["--input_folder", str(checkpoint / tag), "--output_folder", str(folder)]
            subprocess.run([*command, *folders], capture_output=True, text=True, check=True)
    write_text(checkpoint / "latest_universal", universal.name)  # ds_to_universal names the folder that it wrote into
