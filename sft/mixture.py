"""Which rows each epoch trains on, and where every other row went: all of it follows from the config and the seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.rows import write_rows
from sft.cache import REJECTED, TokenizedRows
from sft.config import PackingConfig, SFTConfig, SourceConfig
from sft.rendering import NOTHING_TO_TRAIN

REASONS = (*REJECTED, "overlong", "not drawn")
# A row's reason is 0 where it trains, else one of these: 1 + its place in REASONS, as in TokenizedRows.reasons.
NOTHING, OVERLONG, NOT_DRAWN = (1 + REASONS.index(name) for name in (NOTHING_TO_TRAIN, "overlong", "not drawn"))


@dataclass(frozen=True)
class Mixture:
    """The rows of every epoch.

    `epochs` holds for each epoch the indices into `rows` that it trains on (int64; a row that repeats stands there more
    than once). `lengths` (int32) and `reasons` (int8, see REASONS) are those of every row, after truncation. `sources`
    has for each source its rows, those drawn, and its part of an epoch.
    """

    rows: TokenizedRows
    epochs: list[np.ndarray]
    lengths: np.ndarray
    reasons: np.ndarray
    ledger: Ledger
    sources: list[dict[str, Any]]


def mix(config: SFTConfig, rows: TokenizedRows) -> Mixture:
    """Draw the rows of each epoch from `rows`, the config's sources in their order.

    Raises:
        UserError: an overlong row where those are errors, a count that a source cannot give, or no row is left.
    """
    lengths, trained, reasons = _fit(config.packing, rows)
    drawn = []
    for number, source in enumerate(config.sources):
        first, end = rows.bounds[number], rows.bounds[number + 1]
        usable = first + np.flatnonzero(reasons[first:end] == 0)
        drawn.append(_draw(usable, source, number, config.seed))
    sizes = _epoch_sizes(config.sources, [len(chosen) for chosen in drawn])
    parts = [
        [
            _part(chosen, size, epoch, f"{config.seed}/{number}")
            for number, (chosen, size) in enumerate(zip(drawn, sizes, strict=True))
        ]
        for epoch in range(config.training.epochs)
    ]
    epochs = [np.concatenate(of_epoch) for of_epoch in parts]
    seen = np.zeros(len(rows), dtype=bool)
    for epoch in epochs:
        seen[epoch] = True
    assert not reasons[seen].any(), "a rejected row was drawn"
    reasons[~seen & (reasons == 0)] = NOT_DRAWN
    ledger = _account(rows, lengths, trained, reasons)
    if not seen.any():
        raise UserError(f"no row is left to train on: of {ledger.rows_in}, dropped {dict(ledger.dropped)}")
    tokens = [sum(int(lengths[of_epoch[number]].sum()) for of_epoch in parts) for number in range(len(drawn))]
    sources = [
        {
            "source": source.rows,
            "rows": rows.bounds[number + 1] - rows.bounds[number],
            "drawn": len(drawn[number]),
            "epoch_rows": sizes[number],
            "row_share": sizes[number] / sum(sizes),
            "epoch_tokens": round(tokens[number] / config.training.epochs),
            "token_share": tokens[number] / sum(tokens),
        }
        for number, source in enumerate(config.sources)
    ]
    return Mixture(rows, epochs, lengths, reasons, ledger, sources)


def write_rejects(mixture: Mixture, path: Path) -> None:
    """One line {source, where, id, reason, tokens} for each row that does not train, but for those not drawn."""
    rejected = np.flatnonzero((mixture.reasons != 0) & (mixture.reasons != NOT_DRAWN))
    write_rows(path, (_reject(mixture, index) for index in rejected.tolist()))


def _reject(mixture: Mixture, index: int) -> dict[str, Any]:
    place = mixture.rows.place(index)
    reason, tokens = REASONS[mixture.reasons[index] - 1], int(mixture.rows.lengths[index])
    return {"source": place.source, "where": place.where, "id": place.id, "reason": reason, "tokens": tokens}


def _fit(packing: PackingConfig, rows: TokenizedRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, trained tokens and reasons of all rows, once those that are overlong are dealt with."""
    lengths, trained, reasons = rows.lengths.copy(), rows.trained_tokens.copy(), rows.reasons.copy()
    overlong = np.flatnonzero((reasons == 0) & (lengths > packing.capacity))
    match packing.overlong:
        case "drop":
            reasons[overlong] = OVERLONG
        case "truncate":
            for index in overlong.tolist():
                trained[index] = rows.take([index], packing.capacity)[1].sum()
            lengths[overlong] = packing.capacity
            reasons[overlong[trained[overlong] == 0]] = NOTHING
        case "error" if len(overlong):
            place = rows.place(int(overlong[0]))
            name = f" (id {place.id})" if place.id is not None else ""
            length = lengths[overlong[0]]
            raise UserError(f"{place.where}{name}: {length} tokens, packing.capacity is {packing.capacity}")
    return lengths, trained, reasons


