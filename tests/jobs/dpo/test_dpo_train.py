"""dpo.train as a job: what it writes, that it resumes to the bit, what a dry run says, what it refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alignment import tokenizer as words
from alignment.config import load_config
from alignment.rows import write_rows
from dpo.config import DPOConfig
from dpo.train import main, run

ROOT = Path(__file__).parents[3]
ANSWERS = ("\\boxed{37.5}", "so it is 45 baht", "1.234,5", "45", "Giá 12 元")
LORA = {"rank": 4, "alpha": 8}
LIVE = {"kind": "live"}


def pair(number: int, chosen: int, rejected: int) -> dict[str, Any]:
    return {
        "id": f"row-{number}",
        "prompt": [{"role": "user", "content": f"{number} shirts?"}],
        "chosen": [{"role": "assistant", "content": ANSWERS[chosen]}],
        "rejected": [{"role": "assistant", "content": ANSWERS[rejected]}],
    }


@pytest.fixture
def other(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """Other weights of the same shape and words."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """22 pairs that train, and 6 that measure, one of which trains too."""
    write_rows(tmp_path / "rows.jsonl", [pair(i, i % 3, 3 + i % 2) for i in range(22)])
    write_rows(tmp_path / "held_out.jsonl", [pair(i, i % 3, 3) for i in (100, 101, 102, 103, 7, 104)])
    config = {
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tiny_model_folder)},
        "rows": str(tmp_path / "rows.jsonl"),
        "loss": {"beta": 0.5, "nll_weight": 0.1},
        "batch_size": 4,
        "training": {"learning_rate": 1e-2, "save_steps": 2, "log_steps": 1, "accumulation": 2, "schedule": "linear"},
    }
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "dpo.yaml"


def edited(recipe: Path, name: str, **changes: Any) -> Path:
    """The recipe with other keys, and an output folder of its own."""
    config = yaml.safe_load(recipe.read_text()) | {"output_dir": str(recipe.parent / name)} | changes
    path = recipe.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def trained(path: Path) -> Path:
    config = load_config(DPOConfig, path)
    run(config)
    return config.output_dir


def logged(folder: Path, key: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def metrics(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def test_an_adapter_with_evaluation_and_the_same_after_sigkill(recipe: Path, tiny_model_folder: Path) -> None:
    """LoRA held to the policy with its adapter off; killed once the first checkpoint is whole."""
    changes: dict[str, Any] = {"lora": LORA, "reference": LIVE, "evaluation": str(recipe.parent / "held_out.jsonl")}
    straight = trained(edited(recipe, "straight", **changes))
    found = metrics(straight)
    assert (found["pairs"], found["train.steps"], found["eval.pairs"], found["eval.dropped.trained_on"]) == (
        22,
        3,
        5,
        1,
    )
    assert found["eval.before.margin"] == pytest.approx(0, abs=1e-5), "the policy is its own reference"
    assert found["eval.after.margin"] != pytest.approx(0, abs=1e-3)
    assert found["eval.after.loss"] == logged(straight, "eval_loss")[-1]
    assert found["train.kl"] == logged(straight, "kl")[-1] > 0
    assert found["alarms.both_fall"] == 0
    assert not list(straight.rglob("reference_logps*"))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        together = PeftModel.from_pretrained(plain, straight / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(straight / "model")(ids).logits
    torch.testing.assert_close(merged, together, rtol=0, atol=1e-4)

    killed = edited(recipe, "killed", **changes)
    folder = recipe.parent / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo.train", "--config", str(killed)], cwd=ROOT, stderr=subprocess.PIPE
    )
    while not (folder / "checkpoints" / "checkpoint-2" / "WHOLE").exists():
        assert process.poll() is None, process.stderr and process.stderr.read().decode()[-2000:]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (folder / "DONE").exists(), "killed too late"
    trained(killed)
    assert logged(folder, "loss") == logged(straight, "loss")
    assert len(logged(folder, "loss")) == 3
    assert len(logged(folder, "eval_loss")) == 2, "not measured again in between"
    for part in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        torch.testing.assert_close(load_file(folder / part), load_file(straight / part), rtol=0, atol=0)


def test_a_reference_of_another_model_is_the_same_stored_and_live(recipe: Path, other: Path) -> None:
    stored = trained(edited(recipe, "stored", reference={"model": str(other)}))
    live = trained(edited(recipe, "live", reference={"model": str(other), **LIVE}))
    own = trained(edited(recipe, "own"))
    assert logged(stored, "loss") == pytest.approx(logged(live, "loss"), abs=1e-5)
    assert logged(stored, "kl") == pytest.approx(logged(live, "kl"), abs=1e-5)
    assert logged(own, "kl")[0] == pytest.approx(0, abs=1e-9)
    assert logged(stored, "kl")[0] > 0.01
    assert list((stored / "checkpoints").glob("reference_logps.train.safetensors"))


def test_aot_over_the_step_and_a_loss_of_trls(recipe: Path) -> None:
    for name, loss in {
        "aot": {"type": "aot", "scope": "global", "nll_weight": 0.1},
        "exo": {"type": "exo_pair", "label_smoothing": 1e-3},
    }.items():
        losses = logged(trained(edited(recipe, name, loss=loss | {"beta": 0.5})), "loss")
        assert len(losses) == 3
        assert losses[0] != losses[-1]


def test_two_ranks_with_split_experts_adapter_and_another_reference(recipe: Path, other: Path) -> None:
    path = edited(
        recipe, "ep2", lora=LORA, reference={"model": str(other)}, evaluation=str(recipe.parent / "held_out.jsonl"),
        training=yaml.safe_load(recipe.read_text())["training"] | {"accumulation": 1},
    )  # fmt: skip
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-ep2.yaml"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "dpo.train", "--config", str(path)],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "merged; log-probabilities differ by" in done.stdout
    one = trained(
        edited(recipe, "one", lora=LORA, reference={"model": str(other)},
               evaluation=str(recipe.parent / "held_out.jsonl"))
    )  # fmt: skip
    assert logged(recipe.parent / "ep2", "loss") == pytest.approx(logged(one, "loss"), abs=1e-5)
    for key in ("eval.before.margin", "eval.after.margin", "eval.after.loss", "train.kl"):
        assert metrics(recipe.parent / "ep2")[key] == pytest.approx(metrics(one)[key], abs=1e-4), key
    ours, theirs = (load_file(recipe.parent / name / "model" / "model.safetensors") for name in ("ep2", "one"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command within this process: it would take over the handling of signals."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.mark.usefixtures("command")
def test_a_dry_run_tells_steps_tokens_and_memory(recipe: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = str(recipe.parent / "held_out.jsonl")
    path = edited(recipe, "dry", evaluation=held_out, reference={"model": str(other), **LIVE}, lora=LORA)
    assert main(["--config", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "step: 1 ranks x 2 x 4 = 8 pairs" in out
    assert "pairs: 22 of 22 rows; dropped: none" in out
    assert "steps: 3" in out
    assert "evaluation: 5 pairs; dropped: {'trained_on': 1}" in out
    assert "a frozen copy: 0.0 GB more on each rank, and a forward more at each step" in out
    assert "parameters are trained (" in out
    assert "memory of one rank: 1 ranks" in out
    assert not (recipe.parent / "dry").exists()


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"type": "ot_dop"}}, "loss.type: unknown loss 'ot_dop'; did you mean 'ot_dpo'?"),
        ({"loss": {"type": "ipo", "scope": "global"}}, "loss.scope: 'global' has no effect on 'ipo'"),
        ({"loss": {"type": "exo_pair"}}, "loss.label_smoothing: 'exo_pair' needs one above 0"),
        ({"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing: has no effect on 'ot_dpo'"),
        ({"reference": {"model": "nowhere"}}, "reference.model: nowhere: no such model folder"),
        ({"reference": {"kind": "lvie"}}, "reference.kind: input should be 'stored' or 'live', found 'lvie'"),
        ({"lora": LORA | {"dropout": 0.1}}, "lora.dropout: 0.1 found, expected 0"),
        ({"lora": LORA | {"targets": ["q_prj"]}}, "did you mean 'q_proj'"),
        ({"evaluation": "nothing.jsonl"}, "nothing.jsonl"),
        ({"rows": "rows-without.jsonl"}, "row has no 'chosen'"),
    ],
)
def test_mistakes_end_with_exit_code_2(
    changes: dict[str, Any], message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(recipe.parent)
    write_rows(Path("rows-without.jsonl"), [{"prompt": pair(0, 0, 1)["prompt"]}])
    assert main(["--config", str(edited(recipe, "bad", **changes))]) == 2
    assert message in capsys.readouterr().err
    assert not Path("bad").exists()


@pytest.mark.usefixtures("command")
def test_a_reference_of_other_words_is_refused(
    recipe: Path, other: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one two three four five six"] * 20
    words.train(iter(lines), vocab_size=300, max_length=128).save_pretrained(other)
    path = edited(recipe, "words", reference={"model": str(other)})
    assert main(["--config", str(path)]) == 2
    assert "has another tokenizer than the policy" in capsys.readouterr().err
    tiny_tokenizer.save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    assert main(["--config", str(path)]) == 2
    assert f"has a vocabulary of {config['vocab_size'] + 1}, the policy one of" in capsys.readouterr().err
