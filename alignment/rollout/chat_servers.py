"""A model behind OpenAI-compatible servers, asked by its name through chat completions: samples into a store.

Unlike those of alignment.rollout.endpoints these servers prove nothing: one is believed to serve the model that it
names, and most draw otherwise when they are asked again. So what is stored is not asked again, whatever the server.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from alignment.chat import THINK_END, THINK_START, Messages
from alignment.closing import Closing
from alignment.config import RequestsConfig, SamplingConfig
from alignment.errors import UserError, did_you_mean
from alignment.rollout.pool import Pool, Refusal, Server, read_as
from alignment.rollout.sampling import Chunk, chunks_of, unique_rows
from alignment.rollout.seeds import sample_seed
from alignment.rollout.store import Completion, SampleStore
from alignment.rows import Row

MODELS, CHAT = "/v1/models", "/v1/chat/completions"
SEEDS = 1 << 31  # what all servers take


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class _Message(BaseModel):
    content: str | None = None
    reasoning: str | None = None  # vLLM's name
    reasoning_content: str | None = None  # of most others


class _Choice(BaseModel):
    message: _Message
    finish_reason: str


class _Answers(BaseModel):
    choices: list[_Choice] = Field(min_length=1, max_length=1)


class ChatServers(Closing):
    """Servers that each serve `model`. Use as a context manager, or `close()` it."""

    def __init__(
        self,
        model: str,
        endpoints: Sequence[str],
        requests: RequestsConfig,
        body: Mapping[str, Any],
        key: str | None = None,
    ) -> None:
        """`body` is what every request holds besides; a key of value None is left out of the request.

        Raises:
            UserError: a server serves no such model, or none answers.
        """
        self.model, self.body = model, dict(body)
        self._answered = False
        self._pool = Pool(endpoints, requests, self._examine, key, health=MODELS)
        self._pool.open()

    @property
    def faults(self) -> Mapping[str, int]:
        """How often what went wrong, by kind and address."""
        return self._pool.faults

    def close(self) -> None:
        """Close the connections. Closing twice does nothing."""
        self._pool.close()

    async def _examine(self, server: Server) -> None:
        names = [model.id for model in read_as(_Models, await self._pool.get(server, MODELS)).data]
        if self.model not in names:
            raise UserError(f"{server.address}: serves no model {self.model!r}{did_you_mean(self.model, names)}")
        server.model = self.model

    def answer(
        self, questions: Mapping[str, "Question"], sampling: SamplingConfig, seed: int
    ) -> list[list[Completion]]:
        """`sampling.n` answers to each question, by its id.

        Raises:
            UserError: a request failed too often, no server is left, or every request is refused.
        """
        asked = [
            (name, index, sample_seed(seed, name, index) % SEEDS) for name in questions for index in range(sampling.n)
        ]
        bodies = [self._request(questions[name], sampling, own) for name, _, own in asked]
        found = self._pool.map(bodies, CHAT, _told, lambda refusal: refusal)
        refusals = [one for one in found if isinstance(one, Refusal)]
        if len(refusals) == len(found) and not self._answered:
            raise refusals[0]
        self._answered = True
        samples = iter([_completion(*one, told) for one, told in zip(asked, found, strict=True)])
        return [[next(samples) for _ in range(sampling.n)] for _ in questions]

    def _request(self, question: "Question", sampling: SamplingConfig, seed: int) -> dict[str, Any]:
        messages, template = question
        body = {
            "messages": messages,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "chat_template_kwargs": template or None,
            **self.body,
        }
        return {key: value for key, value in body.items() if value is not None}


Question = tuple[Messages, dict[str, Any]]  # the conversation, and options of the chat template


def sample_chat(
    servers: ChatServers,
    prompts: Iterable[Row],
    root: Path,
    sampling: SamplingConfig,
    *,
    seed: int,
    chunk_prompts: int = 128,
) -> Iterator[Chunk]:
    """As `alignment.rollout.sampling.sample`, of a model that is known by its name alone.

    Samples have no tokens; a server's reasoning that comes apart from its answer stands before it in a block of
    thinking. One whose request the server refuses, or which it filters, has the finish reason "refused".

    Raises:
        UserError: ids that are missing or double, no prompts, or every request refused.
    """
    made_from = {
        "engine": "chat completions",
        "model": servers.model,
        "body": servers.body,
        "sampling": sampling.model_dump(exclude={"n"}),
        "seed": seed,
    }
    store = SampleStore(root, made_from, sampling.n)
    for number, rows in enumerate(chunks_of(unique_rows(prompts), chunk_prompts)):
        questions = {row["id"]: (row["prompt"], row.get("chat_template_kwargs", {})) for row in rows}
        stored = store.shard(questions).exists()
        samples = store.read(questions)
        resampled = stored and samples is None
        if samples is None:
            samples = servers.answer(questions, sampling, seed)
            store.write(questions, samples)
        name = f"{number:06d}-{store.folder.name}-{store.shard(questions).stem}"
        yield Chunk(name, rows, list(samples), resampled)


def _told(answer: Any) -> _Choice | Refusal:
    [choice] = read_as(_Answers, answer).choices
    return choice


def _completion(name: str, index: int, seed: int, told: _Choice | Refusal) -> Completion:
    if isinstance(told, Refusal):
        return Completion(name, index, seed, [], str(told), "refused", math.nan)
    match told.finish_reason:
        case "stop" | "length" as reason:
            return Completion(name, index, seed, [], _text(told.message), reason, math.nan)
        case other:
            return Completion(name, index, seed, [], f"finish_reason {other}", "refused", math.nan)


def _text(message: _Message) -> str:
    reasoning = message.reasoning or message.reasoning_content
    content = message.content or ""
    return f"{THINK_START}\n{reasoning.strip()}\n{THINK_END}\n{content}" if reasoning else content
