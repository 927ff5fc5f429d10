"""What an engine gives and takes. Nothing here imports torch or vLLM."""

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


def fault_metrics(engine: "Engine") -> dict[str, int]:
    """The counts of an engine's faults, as a job's metrics name them."""
    return {f"faults.{name}": count for name, count in sorted(engine.faults.items())}


class Engine(Protocol):
    """What the sampling loop needs of an engine."""

    @property
    def weights(self) -> str:
        """Hash of the weights in use."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer, at most."""

    @property
    def settings(self) -> Mapping[str, str | int | float]:
        """Whatever else changes the samples, such as the dtype."""

    @property
    def faults(self) -> Mapping[str, int]:
        """What went wrong with servers so far and was made good, by kind and address."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        """For each prompt (token ids) a sample of each of its seeds.

        The same arguments and weights give the same samples bit by bit. Other prompts beside them change a sample by
        no more than rounding can, where two tokens are all but equally near to the draw.
        """
