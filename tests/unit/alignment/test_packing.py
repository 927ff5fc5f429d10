import random

import pytest

from alignment.packing import best_fit_decreasing, plan_epoch


def some_lengths(count: int, capacity: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [max(1, min(capacity, int(rng.lognormvariate(4.5, 0.8)))) for _ in range(count)]


def rooms_of_plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The textbook: longest first, each into the fullest pack that still takes it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_nothing_is_lost_doubled_or_over_capacity(multiple: int) -> None:
    lengths = some_lengths(500, 512)
    plan = plan_epoch(lengths, 512, multiple, random.Random(0))
    assert sorted(i for pack in plan.packs for i in pack) == list(range(500))
    assert max(sum(lengths[i] for i in pack) for pack in plan.packs) <= 512
    assert len(plan.packs) % multiple == 0
    fillers = [pack for pack in plan.packs if not pack]
    assert len(fillers) < multiple
    assert plan.packs[len(plan.packs) - len(fillers) :] == fillers  # at the end
    assert plan.utilisation == sum(lengths) / (len(plan.packs) * 512)


@pytest.mark.parametrize("seed", range(5))
def test_equals_plain_best_fit_decreasing(seed: int) -> None:
    lengths = some_lengths(200, 300, seed)
    packs = best_fit_decreasing(lengths, 300, random.Random(seed))
    assert sorted(300 - sum(lengths[i] for i in pack) for pack in packs) == rooms_of_plain_best_fit(lengths, 300)


def test_by_hand() -> None:
    """Capacity 10: 7+3, 6+4 and 5+5 fill three packs to the brim; next fit would take four."""
    lengths = [3, 5, 7, 4, 5, 6]
    packs = best_fit_decreasing(lengths, 10, random.Random(0))
    assert sorted(sorted(lengths[i] for i in pack) for pack in packs) == [[3, 7], [4, 6], [5, 5]]


def test_many_short_samples_leave_little_room() -> None:
    assert plan_epoch(some_lengths(5000, 2048), 2048, 2, random.Random(0)).utilisation > 0.995


def test_plan_is_drawn_from_the_seed_alone() -> None:
    lengths = some_lengths(300, 256)
    plan = plan_epoch(lengths, 256, 2, random.Random("0/0"))
    assert plan == plan_epoch(lengths, 256, 2, random.Random("0/0"))
    assert plan.packs != plan_epoch(lengths, 256, 2, random.Random("0/1")).packs


def test_samples_of_one_length_meet_different_neighbours() -> None:
    """Which of the equally long samples share a pack changes with the seed, not only the order of the packs."""
    first = {frozenset(pack) for pack in best_fit_decreasing([5] * 20, 10, random.Random(0))}
    second = {frozenset(pack) for pack in best_fit_decreasing([5] * 20, 10, random.Random(1))}
    assert first != second


def test_too_long_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit a pack of 10"):
        plan_epoch([3, 11], 10, 1, random.Random(0))
