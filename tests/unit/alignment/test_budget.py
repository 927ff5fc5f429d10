"""Thinking that is closed by force, by a scripted engine: what is asked for, and what comes back."""

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from alignment.chat import THINK_END, THINK_START
from alignment.config import SamplingConfig
from alignment.errors import UserError
from alignment.rollout.budget import Marks, generate_within, thinks
from alignment.rollout.samples import Sample

START, END, STOP = 1, 2, 0
MARKS = Marks([START], [END], [8, END, 8])
SAMPLING = SamplingConfig(n=1, max_tokens=12, thinking_budget=4)


class Scripted:
    """Says what is written for a prompt, up to the limit; a token has log-probability -1."""

    def __init__(self, script: dict[tuple[int, ...], list[int]]) -> None:
        self.script = script
        self.asked: list[tuple[list[list[int]], list[list[int]], int]] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        self.asked.append(([list(p) for p in prompts], [list(s) for s in seeds], sampling.max_tokens))
        return [
            [self._say(prompt, sampling.max_tokens) for _ in own] for prompt, own in zip(prompts, seeds, strict=True)
        ]

    def _say(self, prompt: Sequence[int], limit: int) -> Sample:
        said = self.script[tuple(prompt)]
        ids = said[:limit]
        return Sample(ids, "stop" if ids[-1] == STOP else "length", -float(len(ids)))


def test_open_thinking_is_closed_and_the_answer_goes_on_behind_it() -> None:
    """[1, 5, 5, 5] still thinks at the budget of 4: 8 2 8 is put in, and at most 12 - 4 - 3 tokens follow."""
    engine = Scripted({(9,): [START, 5, 5, 5, 5, 5], (9, START, 5, 5, 5, 8, END, 8): [6, 6, STOP]})
    [[sample]] = generate_within(engine, [[9]], [[77]], SAMPLING, [STOP], MARKS)  # type: ignore[arg-type]
    assert sample == Sample([START, 5, 5, 5, 8, END, 8, 6, 6, STOP], "stop", -7.0)
    (_, first_seeds, first_limit), (behind, second_seeds, second_limit) = engine.asked
    assert (first_limit, second_limit) == (4, 5)
    assert behind == [[9, START, 5, 5, 5, 8, END, 8]]
    assert first_seeds == [[77]] and second_seeds != first_seeds


def test_what_has_ended_or_thinks_no_more_is_left_as_it_is() -> None:
    engine = Scripted(
        {
            (1, 1): [START, 5, STOP],
            (2, 2): [START, END, 6, 6, 6, 6],
            (3, 3): [6, 6, 6, 6, 6],
            (2, 2, START, END, 6, 6): [7, STOP],
            (3, 3, 6, 6, 6, 6): [7] * 9,
        }
    )
    found = generate_within(engine, [[1, 1], [2, 2], [3, 3]], [[1, 2], [3], [4]], SAMPLING, [STOP], MARKS)  # type: ignore[arg-type]
    ended, closed, silent = found
    assert [s.token_ids for s in ended] == [[START, 5, STOP]] * 2, "ended within the budget"
    assert closed == [Sample([START, END, 6, 6, 7, STOP], "stop", -6.0)]
    assert silent == [Sample([6] * 4 + [7] * 5, "length", -9.0)]
    assert len(engine.asked[1][0]) == 2


def test_no_second_request_where_all_have_ended() -> None:
    engine = Scripted({(9,): [5, STOP]})
    generate_within(engine, [[9]], [[1]], SAMPLING, [STOP], MARKS)  # type: ignore[arg-type]
    assert len(engine.asked) == 1


def test_marks_of_several_tokens() -> None:
    marks = Marks([1, 1], [1, 2], [1, 2])
    assert thinks([1, 1, 5], marks) and not thinks([1, 1, 5, 1, 2], marks) and thinks([1, 1, 1, 2, 1, 1], marks)
    assert not thinks([], marks) and not thinks([1], marks)


def test_marks_of_a_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    marks = Marks.of(tiny_tokenizer)
    assert [tiny_tokenizer.decode(ids) for ids in (marks.start, marks.end, marks.close)] == [
        THINK_START, THINK_END, f"\n{THINK_END}\n",
    ]  # fmt: skip
    ids = tiny_tokenizer(f"{THINK_START}\na\n", add_special_tokens=False)["input_ids"]
    assert thinks(ids, marks) and not thinks([*ids, *marks.close], marks)


def test_a_budget_that_leaves_no_room_is_refused() -> None:
    tight = SAMPLING.model_copy(update={"thinking_budget": 9})
    with pytest.raises(UserError, match="leave no room for an answer in max_tokens 12"):
        generate_within(Scripted({}), [[9]], [[1]], tight, [STOP], MARKS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="thinking_budget: 12 leaves no room"):
        SamplingConfig(max_tokens=12, thinking_budget=12)
