"""Rows of a pool, drawn so that training on them is like what the model is used for.

    python -m data_builders.select --config configs/data/select.yaml

Methods: `semantic_gap` (COMPASS: rows of the clusters of meaning of which the target has more than the training rows;
data_builders.clusters and quota), `dbscan` (Compass-v2: rows that add much to the others; data_builders.density),
`linguistic` (rows of the nearest languages; data_builders.proximity) and `random`. Writes rows.jsonl (the rows drawn,
in the pool's order, each with `selection`), selection.md and selection.json (target, training and selection by cluster
and language), map.png, clusters.npz and ledger.json. The same settings give the same rows, so a killed run starts over.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from alignment import job
from alignment.errors import UserError
from alignment.ledger import Ledger
from alignment.progress import track
from alignment.rows import Row, count_rows, local_inputs, located_rows, writing_rows
from data_builders import proximity
from data_builders.config import SelectConfig
from data_builders.drawing import NEVER, Scheme, counts_of, draw, named_bounds, row_draw
from data_builders.quota import deficits, fill, gap_quotas
from data_builders.texts import answer_text, check_texts, row_text

if TYPE_CHECKING:
    from data_builders.clusters import Clusters
    from data_builders.vectors import Vectors

NO_LANGUAGE = ""


@dataclass(frozen=True)
class Rows:
    """What is kept of a source's rows; the rows themselves are read again when they are written."""

    languages_N: NDArray[np.str_]
    domains_N: NDArray[np.str_]
    draws_N: NDArray[np.float64]
    vectors_ND: "Vectors"
    answers_ND: "Vectors | None" = None

    def __len__(self) -> int:
        return len(self.languages_N)


@dataclass(frozen=True)
class Sources:
    """The pool, the target (the pool where there is none) and the training rows, and the cluster of each row."""

    pool: Rows
    target: Rows
    training: Rows | None
    clusters: "Clusters"
    pool_clusters_N: NDArray[np.int64]
    pool_similarities_N: NDArray[np.float32]
    target_K: NDArray[np.int64]
    training_K: NDArray[np.int64]
    training_outside: int


def run(config: SelectConfig) -> None:
    from data_builders import clusters, selection_map, selection_report

    with job.Job.open("data_builders.select", config, inputs(config)) as this:
        if this.done:
            return
        sources = read(config)
        scheme = scheme_of(config, sources)
        columns = {"languages": sources.pool.languages_N, "domains": sources.pool.domains_N}
        drawn_N = draw(scheme, sources.pool.draws_N, columns, config.constraints)
        ledger = write(config, sources, scheme, drawn_N, this.dir / "rows.jsonl")
        ledger.write(this.dir / "ledger.json")
        clusters.save(this.dir / "clusters.npz", sources.clusters)
        report = selection_report.make(config, sources, drawn_N)
        selection_report.write(config, report, this.dir)
        selection_map.draw(config, sources, drawn_N, this.dir / "map.png")
        rows = {"rows.in": ledger.rows_in, "rows.out": ledger.rows_out, **ledger.dropped_metrics()}
        this.finish({**rows, **report.metrics})


def inputs(config: SelectConfig) -> list[Path]:
    vectors = [] if config.vectors is None else [p for p in vars(config.vectors).values() if p is not None]
    return local_inputs(*filter(None, (config.rows, config.target, config.training)), *vectors)


# What is read


def read(config: SelectConfig) -> Sources:
    """The sources with their vectors and clusters."""
    from data_builders import clusters as by_meaning

    pool = read_rows(config, "pool", config.rows)
    target = pool if config.target is None else read_rows(config, "target", config.target)
    training = None if config.training is None else read_rows(config, "training", config.training)
    for name, rows in {"target": target, "training": training}.items():
        if rows is not None and rows.vectors_ND.shape[1] != pool.vectors_ND.shape[1]:
            dimensions = f"{rows.vectors_ND.shape[1]} dimensions, those of the pool {pool.vectors_ND.shape[1]}"
            raise UserError(f"vectors.{name}: the vectors have {dimensions}")
    clusters = by_meaning.find(target.vectors_ND, config.cluster_candidates, config.inside, config.seed)
    number = len(clusters.centres_KD)
    labels, similarities = by_meaning.assign(pool.vectors_ND, clusters)
    of_target = by_meaning.nearest(target.vectors_ND, clusters.centres_KD)[0]
    of_training = np.empty(0, np.int64) if training is None else by_meaning.assign(training.vectors_ND, clusters)[0]
    return Sources(
        pool,
        target,
        training,
        clusters,
        labels,
        similarities,
        counts_of(of_target, number),
        counts_of(of_training, number),
        int((of_training == by_meaning.OUTSIDE).sum()),
    )


def read_rows(config: SelectConfig, name: str, source: str) -> Rows:
    """Languages, domains and draws of a source's rows, and their vectors."""
    from data_builders import vectors

    texts, answers, languages, domains, draws = list[str](), list[str](), list[str](), list[str](), list[float]()
    with_answers = config.method == "dbscan" and config.dbscan.answers and name == "pool"
    for where, row in track(located_rows(source), count_rows(source), f"read {name}"):
        languages.append(sys.intern(str(row.get("language") or NO_LANGUAGE)))
        domains.append(sys.intern(str(row.get(config.constraints.domain_column) or "")))
        if name == "pool":
            draws.append(row_draw(row, config.seed))
        if config.embedding is not None:
            texts.append(row_text(row, where, config.column, config.turns))
        if config.embedding is not None and with_answers:
            answers.append(answer_text(row, where, config.dbscan.answer_column))
    if config.embedding is not None:
        from data_builders.embeddings import embed

        found = embed(texts, config.embedding)
        of_answers = embed(answers, config.embedding) if with_answers else None
    else:
        assert config.vectors is not None
        found = _load(vectors.load(getattr(config.vectors, name)), f"vectors.{name}", len(languages), source)
        of_answers = None
        if with_answers:
            assert config.vectors.answers is not None
            of_answers = _load(vectors.load(config.vectors.answers), "vectors.answers", len(languages), source)
    return Rows(np.array(languages), np.array(domains), np.array(draws), found, of_answers)


def _load(found: "Vectors", key: str, rows: int, source: str) -> "Vectors":
    if len(found) != rows:
        raise UserError(f"{key}: {len(found)} vectors for the {rows} rows of {source}")
    return found


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
    from data_builders import density

    found = density.fit(pool.vectors_ND, config.dbscan, config.seed)
    labels = density.assign(pool.vectors_ND, found)
    weights = density.weights(pool.vectors_ND, pool.answers_ND, labels)
    sizes = counts_of(labels, found.clusters)
    inside = labels != density.NOISE
    quotas = fill(np.bincount(labels[inside], weights[inside], minlength=found.clusters), sizes, config.budget)
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
    against = "" if config.training is None else f" less {config.training}"
    of = config.target or config.rows
    candidates = config.cluster_candidates
    best = " (the highest silhouette)" if len(candidates) > 1 else ""
    return [
        f"{config.budget:,} rows of {config.rows} by {config.method}, for {of}{against}",
        f"clusters of the target: {', '.join(map(str, candidates))}{best}",
    ]


def _check_vectors(config: SelectConfig) -> None:
    from data_builders import vectors

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
