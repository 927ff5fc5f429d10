"""Which two samples become a pair."""

import random

import pytest

from data_builders import pairs as pairing
from data_builders.config import PairingConfig
from data_builders.pairs import Candidate, Discard, Origin, Pair, eligible, pair_row


def candidate(
    index: int, verdict: str | None, score: float | None = None, text: str | None = None, tokens: int = 5
) -> Candidate:
    return Candidate(index, f"text {index}" if text is None else text, [7] * tokens, "stop", verdict, score)


def choose(candidates: list[Candidate], count: int, seed: str, **settings: object) -> list[Pair] | Discard:
    return pairing.choose(eligible(candidates), PairingConfig.model_validate({"per_prompt": count, **settings}), seed)


def indices(chosen: object) -> list[tuple[int, int]]:
    assert isinstance(chosen, list), chosen
    return [(pair.chosen.index, pair.rejected.index) for pair in chosen]


def test_the_best_scored_correct_meets_the_best_scored_incorrect() -> None:
    """The report's rule, though an incorrect sample has the highest score of all."""
    samples = [
        candidate(0, "wrong", 0.1),
        candidate(1, "correct", 0.2),
        candidate(2, "no_answer", 9.0),
        candidate(3, "correct", 0.7),
        candidate(4, "wrong", 3.0),
    ]
    pairs = choose(samples, 1, "0/a")
    assert indices(pairs) == [(3, 2)]
    assert isinstance(pairs, list) and pairs[0].policy == "math_best_scored"
    assert indices(choose(samples, 2, "0/a")) == [(3, 2), (1, 0)]
    assert indices(choose(samples[::-1], 2, "0/a")) == [(3, 2), (1, 0)], "the order of the samples does not matter"


def test_several_pairs_reach_from_the_best_scored_incorrect_to_the_worst() -> None:
    samples = [candidate(0, "correct", 1.0), *(candidate(i, "wrong", -float(i)) for i in range(1, 11))]
    assert [rejected for _, rejected in indices(choose(samples, 4, "s"))] == [1, 4, 7, 10]
    assert [rejected for _, rejected in indices(choose(samples, 1, "s"))] == [1]


def test_a_correct_sample_meets_several_incorrect_ones_and_no_incorrect_one_comes_twice() -> None:
    samples = [candidate(0, "correct", 1.0), *(candidate(i, "wrong", -float(i)) for i in range(1, 5))]
    assert indices(choose(samples, 9, "s")) == [(0, 1), (0, 2), (0, 3), (0, 4)]
    several = [*samples, candidate(5, "correct", 2.0)]
    assert indices(choose(several, 3, "s")) == [(5, 1), (0, 2), (5, 4)]
    assert indices(choose([candidate(i, "correct", 0.0) for i in range(4)] + [candidate(9, "wrong", 0.0)], 9, "s")) == [
        (0, 9)
    ]


def test_equal_scores_go_to_the_earlier_sample() -> None:
    samples = [candidate(i, "correct" if i % 2 else "wrong", 1.0) for i in range(6)]
    assert indices(choose(samples, 3, "0/a")) == [(1, 0), (3, 2), (5, 4)]


def test_a_prompt_without_both_verdicts_is_discarded_with_the_reason() -> None:
    assert choose([candidate(0, "wrong", 1.0), candidate(1, "no_answer", 2.0)], 1, "s") == Discard("none correct")
    assert choose([candidate(0, "correct", 1.0), candidate(1, "correct", 2.0)], 1, "s") == Discard("all correct")
    unsure = [candidate(0, "bad_gold", 1.0), candidate(1, "timeout", 2.0)]
    assert choose(unsure, 1, "s") == Discard("none verifiable")


def test_verdicts_that_say_nothing_are_neither_chosen_nor_rejected() -> None:
    unsure = [candidate(0, "bad_gold", 9.0), candidate(1, "timeout", 8.0)]
    assert choose([candidate(2, "correct", 1.0), *unsure], 1, "s") == Discard("all correct")
    both = [*unsure, candidate(2, "correct", 1.0), candidate(3, "wrong", 0.0)]
    assert indices(choose(both, 4, "s")) == [(2, 3)]


def test_the_same_text_twice_is_one_sample_the_first() -> None:
    samples = [
        candidate(0, "wrong", 0.0, "a"),
        candidate(1, "correct", 0.0, "b"),
        candidate(2, "correct", 0.0, "b"),
        candidate(3, "wrong", 0.0, "a"),
    ]
    assert indices(choose(samples, 4, "s")) == [(1, 0)]


