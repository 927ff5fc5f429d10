"""Which prompts a round draws: by turns, or by what their samples were."""

import random
from collections import Counter
from collections.abc import Mapping

import pytest

from alignment.errors import UserError
from alignment.rows import Row
from dpo.drawing import Redraw, Seen, draw_prompts, weight

PROMPTS: list[Row] = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(10)]


def names(
    count: int, number: int, seed: int = 0, redraw: Redraw = "uniform", seen: Mapping[str, Seen] | None = None
) -> list[str]:
    return [row["id"] for row in draw_prompts(PROMPTS, count, number, seed, redraw=redraw, seen=seen or {})]


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
        names(11, 1)


def test_weights_by_hand() -> None:
    """E[p(1-p)] under Beta(c+1, n-c+1) is B(c+2, n-c+2) / B(c+1, n-c+1) = (c+1)(n-c+1) / ((n+2)(n+3))."""
    assert weight(None) == weight(Seen(0, 0)) == pytest.approx(1 / 6, abs=1e-15)
    assert weight(Seen(0, 1)) == pytest.approx(2 / 12, abs=1e-15)
    assert weight(Seen(1, 2)) == pytest.approx(4 / 20, abs=1e-15)
    assert weight(Seen(16, 32)) == pytest.approx(289 / 1190, abs=1e-15)
    assert weight(Seen(0, 32)) == pytest.approx(33 / 1190, abs=1e-15)


def test_weights_against_the_posterior_s_own_samples() -> None:
    rng = random.Random(0)
    for correct, n in ((0, 8), (3, 8), (31, 32)):
        draws = [rng.betavariate(correct + 1, n - correct + 1) for _ in range(100_000)]
        assert weight(Seen(correct, n)) == pytest.approx(sum(p * (1 - p) for p in draws) / len(draws), abs=2e-3)


@pytest.mark.parametrize("n", [1, 4, 8, 32])
def test_weights_are_symmetric_positive_and_highest_in_the_middle(n: int) -> None:
    weights = [weight(Seen(correct, n)) for correct in range(n + 1)]
    assert weights == weights[::-1]
    assert 0 < min(weights) == weights[0] and max(weights) == weights[n // 2] < 0.25
    assert weights[: n // 2 + 1] == sorted(weights[: n // 2 + 1])


def test_a_draw_by_pass_rate_is_by_the_seed_without_repeats_whatever_the_order_of_what_was_seen() -> None:
    rng = random.Random(1)
    for trial in range(200):
        seen = {row["id"]: Seen(rng.randrange(9), 8) for row in rng.sample(PROMPTS, rng.randrange(11))}
        count, number = rng.randint(1, 10), rng.randint(2, 9)
        drawn = names(count, number, trial, "pass_rate", seen)
        assert len(drawn) == len(set(drawn)) == count
        again = {name: seen[name] for name in sorted(seen, reverse=True)}
        assert names(count, number, trial, "pass_rate", again) == drawn
    assert names(5, 2, 0, "pass_rate") != names(5, 3, 0, "pass_rate"), "another draw in another round"
    assert names(5, 1, 0, "pass_rate") == names(5, 1), "the first round knows nothing"


def test_draws_come_in_proportion_to_the_weights() -> None:
    """One prompt a round: of 4000 draws each has its share, within four standard deviations."""
    seen = {"p0": Seen(16, 32), "p1": Seen(0, 32), "p2": Seen(32, 32)}
    counts = Counter(names(1, number, 0, "pass_rate", seen)[0] for number in range(2, 4002))
    total = sum(weight(seen.get(row["id"])) for row in PROMPTS)
    for row in PROMPTS:
        share = weight(seen.get(row["id"])) / total
        assert counts[row["id"]] == pytest.approx(4000 * share, abs=4 * (4000 * share * (1 - share)) ** 0.5)


def test_samples_go_where_both_verdicts_occur() -> None:
    """Of prompts half of which are hopeless, and all of which were seen, few of the drawn are hopeless."""
    prompts: list[Row] = [{"id": str(i)} for i in range(400)]
    seen = {str(i): Seen(0 if i % 2 else 10, 32) for i in range(400)}
    drawn = draw_prompts(prompts, 100, 2, 0, redraw="pass_rate", seen=seen)
    assert sum(int(row["id"]) % 2 for row in drawn) < 25
    uniform = draw_prompts(prompts, 100, 2, 0, redraw="uniform", seen=seen)
    assert 35 < sum(int(row["id"]) % 2 for row in uniform) < 65
