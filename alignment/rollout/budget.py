"""A budget of thinking: an answer that still thinks when it is used up has its thinking closed, and goes on from there.

The answer's first part is drawn as ever; what is not at its end after `thinking_budget` tokens is drawn on in a second
request, from a seed of its own, behind the closing mark where thinking is open. Tokens that are put in count as the
answer's, but not to its log-probability: the model did not choose them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from alignment.chat import THINK_END, THINK_START
from alignment.config import SamplingConfig
from alignment.errors import UserError
from alignment.rollout.samples import Engine, Sample, generate
from alignment.rollout.seeds import sample_seed


@dataclass(frozen=True)
class Marks:
    """Token ids of what opens and closes a block of thinking, and of what is put in where it is closed by force."""

    start: list[int]
    end: list[int]
    close: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Marks":
        texts = [THINK_START, THINK_END, f"\n{THINK_END}\n"]
        return cls(*tokenizer(texts, add_special_tokens=False)["input_ids"])


def generate_within(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop: Sequence[int],
    marks: Marks,
    adapters: Sequence[str | None] | None = None,
) -> list[list[Sample]]:
    """As `engine.generate`, with at most `sampling.thinking_budget` tokens before an answer's thinking is closed.

    Each prompt is answered by one of an engine's adapters where some are given; see samples.Routed.

    Raises:
        UserError: the budget leaves no room for an answer.
    """
    budget = sampling.thinking_budget
    assert budget is not None
    left = sampling.max_tokens - budget - len(marks.close)
    if left < 1:
        raise UserError(
            f"sampling.thinking_budget: {budget} and the {len(marks.close)} tokens that close the thinking leave no "
            f"room for an answer in max_tokens {sampling.max_tokens}"
        )
    chosen = [None] * len(prompts) if adapters is None else adapters
    first = generate(engine, chosen, prompts, seeds, sampling.model_copy(update={"max_tokens": budget}), stop)
    begun = [
        (adapter, prompt, own, part)
        for adapter, prompt, of_prompt, parts in zip(chosen, prompts, seeds, first, strict=True)
        for own, part in zip(of_prompt, parts, strict=True)
        if part.finish_reason == "length"
    ]
    rest = sampling.model_copy(update={"max_tokens": left})
    put_in = [marks.close if thinks(part.token_ids, marks) else [] for *_, part in begun]
    behind = [[*prompt, *part.token_ids, *close] for (_, prompt, _, part), close in zip(begun, put_in, strict=True)]
    # Tokens are counted from 0 again: the same seed would repeat the draws of the first part.
    again = [[sample_seed(own, "behind the budget", 0)] for _, _, own, _ in begun]
    second = generate(engine, [each[0] for each in begun], behind, again, rest, stop) if begun else []
    whole = iter([_joined(part, close, *end) for (*_, part), close, end in zip(begun, put_in, second, strict=True)])
    return [[part if part.finish_reason == "stop" else next(whole) for part in parts] for parts in first]


def thinks(token_ids: Sequence[int], marks: Marks) -> bool:
    """Whether a block of thinking is open at the end."""
    return _last(token_ids, marks.start) > _last(token_ids, marks.end)


def _last(token_ids: Sequence[int], mark: Sequence[int]) -> int:
    """The last place of a mark, -1 where there is none."""
    places = range(len(token_ids) - len(mark), -1, -1)
    return next((place for place in places if list(token_ids[place : place + len(mark)]) == list(mark)), -1)


def _joined(part: Sample, close: Sequence[int], end: Sample) -> Sample:
    return replace(end, token_ids=[*part.token_ids, *close, *end.token_ids], logprob=part.logprob + end.logprob)
