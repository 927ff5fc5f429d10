"""Does selected data make a better adapter? Real reviews, a small base, rows by semantic_gap and by other methods.

    SHARED_DATA=FOLDER python -m benchmarks.adapters [SEEDS]

Usage: Indonesian marketplace reviews of cosmetics and health (three categories of prdect_id, 600 rows): a third is the
sample that a selection sees, a third is held out, a third lies in the pool. Pool: these, half of the reviews of other
categories, Thai talk (wisesight), and reviews in Indonesian, Javanese and English (nusax). Base: a Llama of 2.6 million
parameters with a tokenizer of its own, trained on Thai talk and on the other half of the reviews of other categories,
which are also the `training` rows of the selection. Vectors: means of the base's last hidden states, less their mean
over the training rows: an embedding model that knows Thai and Indonesian, and has seen nothing of the usage.

Each method draws the same number of rows; each adapter is trained by sft.train with the same recipe, by three seeds,
which draw rows and weights. The measure is the held-out reviews' loss, row by row; intervals are for other reviews and
other seeds (alignment.stats.crossed_interval). `linguistic` draws from Indonesian alone, and so does `within_language`,
which is semantic_gap bound to it. `alone` is semantic_gap without the base's rows as `training`: the rows drawn are to
be like the usage by themselves, `alone_within` the same bound to Indonesian. Without SHARED_DATA nothing is measured.
"""

import csv
import gzip
import json
import math
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from alignment import models, tokenizer
from alignment.config import LoRAConfig, ModelConfig, TrainingConfig
from alignment.rows import Row, read_rows, write_rows
from alignment.stats import crossed_interval
from benchmarks import DATA, data_at_hand, report
from data_builders import select
from data_builders.selection.config import SelectConfig
from sft import interference, train
from sft.config import BASE, PackingConfig, PrepareConfig, SFTConfig, SourceConfig

USED = ("Beauty", "Body Care", "Health")
NUSAX = {"indonesian": "id", "javanese": "jv", "english": "en"}
BUDGET, SEEDS, CLUSTERS = 400, 3, 12
INDONESIAN = {"languages": {"id": {"minimum": BUDGET}}}
METHODS: dict[str, dict[str, Any]] = {
    "semantic_gap": {"method": "semantic_gap"},
    "random": {"method": "random"},
    "linguistic": {"method": "linguistic"},
    "within_language": {"method": "semantic_gap", "constraints": INDONESIAN},
    "alone": {"method": "semantic_gap", "training": None},
    "alone_within": {"method": "semantic_gap", "training": None, "constraints": INDONESIAN},
}
COMPARED = (
    ("semantic_gap", "random"),
    ("semantic_gap", "linguistic"),
    ("within_language", "linguistic"),
    ("alone", "random"),
    ("alone", "semantic_gap"),
    ("alone", "linguistic"),
    ("alone_within", "linguistic"),
)
THAI = (2_000, 4_000)  # rows for the base, and in the pool
LONGEST = 240  # characters of a text
PROMPT = [{"role": "user", "content": "?"}]
SHAPE: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
VOCABULARY, CAPACITY, BATCH = 4096, 512, 64

Array = NDArray[np.float64]


def main(seeds: int = SEEDS) -> None:
    if not data_at_hand():
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        write_texts(folder)
        base = train_base(folder)
        means = {name: hidden_means(base, folder / f"{name}.jsonl") for name in ("pool", "target", "training")}
        for name, found in means.items():
            centred = found - means["training"].mean(axis=0)
            np.save(folder / f"{name}.npy", centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(min=1e-9))
        losses, facts = study(folder, base, seeds)
        tell(losses, facts, seeds, time.perf_counter() - began)


# Texts


