"""The plan of packs: whole samples over the whole data set, as many packs as best fit decreasing needs.

A plan is an ordering of samples that a plain sampler walks: micro-batch i of rank r is pack i * ranks + r. It depends
on the packs of an optimizer step (ranks x accumulation), not on the ranks. It is made in three moves:

1. Best fit decreasing over the histogram of lengths makes the packs (`best_fit_decreasing`).
2. Sorted by attention cost, the packs of a step agree in it. Where they do not, since few steps hold all long samples,
   and where the set is small, packs are made anew: the long samples are dealt out evenly, and best fit decreasing
   fills up (`_spread`). Such packs hold many lengths, where best fit alone puts equal ones together.
3. The packs that fill no last step are spread over all its packs, and the other steps are shuffled (`_arrange`).

Best fit decreasing for language models: Ding et al. 2024, Fewer Truncations Improve Language Modeling (arXiv
2404.10830). One size over all ranks: the Compass-v2 report. Whole samples only: one that is longer than the capacity is
an error here.
"""

import bisect
import dataclasses
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignment import atomic

IntArray = NDArray[np.int64]

UNEVEN = 0.005  # ranks that wait this share of an epoch for attention are worth another way of packing
EVEN = 0.01  # and packs of many lengths are worth this
SMALL = 100_000  # samples that are dealt in well under a second
FILLINGS = (0.2, 0.5, 0.8)  # share of the tokens, in the shortest samples, that is kept back to fill packs to the brim
EXTRA_PACKS = 0.0001  # packs that dealing may cost


@dataclass(frozen=True)
class Imbalance:
    """How long ranks wait for the slowest of a micro-batch, were time proportional to tokens or to attention cost."""

    tokens: float  # share of the epoch: sum over micro-batches of the maximum over that of the mean, less 1
    attention: float
    worst_tokens: float  # the same of the worst single micro-batch
    worst_attention: float


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Packs in training order: the packs of an optimizer step follow one another, those alike in cost side by side.

    An empty pack is a filler without loss: there are some only where samples are fewer than the packs of a step.
    """

    order: IntArray  # [samples] indices into the lengths planned, pack after pack
    starts: IntArray  # [packs + 1] pack p holds order[starts[p]:starts[p + 1]]
    widths: IntArray  # [packs] tokens that a pack is padded to, the same for all packs of a step
    tokens: IntArray  # [packs] valid tokens
    attention: IntArray  # [packs] sum of the squares of the lengths
    capacity: int  # tokens
    packs_per_step: int

    @property
    def packs(self) -> int:
        return len(self.tokens)

    @property
    def steps(self) -> int:
        return self.packs // self.packs_per_step

    @property
    def utilisation(self) -> float:
        """Share of the capacity of all packs that holds tokens."""
        return int(self.tokens.sum()) / (self.packs * self.capacity)

    @property
    def padding_share(self) -> float:
        """Share of what the ranks compute on that is padding."""
        return 1 - int(self.tokens.sum()) / int(self.widths.sum())

    def pack(self, number: int) -> IntArray:
        """The samples of one pack."""
        return self.order[self.starts[number] : self.starts[number + 1]]

    def of_steps(self, first: int, last: int) -> "PackingPlan":
        """The plan of steps `first` to `last` - 1."""
        packs = slice(first * self.packs_per_step, last * self.packs_per_step)
        parts = {name: getattr(self, name)[packs] for name in ("widths", "tokens", "attention")}
        return dataclasses.replace(self, starts=self.starts[packs.start : packs.stop + 1], **parts)

    def imbalance(self, ranks: int) -> Imbalance:
        """
        Raises:
            ValueError: the ranks do not divide the packs of a step.
        """
        if self.packs_per_step % ranks:
            raise ValueError(f"{ranks} ranks do not divide steps of {self.packs_per_step} packs")
        return Imbalance(
            _waiting(self.tokens, ranks),
            _waiting(self.attention, ranks),
            _worst(self.tokens, ranks),
            _worst(self.attention, ranks),
        )

    def save(self, folder: Path) -> None:
        """Write a folder that `load` maps: an .npy file an array, and plan.json."""
        with atomic.replacing_folder(folder) as temporary:
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name))
            numbers = {"capacity": self.capacity, "packs_per_step": self.packs_per_step}
            atomic.write_json(temporary / "plan.json", numbers)

    @classmethod
    def load(cls, folder: Path) -> "PackingPlan":
        """A plan whose arrays stay on disk until they are looked at."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return cls(**arrays, **json.loads((folder / "plan.json").read_text(encoding="utf-8")))


