"""What `alignment export` takes, refuses, copies and compares on; tests/jobs/test_export.py starts vLLM."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment import cli
from alignment import export as exports
from alignment.errors import UserError
from alignment.export import Gap, GapError, check_source, check_tokens, export

STATE = ("trainer_state.json", "WHOLE", "latest", "rng_state_0.pth", "zero_to_fp32.py")


@pytest.fixture
def checkpoint(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model folder among what DeepSpeed and the Trainer leave beside it."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_model_folder, folder)
    for name in STATE:
        (folder / name).touch()
    (folder / "global_step3").mkdir()
    (folder / "global_step3" / "mp_rank_00_model_states.pt").touch()
    return folder


def fixed_gap(mean: float) -> Any:
    return lambda *_: Gap(mean=mean, largest=0.5, tokens=7)


def test_export_holds_the_model_and_nothing_of_the_optimizer(
    checkpoint: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "logprob_gap", fixed_gap(1e-6))
    line = export(checkpoint, tmp_path / "out")
    assert line == (
        f"{tmp_path}/out: exported from {checkpoint}; float32 log-probs of vLLM and transformers on 7 tokens: "
        "max gap 0.5, mean 1e-06 (gate 2e-05)"
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in tiny_model_folder.iterdir()}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_model_folder / name).read_bytes()


@pytest.mark.parametrize(("gap", "gate"), [(3e-5, None), (float("nan"), None), (1e-6, 1e-7)])
def test_gap_over_the_gate_writes_nothing(
    gap: float, gate: float | None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "logprob_gap", fixed_gap(gap))
    with pytest.raises(GapError, match=re.escape(f"mean {gap:.2g}, expected at most {gate or 2e-5:.2g}")):
        export(checkpoint, tmp_path / "out", gate=gate)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3"}


@pytest.fixture
def _signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signal_handlers")
def test_gap_over_the_gate_is_ours_and_exits_1(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exports, "logprob_gap", fixed_gap(3e-5))
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 1
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out"), "--gate", "4e-5"]) == 0
    written = capsys.readouterr()
    assert "mean 3e-05, expected at most 2e-05" in written.err
    assert len(written.out.splitlines()) == 1 and "mean 3e-05 (gate 4e-05)" in written.out


@pytest.mark.usefixtures("_signal_handlers")
def test_torn_checkpoint_is_the_users_mistake(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_source(checkpoint)
    (checkpoint / "WHOLE").unlink()
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
    message = f"error: {checkpoint}: a checkpoint that was not written to its end: it has no WHOLE marker"
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="not written to its end"):  # whatever it is called
        check_source(checkpoint.rename(checkpoint.with_name("renamed")))


def test_gate_is_that_of_the_dtype_computed_in(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 weights may be compared in either; in float32 both engines are exact, and so is the gate."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    asked: list[str] = []
    monkeypatch.setattr(exports, "logprob_gap", lambda _, __, dtype: asked.append(dtype) or Gap(0.01, 0.5, 7))
    assert "bfloat16 log-probs" in export(checkpoint, tmp_path / "out")
    with pytest.raises(GapError, match="float32 log-probs .* mean 0.01, expected at most 2e-05"):
        export(checkpoint, tmp_path / "other", dtype="float32")
    assert asked == ["bfloat16", "float32"]


def test_model_folder_needs_no_marker(tiny_model_folder: Path) -> None:
    assert check_source(tiny_model_folder).model_type == "ernie4_5_moe"


def test_other_folders_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: no such model folder"):
        check_source(tmp_path / "missing")
    (checkpoint / "adapter_config.json").touch()
    with pytest.raises(UserError, match="holds an adapter; merge it"):
        check_source(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["Ernie4_5_MoeForSequenceClassification"], "expected a causal language model"),
        ("dtype", "float16", "float16: expected float32 or bfloat16"),
    ],
)
def test_models_that_cannot_be_checked_are_refused(
    key: str, value: Any, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=message):
        export(checkpoint, tmp_path / "out")


def test_target_in_use_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(UserError, match="out: exists already; choose another folder"):
        export(checkpoint, tmp_path / "out")


def test_rows_are_rendered_cut_and_limited(
    tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A whole conversation where there is one, else a prompt; the context of 128 leaves 127 tokens."""
    question = {"role": "user", "content": "3 x 15"}
    rows = [
        {"messages": [question, {"role": "assistant", "content": "45"}]},
        {"prompt": [question]},
        {"prompt": [question | {"content": "x" * 500}]},
        {"prompt": [question]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = check_source(tiny_model_folder)
    whole, prompt, long = check_tokens(config, tiny_tokenizer, str(file), limit=3)
    assert tiny_tokenizer.decode(whole).endswith("<|im_start|>assistant\n45<|im_end|>\n")
    assert tiny_tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert len(long) == 127
    file.write_text('{"text": "no conversation"}\n')
    with pytest.raises(UserError, match="rows.jsonl: a row has neither 'messages' nor 'prompt'; it has text"):
        check_tokens(config, tiny_tokenizer, str(file), limit=3)


def test_drawn_tokens_are_always_the_same(tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = check_source(tiny_model_folder)
    drawn = check_tokens(config, tiny_tokenizer, None, limit=32)
    assert drawn == check_tokens(config, tiny_tokenizer, None, limit=32)
    assert [len(sequence) for sequence in drawn] == [96] * 8
    assert 0 <= min(map(min, drawn)) < 40 < config.vocab_size - 40 < max(map(max, drawn)) < config.vocab_size
