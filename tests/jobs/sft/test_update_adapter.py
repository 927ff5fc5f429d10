"""Updates of an adapter through the real job: a good one is accepted, a harmful one refused, none is half done."""

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignment import cli, versions
from alignment.config import LoRAConfig, ModelConfig, TrainingConfig
from alignment.errors import UserError
from alignment.fingerprint import weights_hash
from alignment.rows import Row, write_rows
from sft import train, update_adapter
from sft.config import PackingConfig, PrepareConfig, SFTConfig, SourceConfig, UpdateConfig

LIMIT = 0.4
ANSWERS = {"en": ("it is 45 baht", "the answer is 37", "three shirts"), "id": ("harga 45", "berapa tiga", "baju 12")}


def row(number: int, language: str, answer: str | None = None) -> Row:
    question = f"{number} shirts?" if language == "en" else f"Berapa {number} baju?"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer or ANSWERS[language][number % 3]},
    ]
    return {"messages": messages, "language": language, "parity": number % 2}


def garbage(number: int) -> Row:
    letters = random.Random(number).choices("abcdefghijklmnop ", k=16)
    return row(number, "en", "".join(letters).strip())


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows, and `out/adapter`, trained on English rows of two kinds."""
    folder = tmp_path_factory.mktemp("update")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    write_rows(folder / "past.jsonl", (row(number, "en") for number in range(200)))
    write_rows(folder / "old.jsonl", (row(number, "en") for number in range(200, 232)))
    write_rows(folder / "new.jsonl", (row(number, "id") for number in range(48)))
    write_rows(folder / "held.jsonl", (row(number, "id") for number in range(100, 132)))
    write_rows(folder / "garbage.jsonl", (garbage(number) for number in range(48)))
    training = SFTConfig(
        output_dir=folder / "out",
        model=ModelConfig(path=str(folder / "base")),
        sources=[SourceConfig(rows=str(folder / "past.jsonl"))],
        packing=PackingConfig(capacity=128),
        prepare=PrepareConfig(cache=folder / "cache"),
        training=TrainingConfig(learning_rate=2e-2, epochs=2),
        lora=LoRAConfig(rank=4, alpha=8, merge=False),
    )
    train.run(training)
    return folder


def config(folder: Path, out: Path, rows: str = "new.jsonl", **changes: Any) -> UpdateConfig:
    values: dict[str, Any] = {
        "output_dir": out / "run",
        "model": {"path": str(folder / "base")},
        "shelf": out / "shelf",
        "adapter": folder / "out" / "adapter",
        "rows": str(folder / rows),
        "past": {"rows": str(folder / "past.jsonl"), "by": "parity"},
        "replay": {"share": 0.1, "weight": 1.0},
        "gate": {"old": str(folder / "old.jsonl"), "by": "parity", "new": str(folder / "held.jsonl"), "limit": LIMIT},
        "packing": {"capacity": 128},
        "prepare": {"cache": folder / "cache"},
        "training": {"learning_rate": 5e-3, "save_steps": 4, "log_steps": 1, "schedule": "constant_with_warmup"},
    }
    return UpdateConfig.model_validate(values | changes)


def metrics(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run" / "metrics.json").read_text()))


def test_a_good_update_is_accepted_and_taken_back(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    update_adapter.run(config(folder, tmp_path))
    shelf, found = tmp_path / "shelf", metrics(tmp_path)
    first, second = versions.versions(shelf)
    assert found["accepted"] is True and found["version"] == 2
    assert found["new.after"] < found["new.before"] - 1 and found["new.rise.high"] < 0
    assert found["old.largest_rise.high"] <= LIMIT
    assert versions.current(shelf) == second and second.parent == 1
    assert first.hash == weights_hash(folder / "out" / "adapter")
    assert weights_hash(shelf / "current") == second.hash == weights_hash(tmp_path / "run" / "adapter") != first.hash
    assert json.loads((tmp_path / "run" / "replay.json").read_text()) == {
        "0": {"past": 100, "drawn": 10},
        "1": {"past": 100, "drawn": 10},
    }
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["ewc"] == 0 < logged[-2]["ewc"], "the anchor is where it starts"

    assert cli.main(["adapters", "rollback", str(shelf)]) == 0
    assert versions.current(shelf) == first and weights_hash(shelf / "current") == first.hash
    assert cli.main(["adapters", "rollback", str(shelf)]) == 2
    assert "version 1 is the first" in capsys.readouterr().err
    assert cli.main(["adapters", "rollback", str(shelf), "--to", "2"]) == 0
    assert cli.main(["adapters", "list", str(shelf)]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("    1  ") and lines[1].startswith("*   2  ") and "parent 1" in lines[1]

    # The next update starts from the version in use, whichever that is.
    other = config(folder, tmp_path, output_dir=tmp_path / "other")
    with pytest.raises(UserError, match="is not what .*shelf has in use, version 2\nleave 'adapter' out"):
        update_adapter.run(other)
    assert "start: version 2" in "\n".join(update_adapter.plan(config(folder, tmp_path, adapter=None)))


def test_a_harmful_update_is_refused_and_the_version_in_use_stays(folder: Path, tmp_path: Path) -> None:
    """Old questions with garbage for answers, and nothing that holds the adapter back but the gate."""
    unprotected = {"replay": {"share": 0}, "ewc": {"weight": 0}, "training": {"learning_rate": 3e-2, "log_steps": 1}}
    update_adapter.run(config(folder, tmp_path, "garbage.jsonl", **unprotected))
    shelf, found = tmp_path / "shelf", metrics(tmp_path)
    assert found["accepted"] is False and found["version"] == 1
    assert found["old.largest_rise.low"] > LIMIT
    refusals = json.loads((tmp_path / "run" / "gate.json").read_text())["refusals"]
    assert [line[:22] for line in refusals[:2]] == ["0: the loss changes by", "1: the loss changes by"]
    assert [version.number for version in versions.versions(shelf)] == [1]
    assert weights_hash(shelf / "current") == weights_hash(folder / "out" / "adapter") == found["version.hash"]
    assert weights_hash(tmp_path / "run" / "adapter") != found["version.hash"], "there to be looked at"
    assert (tmp_path / "run" / "DONE").exists()


def test_killed_anywhere_it_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(folder, tmp_path / "whole")
    update_adapter.run(whole)
    expected = weights_hash(tmp_path / "whole" / "run" / "adapter")
    killed = config(folder, tmp_path / "killed")

    def run_until(module: Any, name: str, patched: Any = kill) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, patched)
            with pytest.raises(Killed):
                update_adapter.run(killed)

    run_until(update_adapter, "_train")  # the anchor is there
    run_until(update_adapter.UpdateTrainer, "_save_checkpoint", kill_at_second_save())
    assert len(list((tmp_path / "killed" / "run" / "checkpoints").glob("checkpoint-*/WHOLE"))) == 1
    run_until(update_adapter, "_judge")
    assert weights_hash(tmp_path / "killed" / "run" / "adapter") == expected
    run_until(versions, "use")  # the version is there, and not in use
    assert [version.number for version in versions.versions(tmp_path / "killed" / "shelf")] == [1, 2]
    run_until(update_adapter.job.Job, "finish")  # it is in use, and the run is not done
    update_adapter.run(killed)
    assert [version.number for version in versions.versions(tmp_path / "killed" / "shelf")] == [1, 2]
    assert weights_hash(tmp_path / "killed" / "shelf" / "current") == expected
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


class Killed(Exception):
    pass


def kill(*_: Any, **__: Any) -> None:
    raise Killed


def kill_at_second_save() -> Any:
    save, saved = update_adapter.UpdateTrainer._save_checkpoint, []

    def saving(self: Any, *arguments: Any, **options: Any) -> None:
        if saved:
            raise Killed
        save(self, *arguments, **options)
        saved.append(True)

    return saving


def test_another_version_meanwhile_is_not_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(folder, tmp_path)
    judge = update_adapter._judge

    def meanwhile(*arguments: Any) -> Any:
        first = versions.version(tmp_path / "shelf", 1)
        versions.use(
            tmp_path / "shelf", versions.add(tmp_path / "shelf", folder / "other", first, {"from": "elsewhere"})
        )
        return judge(*arguments)

    (folder / "other").mkdir()
    for path in (folder / "out" / "adapter").iterdir():
        (folder / "other" / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "other" / "adapter_model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / "other" / "adapter_model.safetensors")
    monkeypatch.setattr(update_adapter, "_judge", meanwhile)
    with pytest.raises(
        UserError, match="version 2 is in use by now; this update was made from 1\nit is there as version 3"
    ):
        update_adapter.run(settings)
    assert versions.current(tmp_path / "shelf") == versions.version(tmp_path / "shelf", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None}, "shelf: holds no adapter yet; name the first one as 'adapter'"),
        ({"past": {"rows": "PAST", "by": "langage"}}, "a row has no 'langage'; did you mean 'language'"),
        (
            {"gate": {"old": "FEW", "by": "language", "new": "FEW"}},
            "gate.old: .* group 'id' has 3 usable rows, expected 10",
        ),
    ],
)
def test_refusals_before_anything_is_trained(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "few.jsonl", [row(n, "en" if n < 20 else "id") for n in range(23)])
    places = {"PAST": str(folder / "past.jsonl"), "FEW": str(tmp_path / "few.jsonl")}
    filled = {k: {n: places.get(v, v) for n, v in part.items()} if part else part for k, part in changes.items()}
    with pytest.raises(UserError, match=message):
        update_adapter.run(config(folder, tmp_path, **filled))
    assert not (tmp_path / "run").exists() and versions.current(tmp_path / "shelf") is None


def test_an_adapter_with_magnitudes_too(folder: Path, tmp_path: Path) -> None:
    """DoRA, as peft writes it: its magnitudes are anchored and trained like the rest."""
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "dora")
    few = write_rows(tmp_path / "few.jsonl", (row(number, "id") for number in range(8)))
    update_adapter.run(config(folder, tmp_path, adapter=tmp_path / "dora", rows=str(tmp_path / "few.jsonl")))
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "dora", tmp_path / "run/adapter")
    )
    magnitudes = [name for name in before if "magnitude" in name]
    assert few == 8 and magnitudes and before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in magnitudes)
    anchored = load_file(tmp_path / "run" / "anchor.safetensors")
    assert sum("magnitude" in name for name in anchored) == 2 * len(magnitudes)


def test_several_ranks_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs as one process"):
        update_adapter.plan(config(folder, tmp_path))


def test_each_epoch_replays_other_rows(folder: Path, tmp_path: Path) -> None:
    """A tenth of 100 rows of each group, three times: drawn alike they would be the same 20 rows."""
    settings = config(folder, tmp_path)
    settings = settings.model_copy(update={"training": settings.training.model_copy(update={"epochs": 3})})
    past = update_adapter.Held(rows=cast(Any, None), usable=list(range(200)), groups=["0"] * 100 + ["1"] * 100)
    draws = update_adapter._replay_rows(settings, past)
    assert [sum(row < 100 for row in drawn) for drawn in draws] == [10, 10, 10]
    assert len(draws) == 3 and len({row for drawn in draws for row in drawn}) > 40
    counts = update_adapter._replayed(settings, past)
    assert sum(group["drawn"] for group in counts.values()) > 40
