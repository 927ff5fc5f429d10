"""The job on a mixture whose gaps are known: what it draws, what it counts, and that it always draws the same."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.rows import Row, count_rows, read_rows, write_rows
from data_builders import select
from data_builders.config import EmbeddingConfig
from data_builders.embeddings import Embedded
from data_builders.selection import drawing, picture, sources
from data_builders.selection.config import SelectConfig

CENTRES = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0][:8]  # eight directions, orthogonal
LANGUAGES = ("th", "id", "en")
# Rows of each component: the target has 0 to 3; of these training lacks 2 and 3. The pool has 4 to 7 besides.
TARGET, TRAINING, POOL = [60, 60, 60, 60], [150, 90, 0, 0], [90] * 8


def mixture(folder: Path, name: str, counts: list[int], seed: int) -> Path:
    """Rows in random order, `component` among their columns, and vectors near the direction of each."""
    rng = np.random.default_rng(seed)
    components = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    vectors = CENTRES[components] + rng.normal(size=(len(components), 16)) * 0.08
    np.save(folder / f"{name}.npy", vectors.astype(np.float16))
    rows = (
        {"id": f"{name}{i}", "text": f"{name} {i}", "language": LANGUAGES[i % 3], "component": int(c)}
        for i, c in enumerate(components)
    )
    write_rows(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


Make = Callable[..., SelectConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    sources = {
        key: str(mixture(tmp_path, name, counts, seed))
        for seed, (key, name, counts) in enumerate(
            [("rows", "pool", POOL), ("target", "target", TARGET), ("training", "training", TRAINING)]
        )
    }
    vectors = {name: tmp_path / f"{name}.npy" for name in ("pool", "target", "training")}

    def config(**changes: Any) -> SelectConfig:
        settings: dict[str, Any] = {"output_dir": tmp_path / "out", "budget": 160, "clusters": 4, "vectors": vectors}
        return SelectConfig(**(settings | sources | {"dbscan": {"answers": False}} | changes))

    return config


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "DOTS_PER_INCH", 40)


def drawn(config: SelectConfig) -> list[Row]:
    select.run(config)
    return list(read_rows(config.output_dir / "rows.jsonl"))


def test_the_gaps_are_filled(make: Make) -> None:
    """Of 240 + 160 rows each component is to have 100: they lack 0, 10, 100 and 100, 210 in all."""
    config = make()
    rows = drawn(config)
    assert [rows.index(row) for row in sorted(rows, key=lambda row: int(row["id"][4:]))] == list(range(len(rows)))
    assert Counter(row["component"] for row in rows) == {1: 8, 2: 76, 3: 76}
    reasons = {row["selection"]["reason"] for row in rows if row["component"] == 1}
    assert len(reasons) == 1 and min(reasons).startswith("gap: target 25.00%, training 37.")
    ledger = json.loads((config.output_dir / "ledger.json").read_text())
    assert (ledger["rows_in"], ledger["rows_out"]) == (720, 160)
    outside = ledger["dropped"]["outside the target"]
    assert 360 <= outside <= 360 + 15  # the four other components; a few of the target's own look strange too
    metrics = json.loads((config.output_dir / "metrics.json").read_text())
    after = np.array([150, 98, 76, 76]) / 400
    assert metrics["total_variation.before"] == pytest.approx(0.5)
    assert metrics["total_variation.after"] == pytest.approx(np.abs(after - 0.25).sum() / 2, abs=0.005)
    assert metrics["squared_mmd.after"] < 0.2 * metrics["squared_mmd.before"]
    assert (config.output_dir / "map.png").stat().st_size > 5_000
    assert "total variation over clusters | 0.5000" in (config.output_dir / "selection.md").read_text()
    with np.load(config.output_dir / "clusters.npz") as clusters:
        assert np.sort(np.abs(clusters["centres"] @ CENTRES[:4].T).max(0)).min() > 0.98


def test_what_the_pool_lacks_is_reported_and_made_up(make: Make) -> None:
    """200 more rows: of 440 each component is to have 110; 2 and 3 lack 110, the pool has about 90 of each."""
    config = make(budget=250)
    counts = Counter(row["component"] for row in drawn(config))
    lines = json.loads((config.output_dir / "selection.json").read_text())["clusters"]
    wanted = 0.25 * (sum(line["training"] for line in lines[:-1]) + 250)
    gaps = [line for line in lines[:-1] if line["training"] == 0]
    assert counts.total() == 250 and counts[2] + counts[3] == sum(line["pool"] for line in gaps)
    assert [line["unavailable"] for line in gaps] == [math.ceil(wanted) - line["pool"] for line in gaps]


def test_bounds_on_languages_and_domains(make: Make) -> None:
    bounds = {"languages": {"th": {"minimum": 60}}, "domains": {"3": {"maximum": 40}}, "domain_column": "component"}
    config = make(constraints=bounds)
    rows = drawn(config)
    assert len(rows) == 160
    assert sum(row["language"] == "th" for row in rows) >= 60
    assert sum(row["component"] == 3 for row in rows) == 40
    dropped = json.loads((config.output_dir / "ledger.json").read_text())["dropped"]
    assert 30 <= dropped["constraint"] <= POOL[3] - 40  # the rest of the component, but for those outside


def test_bounds_that_cannot_be_held(make: Make) -> None:
    config = make(constraints={"languages": {"th": {"minimum": 150}}})
    with pytest.raises(UserError, match=r"constraints.languages.th.minimum: 150 rows, but the pool has 1\d\d that may"):
        select.run(config)
    assert not config.output_dir.exists()


def test_a_pool_that_is_nothing_like_the_target_is_refused(make: Make, tmp_path: Path) -> None:
    mixture(tmp_path, "pool", [0, 0, 0, 0, 200, 200], 0)
    with pytest.raises(UserError, match=r"no row of the pool may be drawn: all 400 are outside the target"):
        select.run(make())


def test_random_draws_all_alike(make: Make) -> None:
    counts = Counter(row["component"] for row in drawn(make(method="random", budget=360)))
    assert counts.total() == 360 and all(25 <= counts[c] <= 65 for c in range(8))


def test_linguistic_draws_the_nearest_languages(make: Make, tmp_path: Path) -> None:
    """A target of Malay and Lao: of 300 rows 150 each; Indonesian is nearest to one, Thai to the other."""
    write_rows(tmp_path / "usage.jsonl", ({"text": "x", "language": "ms" if i % 2 else "lo"} for i in range(240)))
    rows = drawn(make(method="linguistic", target=str(tmp_path / "usage.jsonl"), budget=300))
    assert Counter(row["language"] for row in rows) == {"id": 150, "th": 150}


def test_dbscan_draws_each_component_and_no_noise(make: Make, tmp_path: Path) -> None:
    """Answers that repeat their question (every second row) are drawn less often."""
    rng = np.random.default_rng(0)
    pool = np.load(tmp_path / "pool.npy").astype(np.float32)
    answers = np.where(np.arange(len(pool))[:, None] % 2, pool, rng.normal(size=pool.shape))
    pool[::60] = rng.normal(size=(12, 16))  # strays
    np.save(tmp_path / "pool.npy", pool)
    np.save(tmp_path / "answers.npy", answers.astype(np.float16))
    vectors = {"pool": tmp_path / "pool.npy", "answers": tmp_path / "answers.npy"}
    config = make(
        method="dbscan", target=None, training=None, vectors=vectors, dbscan={"core_share": 0.9, "components": 8}
    )
    rows = drawn(config)
    assert set(Counter(row["component"] for row in rows)) == set(range(8))
    assert not any(int(row["id"][4:]) % 60 == 0 for row in rows)
    assert sum(int(row["id"][4:]) % 2 for row in rows) < 160 / 4
    assert json.loads((config.output_dir / "ledger.json").read_text())["dropped"]["noise"] >= 12


def test_killed_and_begun_again_it_draws_the_same(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException): ...

    def killed(*_: object) -> None:
        raise Killed

    whole = drawn(make(clusters=[3, 4, 5]))
    config = make(clusters=[3, 4, 5], output_dir=tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(select, "evidence", killed)
        with pytest.raises(Killed):
            select.run(config)
    assert not (config.output_dir / "rows.jsonl").exists()
    assert drawn(config) == whole
    assert len(np.load(config.output_dir / "clusters.npz")["centres"]) == 4  # of the highest silhouette


def test_who_is_drawn_does_not_depend_on_the_pools_order(make: Make, tmp_path: Path) -> None:
    whole = drawn(make())
    order = np.random.default_rng(1).permutation(len(np.load(tmp_path / "pool.npy")))
    rows = list(read_rows(tmp_path / "pool.jsonl"))
    write_rows(tmp_path / "pool.jsonl", [rows[i] for i in order])
    np.save(tmp_path / "pool.npy", np.load(tmp_path / "pool.npy")[order])
    again = drawn(make(output_dir=tmp_path / "again"))
    assert {row["id"] for row in again} == {row["id"] for row in whole}
    other_seed = drawn(make(output_dir=tmp_path / "other", seed=1))
    assert {row["id"] for row in other_seed} != {row["id"] for row in whole}


def test_draws_are_uniform_and_weighted_ones_in_proportion() -> None:
    """3,000 rows of weight 1 and 3,000 of weight 3, 600 drawn: a quarter is of the first, within 4 deviations."""
    draws = np.array([drawing.row_draw({"id": i}, seed=3) for i in range(6_000)])
    assert 0 < draws.min() < 0.001 and abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * 6_000)
    weights = np.repeat([1.0, 3.0], 3_000)
    scheme = drawing.Scheme(np.zeros(6_000, np.int64), np.array([600]), [""], weights)
    none = np.zeros(6_000, "U2")
    columns = {"languages": none, "domains": none}
    chosen = drawing.draw(scheme, draws, columns, drawing.ConstraintsConfig())
    assert chosen.sum() == 600
    assert abs(chosen[:3_000].sum() - 150) < 4 * np.sqrt(600 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": None}, "give one of 'embedding' and 'vectors'"),
        ({"target": None}, "method semantic_gap needs 'target'"),
        ({"clusters": 1}, "clusters: give a number of 2 or more"),
        ({"constraints": {"languages": {"th": {"minimum": 5, "maximum": 4}}}}, "4 is below the minimum, 5"),
        ({"training": None}, "'training' and 'vectors.training' go together"),
        ({"method": "dbscan", "dbscan": {}}, "'dbscan.answers: true' and 'vectors.answers' go together"),
    ],
)
def test_settings_that_do_not_fit(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_vectors_that_do_not_fit(make: Make, tmp_path: Path) -> None:
    np.save(tmp_path / "pool.npy", np.zeros((3, 16), np.float16))
    with pytest.raises(UserError, match=r"vectors.pool: 3 vectors for the 720 rows of .*pool.jsonl"):
        select.run(make())
    np.save(tmp_path / "pool.npy", np.zeros((900, 16), np.float16))
    with pytest.raises(UserError, match=r"vectors.pool: 900 vectors for the 720 rows of .*pool.jsonl"):
        select.plan(make())
    np.save(tmp_path / "pool.npy", np.zeros((720, 8), np.float16))
    with pytest.raises(UserError, match=r"vectors.target: the vectors have 16 dimensions, those of the pool 8"):
        select.run(make())
    np.save(tmp_path / "pool.npy", np.full((720, 16), np.nan, np.float16))
    with pytest.raises(UserError, match=r"pool.npy row 1: the vector is zero or not finite"):
        select.run(make())
    np.save(tmp_path / "pool.npy", np.zeros(720, np.int64))
    with pytest.raises(UserError, match=r"pool.npy: expected floats \[rows, dimensions\], found int64"):
        select.plan(make())
    mixture(tmp_path, "pool", POOL, 0)
    with pytest.raises(UserError, match=r"clusters: 300 clusters need more rows of the target than its 240"):
        select.run(make(clusters=300))


def test_the_command_embeds_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Where vectors are not given, the texts' are made by `embed`, those of the answers too."""

    def stand_in(texts: Iterable[str], config: EmbeddingConfig) -> Embedded:
        made = np.array([np.random.default_rng(len(text)).normal(size=8) for text in texts], np.float32)
        return Embedded(made, np.arange(len(made)) < 2)

    monkeypatch.setattr(sources, "embedded", stand_in)
    monkeypatch.setattr(select, "check_embedding", lambda config: None)
    rows = [
        {"messages": [{"role": "user", "content": "?" * (1 + i % 4)}, {"role": "assistant", "content": "!" * (5 + i)}]}
        for i in range(60)
    ]
    write_rows(tmp_path / "pool.jsonl", rows)
    settings = {
        "output_dir": str(tmp_path / "out"),
        "rows": str(tmp_path / "pool.jsonl"),
        "method": "dbscan",
        "budget": 20,
        "clusters": 3,
        "dbscan": {"components": 4, "min_samples": 5, "core_share": 1.0},
        "embedding": {"model": "org/stand-in"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    assert select.main(["--config", str(tmp_path / "job.yaml"), "--dry-run"]) == 0
    assert "20 rows of" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert select.main(["--config", str(tmp_path / "job.yaml")]) == 0
    assert count_rows(tmp_path / "out" / "rows.jsonl") == 20
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["embedding.truncated"] == 2
    write_rows(tmp_path / "pool.jsonl", [{"text": "no answer"}] * 60)
    assert select.main(["--config", str(tmp_path / "job.yaml"), f"output_dir={tmp_path / 'none'}"]) == 2
    assert "pool.jsonl:1: row has no assistant's turn in 'messages'" in capsys.readouterr().err
