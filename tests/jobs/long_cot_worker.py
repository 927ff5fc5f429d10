"""data_builders.long_cot by its real command, with engines that answer by script: whole, killed, resumed.

python long_cot_worker.py FILE      a config; its runs go to whole/ and killed/

Every run is a fork of this process, which has imported everything and started nothing.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import data_builders.long_cot
import data_builders.window
from alignment import models
from alignment.config import ModelConfig
from alignment.rollout.samples import Sample
from data_builders.long_cot import Writer

GOOD = "<think>\nWell, {extra}so 1.\n</think>\nThat is \\boxed{{1}}"
# What the teacher says, by the seed: the last one is cut off.
TAUGHT = (
    GOOD.format(extra=""),
    GOOD.format(extra="hm, "),
    GOOD.format(extra="").replace("{1}", "{2}"),
    "\\boxed{1}",
    "<think>\nWell,",
)


class Scripted:
    """The student is right the more often, the greater the number in the question; the teacher never for 3."""

    max_model_len, settings, faults = 512, {}, {}

    def __init__(self, weights: str, folder: Any) -> None:
        self.weights = weights
        self._tokenizer = models.load_tokenizer(ModelConfig(path=str(folder)))

    def generate(self, prompts: Any, seeds: Any, sampling: Any, stop: Sequence[int]) -> list[list[Sample]]:
        texts = [self._tokenizer.decode(prompt) for prompt in prompts]
        return [[self._answer(text, seed, stop) for seed in own] for text, own in zip(texts, seeds, strict=True)]

    def _answer(self, prompt: str, seed: int, stop: Sequence[int]) -> Sample:
        number = int(prompt.partition("user\n")[2].partition(" shirts")[0])
        if self.weights == "student":
            text, reason = f"\\boxed{{{1 if seed % 10 < number else 2}}}", "stop"
        else:
            text = TAUGHT[2] if number == 3 else TAUGHT[seed % len(TAUGHT)]
            reason = "length" if text == TAUGHT[-1] else "stop"
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return Sample([*ids, *([stop[0]] if reason == "stop" else [])], reason, -1.0)


def scripted(weights: str) -> Callable[..., Any]:
    return lambda model, config, dtype: nullcontext(Scripted(weights, model))


def deadly(owner: type, name: str, number: int) -> None:
    """The `number`-th call of a method kills the process."""
    method, calls = getattr(owner, name), [0]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **kwargs)

    setattr(owner, name, call)


def forked(arguments: Sequence[str], *moment: Any) -> int:
    """The exit code of a run that is killed at the moment, if one is given."""
    child = os.fork()
    if child == 0:
        data_builders.window.open_engine = scripted("student")
        data_builders.asking.open_engine = scripted("teacher")
        if moment:
            deadly(*moment)
        os._exit(data_builders.long_cot.main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(config: str) -> int:
    whole = ["--config", config, "output_dir=whole"]
    killed = ["--config", config, "output_dir=killed"]
    assert forked(whole) == 0
    # In the second chunk of rollouts, between the phases, in the teacher's second chunk, in the middle of filtering.
    for moment in (
        (Scripted, "generate", 2),
        (Writer, "add_rejects", 1),
        (Scripted, "generate", 2),
        (Writer, "add", 5),
    ):
        assert forked(killed, *moment) == -signal.SIGKILL, moment
        assert not os.path.exists("killed/rows.jsonl") and not os.path.exists("killed/rejects.jsonl")  # noqa: PTH110
    assert forked(killed) == 0
    assert forked(killed) == 0  # done already
    assert forked([*killed, "alpha=0.3"]) == 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
