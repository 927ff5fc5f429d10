"""Every mistake of the user's through the real command: exit code 2, a few clear lines, nothing half-written."""

import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from alignment import job
from alignment.config import JobConfig

ROW = '{"messages": [{"role": "user", "content": "3 x 15?"}, {"role": "assistant", "content": "\\\\boxed{45}"}]}\n'
PROMPT = '{"id": "a", "prompt": [{"role": "user", "content": "3 x 15?"}], "answer": "45"}\n'
TOKENIZER = "output_dir: out\nrows: [rows.jsonl]\nvocab_size: 400\n"
EVALUATE = "output_dir: out\nmodel: model\nprompts: prompts.jsonl\n"
SYNTHESIZE = (
    "output_dir: {}\nshort_rows: 256\ndirect_rows: 64\nlong_rows: 64\nreward_prompts: 64\nprompts: 64\nheld_out: 64\n"
)
SFT = """\
output_dir: out
model: {preset: compass-tiny, tokenizer: tokenizer}
sources: [{rows: rows.jsonl}]
packing: {capacity: 64}
training: {learning_rate: 1.0e-3}
"""
LAUNCHER = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 3
main_process_port: 0
deepspeed_config: {deepspeed_config_file: deepspeed.json, zero3_init_flag: false}
"""
DEEPSPEED = (Path(__file__).parents[2] / "configs" / "deepspeed" / "zero1-ep2.json").read_text()


@dataclass(frozen=True)
class Case:
    """A command, the files it finds, and what its message must hold."""

    name: str
    command: str
    expected: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)


TOKENIZE = "alignment.tokenizer --config job.yaml"
CASES = [
    Case(
        "unknown key",
        TOKENIZE,
        ("job.yaml:3: unknown key 'vocab_sise'", "did you mean 'vocab_size'?"),
        {"job.yaml": TOKENIZER.replace("vocab_size", "vocab_sise"), "rows.jsonl": ROW},
    ),
    Case(
        "unknown key in an override",
        f"{TOKENIZE} vocab.size=400",
        ("override 'vocab.size=400': unknown key 'vocab'",),
        {"job.yaml": TOKENIZER, "rows.jsonl": ROW},
    ),
    Case(
        "unknown key of a pipeline",
        "alignment.cli run pipeline.yaml",
        ("pipeline.yaml:3: unknown key 'stages.0.confg'", "did you mean 'config'?"),
        {"pipeline.yaml": "output_dir: out\nstages:\n  - {name: a, job: alignment.tokenizer, confg: job.yaml}\n"},
    ),
    Case(
        "a stage's mistake ends the pipeline with it",
        "alignment.cli run pipeline.yaml",
        (
            "job.yaml:3: vocab_size: input should be a valid integer",
            "found 'many'",
            "stage words failed with exit code 2",
        ),
        {
            "pipeline.yaml": "output_dir: out\nstages: [{name: words, job: alignment.tokenizer, config: job.yaml}]\n",
            "job.yaml": TOKENIZER.replace("400", "many"),
            "rows.jsonl": ROW,
        },
    ),
    Case(
        "wrong type",
        TOKENIZE,
        ("job.yaml:3: vocab_size: input should be a valid integer", "found 'many'"),
        {"job.yaml": TOKENIZER.replace("400", "many"), "rows.jsonl": ROW},
    ),
    Case(
        "missing file",
        TOKENIZE,
        ("rows.jsonl: no such file", "did you mean 'rows.json'?"),
        {"job.yaml": TOKENIZER, "rows.json": ROW},
    ),
    Case(
        "missing config",
        TOKENIZE,
        ("job.yaml: no such config file", "did you mean 'jobs.yaml'?"),
        {"jobs.yaml": TOKENIZER},
    ),
    Case(
        "malformed line",
        TOKENIZE,
        ("rows.jsonl:7: malformed JSON",),
        {"job.yaml": TOKENIZER, "rows.jsonl": ROW * 6 + ROW[:40] + "\n" + ROW},
    ),
    Case(
        "malformed line far behind the first rows",
        TOKENIZE,
        ("rows.jsonl:99: malformed JSON",),
        {"job.yaml": TOKENIZER, "rows.jsonl": ROW * 98 + ROW[:40] + "\n" + ROW},
    ),
    Case(
        "row without messages",
        TOKENIZE,
        ("rows.jsonl:2: row has no 'messages'", "did you mean 'mesages'?"),
        {"job.yaml": TOKENIZER, "rows.jsonl": ROW + ROW.replace("messages", "mesages")},
    ),
    Case("empty data set", TOKENIZE, ("rows.jsonl: holds no rows",), {"job.yaml": TOKENIZER, "rows.jsonl": ""}),
    Case(
        "model folder without weights",
        "alignment.evaluate --config job.yaml",
        ("model: holds no weights", "expected *.safetensors"),
        {"job.yaml": EVALUATE, "model/config.json": "{}", "prompts.jsonl": PROMPT},
    ),
    Case(
        "pickled weights",
        "alignment.evaluate --config job.yaml",
        ("model: holds pickled weights (pytorch_model.bin)", "convert to safetensors"),
        {"job.yaml": EVALUATE, "model/config.json": "{}", "model/pytorch_model.bin": "", "prompts.jsonl": PROMPT},
    ),
]


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )


def check(finished: subprocess.CompletedProcess[str], *expected: str) -> None:
    """The mistake is named in one to three lines."""
    assert finished.returncode == 2, finished.stderr
    assert 1 <= len(finished.stderr.splitlines()) <= 3, finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stderr.startswith("error: "), finished.stderr
    for fragment in expected:
        assert fragment in finished.stderr


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mistake_is_named_and_nothing_is_written(case: Case, tmp_path: Path) -> None:
    write(tmp_path, case.files)
    check(run(tmp_path, case.command), *case.expected)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(case.files)
    assert not (tmp_path / "out").exists()


def test_output_folder_of_another_run(tmp_path: Path) -> None:
    write(tmp_path, {"job.yaml": TOKENIZER, "rows.jsonl": ROW})
    with job.Job.open("sft.train", JobConfig(output_dir=tmp_path / "out")) as other:
        other.log(step=1, loss=2.0)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    check(run(tmp_path, TOKENIZE), "out: output_dir holds a run of sft.train; choose another folder")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_output_folder_that_is_not_a_run(tmp_path: Path) -> None:
    write(tmp_path, {"job.yaml": TOKENIZER, "rows.jsonl": ROW, "out/thesis.tex": "text"})
    check(run(tmp_path, TOKENIZE), "out: output_dir holds files that are not a run of alignment.tokenizer")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# a full disk


class SmallDisk:
    """A file system of a few kilobytes in memory."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount(f"size={kilobytes}k", flags=0)

    def grow(self, kilobytes: int) -> None:
        self._mount(f"size={kilobytes}k", flags=32)  # MS_REMOUNT

    def _mount(self, options: str, flags: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"tmpfs", os.fsencode(self.folder), b"tmpfs", flags, options.encode()):
            pytest.skip(f"no tmpfs can be mounted here: {os.strerror(ctypes.get_errno())}")

    def remove(self) -> None:
        ctypes.CDLL(None).umount(os.fsencode(self.folder))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if not sys.platform.startswith("linux"):
        pytest.skip("a small disk is made by Linux's mount(2)")
    made = SmallDisk(tmp_path / "disk", kilobytes=96)
    yield made
    made.remove()


