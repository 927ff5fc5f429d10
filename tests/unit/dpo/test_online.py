"""What a round draws, refuses and reports; the rounds themselves are in tests/jobs/test_online.py."""

from collections import Counter
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.rows import Row, write_rows
from dpo.config import OnlineConfig
from dpo.online import _against, _check_disjoint, draw_prompts

PROMPTS: list[Row] = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(10)]


def names(count: int, number: int, seed: int = 0) -> list[str]:
    return [row["id"] for row in draw_prompts(PROMPTS, count, number, seed)]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 10])
def test_every_prompt_is_drawn_once_before_any_is_drawn_twice(count: int) -> None:
    drawn: list[str] = []
    for number in range(1, 31):
        fresh = names(count, number)
        assert len(fresh) == len(set(fresh)) == count
        drawn += fresh
        counts = Counter(drawn)
        assert max(counts.values()) - min(counts[row["id"]] for row in PROMPTS) <= 1


def test_draws_follow_the_seed_and_the_round_alone() -> None:
    assert names(4, 2) == names(4, 2)
    assert names(4, 2) != names(4, 2, seed=1)
    assert set(names(5, 1)) | set(names(5, 2)) == {row["id"] for row in PROMPTS}
    assert names(10, 1) != [row["id"] for row in PROMPTS], "shuffled"


def test_more_prompts_a_round_than_there_are() -> None:
    with pytest.raises(UserError, match=r"round.prompts: 11 wanted, but there are 10"):
        draw_prompts(PROMPTS, 11, 1, 0)


def config(tmp_path: Path) -> OnlineConfig:
    return OnlineConfig.model_validate(
        {
            "output_dir": tmp_path,
            "model": "m",
            "prompts": "train.jsonl",
            "evaluation": {"prompts": "held_out.jsonl"},
            "round": {"prompts": 1},
            "training": {"learning_rate": 1e-3},
        }
    )


def test_a_held_out_prompt_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    held_out = [{"id": f"h{i}", "prompt": [{"role": "user", "content": f"{i}??"}]} for i in range(3)]
    _check_disjoint(PROMPTS, held_out, config(tmp_path))
    leaked = {"id": "h9", "prompt": PROMPTS[4]["prompt"]}  # another name, the same text
    with pytest.raises(UserError, match=r"held_out.jsonl: 1 prompts are also in train.jsonl, such as 'h9'"):
        _check_disjoint(PROMPTS, [*held_out, leaked], config(tmp_path))


def evaluation(folder: Path, rates: dict[str, int]) -> Path:
    rows = [{"id": name, "n": 4, "correct": correct, "verdicts": {}} for name, correct in rates.items()]
    write_rows(folder / "by_prompt.jsonl", rows)
    return folder


def test_change_is_paired_by_prompt_whatever_the_order(tmp_path: Path) -> None:
    """Every prompt gains a quarter, so the interval has no width; paired by place it would have."""
    before = evaluation(tmp_path / "before", {"a": 0, "b": 3, "c": 1})
    after = evaluation(tmp_path / "after", {"c": 2, "a": 1, "b": 4})
    assert _against(before, after) == pytest.approx({"change": 0.25, "change.low": 0.25, "change.high": 0.25})
    swapped = _against(after, before)
    assert swapped["change"] == pytest.approx(-0.25)


def test_evaluations_of_other_prompts_cannot_be_paired(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "before", {"a": 0, "b": 3})
    after = evaluation(tmp_path / "after", {"a": 0, "c": 3})
    with pytest.raises(UserError, match="evaluated other prompts than"):
        _against(before, after)
