import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from alignment import job
from alignment.config import parse_override
from alignment.errors import UserError
from alignment.pipeline import Stage, load_pipeline, run_pipeline, stage_command, stage_dir

ROOT = Path(__file__).parents[3]

# A job that copies its input, appends one line to the journal, and fails or waits when told to.
COPY = '''
"""Copies a file."""
import sys, time
from pathlib import Path
from alignment import job
from alignment.config import JobConfig
from alignment.errors import UserError

class Recipe(JobConfig):
    source: Path
    wait: float = 0.0
    fail: str = ""

def run(config):
    with job.Job.open("copy", config, [config.source]) as this:
        if this.done:
            return
        with Path("journal").open("a") as file:
            file.write(config.output_dir.name + "\\n")
        time.sleep(config.wait)
        if config.fail == "user":
            raise UserError("the source is not to my taste")
        if config.fail:
            raise RuntimeError("broken")
        (this.dir / "copy").write_text(config.source.read_text())
        this.finish({})

if __name__ == "__main__":
    sys.exit(job.main(Recipe, run, lambda config: []))
'''
RECIPE = """\
output_dir: out/pipeline
stages:
  - {name: first, job: copy_job, config: first.yaml}
  - {name: second, job: copy_job, config: second.yaml, set: {output_dir: out/b}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a pipeline of two copies, `source` -> out/a -> out/b."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    Path("copy_job.py").write_text(COPY)
    Path("source").write_text("text")
    Path("first.yaml").write_text("output_dir: out/a\nsource: source\n")
    Path("second.yaml").write_text("output_dir: overridden\nsource: out/a/copy\n")
    Path("pipeline.yaml").write_text(RECIPE)
    return tmp_path


def run(only: str | None = None, dry_run: bool = False) -> str:
    console = Console(file=io.StringIO(), width=200)
    run_pipeline(Path("pipeline.yaml"), only, dry_run, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def journal() -> list[str]:
    return Path("journal").read_text().split() if Path("journal").exists() else []


def printed_commands(text: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix("$ ")) for line in text.splitlines() if line.startswith("$ ")]


def test_stages_run_in_order_and_once(folder: Path) -> None:
    text = run()
    assert journal() == ["a", "b"]
    assert Path("out/b/copy").read_text() == "text"
    assert "(1/2) first" in text
    assert "done in " in text
    again = run()
    assert journal() == ["a", "b"]
    assert again.count("done already, see out/") == 2
    assert set(json.loads(Path("out/pipeline/pipeline.json").read_text())) == {"first", "second"}


def test_printed_command_is_the_real_one(folder: Path) -> None:
    first, second = printed_commands(run(dry_run=True))
    assert not Path("out").exists()
    assert second == ["python", "-m", "copy_job", "--config", "second.yaml", "output_dir=out/b"]
    for command in (first, second):
        subprocess.run([sys.executable, *command[1:]], check=True)
    assert journal() == ["a", "b"]
    run()  # the pipeline takes over what was run by hand
    assert journal() == ["a", "b"]


def test_one_stage_alone(folder: Path) -> None:
    text = run(only="first")
    assert journal() == ["a"]
    assert "(1/1) first" in text
    with pytest.raises(UserError, match=r"pipeline\.yaml: no stage 'secnd'; did you mean 'second'\?"):
        run(only="secnd")


def test_first_failure_ends_the_run_and_the_next_run_goes_on_there(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("pipeline.yaml").write_text(RECIPE.replace("first.yaml}", "first.yaml, set: {fail: user}}"))
    assert job.guarded(lambda: run() and None) == 2
    assert capfd.readouterr().err == (
        "error: the source is not to my taste\nstage first failed with exit code 2; its message stands above\n"
    )
    assert journal() == ["a"]
    Path("pipeline.yaml").write_text(RECIPE)
    run()
    assert journal() == ["a", "a", "b"]


def test_fault_of_ours_in_a_stage_exits_1(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("pipeline.yaml").write_text(RECIPE.replace("first.yaml}", "first.yaml, set: {fail: ours}}"))
    assert job.guarded(lambda: run() and None) == 1
    assert "RuntimeError: broken" in capfd.readouterr().err


def test_later_stages_look_again_after_an_earlier_one_ran(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second stage's record is good, but the folder of the first was deleted and its input changed."""
    run()
    subprocess.run(["rm", "-r", "out/a"], check=True)
    Path("source").write_text("other text")
    assert job.guarded(lambda: run() and None) == 2
    assert "out/b: the inputs have changed since this run began: out/a/copy" in capfd.readouterr().err