def _draw(usable: np.ndarray, source: SourceConfig, number: int, seed: int) -> np.ndarray:
    """The rows of a source that the run draws from, in the order of the source."""
    if source.count is not None and source.count > len(usable):
        raise UserError(
            f"sources[{number}].count: {source.count} rows wanted, but {source.rows} holds {len(usable)} usable rows"
        )
    wanted = source.count or source.cap
    if source.share is not None:
        wanted = max(1, round(source.share * len(usable)))
    if wanted is None or wanted >= len(usable):
        return usable
    return np.sort(_random(f"{seed}/{number}/draw").permutation(usable)[:wanted])


def _epoch_sizes(sources: Sequence[SourceConfig], drawn: Sequence[int]) -> list[int]:
    """Rows of each source in one epoch; at least one of a source that has any."""
    most = [max(1, round(source.epochs * rows)) if rows else 0 for source, rows in zip(sources, drawn, strict=True)]
    sizes = _sizes_by_weight(sources, most)
    total = sum(sizes) / (1 - sum(source.mixture_share or 0 for source in sources))
    for number, source in enumerate(sources):
        if source.mixture_share is None or total == 0:
            continue
        sizes[number] = max(1, round(source.mixture_share * total))
        if sizes[number] > most[number]:
            raise UserError(
                f"sources[{number}].mixture_share: {source.mixture_share:g} of an epoch is {sizes[number]} rows, but "
                f"{source.rows} gives at most {most[number]}: {drawn[number]} usable rows, epochs {source.epochs:g}"
            )
    return sizes


def _sizes_by_weight(sources: Sequence[SourceConfig], most: Sequence[int]) -> list[int]:
    """Rows of the sources without a mixture_share, all of them or by weight; 0 for the others."""
    if all(source.weight is None for source in sources):
        return [size if source.mixture_share is None else 0 for source, size in zip(sources, most, strict=True)]
    for number, (source, size) in enumerate(zip(sources, most, strict=True)):
        if source.weight is not None and size == 0:
            raise UserError(f"sources[{number}]: {source.rows} has a weight, but no usable row")
    # The largest mixture in which no source gives more than its most.
    scale = min(size / source.weight for source, size in zip(sources, most, strict=True) if source.weight is not None)
    return [
        min(size, max(1, round(source.weight * scale))) if source.weight is not None else 0
        for source, size in zip(sources, most, strict=True)
    ]


def _part(drawn: np.ndarray, size: int, epoch: int, seed: str) -> np.ndarray:
    """A source's rows in an epoch: the next `size` of its endless sequence of shuffled passes."""
    if size == 0:
        return drawn[:0]
    start, end = epoch * size, (epoch + 1) * size
    first, last = start // len(drawn), (end - 1) // len(drawn)
    passes = [_random(f"{seed}/pass/{number}").permutation(drawn) for number in range(first, last + 1)]
    return np.concatenate(passes)[start - first * len(drawn) :][:size]


def _random(seed: str) -> np.random.Generator:
    return np.random.default_rng(list(seed.encode()))


def _account(rows: TokenizedRows, lengths: np.ndarray, trained: np.ndarray, reasons: np.ndarray) -> Ledger:
    out = reasons == 0
    cut = rows.lengths - lengths
    ledger = Ledger(
        rows_in=len(rows),
        rows_out=int(out.sum()),
        tokens_in=int(rows.lengths.sum(dtype=np.int64)),
        tokens_trained=int(trained[out].sum(dtype=np.int64)),
        tokens_dropped=int(rows.lengths[~out].sum(dtype=np.int64) + cut[out].sum(dtype=np.int64)),
        truncated=int((cut[out] > 0).sum()),
    )
    for reason, count in enumerate(np.bincount(reasons, minlength=1 + len(REASONS)).tolist()):
        if reason and count:
            ledger.dropped[REASONS[reason - 1]] = count
    ledger.check()
    kept = int(lengths[out].sum(dtype=np.int64))
    assert ledger.tokens_in == kept + ledger.tokens_dropped, f"tokens do not add up: {kept} kept, {ledger}"
    return ledger
