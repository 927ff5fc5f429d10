"""The contract of every job: one folder per run, written so that the same command resumes, returns or refuses.

`output_dir` holds resolved_config.yaml, run.json (versions, commit, input hashes, time), metrics.jsonl (over time),
metrics.json (final), the job's artefacts, and DONE, written last. Under several ranks only rank 0 writes.
"""

import argparse
import ctypes
import errno
import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TextIO, TypeVar

import yaml

from alignment import atomic
from alignment.config import JobConfig, load_config
from alignment.errors import UserError
from alignment.fingerprint import path_hash

J = TypeVar("J", bound=JobConfig)
Metrics = Mapping[str, float | int | str | None]

EXIT_OK, EXIT_BUG, EXIT_USER = 0, 1, 2
DIE_WITH_PARENT = "ALIGNMENT_DIE_WITH_PARENT"
PR_SET_PDEATHSIG = 1
LOCK_SECONDS = 10.0
SPOKESMAN_SECONDS = 3.0
# What a run that is not done may change: more ranks run fewer micro-batches each. The rows of a step may not change,
# which alignment/moe/resume.py holds. Where a cache lies, and how many processes fill it, changes nothing.
RESUMABLE_CHANGES = ("training.accumulation was", "prepare.")
WITHOUT_WORTH = {"resolved_config.yaml", "run.json", ".lock", "plan"}  # what the same command makes again
PACKAGES = ("torch", "transformers", "trl", "peft", "deepspeed", "accelerate", "math-verify", "POT", "datasets")


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C: the job ends cleanly and the same command resumes it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class RankFailed(Exception):
    """A rank of a launched job ended with `code`; what went wrong has been printed by it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a rank ended with exit code {code}")
        self.code = code


class _Signals:
    """Turns SIGTERM and SIGINT into Interrupted, at once or, while deferred, when the loop asks."""

    deferred = False
    pending: int | None = None

    @classmethod
    def handle(cls, signum: int, _frame: FrameType | None) -> None:
        if cls.deferred and cls.pending is None:
            cls.pending = signum
            return
        raise Interrupted(signum)


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int | None]]:
    """Inside the block a first signal is only recorded: the loop asks for it between steps, saves and raises.

    One that came too late for the loop to see is raised at the block's end.
    """
    _Signals.deferred, _Signals.pending = True, None
    try:
        yield lambda: _Signals.pending
    finally:
        _Signals.deferred = False
    if _Signals.pending is not None:
        raise Interrupted(_Signals.pending)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def main(
    config_class: type[J],
    run: Callable[[J], None],
    plan: Callable[[J], list[str]],
    argv: Sequence[str] | None = None,
    forecast: Callable[[J], list[str]] | None = None,
) -> int:
    """Parse the command line, check what can be checked without weights (`plan`), and run the job.

    `forecast` gives further lines of a dry run: what takes too long to work out before every run, on every rank.

    Returns the exit code: 0 done, 2 the user's mistake, 1 ours, 128 + signal when interrupted.
    """
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, run nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)

    def command() -> None:
        config = load_config(config_class, arguments.config, arguments.overrides)
        lines = plan(config)
        if arguments.dry_run:
            print(config.as_yaml())
            print("\n".join([*lines, *(forecast(config) if forecast else [])]))
            return
        run(config)

    return guarded(command)


def guarded(command: Callable[[], None]) -> int:
    """Run `command` and turn its outcome into an exit code and, for mistakes of the user's, one to three lines."""
    _die_with_parent()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _Signals.handle)
    try:
        command()
        return EXIT_OK
    except RankFailed as failure:
        return failure.code if failure.code > 0 else EXIT_BUG
    except UserError as error:
        return _leave(EXIT_USER, f"error: {error}")
    except Interrupted as interruption:
        return _leave(128 + interruption.signum, f"interrupted ({interruption}); the same command resumes")
    except Exception as error:  # noqa: BLE001 the outermost frame: whatever it is becomes an exit code
        if _disk_is_full(error):
            return _leave(EXIT_USER, f"error: no space left on the disk: {error}")
        traceback.print_exc()
        return _leave(EXIT_BUG, "error: this is a fault of ours, please report the lines above")


def _leave(code: int, message: str) -> int:
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)
        return code
    if code not in (EXIT_USER, EXIT_BUG):
        return code  # interrupted, as rank 0 was
    # Most often rank 0 says the same, and its end makes the launcher end this process too.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(SPOKESMAN_SECONDS)
    print(f"[rank {rank()}] {message}", file=sys.stderr, flush=True)
    return code


def _die_with_parent() -> None:
    """End when the process that started this one ends, however it ends: no orphan writes into a resumed run's folder.

    DIE_WITH_PARENT holds the id of the process at the top, which may have ended before the kernel was asked to tell.
    """
    if DIE_WITH_PARENT not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not Path("/proc", os.environ[DIE_WITH_PARENT]).exists():
        sys.exit(EXIT_BUG)


def _disk_is_full(error: BaseException) -> bool:
    text = str(error)
    # torch.save hides the error number: it only says that fewer bytes were written than it gave.
    torn = "inline_container" in text and "unexpected pos" in text
    return torn or getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text


