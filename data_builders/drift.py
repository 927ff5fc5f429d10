"""Has usage moved away from a reference, does the model do worse for it, and which rows would make up for it?

    python -m data_builders.drift --config configs/data/drift.yaml

The stream is cut into windows, by rows or by time; each is tested against the reference (data_builders.drift_tests).
Writes drift.json (every test of every window, and which clusters moved, with typical texts), drift.png, rows.jsonl
(rows of the windows that raised an alarm, from the clusters that grew, with `window` and `cluster`), rejects.jsonl (the
place of every other row of the stream, and why), reference.jsonl (the reference with `cluster`, by which
sft.update_adapter replays it) and ledger.json. It is deterministic, so a killed run starts over; embeddings are kept.

Shapes: W windows, K clusters, N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment import atomic, job
from alignment.apportion import apportion
from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.rows import count_rows, local_inputs, located_rows, write_rows, writing_rows
from data_builders import usage
from data_builders.config import DriftConfig
from data_builders.drift_picture import draw
from data_builders.drift_tests import Clusters, Usage, Window, check_permutations, examine, level_of_one, moved
from data_builders.embeddings import embedding_inputs
from data_builders.texts import row_text
from data_builders.usage import Numbers, Rows

TOO_SMALL, NO_ALARM, DID_NOT_GROW, NOT_DRAWN = "window too small", "no alarm", "cluster did not grow", "not drawn"
EXAMPLES, EXAMPLE_CHARACTERS = 5, 300


@dataclass(frozen=True)
class Located:
    """Rows with their clusters and how far each is from its centre."""

    rows: Rows
    clusters_N: Numbers
    distances_N: np.ndarray

    def whole(self) -> Usage:
        return Usage(self.rows.vectors_ND, self.clusters_N, self.rows.performance_N, self.rows.pairs_N)

    def part(self, which_N: Numbers) -> Usage:
        rows = self.rows
        return Usage(
            rows.vectors_ND[which_N],
            self.clusters_N[which_N],
            None if rows.performance_N is None else rows.performance_N[which_N],
            None if rows.pairs_N is None else [rows.pairs_N[row] for row in which_N.tolist()],
        )


@dataclass(frozen=True)
class Stream:
    """The stream's windows that are large enough, what the tests say of them, and which clusters moved in each."""

    located: Located
    windows: list[Numbers]  # the rows of each
    found: list[Window]
    moved_WK: np.ndarray  # 1 grew, -1 shrank, 0 neither is sure


def run(config: DriftConfig) -> None:
    vectors = [source.vectors for source in (config.reference, config.stream) if source.vectors is not None]
    inputs = local_inputs(config.reference.rows, config.stream.rows, *vectors) + embedding_inputs(config.embedding)
    with job.Job.open("data_builders.drift", config, inputs) as this:
        if this.done:
            return
        rows = [usage.read(config, config.reference, timed=False), usage.read(config, config.stream, timed=True)]
        _check_dimensions(config, *rows)
        clusters = Clusters(rows[0].vectors_ND, config.clusters, config.seed)
        reference, located = (Located(part, *clusters.nearest(part.vectors_ND)) for part in rows)
        windows = [window for window in usage.cut(rows[1], config) if len(window) >= config.minimum_rows]
        if not windows:
            raise UserError(f"{config.stream.rows}: no window holds {config.minimum_rows} rows (minimum_rows)")
        found = examine(reference.whole(), clusters.held_N, [located.part(window) for window in windows], config)
        stream = Stream(located, windows, found, moved(found, config.level))
        before_K = np.bincount(reference.clusters_N[clusters.held_N], minlength=config.clusters)

        ledger = _write_rows(this, config, stream, before_K)
        _write_reference(this, config, reference)
        moved_clusters = _clusters(config, reference, stream, before_K)
        report = {
            "level": config.level,
            "reference_rows": len(rows[0]),
            "windows": [_describe(config, stream, number) for number in range(len(windows))],
            "clusters": moved_clusters,
        }
        atomic.write_json(this.dir / "drift.json", report)
        draw(config, found, moved_clusters, this.dir / "drift.png")
        this.finish({**_metrics(config, stream, moved_clusters), **_counts(ledger)})


def _check_dimensions(config: DriftConfig, reference: Rows, stream: Rows) -> None:
    first, second = reference.vectors_ND.shape[1], stream.vectors_ND.shape[1]
    if first != second:
        raise UserError(f"{config.stream.vectors}: {second} dimensions, but the reference's vectors have {first}")


