"""What every trainer shares: its arguments, its log, checkpoints that are whole, and an end that can be resumed."""

import atexit
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import transformers.training_args
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from alignment import adapters, cores, models
from alignment.config import LoRAConfig, ModelConfig, TrainingConfig
from alignment.errors import UserError
from alignment.job import Interrupted, Job, deferred_interrupts
from alignment.moe.adapters import check_adapter
from alignment.moe.autoep import check_model
from alignment.moe.config import check_launcher_config, deepspeed_launched, expert_parallel_size
from alignment.moe.export import round_weights
from alignment.moe.memory import launched_sharding, memory_plan
from alignment.moe.resume import prepare_resume
from alignment.moe.trainer import ddp_backend

# DeepSpeed 0.19.8 calls it, on every rank.
warnings.filterwarnings("ignore", message=r"`torch.distributed.all_gather_into_tensor` is deprecated")

if not torch.cuda.is_available():
    # The check of TrainingArguments wants a GPU for bfloat16, which a CPU computes in too.
    vars(transformers.training_args).update(is_torch_bf16_gpu_available=lambda: True)

A = TypeVar("A", bound=TrainingArguments)
ExpertLoad = list[list[float]]

LINE_SECONDS = 10.0
WHOLE = "WHOLE"  # the marker that a checkpoint was written to its end by every rank


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave(code: int = 0) -> NoReturn:
    """End the process of a rank with `code`; where there were several ranks, without taking its interpreter down.

    A thread of Gloo's that lets go of the tensors of the last exchange waits for the interpreter. One that goes down
    meanwhile ends that thread in the middle of C++ code, which aborts the process: a run that is done and written
    would fail with SIGABRT (pytorch/pytorch#190489). Destroying the process groups does not help, as DeepSpeed's
    hooks keep them. So: what was to be done at exit, and no more, as multiprocessing ends its children.
    """
    if not torch.distributed.is_initialized():
        raise SystemExit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_one_process(name: str) -> None:
    """Refuse several ranks, for a job that starts those of each training itself."""
    if world_size() > 1:
        raise UserError(
            f"{name} runs as one process, which starts the ranks of each training itself\n"
            "give `launch: configs/accelerate/NAME.yaml` instead of launching it"
        )


def check_parallel(source: ModelConfig) -> list[str]:
    """Refuse what the launcher's config asks for and cannot have of this model, before any weight is read.

    Returns the lines of the memory plan: what one rank of this launch holds when every weight is trained.
    """
    config = models.config_of(source)
    model = models.on_meta(config)
    size = expert_parallel_size()
    if size:
        check_launcher_config()
        check_model(model, size, world_size())
    lines = memory_plan(model, config, launched_sharding(source.dtype))
    if held(source) != source:
        lines.append("  weights are float32 without DeepSpeed; autocast computes in bfloat16, and bfloat16 is saved")
    return lines


def plan_adapter(lora: LoRAConfig | None, source: ModelConfig) -> list[str]:
    """The share of the weights that an adapter trains; refuses one that this launch cannot train."""
    if lora is None:
        return []
    model = adapters.on_meta(lora, source)
    if expert_parallel_size():
        check_adapter(model)
    trained, total = model.get_nb_trainable_parameters()
    return [f"adapter: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"]


def training_arguments(kind: type[A], job: Job, config: TrainingConfig, dtype: str, **specific: Any) -> A:
    """TrainingArguments of `kind` for this run; DeepSpeed's part comes from `accelerate launch`."""
    return kind(
        output_dir=str(job.dir / "checkpoints"),
        seed=job.config.seed,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_share,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_betas[0],
        adam_beta2=config.adam_betas[1],
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.log_steps,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
        remove_unused_columns=False,
        ddp_backend=ddp_backend(),
        bf16=dtype == "bfloat16",
        dataloader_pin_memory=torch.cuda.is_available(),
        **specific,
    )


def held(source: ModelConfig, lora: LoRAConfig | None = None) -> ModelConfig:
    """The model as a training holds it: without DeepSpeed, weights that train are float32, whatever `dtype` says.

    A bfloat16 weight has 8 bits: AdamW's step at a usual learning rate is less than half the distance to the next one,
    and nothing changes. DeepSpeed keeps float32 copies of the weights; elsewhere autocast computes in bfloat16 with
    float32 weights, and `save` writes them in `dtype`. An adapter's are float32 anyway.
    """
    if deepspeed_launched() or lora is not None:
        return source
    return source.model_copy(update={"dtype": "float32"})


