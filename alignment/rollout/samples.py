"""What an engine gives and takes. Nothing here imports torch or vLLM."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from alignment.config import SamplingConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sample:
    """One answer.

    `token_ids` ends with the stop token where `finish_reason` is "stop". `logprob` is the sum of the chosen tokens'
    log-probabilities under the model itself, before temperature and top-p.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprob: float


class Engine(Protocol):
    """What the sampling loop needs of an engine; `VLLMEngine` is the one."""

    @property
    def weights(self) -> str:
        """Hash of the weights in use."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer, at most."""

    @property
    def settings(self) -> Mapping[str, str | int | float]:
        """Whatever else changes the samples, such as the dtype."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, stop: Sequence[int], seed: int
    ) -> list[list[Sample]]:
        """`sampling.n` samples of each prompt (token ids), a function of the arguments and the weights alone."""


def chunk_seed(run_seed: int, chunk: int) -> int:
    """The seed of a chunk of prompts: 32 bits, unrelated between chunks and between runs."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{chunk}".encode()).digest()[:4], "big")
