from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.packing import IntArray, PackingPlan, best_fit_decreasing, concatenate, plan_epoch


class Case(NamedTuple):
    lengths: IntArray
    capacity: int
    packs_per_step: int
    bucket: int
    seed: int

    def plan(self, seed: int | None = None) -> PackingPlan:
        generator = np.random.default_rng(self.seed if seed is None else seed)
        return plan_epoch(self.lengths, self.capacity, self.packs_per_step, self.bucket, generator)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """From a sample or two to thousands; short ones, long ones near the capacity, and few of them much longer."""
    capacity = draw(st.integers(1, 3000))
    longest = draw(st.integers(1, capacity))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 60) | st.integers(1, 1500))
    bulk = generator.integers(draw(st.integers(1, longest)), longest, count, endpoint=True)
    tail = (longest * generator.power(draw(st.floats(0.05, 1)), count)).astype(np.int64).clip(1)
    lengths = draw(st.sampled_from([bulk, tail, np.concatenate([bulk, tail])]))
    drawn = draw(st.lists(st.integers(1, capacity), max_size=8))
    return Case(
        np.concatenate([lengths, np.array(drawn, dtype=np.int64)]),
        capacity,
        draw(st.integers(1, 16)),
        draw(st.integers(1, 128)),
        draw(st.integers(0, 2**32 - 1)),
    )


def log_normal(count: int, capacity: int, mean: float = 4.5) -> IntArray:
    return np.random.default_rng(0).lognormal(mean, 0.8, count).clip(1, capacity).astype(np.int64)


def arrays(plan: PackingPlan) -> list[list[int]]:
    return [each.tolist() for each in (plan.order, plan.starts, plan.widths, plan.tokens, plan.attention)]


def assert_sound(plan: PackingPlan, lengths: IntArray) -> None:
    """Each sample once, none over the capacity, steps of one width, and arrays that say the same."""
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    packs = [lengths[plan.pack(number)] for number in range(plan.packs)]
    assert plan.starts[0] == 0 and plan.starts[-1] == len(lengths)
    assert plan.starts.tolist() == np.cumsum([0, *map(len, packs)]).tolist()
    assert plan.tokens.tolist() == [pack.sum() for pack in packs]
    assert plan.attention.tolist() == [(pack**2).sum() for pack in packs]
    assert plan.tokens.max() <= plan.capacity
    assert plan.packs == plan.steps * plan.packs_per_step
    assert plan.utilisation == lengths.sum() / (plan.packs * plan.capacity)
    assert plan.padding_share == 1 - lengths.sum() / plan.widths.sum()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_sample_once_in_packs_of_one_width_a_step(case: Case) -> None:
    plan = case.plan()
    assert_sound(plan, case.lengths)
    widths = plan.widths.reshape(plan.steps, -1)
    fullest = plan.tokens.reshape(plan.steps, -1).max(1)
    assert (widths == widths[:, :1]).all()
    assert (widths[:, 0] >= fullest).all()
    assert (widths[:, 0] - fullest < case.bucket).all()
    assert ((widths[:, 0] % case.bucket == 0) | (widths[:, 0] == case.capacity)).all()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_packs_of_a_step_stand_in_the_order_of_their_cost_and_fillers_only_where_samples_are_few(case: Case) -> None:
    plan = case.plan()
    assert (np.diff(plan.attention.reshape(plan.steps, -1)) <= 0).all()
    assert (plan.tokens[: -case.packs_per_step] > 0).all()
    in_last_step = len(case.lengths) - plan.starts[-1 - case.packs_per_step]
    assert (plan.tokens == 0).sum() == max(0, case.packs_per_step - in_last_step)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_the_plan_is_a_function_of_its_inputs(case: Case) -> None:
    assert arrays(case.plan()) == arrays(case.plan())


@settings(max_examples=50, deadline=None)
@given(cases())
def test_seeds_agree_on_the_packs_lengths_but_not_on_their_samples(case: Case) -> None:
    """What is drawn is which samples of one length change places, and where a step stands."""
    plan, other = case.plan(1), case.plan(2)
    assert sorted(plan.attention.tolist()) == sorted(other.attention.tolist())
    assert sorted(plan.widths.tolist()) == sorted(other.widths.tolist())


def test_another_seed_is_another_order() -> None:
    case = Case(log_normal(300, 256), 256, 2, 16, 0)
    plan, other = case.plan(0), case.plan(1)
    assert plan.order.tolist() != other.order.tolist()
    assert plan.attention.tolist() != other.attention.tolist()  # the steps, too


