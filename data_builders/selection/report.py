"""What a selection did: target, training rows and selection by cluster and language, and how far apart they are.

Shapes: K clusters, C the clusters and what is outside all of them, N rows of the pool.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment import atomic
from data_builders.gaussian_kernel import median_distance
from data_builders.selection.config import SelectConfig
from data_builders.selection.distances import squared_mmd, total_variation
from data_builders.selection.drawing import counts_of
from data_builders.selection.quota import deficits, gap_quotas
from data_builders.selection.sources import Rows, Sources
from data_builders.vectors import Vectors, sample, take

MMD_ROWS, BANDWIDTH_ROWS = 2_000, 1_000
TABLE_ROWS = 40  # of selection.md; selection.json has all

Table = list[dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """Tables, a line for each cluster, language and domain, and the distances."""

    clusters: Table
    languages: Table
    domains: Table
    metrics: dict[str, float | int | None]


def make(config: SelectConfig, sources: Sources, drawn_N: NDArray[np.bool_]) -> Report:
    clusters = _clusters(config, sources, drawn_N)
    pool, target, training = sources.pool, sources.target, sources.training
    languages, domains = (
        _by_value(getattr(target, name), getattr(training, name, None), getattr(pool, name), drawn_N)
        for name in ("languages_N", "domains_N")
    )
    different = [pool, *(rows for rows in (target, training) if rows is not None and rows is not pool)]
    metrics: dict[str, float | int | None] = {
        "clusters": len(sources.target_K),
        "clusters.silhouette": max(sources.clusters.silhouettes.values(), default=None),
        "clusters.least_similarity": sources.clusters.similarity,
        "embedding.truncated": sum(rows.truncated for rows in different),
        "gap.unavailable": sum(line["unavailable"] for line in clusters),
        **_total_variations(clusters),
        **_mmds(config, sources, drawn_N),
    }
    return Report(clusters, languages, domains, metrics)


def _clusters(config: SelectConfig, sources: Sources, drawn_N: NDArray[np.bool_]) -> Table:
    """A line for each cluster, and the last for what is outside: rows, and shares before and after.

    `deficit` is what training and budget together lack of the target's share, `wanted` what of the budget the cluster
    would have of a pool with rows enough, `unavailable` the part of its deficit that the pool does not have.
    """
    number, labels_N = len(sources.target_K), sources.pool_clusters_N
    target_K, training_K = sources.target_K, sources.training_K
    shares_K = target_K / target_K.sum()
    pool_K = counts_of(labels_N, number)
    deficit_K = deficits(shares_K, training_K, config.budget)
    plenty_K = np.full(number, config.budget + int(training_K.sum()))
    wanted_K = gap_quotas(shares_K, training_K, plenty_K, config.budget, config.weighting == "inverse").total
    columns = {
        "target": [*target_K, 0],
        "training": [*training_K, sources.training_outside],
        "pool": [*pool_K, len(labels_N) - pool_K.sum()],
        "wanted": [*wanted_K, 0],
        "drawn": [*counts_of(labels_N[drawn_N], number), (labels_N[drawn_N] < 0).sum()],
        "unavailable": [*np.maximum(0, np.ceil(deficit_K - 1e-9) - pool_K).astype(np.int64), 0],
    }
    lines = [dict(zip(columns, map(int, values), strict=True)) for values in zip(*columns.values(), strict=True)]
    names = [*range(number), "outside"]
    deficit_C = [*deficit_K, 0.0]
    return [
        {"cluster": name, **line, "deficit": round(float(deficit), 1)} | shares
        for name, line, deficit, shares in zip(names, lines, deficit_C, _shares(lines), strict=True)
    ]


def _by_value(
    target_N: NDArray[np.str_],
    training_N: NDArray[np.str_] | None,
    pool_N: NDArray[np.str_],
    drawn_N: NDArray[np.bool_],
) -> Table:
    """A line for each language or domain, the pool's largest first; none where no row names one."""
    columns = {"target": target_N, "training": training_N, "pool": pool_N, "drawn": pool_N[drawn_N]}
    counts = {name: _count(values) for name, values in columns.items()}
    values = sorted(
        {value for found in counts.values() for value in found}, key=lambda v: (-counts["pool"].get(v, 0), v)
    )
    if not any(values):
        return []
    lines = [{name: found.get(value, 0) for name, found in counts.items()} for value in values]
    return [
        {"value": value or "none", **line} | shares
        for value, line, shares in zip(values, lines, _shares(lines), strict=True)
    ]


