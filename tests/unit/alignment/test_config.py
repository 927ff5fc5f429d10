from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from alignment.config import Config, JobConfig, ModelConfig, TrainingConfig, load_config
from alignment.errors import UserError


class Source(Config):
    rows: str
    count: int | None = Field(None, ge=1)


class Optimizer(Config):
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["linear", "cosine"] = "cosine"


class Recipe(JobConfig):
    optimizer: Optimizer
    sources: list[Source] = Field(min_length=1)
    named: dict[str, Source] = Field(default_factory=dict)
    model: ModelConfig | None = None


GOOD = """\
output_dir: out
optimizer:
  learning_rate: 1e-3
sources:
  - rows: a.jsonl
  - rows: b.jsonl
    count: 5
"""


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Recipe, path, overrides)


def error_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    return message.replace(str(folder), "DIR")


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "optimizer.schedule=linear", "sources.1.count=7", "seed=3")
    assert recipe.optimizer == Optimizer(learning_rate=0.001, schedule="linear")  # 1e-3 is text to YAML 1.1
    assert recipe.sources == [Source(rows="a.jsonl"), Source(rows="b.jsonl", count=7)]
    assert (recipe.seed, recipe.output_dir, recipe.named) == (3, Path("out"), {})


@pytest.mark.parametrize(
    ("overrides", "get", "expected"),
    [
        (["optimizer.betas=[0.8, 0.9]"], lambda r: r.optimizer.betas, (0.8, 0.9)),
        (["sources=[{rows: c.jsonl}]"], lambda r: r.sources, [Source(rows="c.jsonl")]),
        (["sources.1.count=null"], lambda r: r.sources[1].count, None),
        (["named.x.rows=d.jsonl", "named.x.count=2"], lambda r: r.named, {"x": Source(rows="d.jsonl", count=2)}),
        (["optimizer.learning_rate=2e-5"], lambda r: r.optimizer.learning_rate, 2e-5),
        (["output_dir=a=b"], lambda r: r.output_dir, Path("a=b")),
        (["seed=1", "seed=2"], lambda r: r.seed, 2),
    ],
)
def test_override(tmp_path: Path, overrides: list[str], get: Any, expected: Any) -> None:
    assert get(load(tmp_path, GOOD, *overrides)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            GOOD.replace("  learning_rate: 1e-3", "  learning_rate: 1e-3\n  shedule: linear"),
            "DIR/recipe.yaml:4: unknown key 'optimizer.shedule'; did you mean 'schedule'?",
        ),
        (GOOD + "output: x\n", "DIR/recipe.yaml:8: unknown key 'output'; did you mean 'output_dir'?"),
        (
            GOOD.replace("output_dir", "ouput_dir"),
            "DIR/recipe.yaml:1: unknown key 'ouput_dir'; did you mean 'output_dir'?",
        ),
        (
            GOOD.replace("count: 5", "cuont: 5"),
            "DIR/recipe.yaml:7: unknown key 'sources.1.cuont'; did you mean 'count'?",
        ),
        (
            GOOD + "named:\n  x:\n    rows: c\n    zzz: 1\n",
            "DIR/recipe.yaml:11: unknown key 'named.x.zzz'; valid names: count, rows",
        ),
        (GOOD + "seed: 1\nseed: 2\n", "DIR/recipe.yaml:9: duplicate key 'seed', first given on line 8"),
        (
            GOOD.replace("count: 5", "count: 5\n    rows: c.jsonl"),
            "DIR/recipe.yaml:8: duplicate key 'sources.1.rows', first given on line 6",
        ),
        (GOOD.replace("output_dir: out\n", ""), "DIR/recipe.yaml: missing key 'output_dir' (expected: Path)"),
        (
            GOOD.replace("  learning_rate: 1e-3", "  schedule: linear"),
            "DIR/recipe.yaml:2: missing key 'optimizer.learning_rate' (expected: float)",
        ),
        (GOOD.replace("  - rows: b.jsonl\n    count", "  - count"), "DIR/recipe.yaml:6: missing key 'sources.1.rows'"),
        (
            GOOD + "seed: many\n",
            "DIR/recipe.yaml:8: seed: input should be a valid integer, unable to parse",
        ),
        (GOOD.replace("count: 5", "count: 0"), "DIR/recipe.yaml:7: sources.1.count: input should be greater than"),
        (
            GOOD.replace("1e-3", "1e-3\n  schedule: step"),
            "DIR/recipe.yaml:4: optimizer.schedule: input should be 'linear' or 'cosine', found 'step'",
        ),
        (GOOD.replace("1e-3", "[1]"), "DIR/recipe.yaml:3: optimizer.learning_rate: input should be a valid number"),
        (GOOD + "model: {}\n", "DIR/recipe.yaml:8: model: give one of 'path' and 'preset'"),
        (GOOD + "model:\n  preset: x\n", "DIR/recipe.yaml:8: model: a preset has no tokenizer of its own"),
        ("output_dir: [\n", "DIR/recipe.yaml:2: not valid YAML"),
        ("- a\n- b\n", "DIR/recipe.yaml: expected a mapping of keys to values, found list"),
        ("", "DIR/recipe.yaml: missing key 'output_dir'"),
    ],
)
def test_mistake_in_the_file_is_placed_and_explained(tmp_path: Path, text: str, expected: str) -> None:
    assert error_of(tmp_path, text).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.shedule=linear", "override 'optimizer.shedule=linear': unknown key 'optimizer.shedule'; did you"),
        ("seed", "override 'seed': expected section.key=value"),
        ("=3", "override '=3': expected section.key=value"),
        ("seed=[", "override 'seed=[': the value is not valid YAML"),
        ("seed=x", "override 'seed=x': seed: input should be a valid integer"),
        ("sources.2.rows=c", "override 'sources.2.rows=c': expected an index below 2, found '2'"),
        ("sources.first.rows=c", "override 'sources.first.rows=c': expected an index below 2, found 'first'"),
        ("sources.9=c", "override 'sources.9=c': expected an index below 2, found '9'"),
        ("output_dir.x=1", "override 'output_dir.x=1': 'output_dir' is a str, not a section"),
        ("optimizer.learning_rate=-1", "override 'optimizer.learning_rate=-1': optimizer.learning_rate: input should"),
    ],
)
def test_mistake_in_an_override_is_explained(tmp_path: Path, override: str, expected: str) -> None:
    assert error_of(tmp_path, GOOD, override).startswith(expected)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"demmo\.yaml: no such config file; did you mean 'demo\.yaml'\?"):
        load_config(Recipe, tmp_path / "demmo.yaml")
    with pytest.raises(UserError, match="not a YAML file"):
        load_config(Recipe, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a YAML file"):
        load_config(Recipe, tmp_path / "binary.yaml")


def test_values_are_immutable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, GOOD).seed = 4


@pytest.mark.parametrize("values", [{"path": "m", "preset": "p", "tokenizer": "t"}, {}, {"preset": "p"}])
def test_model_has_one_source(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"one of|tokenizer"):
        ModelConfig(**values)  # type: ignore[arg-type]


def test_training_refuses_what_no_optimizer_can_do() -> None:
    for wrong in ({"epochs": 0}, {"warmup_share": 1.0}, {"accumulation": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match=r"greater than|less than"):
            TrainingConfig(**({"learning_rate": 1.0} | wrong))  # type: ignore[arg-type]