def test_samples_of_one_length_meet_different_neighbours() -> None:
    case = Case(np.full(20, 5), 10, 1, 1, 0)
    first, second = ({frozenset(plan.pack(p).tolist()) for p in range(10)} for plan in (case.plan(0), case.plan(1)))
    assert first != second


def rooms_of_plain_best_fit(lengths: list[int], capacity: int, rooms: list[int]) -> list[int]:
    """The textbook: longest first, each into the fullest pack that still takes it."""
    rooms = list(rooms)
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 300))
def test_equals_plain_best_fit_decreasing(data: st.DataObject, capacity: int) -> None:
    most = data.draw(st.integers(1, capacity))
    lengths = sorted(data.draw(st.lists(st.integers(1, most), min_size=1, max_size=150)), reverse=True)
    rooms = data.draw(st.lists(st.integers(0, capacity), max_size=10))
    pack_of = best_fit_decreasing(np.array(lengths), capacity, rooms)
    held = np.bincount(pack_of, lengths, len(rooms)).astype(int)
    before = rooms + [capacity] * (len(held) - len(rooms))
    assert sorted((np.array(before) - held).tolist()) == rooms_of_plain_best_fit(lengths, capacity, rooms)


def test_best_fit_by_hand() -> None:
    """Capacity 10: 7+3, 6+4 and 5+5 fill three packs to the brim; next fit would take four."""
    assert best_fit_decreasing(np.array([7, 6, 5, 5, 4, 3]), 10).tolist() == [0, 1, 2, 2, 1, 0]


def test_many_short_samples_leave_little_room() -> None:
    assert Case(log_normal(5000, 2048), 2048, 1, 1, 0).plan().utilisation > 0.995


def test_a_last_step_is_short_instead_of_full_of_fillers() -> None:
    """Capacity 10: four full packs of 5+5 and one of 5+5 more for steps of two; its two samples take a pack each."""
    plan = Case(np.full(10, 5), 10, 2, 1, 0).plan()
    assert plan.tokens.tolist() == [10, 10, 10, 10, 5, 5]
    assert plan.widths.tolist() == [10, 10, 10, 10, 5, 5]


def test_a_last_step_that_cannot_be_dealt_out_is_halved() -> None:
    """Capacity 6: a pack of one 6, four of 3+3 and four of 2+2+2 for a step of ten.

    Longest first into the emptiest would make 3+2+2. Instead one 3+3 becomes two packs.
    """
    plan = Case(np.array([6] + [3] * 8 + [2] * 12), 6, 10, 1, 0).plan()
    assert plan.attention.tolist() == [36, 18, 18, 18, 12, 12, 12, 12, 9, 9]


def test_a_last_step_takes_a_pack_that_can_be_dealt_out() -> None:
    """Capacity 10: 5+5, 5+5 and 1 in steps of two. The 1 would need a filler beside it, so a 5+5 is dealt out."""
    assert Case(np.array([5, 5, 5, 5, 1]), 10, 2, 1, 0).plan().tokens.tolist() == [10, 1, 5, 5]


def test_widths_are_rounded_up_to_buckets_below_the_capacity() -> None:
    """Capacity 10: 8+1 and 9 make a step of 9, rounded up to 10 in buckets of 4; 3 alone becomes 4."""
    assert Case(np.array([9, 8, 1]), 10, 2, 4, 0).plan().widths.tolist() == [10, 10]
    assert Case(np.array([3]), 10, 2, 4, 0).plan().widths.tolist() == [4, 4]


