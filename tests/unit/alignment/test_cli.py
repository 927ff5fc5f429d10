import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment import cli, doctor, evaluate, pipeline, report
from alignment.doctor import Check
from alignment.errors import UserError


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from alignment.cli import main; assert main(['--help']) == 0;"
        "assert main(['inspect', 'rows', '--help']) == 0;"
        "heavy = {'torch', 'transformers', 'vllm', 'pyarrow', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("run", "inspect", "doctor", "export", "evaluate", "report"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments", [["run"], ["rnu"], ["run", "p.yaml", "--dry"], ["inspect", "rows", "f", "--count", "-1"], ["report"]]
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Usage: alignment" in capsys.readouterr().err


def test_inspect_pairs_is_a_command_of_another_package(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "pairs", "missing.jsonl", "--model", "./missing", "--count", "1"]) == 2
    assert capfd.readouterr().err == "error: ./missing: no such tokenizer folder\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "error: missing.yaml: no such config file"),
        (["inspect", "model", "compass-v22"], "error: compass-v22: neither a preset nor a folder"),
        (["inspect", "rows", "missing.jsonl"], "error: missing.jsonl: no such file"),
        (["export", "missing", "out"], "error: missing: no such model folder"),
        (
            ["inspect", "rows", "missing.jsonl", "--tokenizer", "./missing"],
            "error: ./missing: no such tokenizer folder",
        ),
    ],
)
def test_users_mistake_exits_2_with_its_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    written = capsys.readouterr().err
    assert written.startswith(message)
    assert len(written.splitlines()) <= 3


def test_inspect_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "model", "compass-v2"]) == 0
    assert "29.8B total, 4.9B active" in capsys.readouterr().out


def test_inspect_rows(tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    rows.write_text((json.dumps({"messages": messages}) + "\n") * 2)
    assert cli.main(["inspect", "rows", str(rows), "--tokenizer", str(tiny_model_folder), "--count", "1"]) == 0
    text = capsys.readouterr().out
    assert "⟦2▏<|im_end|>⟧↵" in text
    assert text.count("-- row") == 1


def test_doctor_exits_2_when_something_required_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "examine", lambda: [Check("disk", "note", "small"), Check("vLLM", "wrong", "none", "get it")]
    )
    assert cli.main(["doctor"]) == 2
    written = capsys.readouterr()
    assert "get it" in written.out
    assert written.err == "error: not ready: vLLM; the remedies stand above\n"
    monkeypatch.setattr(doctor, "examine", lambda: [Check("disk", "note", "small")])
    assert cli.main(["doctor"]) == 0


def test_run_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def run_pipeline(*arguments: object) -> None:
        calls.append((*arguments[:3], *arguments[4:]))
        if len(calls) == 2:
            raise UserError("no")

    monkeypatch.setattr(pipeline, "run_pipeline", run_pipeline)
    assert cli.main(["run", "p.yaml", "--only", "sft", "--dry-run", "sft.seed=3"]) == 0
    assert cli.main(["run", "p.yaml"]) == 2
    assert calls == [(Path("p.yaml"), "sft", True, ["sft.seed=3"]), (Path("p.yaml"), None, False, ())]


def test_evaluate_is_given_its_arguments_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        calls.append(arguments)
        return 2

    monkeypatch.setattr(evaluate, "main", main)
    arguments = ["--config", "c.yaml", "sampling.count=4", "--dry-run", "--help"]
    assert cli.main(["evaluate", *arguments]) == 2
    assert calls == [arguments]


def test_report_says_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "build", lambda pipeline, overrides: pipeline.with_name("report.html"))
    monkeypatch.setattr(report, "summary", lambda pipeline, overrides: f"results of {pipeline.stem}")
    assert cli.main(["report", "runs/demo.yaml"]) == 0
    assert capsys.readouterr().out == "results of demo\nreport: runs/report.html\n"