def test_without_scores_the_draw_follows_the_seed() -> None:
    samples = [candidate(i, "correct" if i < 8 else "wrong") for i in range(16)]
    pairs = choose(samples, 4, "0/a")
    assert isinstance(pairs, list) and {pair.policy for pair in pairs} == {"math_random"}
    assert indices(choose(samples, 4, "0/a")) == indices(pairs)
    assert all(chosen < 8 <= rejected for chosen, rejected in indices(pairs))
    assert len({chosen for chosen, _ in indices(pairs)}) == len({rejected for _, rejected in indices(pairs)}) == 4
    drawn = [indices(choose(samples, 1, f"0/{i}"))[0] for i in range(200)]
    assert {chosen for chosen, _ in drawn} == set(range(8)), "every correct sample has its chance"
    assert {rejected for _, rejected in drawn} == set(range(8, 16))


def test_the_two_sides_are_drawn_apart() -> None:
    """With one seed for both, the i-th correct sample would always meet the i-th incorrect one."""
    samples = [candidate(i, "correct" if i < 8 else "wrong") for i in range(16)]
    drawn = [indices(choose(samples, 1, f"0/{i}"))[0] for i in range(40)]
    assert len({rejected - chosen for chosen, rejected in drawn}) > 1


def test_one_missing_score_makes_the_whole_prompt_a_draw() -> None:
    samples = [candidate(0, "correct", 1.0), candidate(1, "wrong", None)]
    pairs = choose(samples, 1, "s")
    assert isinstance(pairs, list) and pairs[0].policy == "math_random"


def test_without_verdicts_the_best_meets_the_worst() -> None:
    samples = [candidate(i, None, score) for i, score in enumerate([0.5, 2.0, -1.0, 1.0])]
    random.Random(0).shuffle(samples)
    pairs = choose(samples, 3, "s")
    assert indices(pairs) == [(1, 2), (3, 0)]
    assert isinstance(pairs, list) and pairs[0].policy == "best_worst"
    assert choose([candidate(0, None, 1.0), candidate(1, None, 1.0)], 1, "s") == Discard("all scores equal")
    assert choose([candidate(0, None, 1.0)], 1, "s") == Discard("one sample only")
    unknown = [candidate(0, None), candidate(1, None)]
    assert choose(unknown, 1, "s") == Discard("no answer to verify and no reward model")


def test_a_row_says_where_it_comes_from() -> None:
    prompt = {"id": "p", "kind": "math", "language": "id", "prompt": [{"role": "user", "content": "?"}], "answer": "3"}
    options = {"chat_template_kwargs": {"enable_thinking": True}, "tools": [{"type": "function"}]}
    pairs = choose([candidate(4, "correct", 0.5), candidate(7, "wrong", 0.25)], 1, "s")
    assert isinstance(pairs, list)
    assert pair_row(prompt | options, pairs[0], Origin("w", "t")) == {
        "id": "p/4/7",
        "kind": "math",
        "language": "id",
        **options,  # without which training would read another prompt than was sampled from
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [{"role": "assistant", "content": "text 4"}],
        "rejected": [{"role": "assistant", "content": "text 7"}],
        "policy": "math_best_scored",
        "reason": "place 1 of 1 correct, place 1 of 1 incorrect",
        "scores": [0.5, 0.25],
        "ranks": [1, 2],
        "verdicts": ["correct", "wrong"],
        "tokens": [5, 5],
        "token_ids": [[7] * 5, [7] * 5],
        "weights": "w",
        "tokenizer": "t",
    }


def test_without_the_math_rule_the_reward_alone_decides() -> None:
    """A wrong answer with the highest score is chosen, and prompts without a correct one give pairs too."""
    samples = [candidate(0, "correct", 0.5), candidate(1, "wrong", 9.0), candidate(2, "wrong", 0.25)]
    pairs = choose(samples, 1, "s", math_rule=False)
    assert indices(pairs) == [(1, 2)]
    assert isinstance(pairs, list) and pairs[0].policy == "best_worst"
    assert pairs[0].reason == "best-scored, lowest-scored; by the reward alone, whatever the verdicts"
    assert pair_row({"id": "p", "prompt": []}, pairs[0], Origin("w", "t"))["verdicts"] == ["wrong", "wrong"]
    assert indices(choose(samples[1:], 1, "s", math_rule=False)) == [(1, 2)]
    assert choose(samples[1:], 1, "s") == Discard("none correct")
    unscored = [candidate(0, "correct"), candidate(1, "wrong")]
    assert choose(unscored, 1, "s", math_rule=False) == Discard("no answer to verify and no reward model")


SCORES = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]  # mean 4, standard deviation 2.582, first quartile 2


