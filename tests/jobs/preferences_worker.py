"""data_builders.preferences by its real command, killed, or several times.

python preferences_worker.py MOMENT N ...    MOMENT is one of generate, judge, write: the N-th such call is a SIGKILL
python preferences_worker.py each JSON       lists of arguments, one run after the other, all with one engine

The rest are the command's own arguments.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from typing import Any

import data_builders.judge
import data_builders.preferences
from alignment.rollout.engine import VLLMEngine


def deadly(owner: type, name: str, number: int) -> None:
    """The `number`-th call of a method kills the process."""
    method, calls = getattr(owner, name), [0]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **kwargs)

    setattr(owner, name, call)


def keep_engine() -> None:
    """An engine takes 15 s to start: the first one serves every run, if only the chunks differ."""
    open_engine, opened = data_builders.preferences.open_engine, {}

    def kept(model: Any, config: Any, dtype: str) -> Any:
        asked = (model, config.model_dump_json(exclude={"chunk_prompts"}), dtype)
        if asked not in opened:
            opened[asked] = open_engine(model, config, dtype)
        return nullcontext(opened[asked])

    data_builders.preferences.open_engine = kept


def main(mode: str, argument: str, *rest: str) -> int:
    match mode:
        case "each":
            keep_engine()
            return max(data_builders.preferences.main(line) for line in json.loads(argument))
        case "generate":
            deadly(VLLMEngine, "generate", int(argument))
        case "judge":
            deadly(data_builders.judge.Judge, "_scored", int(argument))
        case "write":
            deadly(data_builders.preferences.PairWriter, "_write", int(argument))
    return data_builders.preferences.main(rest)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