def test_full_disk_leaves_whole_files_and_the_run_goes_on_when_there_is_room(disk: SmallDisk, tmp_path: Path) -> None:
    write(tmp_path, {"job.yaml": SYNTHESIZE.format("disk/out")})
    command = "data_builders.synthesize --config job.yaml"
    check(run(tmp_path, command), "no space left on the disk")
    out = disk.folder / "out"
    assert (out / "resolved_config.yaml").exists(), "it had begun"
    assert not (out / "DONE").exists()
    for path in out.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == (256 if path.stem == "sft_short" else 64)
    assert not [p.name for p in out.iterdir() if p.name.endswith(".tmp")]
    disk.grow(4096)
    again = run(tmp_path, command)
    assert again.returncode == 0, again.stderr
    assert (out / "DONE").exists()


# launched on several ranks


@pytest.fixture
def launched(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A job for three ranks and expert parallelism of three; the preset has eight experts."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    deepspeed = DEEPSPEED.replace('"autoep_size": 2', '"autoep_size": 3')
    assert deepspeed != DEEPSPEED
    files = {"launcher.yaml": LAUNCHER, "deepspeed.json": deepspeed, "job.yaml": SFT, "rows.jsonl": ROW * 9}
    write(tmp_path, files)
    return tmp_path


def test_ranks_that_do_not_divide_the_experts(launched: Path) -> None:
    finished = run(launched, "alignment.launch --config_file launcher.yaml -m sft.train --config job.yaml")
    check(finished, "expert_parallel.autoep_size: 3 does not divide the model's 8 experts; valid sizes: 1, 2, 4, 8")
    assert not (launched / "out").exists()


def test_port_in_use(launched: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        command = f"alignment.launch --config_file launcher.yaml --main_process_port {port}"
        finished = run(launched, f"{command} -m sft.train --config job.yaml")
    check(finished, f"port {port} is in use; choose another main_process_port, or 0")
    assert not (launched / "out").exists()


def test_launcher_config_that_is_missing(launched: Path) -> None:
    finished = run(launched, "alignment.launch --config_file lancher.yaml -m sft.train --config job.yaml")
    check(finished, "lancher.yaml: no such launcher config", "did you mean 'launcher.yaml'?")
