"""Selection: how much of a known gap each method closes, and its time and memory at a million rows.

    python -m benchmarks.select [FOLDER]

Gaps: mixtures on the sphere, whose components are known. The usage has 24 of them in unequal parts, the training rows
have 18 of those as the usage has them, the pool has 16 more: 60% of it is of use. Distances are the total variation
over the true components, which no method sees, and the maximum mean discrepancy to other rows of the usage than those
that a method sees; what a method closes is the part of the distance before. In `unrelated` mixtures components have
nothing to do with languages; in `aligned` ones each component is of one language, and those that training lacks are of
two. Three kinds show what the gain hangs on, and no claim's value counts them: in `scarce` 30% of the pool is of use,
in `useful` all of it, and in `half` training lacks 12 of the 24 components.
`attainable` is what quotas over the true components close.

Speed: the job on a million vectors of 1,024 dimensions, files read and written, as a process of its own; its peak is
the kernel's high-water mark. The peers hold their rows in memory. KMeans does a million too; DBSCAN is measured
at sizes that it can do, and a line through the logarithms of its times gives those at a million. FOLDER (default: a
temporary one) takes 3 GB.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment.rows import write_rows
from alignment.stats import mean_interval
from benchmarks import report
from data_builders import select
from data_builders.gaussian_kernel import median_distance
from data_builders.selection.config import SelectConfig
from data_builders.selection.distances import squared_mmd, total_variation
from data_builders.selection.quota import gap_quotas
from data_builders.selection.sources import read

METHODS = ("semantic_gap", "linguistic", "random")
CLAIMED = ("unrelated", "aligned")
KINDS = (*CLAIMED, "scarce", "useful", "half")
USED, DIMENSIONS = 24, 64
COMPONENTS = dict.fromkeys(KINDS, 40) | {"scarce": 80, "useful": USED}
KNOWN = dict.fromkeys(KINDS, 18) | {"half": 12}  # of those used, in the training rows
USAGE, TRAINING, POOL, SEEDS = 3_000, 3_000, 60_000, 10
ROOM = 1.5  # the budget, in rows that training lacks
LANGUAGES = ("id", "ms", "th", "vi", "en")
RESAMPLES = 10_000

ROWS, WIDTH, BUDGET_1M = 1_000_000, 1024, 50_000
OURS = (100_000, ROWS)
PEERS = {"KMeans": (10_000, 100_000, ROWS), "DBSCAN": (20_000, 40_000, 80_000)}
PEER_CODE = {
    "KMeans": "sklearn.cluster.KMeans(80, n_init=1, random_state=0).fit(rows)",
    # Rows of one component are about 0.88 apart, those of two 1.41.
    "DBSCAN": "sklearn.cluster.DBSCAN(eps=0.9, min_samples=10).fit(rows)",
}
BLOCK = 20_000

Mixture = dict[str, NDArray[Any]]


def main(folder: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        gaps(Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        speed(folder or Path(scratch))


# Known gaps


def gaps(folder: Path) -> None:
    """By each method, the closed part of both distances over SEEDS mixtures of each kind."""
    closed: dict[tuple[str, str, str], list[float]] = {}
    for kind in KINDS:
        for seed in range(SEEDS):
            for method, parts in study(folder / f"{kind}{seed}", kind, seed).items():
                for distance, value in parts.items():
                    closed.setdefault((kind, distance, method), []).append(value)
    for name, distance in {"gap": "total_variation", "mmd": "mmd"}.items():
        for peer in ("random", "linguistic"):
            compare(f"select.{name}_closed_over_{peer}", distance, peer, closed)


def compare(claim: str, distance: str, peer: str, closed: Mapping[tuple[str, str, str], Sequence[float]]) -> None:
    """One claim: the lowest ratio of both CLAIMED kinds. Where the peer closes nothing there is no ratio: null."""
    ratios = {kind: ratio(closed[kind, distance, "semantic_gap"], closed[kind, distance, peer]) for kind in KINDS}
    lowest = min(CLAIMED, key=lambda kind: ratios[kind][0])
    methods = ("attainable", "semantic_gap", peer)
    means = {kind: {m: mean_interval(closed[kind, distance, m]) for m in methods} for kind in KINDS}
    report(
        claim,
        ratios[lowest][0],
        "x",
        f"{peer}, same budget",
        own_value=round(means[lowest]["semantic_gap"].value, 4),
        peer_value=round(means[lowest][peer].value, 4),
        ratios={
            kind: [round(number, 2) for number in found] if math.isfinite(found[0]) else None
            for kind, found in ratios.items()
        },
        closed={kind: {method: str(mean) for method, mean in found.items()} for kind, found in means.items()},
        left_ratio={
            kind: round((1 - found[peer].value) / (1 - found["semantic_gap"].value), 1) for kind, found in means.items()
        },
        seeds=SEEDS,
        budgets={kind: budget_of(kind) for kind in KINDS},
    )


def budget_of(kind: str) -> int:
    """ROOM times the rows that would give training the components that it lacks, were all of one size."""
    return round(ROOM * TRAINING * (USED - KNOWN[kind]) / KNOWN[kind])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean over mean, and its 95% interval over mixtures drawn with replacement; infinite where theirs may be 0."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
    peer = np.array(theirs)[drawn].mean(1)
    if peer.min() <= 0:
        return math.inf, math.inf, math.inf
    ratios = np.array(ours)[drawn].mean(1) / peer
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.mean(ours) / np.mean(theirs)), float(low), float(high)


def study(folder: Path, kind: str, seed: int) -> dict[str, dict[str, float]]:
    """What part of each distance each method closes, on one mixture."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    mixtures = made(kind, rng)
    for name in ("pool", "target", "training"):
        np.save(folder / f"{name}.npy", mixtures[name]["vectors"])
        languages, components = mixtures[name]["languages"], mixtures[name]["components"]
        rows = (
            {"id": i, "text": "", "language": str(language), "component": int(component)}
            for i, (language, component) in enumerate(zip(languages, components, strict=True))
        )
        write_rows(folder / f"{name}.jsonl", rows)
    before = distances(mixtures, np.empty(0, np.int64))
    drawn = {"attainable": attainable(mixtures, budget_of(kind))}
    config = SelectConfig(
        output_dir=folder / "out",
        seed=seed,
        rows=str(folder / "pool.jsonl"),
        target=str(folder / "target.jsonl"),
        training=str(folder / "training.jsonl"),
        budget=budget_of(kind),
        vectors={name: folder / f"{name}.npy" for name in ("pool", "target", "training")},
    )
    sources = read(config)
    for method in METHODS:
        scheme = select.scheme_of(config.model_copy(update={"method": method}), sources)
        drawn[method] = np.flatnonzero(select.drawn_by(scheme, config, sources.pool))
    after = {method: distances(mixtures, rows) for method, rows in drawn.items()}
    return {
        method: {name: (before[name] - left[name]) / before[name] for name in before} for method, left in after.items()
    }