def train(trainer: Trainer, job: Job) -> dict[str, float]:
    """Run `trainer` from its last whole checkpoint, or from the start, to its end. Returns its final metrics.

    A checkpoint of another layout (ranks, expert-parallel size) is converted first; see alignment/moe/resume.py.
    From here on the rank keeps to the cores that `alignment.launch` gave it.

    Raises:
        Interrupted: after a signal, once the step is done and a checkpoint is written.
        UserError: the checkpoint's layout is another, and the run could not go on from it as it was.
    """
    cores.keep_to_own()
    checkpoint = last_whole_checkpoint(Path(str(trainer.args.output_dir)))
    trainer.remove_callback(PrinterCallback)
    with deferred_interrupts() as pending:
        callback = JobCallback(job, pending, lambda: getattr(trainer, "expert_load", None))
        trainer.add_callback(callback)
        if checkpoint is not None and job.is_main:
            print(f"{job.name}: resumes from {checkpoint}")
        if checkpoint is not None:
            prepare_resume(trainer, checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        signum = callback.stopped_by
    if signum is not None:
        raise Interrupted(signum)
    return {"train.loss": mean_loss(trainer.state.log_history), "train.steps": trainer.state.global_step}


def save(trainer: Trainer, job: Job, source: ModelConfig, lora: LoRAConfig | None = None) -> None:
    """Write the run's `model`; of an adapter `adapter` and, where it is to be merged, `model` with it. Collective.

    Training is over: weights that were `held` in float32 are in the dtype of `source` from here on.
    """
    if lora is None and held(source) != source:
        round_weights(cast(PreTrainedModel, trainer.model), getattr(torch, source.dtype))
    if lora is None:
        trainer.save_model(str(job.dir / "model"))
        return
    trainer.save_model(str(job.dir / "adapter"))
    if lora.merge and job.is_main:
        gap = adapters.merge_adapter(source, job.dir / "adapter", job.dir / "model")
        print(f"{job.name}: merged; log-probabilities differ by {gap.max:.1e} at most, {gap.mean:.1e} on average")


def mean_loss(history: Sequence[Mapping[str, float]]) -> float:
    """The mean over all steps, from the log that checkpoints keep; transformers' own forgets those before a resume."""
    logged = [(line["step"], line["loss"]) for line in history if "loss" in line]
    before = [0, *(step for step, _ in logged[:-1])]
    return sum((step - last) * loss for (step, loss), last in zip(logged, before, strict=True)) / logged[-1][0]


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a torn one is ignored."""
    whole = [p.parent for p in folder.glob(f"checkpoint-*/{WHOLE}")]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def remove_torn_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        if not (path / WHOLE).exists():
            shutil.rmtree(path)


class JobCallback(TrainerCallback):
    """Logs to metrics.jsonl and the terminal, marks whole checkpoints, and stops between steps after a signal."""

    def __init__(self, job: Job, pending: Any, expert_load: Callable[[], ExpertLoad | None] = lambda: None) -> None:
        self.job = job
        self.pending = pending
        self.expert_load = expert_load
        self.stopped_by: int | None = None
        self.began = time.time()
        self.first_step = 0
        self.next_line = self.began + LINE_SECONDS

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step = state.global_step
        self.job.rewind(state.global_step or -1)  # a run from the start logs its step 0 again
        if self.job.is_main:
            remove_torn_checkpoints(Path(str(args.output_dir)))
        _barrier()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # the last steps too, however few
        signum = _agree(self.pending() or 0)
        if signum:
            self.stopped_by = signum
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        values = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        if not all(math.isfinite(value) for value in values.values()):
            raise FloatingPointError(f"step {state.global_step}: not finite: {values}")
        self.job.log(step=state.global_step, **values)
        if "router/load_max" in values:
            self.job.log(step=state.global_step, expert_load=self.expert_load())  # a matrix: on a line of its own
        if self.job.is_main and args.disable_tqdm and "loss" in values and time.time() > self.next_line:
            self.next_line = time.time() + LINE_SECONDS
            speed = (state.global_step - self.first_step) / (time.time() - self.began)
            left = (state.max_steps - state.global_step) / speed if speed else 0
            parts = [f"step {state.global_step}/{state.max_steps}", f"loss {values['loss']:.4f}", *_live(values)]
            print("  ".join([*parts, f"{left:.0f} s left"]), flush=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _barrier()
        if self.job.is_main:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / WHOLE).touch()
        _barrier()


def _live(values: Mapping[str, float]) -> list[str]:
    """Speed and padding, of trainers that log them."""
    parts = []
    if "valid_tokens_per_second" in values:
        parts.append(f"{values['valid_tokens_per_second']:,.0f} valid tokens/s")
    if "packing/padding_share" in values:
        parts.append(f"padding {values['packing/padding_share']:.1%}")
    return parts


def _agree(signum: int) -> int:
    """The largest signal number any rank has received, so that all ranks stop at the same step."""
    if not torch.distributed.is_initialized():
        return signum
    value = torch.tensor(signum, device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value.item())


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