def _write_rows(this: job.Job, config: DriftConfig, stream: Stream, before_K: Numbers) -> Ledger:
    """Rows that come out, and why each other one does not."""
    reasons = _reasons(stream)
    drawn = choose(stream, before_K, reasons, config)
    window_of = _window_of(stream)
    ledger = Ledger()
    with writing_rows(this.dir / "rows.jsonl") as keep, writing_rows(this.dir / "rejects.jsonl") as reject:
        for number, (where, row) in enumerate(located_rows(config.stream.rows)):
            ledger.rows_in += 1
            place = {"window": int(window_of[number]) or None, "cluster": int(stream.located.clusters_N[number])}
            if number in drawn:
                ledger.rows_out += 1
                keep(row | place)
                continue
            reason = reasons[number] or NOT_DRAWN
            ledger.drop(reason)
            reject({"where": where, "id": row.get("id"), "reason": reason, **place})
    ledger.write(this.dir / "ledger.json")
    return ledger


def _window_of(stream: Stream) -> Numbers:
    """[N] the number of each row's window, from 1; 0 of those in none."""
    numbers_N = np.zeros(len(stream.located.rows), np.int64)
    for number, window in enumerate(stream.windows, start=1):
        numbers_N[window] = number
    return numbers_N


def _reasons(stream: Stream) -> list[str | None]:
    """Why each row of the stream cannot be added; None where it can.

    Where an alarm has no cluster that surely grew (performance alone fell), all clusters of its windows can.
    """
    reasons: list[str | None] = [TOO_SMALL] * len(stream.located.rows)
    alarms = [number for number, window in enumerate(stream.found) if window.alarm]
    grew_K = np.maximum(stream.moved_WK[alarms], 0).sum(0)  # in how many of these windows
    for number, window in enumerate(stream.windows):
        for row in window.tolist():
            fits = not grew_K.any() or grew_K[stream.located.clusters_N[row]]
            reasons[row] = NO_ALARM if number not in alarms else None if fits else DID_NOT_GROW
    return reasons


def choose(stream: Stream, before_K: Numbers, reasons: Sequence[str | None], config: DriftConfig) -> set[int]:
    """The rows to add: of each cluster that grew in proportion to the share that it won, drawn without replacement.

    Where none surely grew, in proportion to the rows.
    """
    alarms = [window for window in stream.found if window.alarm]
    if not alarms:
        return set()
    after_K = np.sum([window.counts_K for window in alarms], axis=0)
    can = np.array([row for row, reason in enumerate(reasons) if reason is None])
    members = [can[stream.located.clusters_N[can] == cluster] for cluster in range(config.clusters)]
    sizes = [len(rows) for rows in members]
    won_K = np.maximum(after_K / after_K.sum() - before_K / before_K.sum(), 0) * (np.array(sizes) > 0)
    everywhere = not any((stream.moved_WK[number] > 0).any() for number, w in enumerate(stream.found) if w.alarm)
    quotas = apportion(sizes if everywhere else won_K.tolist(), config.rows_to_add, sizes)
    rng = np.random.default_rng([config.seed, 2])
    return {int(row) for rows, quota in zip(members, quotas, strict=True) for row in rng.permutation(rows)[:quota]}


def _write_reference(this: job.Job, config: DriftConfig, reference: Located) -> None:
    rows = zip(located_rows(config.reference.rows), reference.clusters_N.tolist(), strict=True)
    write_rows(this.dir / "reference.jsonl", (row | {"cluster": cluster} for (_, row), cluster in rows))


def _describe(config: DriftConfig, stream: Stream, number: int) -> dict[str, Any]:
    window, rows = stream.found[number], stream.windows[number]
    times, moved_K = stream.located.rows.times_N, stream.moved_WK[number]
    level = level_of_one(config, len(stream.found))
    described: dict[str, Any] = {
        "number": number + 1,
        "rows": window.rows,
        "first_row": int(rows.min()) + 1,
        "last_row": int(rows.max()) + 1,
        "from": None if times is None else usage.iso(times[rows[0]]),
        "to": None if times is None else usage.iso(times[rows[-1]]),
        "tests": {
            name: {
                "statistic": result.statistic,
                "expected": result.expected,
                "effect": result.effect,
                "threshold": result.threshold(level),
                "p": result.p,
                "adjusted_p": window.adjusted[name],
            }
            for name, result in window.tests.items()
        },
        "shift": window.shift.effect,
        "grew": np.flatnonzero(moved_K > 0).tolist(),
        "shrank": np.flatnonzero(moved_K < 0).tolist(),
        "drifted": window.drifted,
        "fell": window.fell,
        "alarm": window.alarm,
    }
    if window.performance is not None:
        described["performance"] = {
            "before": usage.sign(config) * window.performance.before,
            "after": usage.sign(config) * window.performance.after,
            "rows": window.performance.rows,
            "p": window.performance.result.p,
            "adjusted_p": window.performance_adjusted,
        }
    return described


