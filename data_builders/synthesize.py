"""Synthesize multilingual shopping arithmetic with short, thinking and verifiable answers.

    python -m data_builders.synthesize --config configs/data/demo.yaml

Writes sft_short.jsonl, sft_direct.jsonl, sft_long.jsonl (rows with `messages`: worked answers, results alone, answers
after thinking), reward_prompts.jsonl, prompts.jsonl and held_out.jsonl (rows with `prompt` and `answer`), and
held_out_worked.jsonl, the last with worked answers, for tasks that choose among answers. SFT, reward prompts, prompts
and held-out share no problem, whatever its language.
"""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from typing import cast

from alignment import chat, job
from alignment.errors import UserError, did_you_mean
from alignment.rows import Row, write_rows
from data_builders import synthesis
from data_builders.config import SynthesizeConfig
from data_builders.synthesis import Language, Task, Template

# One training problem in eight for the reward models, two for online training, the rest for SFT.
USES = ("sft", "sft", "sft", "sft", "sft", "prompts", "prompts", "reward_prompts")
MOST_TASKS = 10**9  # a cell of language and template that runs dry raises before


def run(config: SynthesizeConfig) -> None:
    with job.Job.open("data_builders.synthesize", config) as this:
        if this.done:
            return
        parts = draw(config)
        train = [task for name, tasks in parts.items() if name != "held_out" for task in tasks]
        synthesis.check_disjoint(train, parts["held_out"])
        for name, tasks in parts.items():
            write_rows(this.dir / f"{name}.jsonl", rows(name, tasks))
        write_rows(this.dir / "held_out_worked.jsonl", rows("sft_short", parts["held_out"]))
        this.finish({f"rows.{name}": len(tasks) for name, tasks in parts.items()})


def draw(config: SynthesizeConfig) -> dict[str, list[Task]]:
    """The tasks of every file. A problem belongs to one of the three uses, whatever the language it is worded in."""
    uses = {name: stream_of(config, name) for name in dict.fromkeys(USES)}
    return {
        "sft_short": list(islice(uses["sft"], config.short_rows)),
        "sft_direct": list(islice(uses["sft"], config.direct_rows)),
        "sft_long": list(islice(uses["sft"], config.long_rows)),
        "reward_prompts": list(islice(uses["reward_prompts"], config.reward_prompts)),
        "prompts": list(islice(uses["prompts"], config.prompts)),
        "held_out": list(generate(config, "held_out", config.held_out)),
    }


def stream_of(config: SynthesizeConfig, use: str) -> Iterator[Task]:
    return (task for task in generate(config, "train", MOST_TASKS) if use_of(task.key) == use)


def use_of(key: str) -> str:
    """What a training problem is used for, by a stable hash of its key."""
    return USES[int(sha256(f"use/{key}".encode()).hexdigest(), 16) % len(USES)]


def generate(config: SynthesizeConfig, split: synthesis.Split, count: int) -> Iterator[Task]:
    return synthesis.generate(
        split,
        count,
        seed=config.seed,
        languages=cast(list[Language], config.languages),
        templates=cast(list[Template], config.templates or list(synthesis.TEMPLATES)),
    )


def rows(name: str, tasks: Iterable[Task]) -> Iterator[Row]:
    match name:
        case "sft_short":
            return (_sft(task, task.short_answer, []) for task in tasks)
        case "sft_direct":
            return (_sft(task, task.direct_answer, []) for task in tasks)
        case "sft_long":
            thinking = [{"role": "system", "content": chat.THINKING_PROMPT}]
            return (
                _sft(task, f"{chat.THINK_START}\n{task.thinking}\n{chat.THINK_END}\n{task.direct_answer}", thinking)
                for task in tasks
            )
        case _:
            return (_head(task) | {"prompt": [_question(task)], "answer": task.answer} for task in tasks)


def _head(task: Task) -> Row:
    return {"id": task.id, "kind": "math", "language": task.language, "template": task.template}


def _question(task: Task) -> Row:
    return {"role": "user", "content": task.question}


def _sft(task: Task, answer: str, system: list[Row]) -> Row:
    return _head(task) | {"messages": [*system, _question(task), {"role": "assistant", "content": answer}]}


def plan(config: SynthesizeConfig) -> list[str]:
    for key, given, known in (
        ("languages", config.languages, synthesis.LANGUAGES),
        ("templates", config.templates or [], synthesis.TEMPLATES),
    ):
        for name in given:
            if name not in known:
                raise UserError(f"{key}: unknown name {name!r}{did_you_mean(name, known)}")
    return [f"{config.short_rows + config.long_rows} SFT rows, {config.prompts} prompts, {config.held_out} held out"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(SynthesizeConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
