"""`accelerate launch` with the exit codes of our jobs.

    python -m alignment.launch --config_file configs/accelerate/cpu-ep2.yaml -m sft.train --config configs/sft/demo.yaml

Takes the arguments of `accelerate launch`, which runs the same; but where that ends every failure of a rank with a
traceback of its own and code 1, this ends with the code of the rank and leaves the rank's message as the last word.
With --dry-run among the job's arguments no ranks are started: one process plans for all of them, on any machine.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignment import cores, job
from alignment.errors import UserError, did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    return job.guarded(lambda: launch(sys.argv[1:] if argv is None else argv))


def launch(arguments: Sequence[str]) -> None:
    """Run `accelerate launch` in this process.

    Raises:
        UserError: the port is in use, or the launcher's config or what is said of the ranks' cores is wrong.
        job.RankFailed: a rank ended with another code than 0; its message stands above.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on every start that it found no GPU
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parsed = launch_command_parser().parse_args(list(arguments))
    config = _config(parsed)
    if "--dry-run" in parsed.training_script_args:
        _dry_run(parsed, config)
        return
    _check(parsed, config)
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise job.RankFailed(failure.exitcode) from None
    except SignalException as error:
        raise job.Interrupted(error.sigval) from None
    except (ConnectionError, DistNetworkError) as error:
        raise UserError(f"the launcher's port cannot be used: {str(error).strip().splitlines()[0]}") from None


def _config(parsed: argparse.Namespace) -> Any:
    """The launcher's config; None where there is none."""
    from accelerate.commands.config import load_config_from_file

    if parsed.config_file is None:
        return None
    path = Path(parsed.config_file)
    if not path.is_file():
        hint = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise UserError(f"{path}: no such launcher config{hint}")
    return load_config_from_file(str(path))


def _check(parsed: argparse.Namespace, config: Any) -> None:
    """Refuse a port that cannot be used, and share the cores among the ranks.

    Without OMP_NUM_THREADS, accelerate gives CPU ranks the threads of all.
    """
    import torch
    from accelerate.utils import is_port_in_use

    if config is None:
        return
    port = config.main_process_port if parsed.main_process_port is None else parsed.main_process_port
    if port and is_port_in_use(port):  # on one machine accelerate would only warn, and take another
        raise UserError(f"port {port} is in use; choose another main_process_port, or 0 for any that is free")
    ranks = (parsed.num_processes or config.num_processes) // (parsed.num_machines or config.num_machines)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores.count() // ranks)))
    if not torch.cuda.is_available():
        cores.give_to_ranks(ranks)


def _dry_run(parsed: argparse.Namespace, config: Any) -> None:
    """Run the job's dry run in one process that is told of the ranks and the DeepSpeed config.

    Raises:
        UserError: a DeepSpeed config that is not there.
        job.RankFailed: the job refused its config; its message stands above.
    """
    os.environ |= _rank_environment(parsed.config_file, config, parsed.num_processes)
    script = ["-m", parsed.training_script] if parsed.module else [parsed.training_script]
    code = run_command(["python", *script, *parsed.training_script_args])
    if code:
        raise job.RankFailed(code)


def _rank_environment(config_file: str, config: Any, ranks: int | None = None) -> dict[str, str]:
    """What a job reads of its launch: the number of ranks, and the DeepSpeed config."""
    found = {"WORLD_SIZE": str(ranks or (config and config.num_processes) or 1)}
    if config is None or config.distributed_type != "DEEPSPEED":
        return found
    settings = config.deepspeed_config
    path = settings.get("deepspeed_config_file")
    if path is not None and not Path(path).is_file():
        raise UserError(f"{config_file}: deepspeed_config_file {path}: no such file")
    found |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(settings.get("zero_stage", 2))}
    return found if path is None else found | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": path}


@contextmanager
def planned_ranks(config_file: Path | None) -> Iterator[None]:
    """Inside the block this process plans as one of the ranks of a launcher config would; None: as itself.

    Raises:
        UserError: a launcher or DeepSpeed config that is not there.
    """
    before = dict(os.environ)
    if config_file is not None:
        config = _config(argparse.Namespace(config_file=str(config_file)))
        os.environ.update(_rank_environment(str(config_file), config))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def job_command(module: str, config: Path, overrides: Sequence[str] = (), accelerate: Path | None = None) -> list[str]:
    """The command line of a job: in one process, or on the ranks of a launcher config."""
    arguments = ["-m", module, "--config", str(config), *overrides]
    if accelerate is None:
        return ["python", *arguments]
    return ["python", "-m", "alignment.launch", "--config_file", str(accelerate), *arguments]


def run_job(module: str, config: Path, accelerate: Path | None = None) -> None:
    """Run a job as a command, to its end.

    Raises:
        job.RankFailed: it failed; its message stands above.
    """
    code = run_command(job_command(module, config, accelerate=accelerate))
    if code:
        raise job.RankFailed(code)


def run_command(command: Sequence[str]) -> int:
    """Run a job's command with this Python and return its exit code; the job ends when this process does.

    Raises:
        job.Interrupted: after a signal, once the job has ended cleanly.
    """
    environment = os.environ | {job.DIE_WITH_PARENT: str(os.getpid())}
    process = subprocess.Popen([sys.executable, *command[1:]], env=environment)
    try:
        return process.wait()
    except job.Interrupted as interruption:
        if interruption.signum != signal.SIGINT:  # a terminal's Ctrl-C has reached the job already
            process.send_signal(interruption.signum)
        process.wait()
        raise


if __name__ == "__main__":
    raise SystemExit(main())
