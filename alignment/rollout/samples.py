"""What an engine gives and takes. Nothing here imports torch or vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from alignment.config import SamplingConfig

if TYPE_CHECKING:
    from alignment.rollout.routes import Routes  # lingua, which few jobs need

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


class Faulty(Protocol):
    """What asks servers, or might."""

    @property
    def faults(self) -> Mapping[str, int]:
        """What went wrong with servers so far and was made good, by kind and address."""


def engine_metrics(engine: Faulty) -> dict[str, int]:
    """Faults by kind and address, and how many prompts each adapter was asked, if there are any, as metrics."""
    faults = {f"faults.{name}": count for name, count in sorted(engine.faults.items())}
    if not isinstance(engine, Routed):
        return faults
    return faults | {f"routed.{name}": count for name, count in sorted(engine.routes.counts.items())}


class Engine(Faulty, Protocol):
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


@runtime_checkable
class Routed(Engine, Protocol):
    """An engine with adapters, which are chosen by a prompt's language."""

    @property
    def routes(self) -> "Routes":
        """Chooses and counts."""

    def generate_with(
        self,
        adapters: Sequence[str | None],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        """As `generate`, each prompt by one of the adapters; None: by none."""


def generate(
    engine: Engine,
    adapters: Sequence[str | None],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop: Sequence[int],
) -> list[list[Sample]]:
    """`engine.generate`, by the adapters that `engine.routes` chose where it has such."""
    if isinstance(engine, Routed):
        return engine.generate_with(adapters, prompts, seeds, sampling, stop)
    return engine.generate(prompts, seeds, sampling, stop)