def attainable(mixtures: Mapping[str, Mixture], budget: int) -> NDArray[np.int64]:
    """The rows that quotas over the true components draw."""
    target, training, pool = (mixtures[name]["components"] for name in ("target", "training", "pool"))
    counts = [np.bincount(found, minlength=pool.max() + 1) for found in (target, training, pool)]
    quotas = gap_quotas(counts[0] / USAGE, counts[1], counts[2], budget).total
    return np.concatenate([np.flatnonzero(pool == number)[:quota] for number, quota in enumerate(quotas)])


def made(kind: str, rng: np.random.Generator) -> dict[str, Mixture]:
    """Rows of usage (twice: what methods see, and what they are judged by), training and pool."""
    components = COMPONENTS[kind]
    centres = rng.normal(size=(components, DIMENSIONS))
    spread = rng.uniform(0.5, 1.0, size=components)
    used = rng.permutation(components)[:USED]
    languages = rng.choice(LANGUAGES, size=components)
    known, lacking = used[: KNOWN[kind]], used[KNOWN[kind] :]
    if kind == "aligned":
        languages[known] = rng.choice(["en", "vi"], size=len(known))
        languages[lacking] = rng.choice(["th", "id"], size=len(lacking))
    shares = {name: np.zeros(components) for name in ("target", "training")}
    shares["target"][used] = rng.dirichlet(np.full(USED, 5.0))
    shares["training"][known] = shares["target"][known] / shares["target"][known].sum()
    shares |= {"judge": shares["target"], "pool": rng.dirichlet(np.full(components, 10.0))}
    sizes = {"target": USAGE, "judge": USAGE, "training": TRAINING, "pool": POOL}
    mixtures: dict[str, Mixture] = {}
    for name, size in sizes.items():
        drawn = rng.choice(components, size=size, p=shares[name])
        vectors = centres[drawn] + rng.normal(size=(size, DIMENSIONS)) * spread[drawn][:, None]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        spoken = languages[drawn] if kind == "aligned" else rng.choice(LANGUAGES, size=size)
        mixtures[name] = {"components": drawn, "vectors": vectors.astype(np.float32), "languages": spoken}
    return mixtures


def distances(mixtures: Mapping[str, Mixture], drawn: NDArray[np.int64]) -> dict[str, float]:
    """Of training rows and those drawn of the pool, to the rows of usage that nobody has seen."""
    judge, training, pool = mixtures["judge"], mixtures["training"], mixtures["pool"]
    components = np.concatenate([training["components"], pool["components"][drawn]])
    counts, wanted = (
        np.bincount(found, minlength=pool["components"].max() + 1) for found in (components, judge["components"])
    )
    vectors = np.concatenate([training["vectors"], pool["vectors"][drawn]])
    width = median_distance(judge["vectors"][:1_000])
    squared = squared_mmd(vectors, judge["vectors"], width)
    return {"total_variation": total_variation(counts, wanted), "mmd": math.sqrt(max(0.0, squared))}


# A million rows