_ARRAYS = [field.name for field in dataclasses.fields(PackingPlan) if field.type == IntArray]


def _waiting(costs: IntArray, ranks: int) -> float:
    micro_batches = costs.reshape(-1, ranks)
    return float(ranks * micro_batches.max(1).sum() / costs.sum() - 1)


def _worst(costs: IntArray, ranks: int) -> float:
    micro_batches = costs.reshape(-1, ranks)
    return float((micro_batches.max(1) / micro_batches.mean(1).clip(min=1 / ranks)).max() - 1)


def concatenate(plans: Sequence[PackingPlan]) -> PackingPlan:
    """Epochs one after the other.

    Raises:
        ValueError: the plans differ in capacity or in the packs of a step.
    """
    sizes = {(plan.capacity, plan.packs_per_step) for plan in plans}
    if len(sizes) != 1:
        raise ValueError(f"plans of one capacity and one number of packs a step, got {sorted(sizes)}")
    before = np.cumsum([0, *(len(plan.order) for plan in plans)])
    joined = {name: np.concatenate([getattr(plan, name) for plan in plans]) for name in _ARRAYS}
    starts = [plan.starts[:-1] + offset for plan, offset in zip(plans, before, strict=False)]
    return dataclasses.replace(plans[0], **joined | {"starts": np.concatenate([*starts, before[-1:]])})