def test_long_samples_are_spread_where_steps_would_be_uneven() -> None:
    """Of best fit's packs, sorted by cost, 16 ranks would wait 0.4 of the epoch. Less than 0.02 costs no pack."""
    lengths = log_normal(40_000, 16_384)
    plan = Case(lengths, 16_384, 16, 64, 0).plan()
    descending = np.sort(lengths)[::-1]
    plain = np.sort(np.bincount(best_fit_decreasing(descending, 16_384), descending**2))[::-1]
    whole = plain[: len(plain) // 16 * 16].reshape(-1, 16)
    assert whole.max(1).sum() / whole.mean(1).sum() > 1.4
    assert plan.imbalance(16).attention < 0.02
    assert plan.packs == -(-len(plain) // 16) * 16
    assert_sound(plan, lengths)


def test_imbalance_by_hand() -> None:
    """Two steps of two packs: tokens 4, 4 and 4, 2; costs 16, 8 and 16, 4.

    Two ranks wait for 4 + 4 of a mean of 4 + 3 tokens, and for 16 + 16 of 12 + 10; the second step is the worst. One
    rank never waits.
    """
    empty = np.zeros(0, dtype=np.int64)
    plan = PackingPlan(empty, empty, empty, np.array([4, 4, 4, 2]), np.array([16, 8, 16, 4]), 4, 2)
    two, one = plan.imbalance(2), plan.imbalance(1)
    assert [two.tokens, two.attention] == pytest.approx([8 / 7 - 1, 32 / 22 - 1], abs=1e-12)
    assert [two.worst_tokens, two.worst_attention] == pytest.approx([4 / 3 - 1, 16 / 10 - 1], abs=1e-12)
    assert [one.tokens, one.attention, one.worst_tokens, one.worst_attention] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="4 ranks do not divide steps of 2 packs"):
        plan.imbalance(4)


def test_squares_of_long_samples_do_not_overflow() -> None:
    lengths = np.array([131_072, 100_000, 31_072], dtype=np.int32)
    plan = plan_epoch(lengths, 131_072, 1, 64, np.random.default_rng(0))
    assert sorted(plan.attention.tolist()) == [100_000**2 + 31_072**2, 131_072**2]


@settings(max_examples=20, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=3))
def test_epochs_follow_one_another(drawn: list[Case]) -> None:
    epochs = [case._replace(capacity=3000, packs_per_step=3) for case in drawn]
    plans = [epoch.plan() for epoch in epochs]
    joined = concatenate(plans)
    packs = [joined.pack(number).tolist() for number in range(joined.packs)]
    assert packs == [plan.pack(number).tolist() for plan in plans for number in range(plan.packs)]
    for name in ("widths", "tokens", "attention"):
        assert getattr(joined, name).tolist() == [each for plan in plans for each in getattr(plan, name).tolist()]


def test_epochs_of_different_steps_are_refused() -> None:
    plans = [Case(np.array([3]), 10, steps, 1, 0).plan() for steps in (1, 2)]
    with pytest.raises(ValueError, match=r"got \[\(10, 1\), \(10, 2\)\]"):
        concatenate(plans)


def test_a_plan_is_mapped_from_disk(tmp_path: Path) -> None:
    plan = Case(log_normal(300, 256), 256, 4, 16, 0).plan()
    plan.save(tmp_path / "plan")
    loaded = PackingPlan.load(tmp_path / "plan")
    assert arrays(loaded) == arrays(plan)
    assert (loaded.capacity, loaded.packs_per_step) == (256, 4)
    assert isinstance(loaded.order, np.memmap)
    assert loaded.pack(7).tolist() == plan.pack(7).tolist()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 11], "a sample of 11 tokens does not fit a pack of 10"), ([3, 0], "one token at least"), ([], "one token")],
)
def test_lengths_that_cannot_be_packed_are_refused(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(np.array(lengths, dtype=np.int64), 10, 1, 1, 0).plan()


def test_a_small_set_is_packed_so_that_steps_hold_many_lengths_in_as_few_packs() -> None:
    """Best fit decreasing alone puts equal lengths together: its steps are of one or two lengths."""
    lengths = np.random.default_rng(0).normal(100, 15, 4000).astype(np.int64).clip(20, 200)
    plan = plan_epoch(lengths, 512, 2, 1, np.random.default_rng(0))
    alone = best_fit_decreasing(np.sort(lengths)[::-1], 512)
    assert plan.packs <= int(alone.max()) + 2  # at most the packs that fill the last step
    steps = np.split(lengths[plan.order], plan.starts[2:-1:2])
    spread = np.median([step.std() for step in steps])
    by_length = np.sort(lengths)[::-1]
    cheapest_first = np.argsort(np.bincount(alone, by_length**2), kind="stable")
    together = np.argsort(np.argsort(cheapest_first)[alone] // 2, kind="stable")
    counts = np.bincount(np.argsort(cheapest_first)[alone] // 2)
    without = np.median([step.std() for step in np.split(by_length[together], counts.cumsum()[:-1])])
    assert spread > 5 and spread > 3 * without, (spread, without)


def test_dealing_that_needs_fewer_packs_leaves_none_empty() -> None:
    lengths = np.random.default_rng(0).normal(93, 12.6, 10_000).astype(np.int64).clip(40, 200)
    plan = plan_epoch(lengths, 512, 2, 64, np.random.default_rng(0))
    assert plan.tokens.min() > 0
    assert plan.packs <= int(best_fit_decreasing(np.sort(lengths)[::-1], 512).max()) + 2