@pytest.mark.parametrize(
    ("settings", "rejected"),
    [
        ({"policy": "best_worst"}, 0),
        ({"policy": "best_quantile", "quantile": 0.25}, 2),
        ({"policy": "best_quantile", "quantile": 0.0}, 0),
        ({"policy": "best_sigma", "sigmas": 1.0}, 1),  # nearest to 1.418
        ({"policy": "best_sigma", "sigmas": 2.0}, 0),  # nearest to -1.16
        ({"policy": "best_sigma", "sigmas": 0.0}, 4),
        ({"policy": "best_sigma", "sigmas": 0.0, "minimum_margin": 4.5}, 3),
        ({"policy": "best_sigma", "sigmas": 0.0, "minimum_margin_sigmas": 2.0}, 2),  # 5.164 below 8
    ],
)
def test_the_rejected_is_nearest_to_the_target(settings: dict[str, object], rejected: int) -> None:
    samples = [candidate(i, None, score) for i, score in enumerate(SCORES)]
    assert indices(choose(samples, 1, "s", **settings)) == [(8, rejected)]


def test_of_two_as_near_the_lower_scored_is_rejected_and_of_two_equal_the_earlier() -> None:
    samples = [candidate(i, None, score) for i, score in enumerate([9.0, 1.0, -1.0, -1.0])]
    assert indices(choose(samples, 1, "s", policy="best_quantile", quantile=1 / 3)) == [(0, 2)]
    level = [candidate(i, None, score) for i, score in enumerate([3.0, 1.0, -1.0, -3.0])]  # both are 1 from the mean
    assert indices(choose(level, 1, "s", policy="best_sigma", sigmas=0.0)) == [(0, 2)]


def test_a_margin_that_nothing_reaches_discards() -> None:
    samples = [candidate(i, None, score) for i, score in enumerate(SCORES)]
    assert choose(samples, 1, "s", minimum_margin=8.5) == Discard("margin too small")
    assert indices(choose(samples, 1, "s", minimum_margin=8.0)) == [(8, 0)]
    assert len(indices(choose(samples, 9, "s", minimum_margin=3.0))) == 3, "8-0, 7-1, 6-2; 5-3 is too near"


def test_lengths_are_matched_before_the_policy_chooses() -> None:
    lengths = [50, 12, 40, 9, 20, 30, 40, 50, 10]
    samples = [candidate(i, None, SCORES[i], tokens=lengths[i]) for i in range(9)]
    assert indices(choose(samples, 1, "s", longest_ratio=1.2)) == [(8, 1)]
    assert indices(choose(samples, 1, "s", longest_ratio=1.15)) == [(8, 3)]
    assert choose(samples, 1, "s", longest_ratio=1.0) == Discard("no sample of like length")
    math = [candidate(0, "correct", 1.0, tokens=10)]
    math += [candidate(i, "wrong", float(10 - i), tokens=10 * i) for i in range(1, 6)]
    assert indices(choose(math, 3, "s", longest_ratio=3.0)) == [(0, 1), (0, 3), (0, 2)], "nearest to places 1, 3, 5"
    assert choose(math[:1] + math[4:], 1, "s", longest_ratio=3.0) == Discard("no incorrect sample of like length")


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(score: float) -> None:
    for verdicts in ((None, None), ("correct", "wrong")):
        samples = [candidate(0, verdicts[0], 1.0), candidate(1, verdicts[1], score)]
        assert choose(samples, 1, "s") == Discard("a score is not finite")


def test_cut_off_samples_are_not_eligible_and_of_equal_texts_the_first_is() -> None:
    cut = Candidate(0, "a", [7] * 5, "length", "correct", 9.0)
    samples = [candidate(3, "wrong", 0.0, "b"), candidate(2, "wrong", 0.0, "b"), cut, candidate(1, "correct", 0.0, "a")]
    assert [c.index for c in eligible(samples)] == [1, 2]
    assert choose([cut], 1, "s") == Discard("every sample cut off")


def reference(samples: list[Candidate]) -> tuple[int, int] | str:
    """The report's rule for one pair, spelt out."""
    right = [c for c in samples if c.verdict == "correct"]
    wrong = [c for c in samples if c.verdict in ("wrong", "no_answer")]
    if not right:
        return "none correct" if wrong else "none verifiable"
    if not wrong:
        return "all correct"
    best = []
    for group in (right, wrong):
        top = group[0]
        for c in group[1:]:
            assert c.score is not None and top.score is not None
            if c.score > top.score:
                top = c
        best.append(top.index)
    return best[0], best[1]


def test_random_rewards_and_verdicts_against_the_rule_spelt_out() -> None:
    draw = random.Random(0)
    outcomes = set()
    for number in range(2000):
        verdicts = draw.choices(
            ["correct", "wrong", "no_answer", "timeout"], weights=[2, 2, 1, 1], k=draw.randint(1, 6)
        )
        samples = [candidate(i, v, draw.choice([0.0, 0.5, 1.0, draw.random()])) for i, v in enumerate(verdicts)]
        expected = reference(samples)
        draw.shuffle(samples)
        found = choose(samples, 1, str(number))
        outcomes.add(expected if isinstance(expected, str) else "pair")
        assert (found.reason if isinstance(found, Discard) else indices(found)[0]) == expected
    assert outcomes == {"pair", "none correct", "none verifiable", "all correct"}