def test_changed_stage_is_started_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run()
    with Path("first.yaml").open("a") as file:
        file.write("seed: 3\n")
    assert job.guarded(lambda: run() and None) == 2
    assert "seed was 0, is 3" in capfd.readouterr().err


def test_sigterm_reaches_the_stage_and_the_same_command_resumes(folder: Path) -> None:
    Path("pipeline.yaml").write_text(RECIPE.replace("first.yaml}", "first.yaml, set: {wait: 1.5}}"))
    script = "import sys; from alignment import cli; sys.exit(cli.main(['run', 'pipeline.yaml']))"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not journal():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors == "interrupted (SIGTERM); the same command resumes\n" * 2  # the stage, then the pipeline
    run()
    assert journal() == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("second.yaml", "secnd.yaml", "stage 'second': secnd.yaml: no such file; did you mean 'second.yaml'?"),
        ("name: second", "name: first", "two stages are named 'first'"),
        ("name: second", "name: Second", "stages.1.name: string should match pattern"),
        ("job: copy_job", "jop: copy_job", "pipeline.yaml:3: unknown key 'stages.0.jop'; did you mean 'job'?"),
        ("first.yaml}", "first.yaml, accelerate: cpu.yaml}", "stage 'first': cpu.yaml: no such file"),
    ],
)
def test_mistake_in_the_pipeline_is_found_before_anything_runs(folder: Path, old: str, new: str, expected: str) -> None:
    Path("pipeline.yaml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        run()
    assert expected in str(caught.value)
    assert not Path("out").exists()


def test_an_override_changes_one_stage(folder: Path) -> None:
    first, second = load_pipeline(Path("pipeline.yaml"), ["first.source=other", "second.engine.seed=3"]).stages
    assert first.set == {"source": "other"}
    assert second.set == {"output_dir": "out/b", "engine.seed": 3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frist.source=x", "no stage 'frist'; did you mean 'first'"),
        ("first=x", "override 'first=x': expected STAGE.section.key=value"),
        ("first.source", "expected section.key=value"),
    ],
)
def test_an_override_that_names_no_stage_s_key(folder: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pipeline(Path("pipeline.yaml"), [override])


TEXTS = ["plain/path.x", "true", "3", "1.5", "null", "", "a b", "org/name:train", "{x}", "é"]
VALUES = [*TEXTS, 3, 1.5, 2e-5, True, None, [1, "a"], {"k": "v"}]


@pytest.mark.parametrize("value", VALUES)
def test_overrides_of_a_stage_keep_their_types(value: object) -> None:
    stage = Stage.model_validate({"name": "s", "job": "j", "config": "c", "set": {"a.b": value}})
    place, parsed = parse_override(stage_command(stage)[-1])
    assert place == ("a", "b")
    assert (float(parsed) if isinstance(value, float) else parsed) == value  # YAML 1.1 reads 2e-05 as text


def test_launcher_config_makes_a_launch_command() -> None:
    stage = Stage.model_validate({"name": "s", "job": "sft.train", "config": "c.yaml", "accelerate": "a.yaml"})
    expected = "python -m alignment.launch --config_file a.yaml -m sft.train --config c.yaml"
    assert shlex.join(stage_command(stage)) == expected


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pipelines").glob("*.yaml")), ids=lambda p: p.stem)
def test_pipelines_of_the_repository_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pipeline = load_pipeline(path)
    folders = [stage_dir(stage) for stage in pipeline.stages]
    assert len(set(folders)) == len(folders)
    assert all(folder.parts[0] == "runs" for folder in folders)
