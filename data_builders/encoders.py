"""Models that make a vector of a text: sentence-transformers or vLLM in this process, or servers of /v1/embeddings.

Suffixes: S texts of a call, D dimensions.
"""

import logging
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from pydantic import BaseModel, FiniteFloat, ValidationError

from alignment.closing import Closing
from alignment.errors import UserError, did_you_mean
from alignment.rollout.pool import Fault, Pool, Server
from alignment.rows import is_hub_id
from data_builders.config import EmbeddingConfig

EMBEDDINGS = "/v1/embeddings"
PING = "ping"  # what a server embeds to show that it is well
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a hub id: nothing pickled, no code
SAME = 0.999  # cosine of one text's vectors by two runs of one model, at least
GIB = 1 << 30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """Vectors of texts, of any length, and which texts were longer than the model takes."""

    vectors_SD: NDArray[np.float32]
    truncated_S: NDArray[np.bool_]


class Encoder(Closing):
    """A model that is loaded, or servers that answer. Use as a context manager, or `close()` it."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Encoded:
        """The vectors of texts, their prefix included."""


def open_encoder(config: EmbeddingConfig) -> Encoder:
    """
    Raises:
        UserError: no such model, one that cannot be loaded, or no server that answers.
    """
    match config.backend:
        case "sentence_transformers":
            return SentenceTransformers(config)
        case "vllm":
            return VLLM(config)
        case "endpoint":
            return Endpoints(config)


def local_folder(config: EmbeddingConfig) -> Path:
    """The model's folder; a hub id is downloaded first, or found where it was before.

    Raises:
        UserError: no such folder or hub id, or no safetensors in it.
    """
    folder = Path(config.model)
    if is_hub_id(config.model):
        try:
            folder = Path(snapshot_download(config.model, revision=config.revision, allow_patterns=FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError) as error:
            raise UserError(f"{config.model}: the hub does not give this model: {_first_line(error)}") from None
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        hint = did_you_mean(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise UserError(f"{folder}: no such model folder, nor is it a hub id, org/name{hint}")
    if not any(folder.rglob("*.safetensors")):
        raise UserError(f"{folder}: holds no weights, expected *.safetensors; pickled ones are refused")


def same_direction(a_D: NDArray[Any], b_D: NDArray[Any]) -> bool:
    """Whether they may be vectors that one model makes of one text."""
    return a_D.shape == b_D.shape and bool(a_D @ b_D >= SAME * np.linalg.norm(a_D) * np.linalg.norm(b_D))


class SentenceTransformers(Encoder):
    """A sentence-transformers model on the GPU, or on the cores that torch takes."""

    def __init__(self, config: EmbeddingConfig) -> None:
        import torch
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        if not sys.stderr.isatty():
            disable_progress_bar()
        options: dict[str, Any] = {"use_safetensors": True}
        if torch.cuda.is_available():
            options["dtype"] = config.dtype
        try:
            self._model = SentenceTransformer(
                str(local_folder(config)), trust_remote_code=False, local_files_only=True, model_kwargs=options
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise UserError(f"{config.model}: not a model for embeddings: {_first_line(error)}") from None
        if config.max_tokens is not None:
            most = self._model.max_seq_length
            if most is not None and config.max_tokens > most:
                raise UserError(f"embedding.max_tokens: {config.max_tokens} are more than {config.model} takes, {most}")
            self._model.max_seq_length = config.max_tokens
        self._batch_size = config.batch_size

    def encode(self, texts: Sequence[str]) -> Encoded:
        # An empty prompt is none; None would be the model's default prompt.
        vectors_SD = self._model.encode(list(texts), prompt="", batch_size=self._batch_size, show_progress_bar=False)
        return Encoded(np.asarray(vectors_SD, dtype=np.float32), self._truncated(texts))

    def _truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        longest = self._model.max_seq_length
        if longest is None:
            return np.zeros(len(texts), dtype=np.bool_)
        ids = self._model.tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
        return np.array([len(own) > longest for own in ids])

    def close(self) -> None:
        """Nothing: the weights go with the object."""


class VLLM(Encoder):
    """vLLM's pooling runner in this process. Only one engine lives at a time in a process."""

    def __init__(self, config: EmbeddingConfig) -> None:
        # First the engine's module: it sets what vLLM reads when it is imported.
        from alignment.rollout.engine import kept_process_state, own_random_state  # isort: skip
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = {"kv_cache_memory_bytes": GIB} if on_cpu else {}
        options |= {
            "dtype": "float32" if on_cpu else config.dtype,
            "max_model_len": config.max_tokens,
            "enforce_eager": on_cpu,
            "use_tqdm_on_load": sys.stderr.isatty(),
        }
        try:
            with own_random_state(0), kept_process_state():
                self._llm: LLM | None = LLM(str(local_folder(config)), runner="pooling", **options)
        except ValueError as error:  # what its checks raise: no pooling model, or one that takes fewer tokens
            raise UserError(f"{config.model}: vLLM does not take it: {' '.join(str(error).split()):.300}") from None
        self._longest = self._llm.llm_engine.model_config.max_model_len
        self._tokenizer = self._llm.get_tokenizer()

    def encode(self, texts: Sequence[str]) -> Encoded:
        from vllm.inputs import TokensPrompt

        assert self._llm is not None
        whole = self._tokenizer(list(texts), truncation=False)["input_ids"]
        cut = self._tokenizer(list(texts), truncation=True, max_length=self._longest)["input_ids"]
        outputs = self._llm.embed([TokensPrompt(prompt_token_ids=ids) for ids in cut], use_tqdm=False)
        vectors_SD = np.array([output.outputs.embedding for output in outputs], dtype=np.float32)
        return Encoded(vectors_SD, np.array([len(ids) > self._longest for ids in whole]))

    def close(self) -> None:
        """Free the weights. Closing twice does nothing."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()


class _Item(BaseModel):
    index: int
    embedding: list[FiniteFloat]


class _Usage(BaseModel):
    prompt_tokens: int


class _Answer(BaseModel):
    data: list[_Item]
    usage: _Usage | None = None


class Endpoints(Encoder):
    """Servers that answer /v1/embeddings as OpenAI's does (vLLM, text-embeddings-inference, OpenAI).

    A server refuses texts that it finds too long, which ends the job. With `max_tokens` it is asked to cut them (by
    `truncate_prompt_tokens`, which is vLLM's), one text a request, so that its count of tokens tells which; a text of
    exactly as many counts as cut.
    """

    def __init__(self, config: EmbeddingConfig) -> None:
        self._config = config
        self._first_D: NDArray[np.float64] | None = None  # what the first server that answered makes of PING
        self._pool = Pool(config.endpoints, config.requests, self._ping, check=self._ping)
        self._pool.open()

    def encode(self, texts: Sequence[str]) -> Encoded:
        size = 1 if self._config.max_tokens else self._config.batch_size
        bodies = [self._body(texts[start : start + size]) for start in range(0, len(texts), size)]
        answers = self._pool.map(bodies, EMBEDDINGS, _read)
        vectors = [
            vector
            for body, answer in zip(bodies, answers, strict=True)
            for vector in self._vectors(body["input"], answer)
        ]
        truncated = [cut for answer in answers for cut in self._truncated(answer)]
        return Encoded(np.array(vectors, dtype=np.float32), np.array(truncated))

    def _truncated(self, answer: _Answer) -> list[bool]:
        longest, usage = self._config.max_tokens, answer.usage
        return [longest is not None and usage is not None and usage.prompt_tokens >= longest] * len(answer.data)

    def _body(self, texts: Sequence[str]) -> dict[str, Any]:
        cut = {"truncate_prompt_tokens": self._config.max_tokens} if self._config.max_tokens else {}
        return {"input": list(texts), **cut}

    def _vectors(self, texts: Sequence[str], answer: _Answer) -> list[list[float]]:
        in_order = sorted(answer.data, key=lambda item: item.index)
        if [item.index for item in in_order] != list(range(len(texts))):
            raise UserError(f"{', '.join(self._config.endpoints)}: {len(texts)} texts got {len(in_order)} vectors")
        return [item.embedding for item in in_order]

    async def _ping(self, server: Server) -> None:
        """Is the server well, and has it the model of the others?"""
        server.model = self._config.model
        answer = _read(await self._pool.post(server, EMBEDDINGS, {**self._body([PING]), "model": server.model}))
        now_D = np.array(answer.data[0].embedding)
        if self._first_D is None:
            self._first_D = now_D
        if not same_direction(self._first_D, now_D):
            raise UserError(f"{server.address}: its {server.model} is not the one of the other servers")

    def close(self) -> None:
        """Close the connections and say what went wrong. Closing twice does nothing."""
        self._pool.close()
        if self._pool.faults:
            logger.warning("embedding: faults of the servers: %s", dict(self._pool.faults))
            self._pool.faults.clear()


def _read(answer: Any) -> _Answer:
    try:
        read = _Answer.model_validate(answer)
    except ValidationError as error:
        raise Fault("garbage", str(error.errors()[0]["msg"])) from None
    lengths = {len(item.embedding) for item in read.data}
    if len(lengths) != 1 or 0 in lengths:
        raise Fault("garbage", "vectors of no or of different lengths")
    return read


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
