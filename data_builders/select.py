"""Rows of a pool, drawn so that training on them is like what the model is used for.

    python -m data_builders.select --config configs/data/select.yaml

Methods: `semantic_gap` (COMPASS: rows of the clusters of meaning of which the target has more than the training rows;
selection.clusters and quota), `dbscan` (Compass-v2: rows that add much to the others; selection.density), `linguistic`
(rows of the nearest languages; selection.proximity) and `random`. Writes rows.jsonl (the rows drawn, in the pool's
order, each with `selection`), selection.md and selection.json (target, training and selection by cluster and language),
map.png, clusters.npz and ledger.json. The same settings give the same rows, so a killed run starts over.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignment import job
from alignment.apportion import apportion
from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.progress import track
from alignment.rows import Row, count_rows, local_inputs, located_rows, writing_rows
from data_builders import vectors
from data_builders.embeddings import check_embedding, embedding_inputs
from data_builders.selection import clusters, density, picture, proximity, report
from data_builders.selection.config import SelectConfig
from data_builders.selection.drawing import NEVER, Scheme, counts_of, draw, named_bounds
from data_builders.selection.quota import deficits, gap_quotas
from data_builders.selection.sources import NO_LANGUAGE, Rows, Sources, read
from data_builders.texts import check_texts


def run(config: SelectConfig) -> None:
    with job.Job.open("data_builders.select", config, inputs(config)) as this:
        if this.done:
            return
        sources = read(config)
        scheme = scheme_of(config, sources)
        drawn_N = drawn_by(scheme, config, sources.pool)
        ledger = write(config, sources, scheme, drawn_N, this.dir / "rows.jsonl")
        ledger.write(this.dir / "ledger.json")
        clusters.save(this.dir / "clusters.npz", sources.clusters)
        found = report.make(config, sources, drawn_N)
        report.write(config, found, this.dir)
        picture.draw(config, sources, drawn_N, this.dir / "map.png")
        rows = {"rows.in": ledger.rows_in, "rows.out": ledger.rows_out, **ledger.dropped_metrics()}
        this.finish({**rows, **found.metrics})


def inputs(config: SelectConfig) -> list[Path]:
    sources = filter(None, (config.rows, config.target, config.training))
    given = [] if config.vectors is None else filter(None, vars(config.vectors).values())
    return local_inputs(*sources, *given, *embedding_inputs(config.embedding))


def drawn_by(scheme: Scheme, config: SelectConfig, pool: Rows) -> NDArray[np.bool_]:
    """Which rows of the pool are drawn."""
    columns = {"languages": pool.languages_N, "domains": pool.domains_N}
    return draw(scheme, pool.draws_N, columns, config.constraints)


# What each method wants


def scheme_of(config: SelectConfig, sources: Sources) -> Scheme:
    pool = sources.pool
    match config.method:
        case "semantic_gap":
            return _semantic_gap(config, sources)
        case "dbscan":
            return _dbscan(config, pool)
        case "linguistic":
            return _linguistic(config, pool, sources.target)
        case "random":
            return Scheme(np.zeros(len(pool), np.int64), np.array([min(config.budget, len(pool))]), ["drawn at random"])


def _semantic_gap(config: SelectConfig, sources: Sources) -> Scheme:
    target_K = sources.target_K / sources.target_K.sum()
    training_K = sources.training_K
    available_K = counts_of(sources.pool_clusters_N, len(target_K))
    quotas = gap_quotas(target_K, training_K, available_K, config.budget, config.weighting == "inverse")
    shares = training_K / max(1, training_K.sum())
    wanted = deficits(target_K, training_K, config.budget)
    reasons = [
        f"{'gap' if lacking > 0 else 'beyond the gaps'}: target {target:.2%}, training {training:.2%}"
        for target, training, lacking in zip(target_K, shares, wanted, strict=True)
    ]
    return Scheme(sources.pool_clusters_N, quotas.total, reasons, never="outside the target")


def _dbscan(config: SelectConfig, pool: Rows) -> Scheme:
    found = density.fit(pool.vectors_ND, config.dbscan, config.seed)
    labels = density.assign(pool.vectors_ND, found)
    weights = density.weights(pool.vectors_ND, pool.answers_ND, labels)
    sizes = counts_of(labels, found.clusters)
    inside = labels != density.NOISE
    quotas = apportion(np.bincount(labels[inside], weights[inside], minlength=found.clusters), config.budget, sizes)
    return Scheme(labels, quotas, [f"question cluster {i}" for i in range(found.clusters)], weights, "noise")


def _linguistic(config: SelectConfig, pool: Rows, target: Rows) -> Scheme:
    languages, stratum_N = np.unique(pool.languages_N, return_inverse=True)
    if set(languages) == {NO_LANGUAGE} or set(target.languages_N) == {NO_LANGUAGE}:
        raise UserError("method linguistic needs rows with a `language`, in 'rows' and in 'target'")
    wanted = Counter(language for language in target.languages_N.tolist() if language != NO_LANGUAGE)
    held = Counter(language for language in pool.languages_N.tolist() if language != NO_LANGUAGE)
    unknown = sorted(language for language in wanted | held if language not in proximity.PATHS)
    if unknown:
        print(f"data_builders.select: near to no other language, as not in the table: {', '.join(unknown)}")
    counts = proximity.nearest_first(wanted, held, config.budget)
    quotas = np.array([counts.get(language, 0) for language in languages.tolist()])
    stratum_N = np.where(pool.languages_N == NO_LANGUAGE, NEVER, stratum_N)
    return Scheme(stratum_N, quotas, [f"language {language}" for language in languages], never="no language")


# What is written


def write(config: SelectConfig, sources: Sources, scheme: Scheme, drawn_N: NDArray[np.bool_], path: Path) -> Ledger:
    """The rows drawn, and where each of the others went."""
    ledger, at_maximum_N = Ledger(), _at_maximum(config, sources.pool, drawn_N)
    with writing_rows(path) as keep:
        for number, (_, row) in enumerate(track(located_rows(config.rows), len(drawn_N), "write")):
            ledger.rows_in += 1
            if drawn_N[number]:
                ledger.rows_out += 1
                keep(row | {"selection": evidence(config, sources, scheme, number)})
            elif scheme.stratum_N[number] == NEVER:
                ledger.drop(scheme.never)
            else:
                ledger.drop("constraint" if at_maximum_N[number] else "quota")
    return ledger


def evidence(config: SelectConfig, sources: Sources, scheme: Scheme, number: int) -> Row:
    """Why a row was drawn, and the cluster of the target that it is in: null where it is outside them."""
    cluster = int(sources.pool_clusters_N[number])
    return {
        "method": config.method,
        "reason": scheme.reasons_S[scheme.stratum_N[number]],
        "cluster": cluster if cluster >= 0 else None,
        "similarity": round(float(sources.pool_similarities_N[number]), 4),
    }


def _at_maximum(config: SelectConfig, pool: Rows, drawn_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows of a language or domain of which as many are drawn as may be."""
    at_maximum_N = np.zeros(len(drawn_N), np.bool_)
    columns = {"languages": pool.languages_N, "domains": pool.domains_N}
    for name, bounds in named_bounds(config.constraints).items():
        for value, bound in bounds.items():
            members = columns[name] == value
            if bound.maximum is not None and drawn_N[members].sum() >= bound.maximum:
                at_maximum_N |= members
    return at_maximum_N


def plan(config: SelectConfig) -> list[str]:
    for source in filter(None, (config.rows, config.target, config.training)):
        check_texts(source, config.column, config.turns)
    if config.vectors is not None:
        _check_vectors(config)
    if config.embedding is not None:
        check_embedding(config.embedding)
    against = "" if config.training is None else f" less {config.training}"
    of = config.target or config.rows
    candidates = config.cluster_candidates
    best = " (the highest silhouette)" if len(candidates) > 1 else ""
    return [
        f"{config.budget:,} rows of {config.rows} by {config.method}, for {of}{against}",
        f"clusters of the target: {', '.join(map(str, candidates))}{best}",
    ]


def _check_vectors(config: SelectConfig) -> None:
    assert config.vectors is not None
    sources = {"pool": config.rows, "target": config.target, "training": config.training, "answers": config.rows}
    for name, path in vars(config.vectors).items():
        if path is None:
            continue
        found, rows = vectors.load(path), count_rows(str(sources[name]))
        if rows is not None and rows < len(found):
            raise UserError(f"vectors.{name}: {len(found)} vectors for the {rows} rows of {sources[name]}")


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(SelectConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
