"""The process that `alignment.verify` runs math-verify in: JSON lines in, a verdict a line out.

It may be killed at any time. It is started by its path and imports nothing of ours, so it is ready soon, whatever its
parent has loaded.
"""

import json
import logging
import os
import resource
import signal
import sys

from math_verify import parse, verify
from sympy import Basic
from sympy.core.cache import clear_cache
from sympy.matrices import MatrixBase

MEMORY_BYTES = 4 << 30
CLEAR_EVERY = 500  # requests; sympy's caches grow without end


def judge(gold: str, answer: str) -> str:
    """One of the values of `alignment.verify.Verdict`."""
    parsed_gold = parse(rf"\boxed{{{gold}}}", parsing_timeout=None, raise_on_error=True)
    if not any(isinstance(expression, Basic | MatrixBase) for expression in parsed_gold):
        return "bad_gold"
    parsed = parse(rf"\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)
    return "correct" if verify(parsed_gold, parsed, timeout_seconds=None, raise_on_error=True) else "wrong"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes our input
    logging.disable()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no reply
    print("ready", file=replies)
    for number, line in enumerate(sys.stdin, start=1):
        request = json.loads(line)
        signal.alarm(request["seconds"])  # an orphan ends itself
        try:
            verdict = judge(request["gold"], request["answer"])
        except Exception:  # noqa: BLE001 - whatever sympy raises on a hostile answer is reported as `error`
            verdict = "error"
        signal.alarm(0)
        print(verdict, file=replies)
        if number % CLEAR_EVERY == 0:
            clear_cache()


if __name__ == "__main__":
    main()