def speed(folder: Path) -> None:
    """Time and peak of both methods that cluster, growth with the rows, and scikit-learn's beside them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, WIDTH)).astype(np.float32)
    for name, rows in {"target": 20_000, "training": 50_000, "pool": ROWS}.items():
        write_mixture(folder, name, rows, centres, rng)
    peers = {name: fitted({n: peer(folder, name, n) for n in sizes}) for name, sizes in PEERS.items()}
    for method, against in {"semantic_gap": "KMeans", "dbscan": "DBSCAN"}.items():
        measured = {rows: ours(folder, method, rows) for rows in OURS}
        own, theirs = fitted(measured), peers[against]
        settings = {
            "rows": ROWS,
            "dimensions": WIDTH,
            "growth": own["growth"],
            "measured": own["measured"],
            "peer_growth": theirs["growth"],
            "peer_measured": theirs["measured"],
        }
        peer_name = f"sklearn {against} alone, in memory{'' if ROWS in PEERS[against] else ', extrapolated'}"
        suffix = "" if method == "semantic_gap" else "_dbscan"
        seconds, gigabytes = measured[ROWS]
        report(
            f"select.seconds_1m{suffix}", seconds, "s", peer_name, "lower", peer_value=theirs["seconds_1m"], **settings
        )
        report(
            f"select.peak_gb_1m{suffix}",
            gigabytes,
            "GB",
            peer_name,
            "lower",
            peer_value=theirs["peak_gb_1m"],
            **settings,
        )


def write_mixture(folder: Path, name: str, rows: int, centres: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Vectors by blocks, float16, and a short row for each."""
    vectors = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (rows, WIDTH))
    for start in range(0, rows, BLOCK):
        block = vectors[start : start + BLOCK]
        noise = rng.standard_normal(block.shape, np.float32)
        unit = centres[rng.integers(len(centres), size=len(block))] + 0.8 * noise
        block[:] = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    vectors.flush()
    texts = ({"id": i, "language": LANGUAGES[i % 5], "text": f"row {i} of {name}"} for i in range(rows))
    write_rows(folder / f"{name}.jsonl", texts)


def ours(folder: Path, method: str, rows: int) -> tuple[float, float]:
    """Seconds and peak in GB of the job's command on the first `rows` of the pool."""
    part = folder / f"{method}{rows}"
    part.mkdir()
    pool = folder / "pool"
    if rows < ROWS:
        pool = part / "pool"
        np.save(pool.with_suffix(".npy"), np.load(folder / "pool.npy", mmap_mode="r")[:rows])
        with (folder / "pool.jsonl").open() as lines:
            pool.with_suffix(".jsonl").write_text("".join(line for _, line in zip(range(rows), lines, strict=False)))
    others = ("target", "training")
    config = {
        "output_dir": str(part / "out"),
        "rows": str(pool.with_suffix(".jsonl")),
        **{name: str(folder / f"{name}.jsonl") for name in others},
        "method": method,
        "budget": BUDGET_1M,
        "clusters": 80,
        "dbscan": {"answers": False},
        "vectors": {"pool": str(pool.with_suffix(".npy")), **{name: str(folder / f"{name}.npy") for name in others}},
    }
    (part / "job.yaml").write_text(json.dumps(config))
    arguments = ["--config", str(part / "job.yaml")]
    return timed(f"from data_builders import select; assert select.main({arguments}) == 0")


def peer(folder: Path, name: str, rows: int) -> tuple[float, float]:
    """Seconds and peak in GB of scikit-learn's class on the first `rows` of the pool, held in memory."""
    load = f"rows = np.load({str(folder / 'pool.npy')!r}, mmap_mode='r')[:{rows}].astype('f4')"
    return timed(f"import numpy as np, sklearn.cluster; {load}; {PEER_CODE[name]}")


def timed(code: str) -> tuple[float, float]:
    """Of a process of its own; the peak is the kernel's high-water mark of what it held at once."""
    began = time.perf_counter()
    command = [sys.executable, "-c", f"{code}; print(open('/proc/self/status').read())"]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    mark = next(line for line in finished.stdout.splitlines() if line.startswith("VmHWM:"))
    return seconds, int(mark.split()[1]) * 1024 / 1e9


def fitted(measured: Mapping[int, tuple[float, float]]) -> dict[str, Any]:
    """Growth exponents of time and peak by least squares on logarithms; both at ROWS, as measured or by that line."""
    rows = np.log(list(measured))
    slopes, by_line = [], []
    for values in zip(*measured.values(), strict=True):
        slope, intercept = np.polyfit(rows, np.log(values), 1)
        slopes.append(round(float(slope), 2))
        by_line.append(float(np.exp(intercept + slope * math.log(ROWS))))
    seconds, gigabytes = measured.get(ROWS, by_line)
    return {
        "growth": slopes,
        "seconds_1m": round(seconds, 2),
        "peak_gb_1m": round(gigabytes, 2),
        "measured": {str(n): [round(seconds, 1), round(peak, 2)] for n, (seconds, peak) in measured.items()},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