def write_texts(folder: Path) -> None:
    """pool, target, training and held_out.jsonl."""
    rng = np.random.default_rng(0)
    used, other = reviews(rng)
    third = len(used) // 3
    thai = [row(text, "th", "talk") for text in wisesight()]
    thai = [thai[place] for place in rng.permutation(len(thai))[: sum(THAI)]]
    nusax = [row(text, code, "nusax") for name, code in NUSAX.items() for text in column(nusax_file(name), "text")]
    sources = {
        "target": used[:third],
        "held_out": used[third : 2 * third],
        "training": [*other[: len(other) // 2], *thai[: THAI[0]]],
        "pool": [*used[2 * third :], *other[len(other) // 2 :], *thai[THAI[0] :], *nusax],
    }
    for name, rows in sources.items():
        write_rows(folder / f"{name}.jsonl", (each | {"id": f"{name}-{i}"} for i, each in enumerate(rows)))


def reviews(rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """Those of the usage's categories, and the others, in random order; a text that is there twice counts once."""
    with gzip.open(DATA / "prdect_id/prdect_id.csv.gz", "rt", encoding="utf-8", errors="replace") as file:
        found = {line["Customer Review"].strip(): line["Category"] for line in csv.DictReader(file)}
    rows = [row(text, "id", category) for text, category in found.items() if text]
    rows = [rows[place] for place in rng.permutation(len(rows))]
    return [r for r in rows if r["domain"] in USED], [r for r in rows if r["domain"] not in USED]


def row(text: str, language: str, domain: str) -> Row:
    messages = [*PROMPT, {"role": "assistant", "content": text[:LONGEST]}]
    return {"messages": messages, "language": language, "domain": domain}


def nusax_file(name: str) -> Path:
    return DATA / f"nusax/{name}_train.csv"


def column(path: Path, name: str) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line[name] for line in csv.DictReader(file))


def wisesight() -> list[str]:
    with zipfile.ZipFile(DATA / "wisesight/huggingface_data.zip") as archive:
        texts = [json.loads(line)["texts"].strip() for line in archive.read("data/train.jsonl").splitlines()]
    return [text for text in dict.fromkeys(texts) if text]


# The base, and what it makes of a text


def train_base(folder: Path) -> Path:
    """A base trained on the training rows alone; its tokenizer too."""
    fresh = fresh_llama(folder / "fresh", read_rows(folder / "training.jsonl"), VOCABULARY, SHAPE)
    train.run(recipe(folder, fresh, folder / "training.jsonl", "base", 0, None))
    return folder / "base" / "model"


def fresh_llama(folder: Path, rows: Iterable[Row], vocabulary: int, shape: dict[str, Any]) -> Path:
    """Random weights, the same every time, and a tokenizer trained on the rows' answers; returns `folder`."""
    words = tokenizer.train((found["messages"][1]["content"] for found in rows), vocabulary, 512)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), tie_word_embeddings=True, eos_token_id=words.eos_token_id, bos_token_id=None,
        pad_token_id=words.pad_token_id, **shape,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Path, rows: Path, name: str, seed: int, lora: LoRAConfig | None) -> SFTConfig:
    rate = 2e-3 if lora is None else 5e-3
    return SFTConfig(
        output_dir=folder / name,
        seed=seed,
        model=ModelConfig(path=str(model)),
        sources=[SourceConfig(rows=str(rows))],
        prepare=PrepareConfig(cache=folder / "cache", workers=1),
        packing=PackingConfig(capacity=CAPACITY, overlong="truncate"),
        training=TrainingConfig(
            learning_rate=rate, epochs=2 if lora is None else 4, accumulation=4 if lora is None else 2
        ),
        lora=lora,
    )


@torch.no_grad()
def hidden_means(base: Path, rows: Path) -> NDArray[np.float32]:
    """Of each text the mean over its tokens of the base's last hidden states, [rows, dimensions]."""
    words, model = models.load_tokenizer(ModelConfig(path=str(base))), AutoModel.from_pretrained(base).eval()
    texts = [found["messages"][1]["content"] for found in read_rows(rows)]
    order = np.argsort([len(text) for text in texts])
    means = np.empty((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(texts), BATCH):
        places = order[start : start + BATCH]
        inputs = words([texts[place] for place in places], return_tensors="pt", padding=True, truncation=True)
        states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        weights = inputs["attention_mask"][..., None].float()
        means[places] = ((states * weights).sum(1) / weights.sum(1).clamp(min=1)).numpy()
    return means


# Selections and their adapters


def study(folder: Path, base: Path, seeds: int) -> tuple[dict[str, Array], dict[str, dict[str, float]]]:
    """The held-out losses of the base [1, rows] and of each method [seeds, rows]; facts of each method's rows."""
    folders: dict[str, Path] = {}
    facts: dict[str, dict[str, float]] = {}
    for method in METHODS:
        for seed in range(seeds):
            name = f"{method}_{seed}"
            rows = select_rows(folder, method, seed)
            lora = LoRAConfig(rank=8, alpha=16, merge=False)
            train.run(recipe(folder, base, rows, name, seed + 1, lora))
            folders[name] = folder / name / "adapter"
            found = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))
            drawn = list(read_rows(rows))
            own = facts.setdefault(method, {"rows": len(drawn), "of_the_usage": 0.0, "indonesian": 0.0, "tokens": 0.0})
            own["of_the_usage"] += sum(each["domain"] in USED for each in drawn) / seeds
            own["indonesian"] += sum(each["language"] == "id" for each in drawn) / seeds
            own["tokens"] += found["rows.tokens_trained"] / seeds
    words = models.load_tokenizer(ModelConfig(path=str(base)))
    settings = recipe(folder, base, folder / "held_out.jsonl", "measured", 0, None)
    held = interference.held_out(str(folder / "held_out.jsonl"), settings, words)
    measured = interference.measure(settings, folders, held, words, folder / "losses")
    losses = {m: np.stack([measured[f"{m}_{seed}"] for seed in range(seeds)]) for m in METHODS}
    return {BASE: measured[BASE][None]} | losses, facts


def select_rows(folder: Path, method: str, seed: int) -> Path:
    settings = METHODS[method]
    sources = [name for name in ("pool", "target", "training") if settings.get(name, name) is not None]
    config = SelectConfig.model_validate(
        {
            "output_dir": folder / f"selected_{method}_{seed}",
            "seed": seed,
            **{"rows" if name == "pool" else name: str(folder / f"{name}.jsonl") for name in sources},
            "budget": BUDGET,
            "clusters": CLUSTERS,
            "turns": "all",
            "vectors": {name: folder / f"{name}.npy" for name in sources},
            **settings,
        }
    )
    select.run(config)
    return config.output_dir / "rows.jsonl"


def tell(losses: dict[str, Array], facts: dict[str, dict[str, float]], seeds: int, seconds: float) -> None:
    """One claim for each pair COMPARED: the ratio of perplexities, of the same reviews by the same seeds."""
    perplexities = {name: round(math.exp(found.mean()), 3) for name, found in losses.items()}
    for own, peer in COMPARED:
        changes = losses[own] - losses[peer]
        change = crossed_interval(changes)
        report(
            f"adapters.perplexity_{own}_over_{peer}",
            math.exp(change.value),
            "x",
            f"{peer}, same number of rows",
            better="lower",
            own_value=perplexities[own],
            peer_value=perplexities[peer],
            interval=[round(math.exp(end), 4) for end in (change.low, change.high)],
            by_seed=[round(float(math.exp(each)), 4) for each in changes.mean(axis=1)],
            base=perplexities[BASE],
            rows={name: {key: round(value) for key, value in found.items()} for name, found in facts.items()},
            seeds=seeds,
            budget=BUDGET,
            held_out=losses[BASE].shape[1],
            total_seconds=round(seconds),
        )


def arguments(given: Sequence[str]) -> int:
    return int(given[0]) if given else SEEDS


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))
