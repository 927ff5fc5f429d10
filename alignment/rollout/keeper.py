"""Run a command, and leave no process of it behind, however it or the one who started this ends.

    python -m alignment.rollout.keeper COMMAND ...

Standard input is a pipe that the starter holds open. It closes with the starter, by SIGKILL too, and then the command
gets SIGTERM and some time. Whoever ends first, the whole process group ends with it: vLLM's engine, for one, lives on
where the server that started it is killed, so that telling the server alone of the starter's death is not enough.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

GRACE_SECONDS = 10.0  # vLLM takes half a second to give back its shared memory


def main(argv: Sequence[str] | None = None) -> None:
    """Does not return. Its process has to lead a process group: `subprocess.Popen(..., start_new_session=True)`."""
    assert os.getpgrp() == os.getpid()
    command = subprocess.Popen(sys.argv[1:] if argv is None else argv, stdin=subprocess.DEVNULL)
    threading.Thread(target=_watch_starter, args=(command,), daemon=True).start()
    command.wait()
    _end_group()


def _watch_starter(command: "subprocess.Popen[bytes]") -> None:
    sys.stdin.buffer.read()
    command.terminate()
    threading.Timer(GRACE_SECONDS, _end_group).start()


def _end_group() -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
