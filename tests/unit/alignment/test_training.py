"""The loop around every trainer: which checkpoint counts, how a run ends early, and that it goes on from there."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from alignment import cores, training
from alignment.config import JobConfig, TrainingConfig
from alignment.job import Interrupted, Job
from alignment.training import WHOLE, JobCallback, last_whole_checkpoint, remove_torn_checkpoints

STEPS = 8


def checkpoint(folder: Path, step: int, whole: bool) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    if whole:
        (path / WHOLE).touch()
    return path


# checkpoints


def test_a_torn_checkpoint_is_not_the_last(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9, whole=True)
    expected = checkpoint(tmp_path, 100, whole=True)  # by number, not by name
    checkpoint(tmp_path, 200, whole=False)
    assert last_whole_checkpoint(tmp_path) == expected


def test_torn_checkpoints_are_removed(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path, 1, whole=True)
    checkpoint(tmp_path, 2, whole=False)
    remove_torn_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


# a real Trainer on a line


class Line(nn.Module):
    """y = w x + b; its loss is the squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.line(x)[:, 0] - labels) ** 2).mean()}


ROWS = [{"x": torch.tensor([float(i % 5)]), "labels": torch.tensor(3.0 * (i % 5) + 1)} for i in range(4 * STEPS)]


class SignalAt(Trainer):
    """Sends this process a signal during one step."""

    at: int | None = None
    signum = signal.SIGTERM

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == self.at:
            os.kill(os.getpid(), self.signum)
        return super().training_step(*args, **kwargs)


@pytest.fixture
def handlers() -> Any:
    """What `job.guarded` installs."""
    from alignment.job import _Signals

    before = {number: signal.signal(number, _Signals.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def trainer(job: Job, at: int | None = None, log_steps: int = 1, rows: list[Any] = ROWS) -> SignalAt:
    config = TrainingConfig(learning_rate=0.05, schedule="linear", save_steps=3, log_steps=log_steps)
    arguments = training.training_arguments(
        TrainingArguments, job, config, "float32", per_device_train_batch_size=4, use_cpu=True
    )
    made = SignalAt(model=Line(), args=arguments, train_dataset=rows)
    made.at = at
    return made


def run(folder: Path, at: int | None = None, **options: Any) -> tuple[dict[str, float], Line]:
    with Job.open("test.line", JobConfig(output_dir=folder)) as job:
        made = trainer(job, at, **options)
        return training.train(made, job), made.model


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_a_signal_ends_the_run_after_its_step_and_the_next_run_ends_with_the_same_bits(
    tmp_path: Path, handlers: None
) -> None:
    metrics, whole = run(tmp_path / "whole")
    losses = [line["loss"] for line in logged(tmp_path / "whole")]
    assert metrics == {"train.steps": STEPS, "train.loss": pytest.approx(sum(losses) / STEPS)}
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(tmp_path / "stopped", at=4)
    last = last_whole_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert last is not None and last.name == "checkpoint-5", "the step under way is finished and saved"
    assert [line["step"] for line in logged(tmp_path / "stopped")] == [1, 2, 3, 4, 5]
    metrics_of_resumed, resumed = run(tmp_path / "stopped")
    assert metrics_of_resumed == metrics
    assert resumed.line.weight.item() == whole.line.weight.item()
    assert resumed.line.bias.item() == whole.line.bias.item()
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")


def test_a_rank_keeps_to_its_cores_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines_by_then = []
    metrics = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(cores, "keep_to_own", lambda: lines_by_then.append(metrics.exists() and len(logged(tmp_path))))
    run(tmp_path)
    assert lines_by_then == [0] and len(logged(tmp_path)) == STEPS


def test_steps_that_fill_no_log_line_are_logged_at_the_end(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    for log_steps, steps in ((3, [3, 6, 8]), (100, [8])):
        metrics, _ = run(tmp_path / str(log_steps), log_steps=log_steps)
        assert [line["step"] for line in logged(tmp_path / str(log_steps))] == steps
        assert metrics["train.loss"] == pytest.approx(whole["train.loss"], abs=1e-4)


def test_steps_after_the_checkpoint_are_logged_once(tmp_path: Path) -> None:
    """What a killed run logged after its last checkpoint is dropped when the steps are done again."""
    run(tmp_path / "whole")
    run(tmp_path / "again")
    checkpoints = tmp_path / "again" / "checkpoints"
    for path in checkpoints.glob("checkpoint-*"):
        if path.name != "checkpoint-6":
            (path / WHOLE).unlink(missing_ok=True)
    run(tmp_path / "again")
    assert logged(tmp_path / "again") == logged(tmp_path / "whole")


def test_every_checkpoint_of_a_run_is_marked_whole(tmp_path: Path) -> None:
    run(tmp_path)
    found = {p.name: (p / WHOLE).exists() for p in (tmp_path / "checkpoints").glob("checkpoint-*")}
    assert found == {"checkpoint-6": True, f"checkpoint-{STEPS}": True}, "two are kept"


@pytest.mark.parametrize(
    ("live", "shown"),
    [
        ({}, "loss 0.5000"),
        (
            {"valid_tokens_per_second": 1234.5, "packing/padding_share": 0.0123},
            "loss 0.5000  1,234 valid tokens/s  padding 1.2%",
        ),
    ],
)
def test_the_progress_line_shows_speed_and_padding_where_they_are_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], live: dict[str, float], shown: str
) -> None:
    with Job.open("test.line", JobConfig(output_dir=tmp_path)) as job:
        callback = JobCallback(job, lambda: None)
        callback.next_line = 0.0
        arguments = TrainingArguments(output_dir=str(tmp_path / "checkpoints"), use_cpu=True, disable_tqdm=True)
        state = TrainerState(global_step=3, max_steps=8)
        callback.on_log(arguments, state, TrainerControl(), logs={"loss": 0.5} | live)
    assert f"step 3/8  {shown}  " in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    rows = [*ROWS[:8], {"x": torch.tensor([math.inf]), "labels": torch.tensor(0.0)}, *ROWS[8:]]
    with pytest.raises(FloatingPointError, match="not finite"):
        run(tmp_path, rows=rows)


def test_the_callback_stops_and_saves_only_when_a_signal_is_pending(tmp_path: Path) -> None:
    pending: list[int] = []
    with Job.open("test.line", JobConfig(output_dir=tmp_path)) as job:
        callback = JobCallback(job, lambda: pending[-1] if pending else None)
        arguments = TrainingArguments(output_dir=str(tmp_path / "checkpoints"), use_cpu=True)
        control = TrainerControl()
        callback.on_step_end(arguments, TrainerState(), control)
        assert (control.should_save, control.should_training_stop, callback.stopped_by) == (False, False, None)
        pending.append(signal.SIGINT)
        callback.on_step_end(arguments, TrainerState(), control)
        assert (control.should_save, control.should_training_stop) == (True, True)
        assert callback.stopped_by == signal.SIGINT
