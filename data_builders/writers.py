"""Texts that a model writes, one for each question, kept on disk so that a resumed job asks for none a second time.

The model is a folder, sampled by vLLM in this process or by the project's servers, or a name at OpenAI-compatible
servers. The texts lie in the sample store (alignment.rollout), so each belongs to the model and settings that made it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.progress import track
from alignment.rollout.samples import engine_metrics
from alignment.rollout.store import Completion
from alignment.rows import Row
from alignment.thinking import Fault, Thought, parse
from data_builders.asking import asking, check_teacher
from data_builders.ecommerce.config import WriterConfig

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Written:
    """What a model wrote; where that is not a whole text, `fault` says why."""

    text: str
    fault: str | None = None

    @property
    def spoken(self) -> "Written":
        """Without its thinking."""
        match parse(self.text):
            case Thought(summary=summary):
                return Written(summary, self.fault)
            case Fault(reason="no thinking"):
                return Written(self.text.strip(), self.fault or ("empty" if not self.text.strip() else None))
            case Fault(reason=reason):
                return Written("", self.fault or reason)


def write(
    writer: WriterConfig, questions: Mapping[str, Messages], folder: Path, seed: int, label: str, counts: Counter[str]
) -> dict[str, Written]:
    """A text for each question (id -> conversation), by id; asked are those that `folder` does not hold yet.

    What the servers failed at, and which adapter was asked how often, is added to `counts`.
    """
    if not questions:
        return {}
    rows = [asked(writer, name, messages) for name, messages in questions.items()]
    found: dict[str, Written] = {}
    with asking(writer, rows, folder, seed) as (answering, chunks):
        for chunk in track(chunks, len(rows), label, lambda chunk: len(chunk.prompts)):
            for row, samples in zip(chunk.prompts, chunk.samples, strict=True):
                found[row["id"]] = _written(samples)
        counts.update(engine_metrics(answering))
    return found


def asked(writer: WriterConfig, name: str, messages: Messages) -> Row:
    """A question as the model is asked it."""
    if writer.system_prompt is not None:
        own = [message["content"] for message in messages if message["role"] == "system"]
        rest = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": "\n\n".join([writer.system_prompt, *own])}, *rest]
    switch = {} if writer.enable_thinking is None else {"enable_thinking": writer.enable_thinking}
    return {"id": name, "prompt": messages, **({"chat_template_kwargs": switch} if switch else {})}


def check_writer(writer: WriterConfig) -> str:
    """Refuse, for a dry run, a model that cannot be asked; returns what is asked, and where, in words.

    Raises:
        UserError: no such model folder, or no room for a question.
    """
    return f"{writer.model} {check_teacher(writer)}"


def _written(samples: Sequence[Completion] | None) -> Written:
    if samples is None:
        return Written("", "question too long")
    [one] = samples
    match one.finish_reason:
        case "stop":
            return Written(one.text)
        case "length":
            return Written(one.text, "cut off")
        case _:
            return Written("", "refused by the server")
