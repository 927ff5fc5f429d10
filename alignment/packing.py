"""The plan of packs: whole samples over the whole data set, best fit decreasing.

Whole samples only: a sample that is longer than the capacity is an error here, its caller drops and counts it.
"""

import bisect
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

Pack = list[int]


@dataclass(frozen=True)
class PackingPlan:
    """Packs in training order; each is a list of sample indices. An empty pack is a filler with no loss."""

    packs: list[Pack]
    capacity: int
    tokens: int

    @property
    def utilisation(self) -> float:
        """Share of the capacity of the packs (fillers too) that holds tokens."""
        return self.tokens / (len(self.packs) * self.capacity)


def plan_epoch(lengths: Sequence[int], capacity: int, multiple: int, rng: random.Random) -> PackingPlan:
    """Pack every sample once, shuffle, and fill up with empty packs to a multiple of `multiple`.

    Nothing is dropped or repeated: ranks x accumulation steps packs make an optimizer step, so the last one is filled.
    """
    packs = best_fit_decreasing(lengths, capacity, rng)
    rng.shuffle(packs)
    packs += [[] for _ in range(-len(packs) % multiple)]
    return PackingPlan(packs, capacity, sum(lengths))


def best_fit_decreasing(lengths: Sequence[int], capacity: int, rng: random.Random) -> list[Pack]:
    """Best-fit-decreasing over the histogram of lengths: cost grows with the number of packs, not of comparisons.

    Samples of one length are interchangeable, so which of them share a pack is drawn from `rng`.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit a pack of {capacity}")
    samples: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        samples[length].append(index)
    for same in samples.values():
        rng.shuffle(same)
    packs: list[Pack] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # room left -> packs
    rooms: list[int] = []  # sorted rooms that have a pack
    for length, count in sorted(Counter(lengths).items(), reverse=True):
        for _ in range(count):
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                packs.append([])
                pack, room = len(packs) - 1, capacity
            else:
                room = rooms[at]
                pack = by_room[room].pop()
                if not by_room[room]:
                    rooms.pop(at)
            packs[pack].append(samples[length].pop())
            left = room - length
            if not by_room[left]:
                bisect.insort(rooms, left)
            by_room[left].append(pack)
    return packs
