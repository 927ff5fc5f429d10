"""Who may import whom, which modules stay light, and that every recipe of the repository is valid."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.config import JobConfig, load_config
from alignment.errors import UserError
from alignment.pipeline import PipelineConfig, Stage, stage_command

ROOT = Path(__file__).parents[2]
# package -> packages of ours that it may import, besides itself
ALLOWED = {
    "alignment": set(),
    "sft": {"alignment"},
    "reward": {"alignment"},
    "data_builders": {"alignment", "reward"},
    "dpo": {"alignment", "reward", "data_builders"},
}  # fmt: skip
MODULES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
LIGHT = [name for name in ("alignment", *sorted(set(ALLOWED) - {"alignment"})) if (ROOT / name / "config.py").exists()]


def imported_packages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of everything that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
            case ast.ImportFrom(level=0):
                yield node.lineno, str(node.module).partition(".")[0]
            case ast.ImportFrom():
                yield node.lineno, path.relative_to(ROOT).parts[0]  # relative: its own package
            case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module")):
                yield node.lineno, "a computed name"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = set(ALLOWED) | {"tests", "benchmarks", "a computed name"}
    forbidden = ours - ALLOWED[package] - {package}
    found = [f"{path}:{line} imports {name}" for line, name in imported_packages(path) if name in forbidden]
    assert found == []


def test_the_check_above_sees_every_kind_of_import(tmp_path: Path) -> None:
    source = "import dpo.x as y\ndef f():\n    from sft import z\n    __import__('reward')\n"
    (tmp_path / "m.py").write_text(source)
    assert list(imported_packages(tmp_path / "m.py")) == [(1, "dpo"), (3, "sft"), (4, "a computed name")]


@pytest.mark.parametrize("package", [*LIGHT, "data_builders.ecommerce", "data_builders.selection"])
def test_config_imports_no_torch(package: str) -> None:
    script = f"import sys, {package}.config; sys.exit(bool({{'torch', 'transformers', 'vllm'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_light_packages_were_found() -> None:
    assert {"alignment", "sft"} <= set(LIGHT)


def config_class(place: str) -> type[JobConfig]:
    module, _, name = place.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, JobConfig)
    return found  # type: ignore[no-any-return]


# job -> its config class
JOBS = {
    "alignment.tokenizer": "alignment.tokenizer.TokenizerConfig",
    "alignment.evaluate": "alignment.evaluate.EvaluateConfig",
    "alignment.general": "alignment.general.GeneralConfig",
    "sft.prepare": "sft.config.SFTConfig",
    "sft.train": "sft.config.SFTConfig",
    "sft.mixture_sweep": "sft.config.MixtureSweepConfig",
    "sft.update_adapter": "sft.config.UpdateConfig",
    "sft.adapters": "sft.config.AdaptersConfig",
    "reward.train": "reward.config.RewardConfig",
    "reward.sweep": "reward.config.SweepConfig",
    "reward.average": "reward.config.AverageConfig",
    "reward.score": "reward.config.ScoreConfig",
    "reward.best_of_n": "reward.config.BestOfNConfig",
    "reward.pairwise": "reward.config.PairwiseConfig",
    "reward.math_rule": "reward.config.MathRuleConfig",
    "data_builders.synthesize": "data_builders.config.SynthesizeConfig",
    "data_builders.preferences": "data_builders.config.PreferencesConfig",
    "data_builders.questions": "data_builders.config.QuestionsConfig",
    "data_builders.decontaminate": "data_builders.config.DecontaminateConfig",
    "data_builders.deduplicate": "data_builders.config.DeduplicateConfig",
    "data_builders.languages": "data_builders.config.LanguagesConfig",
    "data_builders.select": "data_builders.selection.config.SelectConfig",
    "data_builders.drift": "data_builders.config.DriftConfig",
    "data_builders.embed": "data_builders.config.EmbedConfig",
    "data_builders.long_cot": "data_builders.config.LongCoTConfig",
    "data_builders.instructions": "data_builders.ecommerce.config.InstructionsConfig",
    "dpo.train": "dpo.config.DPOConfig",
    "dpo.online": "dpo.config.OnlineConfig",
}
# folder of configs/ -> the packages whose recipes it holds
FOLDERS = {
    "sft": ["sft"],
    "reward": ["reward"],
    "dpo": ["dpo"],
    "data": ["data_builders", "alignment"],
    "general": ["alignment"],
}
RECIPES = [path for folder in FOLDERS for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
STAGES = [
    (path.stem, stage)
    for path in sorted((ROOT / "configs" / "pipelines").glob("*.yaml"))
    for stage in load_config(PipelineConfig, path).stages
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipe_is_valid_for_a_job(path: Path) -> None:
    jobs = [job for job in JOBS if job.partition(".")[0] in FOLDERS[path.parent.name]]
    mistakes = {}
    for job in jobs:
        try:
            load_config(config_class(JOBS[job]), path)
        except UserError as error:
            mistakes[job] = str(error)
    assert len(mistakes) < len(jobs), mistakes


@pytest.mark.parametrize(("pipeline", "stage"), STAGES, ids=lambda v: v if isinstance(v, str) else v.name)
def test_stage_of_a_pipeline_is_valid_for_its_job(pipeline: str, stage: Stage) -> None:
    arguments = stage_command(stage)
    overrides = arguments[arguments.index(str(stage.config)) + 1 :]
    config = load_config(config_class(JOBS[stage.job]), ROOT / stage.config, overrides)
    assert config.output_dir.parts[:2] == ("runs", pipeline)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.yaml")))
def test_preset_builds(name: str) -> None:
    """Also by name, as `inspect model` does; transformers checks the values."""
    from alignment.inspect_model import inspect_model

    assert inspect_model(name).parameters.total > 1e6