def _clusters(config: DriftConfig, reference: Located, stream: Stream, before_K: Numbers) -> list[dict[str, Any]]:
    """The clusters that moved in any window, those that won or lost most first, with their most typical texts."""
    described = []
    for cluster in np.flatnonzero((stream.moved_WK != 0).any(0)).tolist():
        where = np.flatnonzero(stream.moved_WK[:, cluster]).tolist()
        counts = np.sum([stream.found[number].counts_K for number in where], axis=0)
        before, after = before_K[cluster] / before_K.sum(), counts[cluster] / counts.sum()
        windows = np.concatenate([stream.windows[number] for number in where])
        source, rows = (stream.located, windows) if after > before else (reference, np.arange(len(reference.rows)))
        members = rows[source.clusters_N[rows] == cluster]
        described.append(
            {
                "cluster": cluster,
                "share_before": float(before),
                "share_after": float(after),
                "residuals": {number + 1: float(stream.found[number].residuals_K[cluster]) for number in where},
                "windows": [number + 1 for number in where],
                "typical": members[np.argsort(source.distances_N[members], kind="stable")[:EXAMPLES]].tolist(),
                "in": "stream" if after > before else "reference",
            }
        )
    _add_texts(config, described)
    return sorted(described, key=lambda one: -abs(one["share_after"] - one["share_before"]))


def _add_texts(config: DriftConfig, described: list[dict[str, Any]]) -> None:
    """Put texts in the place of row numbers."""
    for name, source in (("reference", config.reference), ("stream", config.stream)):
        wanted = {row for one in described if one["in"] == name for row in one["typical"]}
        texts = {
            number: row_text(row, where, config.column, config.turns)[:EXAMPLE_CHARACTERS]
            for number, (where, row) in enumerate(located_rows(source.rows))
            if number in wanted
        }
        for one in described:
            if one["in"] == name:
                one["typical"] = [texts[row] for row in one["typical"]]


def _metrics(config: DriftConfig, stream: Stream, clusters: Sequence[dict[str, Any]]) -> dict[str, float | int | None]:
    alarms = [number for number, window in enumerate(stream.found, start=1) if window.alarm]
    performances = [window.performance.after for window in stream.found if window.performance]
    return {
        "windows": len(stream.found),
        "windows.drifted": sum(window.drifted for window in stream.found),
        "windows.fell": sum(window.fell for window in stream.found),
        "alarms": len(alarms),
        "alarms.first": alarms[0] if alarms else None,
        "adjusted_p": min(min(window.adjusted.values()) for window in stream.found),
        "shift.largest": max(window.shift.effect for window in stream.found),
        "performance.worst": usage.sign(config) * min(performances) if performances else None,
        "clusters.grew": sum(one["share_after"] > one["share_before"] for one in clusters),
        "clusters.shrank": sum(one["share_after"] < one["share_before"] for one in clusters),
    }


def _counts(ledger: Ledger) -> dict[str, int]:
    return {"rows.in": ledger.rows_in, "rows.out": ledger.rows_out, **ledger.dropped_metrics()}


def plan(config: DriftConfig) -> list[str]:
    usage.check(config)
    lines = [
        f"{config.stream.rows} against {config.reference.rows}: {', '.join(config.tests)}; {config.clusters} clusters"
    ]
    rows = count_rows(config.stream.rows)
    if isinstance(config.window, str) or rows is None:
        return [*lines, f"windows of {config.window}"]
    windows = max(1, -(-rows // config.window))
    check_permutations(config, windows)
    return [
        *lines,
        f"{windows} windows of {config.window:,} rows; an alarm by {config.trigger.by}, level {config.level:g}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(DriftConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