def plan_epoch(
    lengths: IntArray, capacity: int, packs_per_step: int, bucket: int, generator: np.random.Generator
) -> PackingPlan:
    """Pack every sample once.

    Args:
        lengths: [samples] tokens of each.
        capacity: tokens that a pack holds at most.
        packs_per_step: ranks x accumulation; packs come in multiples of it.
        bucket: a step's packs are padded to its longest, rounded up to a multiple of this, at most the capacity.
        generator: draws which samples of one length change places, and the order of the steps.

    Raises:
        ValueError: no sample, an empty one, or one that is longer than the capacity.
    """
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("samples of one token at least are needed")
    if lengths.max() > capacity:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit a pack of {capacity}")
    longest_first = _longest_first(lengths, generator)
    sizes = lengths[longest_first].astype(np.int64)
    pack_of, packs = _arrange(sizes, _pack(sizes, capacity, packs_per_step), capacity, packs_per_step, generator)
    by_pack = _sorted_by(pack_of)
    tokens = _sums(pack_of, sizes, packs)
    fullest = tokens.reshape(-1, packs_per_step).max(1)
    return PackingPlan(
        order=longest_first[by_pack],
        starts=np.concatenate([[0], np.bincount(pack_of, minlength=packs).cumsum()]),
        widths=np.repeat(np.minimum(-(-fullest // bucket) * bucket, capacity), packs_per_step),
        tokens=tokens,
        attention=_sums(pack_of, sizes**2, packs),
        capacity=capacity,
        packs_per_step=packs_per_step,
    )


def _longest_first(lengths: IntArray, generator: np.random.Generator) -> IntArray:
    """[samples] indices; those of one length in the generator's order."""
    shuffled = generator.permutation(len(lengths))
    return shuffled[_sorted_by(lengths.max() - lengths[shuffled])]


def _sorted_by(keys: IntArray) -> IntArray:
    """A stable argsort of keys below 2^31: one sort of integers that hold key and place, twice as fast as numpy's."""
    return np.sort(keys.astype(np.int64) << 32 | np.arange(len(keys))) & 0xFFFFFFFF


def _sums(pack_of: IntArray, values: IntArray, packs: int) -> IntArray:
    """Sums by pack, exact: floats hold integers up to 2^53, and a capacity of a million has a square of 2^40."""
    return np.bincount(pack_of, values, packs).astype(np.int64)


def _pack(sizes: IntArray, capacity: int, packs_per_step: int) -> IntArray:
    """[samples] the pack of each, longest first: the fewest packs, dealt where that makes steps even, or mixes them.

    Best fit decreasing puts samples of one length into one pack, and packs alike into one step. Dealt packs hold many
    lengths, the more the less is kept back for filling.
    """
    plain = best_fit_decreasing(sizes, capacity)
    packs = int(plain.max()) + 1
    uneven = _unevenness(sizes, plain, packs_per_step)
    if uneven < UNEVEN and len(sizes) > SMALL:
        return plain
    for filling in FILLINGS:
        dealt = _spread(sizes, packs, capacity, packs_per_step, filling)
        fits = dealt.max() < packs * (1 + EXTRA_PACKS)
        if fits and _unevenness(sizes, dealt, packs_per_step) < max(uneven, EVEN):
            return dealt
    return plain


def _unevenness(sizes: IntArray, pack_of: IntArray, packs_per_step: int) -> float:
    """What ranks, one a pack, would wait for attention, where the packs are sorted by it; 0 below one whole step."""
    attention = np.sort(_sums(pack_of, sizes**2, 0))[::-1]
    whole = len(attention) // packs_per_step * packs_per_step
    return _waiting(attention[:whole], packs_per_step) if whole else 0.0


class _Run(NamedTuple):
    """Consecutive packs that hold the same lengths."""

    first: int
    packs: int


class _Rooms:
    """Packs by the room that is left in them."""

    def __init__(self, rooms: Sequence[int]) -> None:
        self.runs: dict[int, list[_Run]] = {}
        self.ascending: list[int] = []
        for pack, room in enumerate(rooms):
            self.put(room, _Run(pack, 1))

    def put(self, room: int, run: _Run) -> None:
        if room not in self.runs:
            self.runs[room] = []
            bisect.insort(self.ascending, room)
        self.runs[room].append(run)

    def smallest(self, length: int) -> int | None:
        """The smallest room that takes a sample of this length."""
        at = bisect.bisect_left(self.ascending, length)
        return self.ascending[at] if at < len(self.ascending) else None

    def take(self, room: int, most: int) -> _Run:
        """Remove packs with this room, one run and `most` of them at most."""
        runs = self.runs[room]
        run = runs.pop()
        if run.packs > most:
            runs.append(_Run(run.first + most, run.packs - most))
        elif not runs:
            del self.runs[room]
            self.ascending.pop(bisect.bisect_left(self.ascending, room))
        return _Run(run.first, min(run.packs, most))


def best_fit_decreasing(sizes: IntArray, capacity: int, rooms: Sequence[int] = ()) -> IntArray:
    """Each sample into the fullest pack that still takes it.

    Packs that are alike are filled at once, so that time goes by the distinct lengths and the kinds of packs: the
    fullest pack that takes a length is still the fullest when it has taken it, and takes it again while it has room.

    Args:
        sizes: [samples] lengths, longest first, none over the capacity.
        rooms: what is left in packs that are there already; new ones are numbered after them.

    Returns:
        [samples] the pack of each.
    """
    ends = np.append(np.flatnonzero(np.diff(sizes)), len(sizes) - 1) if len(sizes) else sizes
    open_packs, packs = _Rooms(rooms), len(rooms)
    filled: list[tuple[int, int, int]] = []  # first pack, packs, samples each
    for length, left in zip(sizes[ends].tolist(), np.diff(ends, prepend=-1).tolist(), strict=True):
        while left:
            room = open_packs.smallest(length)
            each = min(left, (room or capacity) // length)
            run = open_packs.take(room, left // each) if room else _Run(packs, left // each)
            packs = max(packs, run.first + run.packs)
            open_packs.put((room or capacity) - each * length, run)
            filled.append((*run, each))
            left -= run.packs * each
    first, count, each_of = np.array(filled, dtype=np.int64).reshape(-1, 3).T
    pack_of = np.repeat(first - (count.cumsum() - count), count) + np.arange(count.sum())
    return np.repeat(pack_of, np.repeat(each_of, count))


def _spread(sizes: IntArray, packs: int, capacity: int, packs_per_step: int, filling: float) -> IntArray:
    """[samples] the pack of each: attention costs as equal as the longest samples let them be.

    The longest samples are dealt out, one a pack and round, longer ones to the packs that cost less; the shortest, that
    cost little, then fill the packs by best fit decreasing. While one sample alone costs more than a pack does on
    average, the longest go into a step of their own, until each of its packs costs as much.
    """
    squares_left = (sizes[::-1] ** 2).cumsum()[::-1]  # of this sample and all shorter ones
    stop = int(np.searchsorted(sizes.cumsum(), int((1 - filling) * sizes.sum())))
    table = _Table(sizes, stop, np.full(packs, capacity))
    first = 0
    while first + packs_per_step < packs and table.dealt < stop:
        most = int(sizes[table.dealt]) ** 2
        if most * (packs - first) <= squares_left[table.dealt]:
            break
        table.deal(first, first + packs_per_step, most)
        first += packs_per_step
    table.deal(first, packs, int(squares_left[0]))
    rest = best_fit_decreasing(sizes[table.dealt :], capacity, table.rooms.tolist())
    dealt = np.concatenate([table.pack_of[: table.dealt], rest])
    used = np.bincount(dealt) > 0  # it may need fewer packs than best fit alone
    return (used.cumsum() - 1)[dealt]


class _Table:
    """Samples dealt to packs, longest first."""

    def __init__(self, sizes: IntArray, stop: int, rooms: IntArray) -> None:
        self.sizes = sizes
        self.stop = stop  # samples from here on are not dealt
        self.rooms = rooms
        self.costs = np.zeros_like(rooms)
        self.pack_of = np.zeros(stop, dtype=np.int64)
        self.dealt = 0

    def deal(self, first: int, last: int, most: int) -> None:
        """Deal to packs first to last - 1 until the next sample fits none of them, or makes each cost over `most`."""
        rooms, costs = self.rooms[first:last], self.costs[first:last]
        while self.dealt < self.stop:
            longest = int(self.sizes[self.dealt])
            takers = np.flatnonzero((rooms >= longest) & (costs + longest**2 <= most))
            if not len(takers):
                break
            takers = takers[np.argsort(costs[takers], kind="stable")][: self.stop - self.dealt]
            hand = self.sizes[self.dealt : self.dealt + len(takers)]
            rooms[takers] -= hand
            costs[takers] += hand**2
            self.pack_of[self.dealt : self.dealt + len(takers)] = first + takers
            self.dealt += len(takers)


def _arrange(
    sizes: IntArray, pack_of: IntArray, capacity: int, packs_per_step: int, generator: np.random.Generator
) -> tuple[IntArray, int]:
    """[samples] the pack of each in training order, and the number of packs, a multiple of those of a step.

    The short step is the last one: with fewer tokens in it each weighs more, and there the learning rate is lowest.
    """
    attention = _sums(pack_of, sizes**2, 0)
    steps, left = divmod(len(attention), packs_per_step)
    samples = np.bincount(pack_of)
    by_cost = np.argsort(-attention, kind="stable")
    if samples[by_cost[steps * packs_per_step :]].sum() < packs_per_step:  # too few for a last step without fillers
        is_left = np.isin(by_cost, np.argsort(-samples, kind="stable")[:left])
        by_cost = np.concatenate([by_cost[~is_left], by_cost[is_left]])
    places = np.empty_like(by_cost)
    places[by_cost] = np.arange(len(by_cost))
    step_of, within = np.divmod(places, packs_per_step)
    shuffled = np.append(generator.permutation(steps), steps)  # the packs that are left stay last
    new = (shuffled[step_of] * packs_per_step + within)[pack_of]
    if not left:
        return new, steps * packs_per_step
    last = np.flatnonzero(new >= steps * packs_per_step)
    new[last] = steps * packs_per_step + _last_step(sizes[last], new[last], capacity, packs_per_step)
    return new, (steps + 1) * packs_per_step


def _last_step(sizes: IntArray, pack_of: IntArray, capacity: int, packs: int) -> IntArray:
    """[samples] the pack of each, of samples (longest first) that fill fewer packs than the step has.

    Each goes into the emptiest. Rarely, with samples near the capacity, that overfills one: then packs are halved.
    """
    new = _into_the_emptiest(sizes, packs)
    if _sums(new, sizes, packs).max() > capacity:
        new = _halve(sizes, pack_of, packs)
    places = np.argsort(np.argsort(-_sums(new, sizes**2, packs), kind="stable"))
    return places[new]


def _into_the_emptiest(sizes: IntArray, packs: int) -> IntArray:
    loads = [(0, pack) for pack in range(packs)]
    pack_of = []
    for size in sizes.tolist():
        load, pack = loads[0]
        heapq.heapreplace(loads, (load + size, pack))
        pack_of.append(pack)
    return np.array(pack_of, dtype=np.int64)


def _halve(sizes: IntArray, pack_of: IntArray, packs: int) -> IntArray:
    """Halve the fullest pack of two samples or more until there are enough packs. Samples are not fewer than packs."""
    new = np.unique(pack_of, return_inverse=True)[1]
    for number in range(int(new.max()) + 1, packs):
        several = np.bincount(new) > 1
        fullest = int((_sums(new, sizes, 0) * several).argmax())
        members = np.flatnonzero(new == fullest)
        new[members] = np.where(_into_the_emptiest(sizes[members], 2), number, fullest)
    return new
