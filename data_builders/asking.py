"""Asking a model that others learn from: a folder, by vLLM here or by servers of ours, or a name at any servers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignment import models
from alignment.config import ModelConfig
from alignment.evaluate import check_room
from alignment.rollout import engine_inputs, open_engine, place
from alignment.rollout.chat_servers import ChatServers, sample_chat
from alignment.rollout.samples import Faulty
from alignment.rollout.sampling import Chunk, sample
from alignment.rows import Row
from data_builders.config import TeacherConfig


@contextmanager
def asking(
    teacher: TeacherConfig, prompts: Iterable[Row], folder: Path, seed: int
) -> Iterator[tuple[Faulty, Iterator[Chunk]]]:
    """What answers, open within the block, and its samples; those that `folder` holds are not drawn again."""
    engine = teacher.engine
    options: dict[str, Any] = {"seed": seed, "chunk_prompts": engine.chunk_prompts}
    if teacher.endpoints:
        with ChatServers(teacher.model, teacher.endpoints, engine.requests, teacher.request) as servers:
            yield servers, sample_chat(servers, prompts, folder, teacher.sampling, **options)
        return
    tokenizer = models.load_tokenizer(ModelConfig(path=teacher.model))
    with open_engine(Path(teacher.model), engine, teacher.dtype) as local:
        yield local, sample(local, tokenizer, prompts, folder, teacher.sampling, **options)


def teacher_inputs(teacher: TeacherConfig) -> list[Path]:
    """What a job hashes of it: nothing where servers are asked, whose weights it does not see."""
    return [] if teacher.endpoints else engine_inputs(teacher.model, teacher.engine)


def check_teacher(teacher: TeacherConfig) -> str:
    """Refuse, for a dry run, a model that cannot be asked; returns where it is asked, in words.

    Raises:
        UserError: no such model folder, or no room for a prompt.
    """
    if teacher.endpoints:
        return f"by the servers {', '.join(teacher.endpoints)}"
    models.check_model(ModelConfig(path=teacher.model))
    check_room(teacher.engine, teacher.sampling)
    return place(teacher.engine)
