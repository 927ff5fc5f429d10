"""One rank of a test: ends while a thread of Gloo's lets go of the tensors of an exchange, one after the other.

    leaving_worker.py OUT CODE [raise]      by training.leave, or as any other program

The group is held for ever, as DeepSpeed's hooks hold it, and each tensor let go of waits for the interpreter, here as
long as the process does not give it away.
"""

import atexit
import ctypes
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from alignment.training import leave

TENSORS, SECONDS = 20_000, 0.5


def main() -> list[torch.Tensor]:
    dist.init_process_group("gloo")
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    atexit.register(Path(sys.argv[1], f"rank{dist.get_rank()}").touch)
    dist.barrier()
    sys.setswitchinterval(100)
    tensors = [torch.ones(1) for _ in range(TENSORS)]
    dist.all_reduce_coalesced(tensors, async_op=True)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        pass
    print("said before the end")
    return tensors


if __name__ == "__main__":
    kept, code = main(), int(sys.argv[2])
    if "raise" in sys.argv:
        raise SystemExit(code)
    leave(code)