class Job:
    """A run's folder. Use as a context manager; `finish` marks it done."""

    def __init__(self, name: str, folder: Path, config: JobConfig, inputs: Mapping[str, str]) -> None:
        self.name = name
        self.dir = folder
        self.config = config
        self.inputs = dict(inputs)
        self.is_main = rank() == 0
        self.started = time.time()
        self._lock_file: TextIO | None = None
        self._shared: frozenset[str] = frozenset()

    @classmethod
    def open(cls, name: str, config: JobConfig, inputs: Sequence[Path] = (), shared: Collection[str] = ()) -> Self:
        """Open `config.output_dir` for this run: fresh, resumed, or done already (`job.done`).

        `shared` are names that other runs may have put there before it.

        Raises:
            UserError: the folder holds something else, or a run with another config or other inputs.
        """
        for path in inputs:
            if not path.exists():
                raise UserError(f"{path}: no such file or folder (an input of {name})")
        hashes = {str(path): path_hash(path) for path in inputs} if rank() == 0 else {}
        job = cls(name, config.output_dir, config, hashes)
        job._shared = frozenset({"run.json", *shared})  # run.json is written first
        if job.is_main:
            try:
                job._claim()
            except BaseException:
                job._unlock()
                raise
        return job

    @property
    def done(self) -> bool:
        return (self.dir / "DONE").exists()

    @property
    def metrics(self) -> dict[str, Any]:
        """The final metrics of a job that is done."""
        return dict(json.loads((self.dir / "metrics.json").read_text(encoding="utf-8")))

    def log(self, **values: float | str | list[list[float]] | None) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_main:
            with (self.dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`, which a resumed loop will log again."""
        path = self.dir / "metrics.jsonl"
        if self.is_main and path.exists():
            whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was torn
            kept = [line + "\n" for line in whole if json.loads(line).get("step", 0) <= step]
            atomic.write_text(path, "".join(kept))

    def finish(self, metrics: Metrics) -> None:
        """Write the final metrics and, last, the DONE marker."""
        if not self.is_main:
            return
        seconds = time.time() - self.started
        atomic.write_json(self.dir / "metrics.json", dict(metrics))
        atomic.write_json(self.dir / "run.json", self._record() | {"seconds": round(seconds, 1), "finished": _now()})
        atomic.write_text(self.dir / "DONE", _now() + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, UserError) and self.is_main:
            self._leave_nothing_behind()
        self._unlock()

    def _claim(self) -> None:
        settings = self.config.model_dump(mode="json")
        self._refuse_other_run(settings)
        if not self.done:
            self._lock()
            self._refuse_other_run(settings)  # another process may have begun, or ended, a run meanwhile
        if self.done:
            print(f"{self.name}: done already, see {self.dir}")
            return
        record = self._record()
        atomic.write_json(self.dir / "run.json", _provenance(self, int(record.get("attempts", 0)) + 1))
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        atomic.write_text(self.dir / "resolved_config.yaml", text)

    def _record(self) -> dict[str, Any]:
        path = self.dir / "run.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def _lock(self) -> None:
        """Keep a second process out of this folder until this job is closed."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock_file = (self.dir / ".lock").open("w")
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"{self.dir}: this output_dir cannot be written: {error.strerror}") from None
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{self.dir}: another process is running in this output_dir") from None
                time.sleep(0.2)

    def _unlock(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()

    def _refuse_other_run(self, settings: dict[str, Any]) -> None:
        if not self.dir.exists():
            return
        if not self.dir.is_dir():
            raise UserError(f"{self.dir}: output_dir is a file, expected a folder")
        record = self._record()
        before = self.dir / "resolved_config.yaml"
        if not before.exists():
            if any(p for p in self.dir.iterdir() if not p.name.startswith(".") and p.name not in self._shared):
                raise UserError(
                    f"{self.dir}: output_dir holds files that are not a run of {self.name}; choose another folder"
                )
            return
        if record.get("job") != self.name:
            raise UserError(f"{self.dir}: output_dir holds a run of {record.get('job')}; choose another folder")
        changes = _differences(yaml.safe_load(before.read_text(encoding="utf-8")), settings)
        if not self.done:
            changes = [change for change in changes if not change.startswith(RESUMABLE_CHANGES)]
        if changes:
            raise UserError(
                f"{self.dir}: output_dir holds a run with another config; choose another folder, or delete it\n"
                + "; ".join(changes[:4])
            )
        if record["inputs"] != self.inputs:
            changed = sorted(p for p in self.inputs | record["inputs"] if record["inputs"].get(p) != self.inputs.get(p))
            raise UserError(f"{self.dir}: the inputs have changed since this run began: {', '.join(changed[:4])}")

    def _leave_nothing_behind(self) -> None:
        """A run that fails on the user's mistake before it wrote anything of worth gives its folder back."""
        if {p.name for p in self.dir.iterdir()} <= WITHOUT_WORTH:
            shutil.rmtree(self.dir)


def _differences(before: Any, now: Any, place: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{place}.{key}".lstrip("."))]
    return [] if before == now else [f"{place} was {before!r}, is {now!r}"]


def _provenance(job: Job, attempts: int) -> dict[str, Any]:
    return {
        "job": job.name,
        "command": sys.argv,
        "started": _now(),
        "attempts": attempts,
        "seed": job.config.seed,
        "inputs": job.inputs,
        "git_commit": git_commit(),
        "python": sys.version.split()[0],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` where it differs from it; None outside a checkout."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
