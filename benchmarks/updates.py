"""What each part of an update's loss keeps: an adapter for English reviews, trained on for Indonesian ones.

    SHARED_DATA=FOLDER python -m benchmarks.updates [SEEDS]

Rows are NusaX's: 350 to train on and 150 held out of each language. The base is a two-layer Llama of 96 dimensions that
knows Javanese and English; each seed has an adapter of its own for English, which sft.update_adapter trains on for four
epochs at a rate of 5e-3, far too fast to be harmless: it is to show what is forgotten. Changes are of the held-out
losses, row by row; intervals are for other rows and other seeds (alignment.stats.crossed_interval). Without SHARED_DATA
nothing is measured.
"""

import csv
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment import models
from alignment.config import LoRAConfig, ModelConfig, TrainingConfig
from alignment.rows import Row, read_rows, write_rows
from alignment.stats import Interval, crossed_interval
from benchmarks import DATA, data_at_hand, report
from benchmarks.adapters import fresh_llama
from sft import interference, train, update_adapter
from sft.config import PackingConfig, PrepareConfig, SFTConfig, SourceConfig, UpdateConfig

TEXTS = {"en": "english", "id": "indonesian", "jv": "javanese"}
OLD, NEW, TRAINED, SEEDS = "en", "id", 350, 3
NAIVE: dict[str, Any] = {"replay": {"share": 0}, "ewc": {"weight": 0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "new rows alone": NAIVE,
    "replay": NAIVE | {"replay": {}},
    "ewc": NAIVE | {"ewc": {}},
    "both": {},
    "both, beta 1": {"replay": {"weight": 1}},
    "both, all of the past": {"replay": {"share": 1}},
    "both, beta 1, all of the past": {"replay": {"weight": 1, "share": 1}},
}
STATED = "both"
SHAPE: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.05,
}  # fmt: skip
RATE, EPOCHS = 5e-3, 4

Array = NDArray[np.float64]


def main(seeds: int = SEEDS) -> None:
    if not data_at_hand():
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_texts(folder)
        base = train_base(folder)
        tell(changes(folder, base, seeds), seeds)


def write_texts(folder: Path) -> None:
    for code, name in TEXTS.items():
        with (DATA / f"nusax/{name}_train.csv").open(encoding="utf-8") as file:
            rows = [row(line["text"], line["label"], code) for line in csv.DictReader(file)]
        write_rows(folder / f"{code}.jsonl", rows[:TRAINED])
        write_rows(folder / f"{code}.held.jsonl", rows[TRAINED:])
    held = (found for code in (OLD, NEW) for found in read_rows(folder / f"{code}.held.jsonl"))
    write_rows(folder / "held.jsonl", held)


def row(text: str, label: str, language: str) -> Row:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    return {"messages": messages, "label": label, "language": language}


def train_base(folder: Path) -> Path:
    rows = (found for code in TEXTS for found in read_rows(folder / f"{code}.jsonl"))
    fresh = fresh_llama(folder / "fresh", rows, 1000, SHAPE)
    train.run(recipe(folder, "base", fresh, ["jv", OLD], 0, 3e-3, None))
    return folder / "base" / "model"


def recipe(
    folder: Path, name: str, model: Path, codes: list[str], seed: int, rate: float, lora: LoRAConfig | None
) -> SFTConfig:
    return SFTConfig(
        output_dir=folder / name,
        seed=seed,
        model=ModelConfig(path=str(model)),
        sources=[SourceConfig(rows=str(folder / f"{code}.jsonl")) for code in codes],
        prepare=PrepareConfig(cache=folder / "cache", workers=1),
        packing=PackingConfig(capacity=512),
        training=TrainingConfig(learning_rate=rate, epochs=EPOCHS),
        lora=lora,
    )


def changes(folder: Path, base: Path, seeds: int) -> dict[str, dict[str, Array]]:
    """variant -> language -> the change of each held-out row's loss, [seeds, rows]."""
    folders: dict[str, Path] = {}
    for seed in range(seeds):
        lora = LoRAConfig(rank=8, alpha=16, merge=False)
        settings = recipe(folder, f"before_{seed}", base, [OLD], seed, RATE, lora)
        train.run(settings)
        folders[f"before_{seed}"] = settings.output_dir / "adapter"
        for variant, values in VARIANTS.items():
            name = f"{variant}_{seed}"
            update_adapter.run(update(folder / name, settings, values))
            folders[name] = folder / name / "adapter"
    words = models.load_tokenizer(settings.model)
    held = interference.held_out(str(folder / "held.jsonl"), settings, words)
    losses = interference.measure(settings, folders, held, words, folder / "losses")
    languages = np.array(held.languages)
    return {
        variant: {
            code: np.stack(
                [(losses[f"{variant}_{s}"] - losses[f"before_{s}"])[languages == code] for s in range(seeds)]
            )
            for code in (OLD, NEW)
        }
        for variant in VARIANTS
    }


def update(out: Path, settings: SFTConfig, values: Mapping[str, Any]) -> UpdateConfig:
    folder = out.parent
    return UpdateConfig.model_validate(
        {
            "output_dir": out,
            "seed": settings.seed,
            "model": settings.model,
            "shelf": folder / f"shelf_{out.name}",
            "adapter": settings.output_dir / "adapter",
            "rows": str(folder / f"{NEW}.jsonl"),
            "past": {"rows": str(folder / f"{OLD}.jsonl"), "by": "label"},
            "gate": {"old": str(folder / f"{OLD}.held.jsonl"), "new": str(folder / f"{NEW}.held.jsonl")},
            "prepare": settings.prepare,
            "packing": settings.packing,
            "training": settings.training,
            **values,
        }
    )


def tell(found: Mapping[str, Mapping[str, Array]], seeds: int) -> None:
    """One claim: how much of what the new rows alone forget is forgotten, and all variants beside it."""
    intervals = {name: {code: crossed_interval(each) for code, each in of.items()} for name, of in found.items()}
    own, peer = intervals[STATED][OLD], intervals["new rows alone"][OLD]
    report(
        "updates.forgotten_over_new_rows_alone",
        own.value / peer.value,
        "x",
        "no replay, no consolidation",
        better="lower",
        own_value=round(own.value, 4),
        peer_value=round(peer.value, 4),
        change={name: {code: shown(each) for code, each in of.items()} for name, of in intervals.items()},
        seeds=seeds,
        rows=found[STATED][OLD].shape[1],
    )


def shown(found: Interval) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else SEEDS)
