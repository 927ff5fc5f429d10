import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignment import job
from alignment.config import Config, JobConfig, TrainingConfig
from alignment.errors import UserError

NAME = "test.job"
BOOKKEEPING = {".lock", "resolved_config.yaml", "run.json"}


class Recipe(JobConfig):
    rate: float = 1.0
    names: tuple[str, ...] = ("a",)
    rows: Path | None = None


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """`guarded` installs its own handlers; give pytest's back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1\n")
    return Recipe(output_dir=tmp_path / "out", rows=rows)


def open_job(config: Recipe) -> job.Job:
    return job.Job.open(NAME, config, [config.rows] if config.rows else [])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def record(config: Recipe) -> dict[str, Any]:
    return dict(json.loads((config.output_dir / "run.json").read_text()))


# fresh, resumed, done


def test_fresh_run_writes_its_account_and_done_last(recipe: Recipe) -> None:
    with open_job(recipe) as this:
        assert not this.done
        assert {p.name for p in this.dir.iterdir()} == BOOKKEEPING
        this.log(step=1, loss=0.5)
        this.finish({"loss": 0.25, "rows.out": 3})
        assert this.done
        assert this.metrics == {"loss": 0.25, "rows.out": 3}
    assert {p.name for p in this.dir.iterdir()} == BOOKKEEPING | {"metrics.jsonl", "metrics.json", "DONE"}
    assert yaml.safe_load((this.dir / "resolved_config.yaml").read_text()) == recipe.model_dump(mode="json")
    written = record(recipe)
    assert (written["job"], written["seed"], written["attempts"], written["world_size"]) == (NAME, 0, 1, 1)
    assert list(written["inputs"]) == [str(recipe.rows)]
    assert written["versions"]["torch"] == torch.__version__
    assert written["seconds"] >= 0


def test_unfinished_run_is_resumed_with_its_files(recipe: Recipe) -> None:
    with open_job(recipe) as this:
        (this.dir / "shard").write_text("half of the work")
    with open_job(recipe) as again:
        assert not again.done
        assert (again.dir / "shard").read_text() == "half of the work"
    assert record(recipe)["attempts"] == 2


def test_done_run_is_left_untouched(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with open_job(recipe) as this:
        this.finish({"loss": 1.0})
    before = contents(this.dir)
    with open_job(recipe) as again:
        assert again.done
        assert again.metrics == {"loss": 1.0}
    assert contents(this.dir) == before
    assert capsys.readouterr().out == f"{NAME}: done already, see {this.dir}\n"


def test_run_killed_between_its_first_two_files_is_resumed(recipe: Recipe) -> None:
    with open_job(recipe) as this:
        (this.dir / "resolved_config.yaml").unlink()
    with open_job(recipe) as again:
        assert {p.name for p in again.dir.iterdir()} == BOOKKEEPING


class Cache(Config):
    workers: int = 1


class Training(JobConfig):
    training: TrainingConfig
    prepare: Cache = Cache()


def test_accumulation_may_change_until_a_run_is_done(tmp_path: Path) -> None:
    """More ranks run fewer micro-batches each; how a cache is filled changes nothing; another rate is another run."""

    def settings(accumulation: int, rate: float = 1.0) -> Training:
        training = TrainingConfig(learning_rate=rate, accumulation=accumulation)
        return Training(output_dir=tmp_path / "out", training=training, prepare=Cache(workers=accumulation))

    with job.Job.open(NAME, settings(2)):
        pass
    with job.Job.open(NAME, settings(1)) as this:
        assert yaml.safe_load((this.dir / "resolved_config.yaml").read_text())["training"]["accumulation"] == 1
    with pytest.raises(UserError, match=r"training.learning_rate was 1.0, is 2.0"):
        job.Job.open(NAME, settings(2, rate=2.0))
    with job.Job.open(NAME, settings(1)) as this:
        this.finish({})
    with pytest.raises(UserError, match="training.accumulation was 1, is 2"):
        job.Job.open(NAME, settings(2))


# refusals


@pytest.mark.parametrize("finished", [False, True])
def test_other_config_is_refused_naming_what_differs(recipe: Recipe, finished: bool) -> None:
    with open_job(recipe) as this:
        if finished:
            this.finish({})
    before = contents(this.dir)
    with pytest.raises(UserError, match="a run with another config") as caught:
        open_job(recipe.model_copy(update={"rate": 2.0, "names": ("a", "b")}))
    assert str(caught.value).splitlines()[1] == "rate was 1.0, is 2.0; names was ['a'], is ['a', 'b']"
    assert contents(this.dir) == before


def test_other_inputs_are_refused_naming_the_file(recipe: Recipe) -> None:
    with open_job(recipe) as this:
        this.finish({})
    assert recipe.rows is not None
    recipe.rows.write_text("2\n")
    with pytest.raises(UserError, match=r"the inputs have changed since this run began: .*rows\.jsonl"):
        open_job(recipe)


def test_folder_of_something_else_is_refused_and_untouched(recipe: Recipe) -> None:
    recipe.output_dir.mkdir()
    (recipe.output_dir / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds files that are not a run of"):
        open_job(recipe)
    assert contents(recipe.output_dir) == {"thesis.tex": b"x"}


def test_folder_of_another_job_is_refused(recipe: Recipe) -> None:
    with job.Job.open("other.job", recipe):
        pass
    with pytest.raises(UserError, match=r"holds a run of other\.job; choose another folder"):
        open_job(recipe)


@pytest.mark.parametrize("output", ["rows.jsonl", "rows.jsonl/out"])
def test_output_that_cannot_be_a_folder_is_refused(recipe: Recipe, tmp_path: Path, output: str) -> None:
    with pytest.raises(UserError, match=r"is a file, expected a folder|cannot be written"):
        open_job(recipe.model_copy(update={"output_dir": tmp_path / output}))


def test_missing_input_is_refused_before_anything_is_written(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing: no such file or folder \(an input of test\.job\)"):
        job.Job.open(NAME, recipe, [tmp_path / "missing"])
    assert not recipe.output_dir.exists()


def test_users_mistake_gives_the_folder_back_unless_work_is_in_it(recipe: Recipe) -> None:
    def run(*, works_first: bool) -> None:
        with open_job(recipe) as this:
            if works_first:
                this.log(step=1)
            raise UserError("bad rows")

    with pytest.raises(UserError):
        run(works_first=False)
    assert not recipe.output_dir.exists()
    with pytest.raises(UserError):
        run(works_first=True)
    assert {p.name for p in recipe.output_dir.iterdir()} == BOOKKEEPING | {"metrics.jsonl"}


# two processes


def test_second_process_is_kept_out(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "LOCK_SECONDS", 0.1)
    with open_job(recipe):
        with pytest.raises(UserError, match="another process is running in this output_dir"):
            open_job(recipe)
        assert record(recipe)["attempts"] == 1
    with open_job(recipe) as third:
        assert not third.done


def test_process_that_waited_sees_that_the_first_has_finished(recipe: Recipe) -> None:
    opened: list[job.Job] = []
    with open_job(recipe) as first:
        second = threading.Thread(target=lambda: opened.append(open_job(recipe)))
        second.start()
        time.sleep(0.3)
        first.finish({"loss": 1.0})
    second.join(timeout=10)
    assert opened[0].done
    assert record(recipe)["attempts"] == 1
    assert "finished" in record(recipe)
    opened[0].__exit__(None, None, None)


def test_only_rank_0_writes(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with open_job(recipe) as this:
        this.log(step=1)
        this.rewind(0)
        this.finish({})
    assert not recipe.output_dir.exists()


# metrics


def test_rewind_drops_later_steps_and_a_torn_line(recipe: Recipe) -> None:
    with open_job(recipe) as this:
        this.log(note="a line\u2028of two")
        for step in range(1, 6):
            this.log(step=step, loss=1 / step)
        path = this.dir / "metrics.jsonl"
        with path.open("a") as file:
            file.write('{"step": 6, "lo')
        this.rewind(3)
        this.log(step=4, loss=0.0)
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert lines == [
        {"note": "a line\u2028of two"},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 1 / 3},
        {"step": 4, "loss": 0.0},
    ]


# exit codes


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("f.yaml:3: unknown key"), 2, "error: f.yaml:3: unknown key\n"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 2, "error: no space left on the disk: "),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "error: no space left on the disk: "),
        (job.Interrupted(signal.SIGTERM), 143, "interrupted (SIGTERM); the same command resumes\n"),
        (job.Interrupted(signal.SIGINT), 130, "interrupted (SIGINT); the same command resumes\n"),
        (job.RankFailed(2), 2, ""),
        (job.RankFailed(143), 143, ""),
        (job.RankFailed(-9), 1, ""),
    ],
)
def test_exit_code_and_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.guarded(lambda: fail(error)) == code
    written = capsys.readouterr().err
    assert written.startswith(message)
    assert "Traceback" not in written
    assert len(written.splitlines()) <= 3


def test_fault_of_ours_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.guarded(lambda: fail(KeyError("x"))) == 1
    written = capsys.readouterr().err
    assert "Traceback" in written
    assert written.endswith("error: this is a fault of ours, please report the lines above\n")
    assert job.guarded(lambda: None) == 0


def test_late_signal_is_not_lost() -> None:
    """A signal that arrives after the loop last asked is raised when the block ends."""

    def loop() -> None:
        with job.deferred_interrupts() as pending:
            assert pending() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert pending() == signal.SIGTERM

    assert job.guarded(loop) == 143
    with job.deferred_interrupts() as pending:
        assert pending() is None


def test_second_signal_does_not_wait_for_the_loop() -> None:
    def loop() -> None:
        with job.deferred_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the second signal was deferred")

    assert job.guarded(loop) == 143


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that takes 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", folder]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("how", ["text", "torch"])
def test_full_disk_is_the_users_and_leaves_no_half_file(
    full_disk: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Recipe(output_dir=full_disk / "out")

    def run() -> None:
        with open_job(config) as this:
            if how == "text":
                this.finish({"much": "x" * 500_000})
            else:
                torch.save(torch.zeros(200_000), this.dir / "checkpoint.pt")

    assert job.guarded(run) == 2
    assert capsys.readouterr().err.startswith("error: no space left on the disk: ")
    if how == "text":
        assert {p.name for p in config.output_dir.iterdir()} == BOOKKEEPING


# the command line

SCRIPT = '''
"""A job that counts."""
import sys, time
from alignment import job
from alignment.config import JobConfig

class Recipe(JobConfig):
    steps: int
    seconds: float = 0.0

def run(config):
    with job.Job.open("count", config) as this:
        if this.done:
            return
        print("running", flush=True)
        with job.deferred_interrupts() as pending:
            for step in range(config.steps):
                time.sleep(config.seconds)
                this.log(step=step)
                if pending():
                    raise job.Interrupted(pending())
        this.finish({"steps": config.steps})

def plan(config):
    return [f"{config.steps} steps"]

if __name__ == "__main__":
    sys.exit(job.main(Recipe, run, plan))
'''


@pytest.fixture
def count_job(tmp_path: Path) -> list[str]:
    (tmp_path / "count.py").write_text(SCRIPT)
    (tmp_path / "count.yaml").write_text(f"output_dir: {tmp_path / 'out'}\nsteps: 2\n")
    return [sys.executable, str(tmp_path / "count.py"), "--config", str(tmp_path / "count.yaml")]


def test_command_runs_once_and_refuses_another_config(count_job: list[str], tmp_path: Path) -> None:
    first = subprocess.run(count_job, capture_output=True, text=True, check=False)
    assert (first.returncode, first.stdout, first.stderr) == (0, "running\n", "")
    again = subprocess.run(count_job, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, f"count: done already, see {tmp_path / 'out'}\n")
    other = subprocess.run([*count_job, "steps=3"], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert other.stderr.endswith("steps was 2, is 3\n")


def test_dry_run_prints_config_and_plan_and_writes_nothing(count_job: list[str], tmp_path: Path) -> None:
    command = [*count_job, "steps=5", "--dry-run", "seconds=0.5"]  # overrides on both sides of an option
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text, plan = done.stdout.rstrip("\n").rsplit("\n", 1)
    assert yaml.safe_load(text) == {"output_dir": str(tmp_path / "out"), "seed": 0, "steps": 5, "seconds": 0.5}
    assert plan == "5 steps"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["stps=3"], ["--dry-run", "steps=x"], ["--nonsense"], ["--conf", "x"]])
def test_wrong_command_line_exits_2(count_job: list[str], tmp_path: Path, wrong: list[str]) -> None:
    done = subprocess.run([*count_job, *wrong], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_sigterm_ends_with_143_and_the_same_command_resumes(count_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "count.yaml").write_text(f"output_dir: {tmp_path / 'out'}\nsteps: 25\nseconds: 0.2\n")
    with subprocess.Popen(count_job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        wait_for((tmp_path / "out" / "metrics.jsonl").exists)
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors == "interrupted (SIGTERM); the same command resumes\n"
    assert not (tmp_path / "out" / "DONE").exists()
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) < 25
    done = subprocess.run(count_job, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "running\n")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["attempts"] == 2


PARENT = """
import sys
from pathlib import Path
from alignment import launch
sys.exit(launch.run_command(["python", "-c", sys.argv[1], sys.argv[2]]))
"""
CHILD = """
import os, sys, time
from pathlib import Path
from alignment import job
def run():
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(60)
sys.exit(job.guarded(run))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_job_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(file)])
    child = int(wait_for(lambda: file.exists() and file.read_text()))
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_running(child))


def test_job_whose_starter_is_gone_does_not_begin(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = os.environ | {job.DIE_WITH_PARENT: str(gone.pid)}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "pid")]
    assert subprocess.run(command, env=environment, timeout=20, check=False).returncode == 1
    assert not (tmp_path / "pid").exists()


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Any, seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value