def _count(values_N: NDArray[np.str_] | None) -> dict[str, int]:
    if values_N is None:
        return {}
    values, counts = np.unique(values_N, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _shares(lines: Sequence[Mapping[str, int]]) -> list[dict[str, float | None]]:
    """Of each line its shares of the target, of the training rows, and of training and selection together."""
    target, before = np.array([n["target"] for n in lines]), np.array([n["training"] for n in lines])
    after = before + np.array([n["drawn"] for n in lines])
    columns = {"target_share": target, "before": before, "after": after}
    return [
        {name: round(float(counts[i] / counts.sum()), 6) if counts.sum() else None for name, counts in columns.items()}
        for i in range(len(lines))
    ]


def _total_variations(clusters: Table) -> dict[str, float | None]:
    """Over the clusters and what is outside; `random` is what as many rows drawn at random are expected to leave."""
    target, training, pool, drawn = (
        np.array([line[name] for line in clusters]) for name in ("target", "training", "pool", "drawn")
    )
    at_random = training + drawn.sum() * pool / pool.sum()
    return {
        "total_variation.before": total_variation(training, target) if training.sum() else None,
        "total_variation.after": total_variation(training + drawn, target),
        "total_variation.random": total_variation(at_random, target),
    }


def _mmds(config: SelectConfig, sources: Sources, drawn_N: NDArray[np.bool_]) -> dict[str, float | None]:
    """Between MMD_ROWS rows of each; the kernel is as wide as the target's rows are apart."""
    rng = np.random.default_rng(config.seed)
    target = sample(sources.target.vectors_ND, MMD_ROWS, rng)
    width = median_distance(sample(target, BANDWIDTH_ROWS, rng))
    before = _together(sources.training, sources.pool, np.empty(0, np.int64), rng)
    after = _together(sources.training, sources.pool, np.flatnonzero(drawn_N), rng)
    return {
        f"squared_mmd.{name}": squared_mmd(rows, target, width) if min(len(rows), len(target)) > 1 else None
        for name, rows in {"before": before, "after": after}.items()
    }


def _together(
    training: Rows | None, pool: Rows, drawn: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.float32]:
    """At most MMD_ROWS rows of the training rows and those drawn of the pool."""
    first = 0 if training is None else len(training)
    chosen = np.sort(rng.permutation(first + len(drawn))[:MMD_ROWS])
    parts: list[tuple[Vectors, NDArray[np.int64]]] = [(pool.vectors_ND, drawn[chosen[chosen >= first] - first])]
    if training is not None:
        parts.insert(0, (training.vectors_ND, chosen[chosen < first]))
    return np.concatenate([take(vectors, indices) for vectors, indices in parts])


# Files


def write(config: SelectConfig, report: Report, folder: Path) -> None:
    tables = {"clusters": report.clusters, "languages": report.languages, "domains": report.domains}
    atomic.write_json(folder / "selection.json", tables | {"distances": report.metrics})
    atomic.write_text(folder / "selection.md", _markdown(config, report))


def _markdown(config: SelectConfig, report: Report) -> str:
    metrics = report.metrics
    distances = [
        {"distance": name, "before": metrics[f"{key}.before"], "after": metrics[f"{key}.after"]}
        for name, key in (("total variation over clusters", "total_variation"), ("squared MMD", "squared_mmd"))
    ]
    drawn = sum(line["drawn"] for line in report.clusters)
    largest = sorted(report.clusters, key=lambda line: -line["deficit"])
    parts = [
        f"# Selection by {config.method}: {drawn:,} of {sum(line['pool'] for line in report.clusters):,} rows\n",
        "![target, before, after](map.png)\n",
        f"Distance to the target, of the training rows and of training and selection together. As many rows drawn at "
        f"random would leave a total variation of {_cell(metrics['total_variation.random'])}.\n",
        _table(distances),
        f"Clusters of the target, the largest deficits first{_shown(largest)}.\n",
        _table(largest[:TABLE_ROWS]),
    ]
    for name, table in {"Languages": report.languages, "Domains": report.domains}.items():
        if table:
            parts += [f"{name}{_shown(table)}.\n", _table(table[:TABLE_ROWS])]
    return "\n".join(parts)


def _shown(table: Table) -> str:
    return f" ({TABLE_ROWS} of {len(table)}; all are in selection.json)" if len(table) > TABLE_ROWS else ""


def _table(lines: Table) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *([_cell(value) for value in line.values()] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(value: float | int | str | None) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4f}" if abs(value) < 1 else f"{value:,.1f}"
        case int():
            return f"{value:,}"
    return str(value)
