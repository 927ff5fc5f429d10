"""dpo.online with a planted fault: `python online_worker.py FAULT ...`. The rest is the command's own arguments.

FAULT is `stale` (the engine keeps its weights and says that it took the new ones), `generate:N` (SIGKILL in place of
the engine's N-th call), or `file:PATTERN` (SIGKILL once a file of that pattern is there).
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import dpo.online
from alignment.fingerprint import weights_hash
from alignment.rollout.engine import VLLMEngine


def stale() -> None:
    def load_weights(self: VLLMEngine, folder: Path) -> None:
        self.weights = weights_hash(folder)

    VLLMEngine.load_weights = load_weights  # type: ignore[assignment,method-assign]


def kill_at_call(number: int) -> None:
    generate, calls = VLLMEngine.generate, [0]

    def call(self: VLLMEngine, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(self, *args)

    VLLMEngine.generate = call  # type: ignore[method-assign]


def kill_when(pattern: str) -> None:
    def watch() -> None:
        while not list(Path().glob(pattern)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    fault, _, argument = sys.argv[1].partition(":")
    match fault:
        case "stale":
            stale()
        case "generate":
            kill_at_call(int(argument))
        case "file":
            kill_when(argument)
    raise SystemExit(dpo.online.main(sys.argv[2:]))
