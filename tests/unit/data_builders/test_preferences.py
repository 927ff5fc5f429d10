"""From graded samples to pair files: nothing is lost, nothing is in two files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from alignment.errors import UserError
from alignment.grading import GradedChunk, GradedSample
from alignment.ledger import Ledger
from alignment.rows import write_rows
from data_builders.config import PairingConfig, PreferencesConfig, SourceConfig
from data_builders.pairs import Origin
from data_builders.preferences import PairWriter, with_shard
from data_builders.sources import draw_prompts, expected_prompts


def prompt(name: str) -> dict[str, Any]:
    return {"id": name, "language": "en", "prompt": [{"role": "user", "content": f"{name}?"}], "answer": "1"}


def graded(name: str, *samples: tuple[str, str]) -> list[GradedSample]:
    """Samples of a prompt, each (verdict, finish reason)."""
    return [
        GradedSample(name, i, f"{name} sample {i}", [5, 6], reason, -1.0, None, verdict)
        for i, (verdict, reason) in enumerate(samples)
    ]


ORIGIN = Origin("weights", "tokenizer")
Files = dict[str, list[dict[str, Any]]]


def chunk(*prompts: tuple[str, list[GradedSample] | None]) -> GradedChunk:
    return GradedChunk("0", [prompt(name) for name, _ in prompts], [samples for _, samples in prompts])


def pair(folder: Path, *chunks: GradedChunk, share: float = 0.0, seed: int = 0, count: int = 3) -> tuple[Files, Any]:
    """What is written, and the counts."""
    writer = PairWriter(folder, PairingConfig(per_prompt=count), share, seed, Ledger(), ORIGIN)
    with writer.files():
        for one in chunks:
            writer.add(one)
    return {
        p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in folder.glob("*.jsonl")
    }, writer.counts()


RIGHT, WRONG, CUT = ("correct", "stop"), ("wrong", "stop"), ("correct", "length")


PROMPTS = [
    ("two", graded("two", RIGHT, RIGHT, WRONG, WRONG, WRONG)),
    ("none", graded("none", WRONG, WRONG)),
    ("all", graded("all", RIGHT, RIGHT)),
    ("cut", graded("cut", CUT, CUT)),
    ("one", graded("one", CUT, RIGHT, WRONG, ("wrong", "length"))),
    ("half", graded("half", CUT, WRONG)),
    ("long", None),
]


def test_every_prompt_is_a_pair_or_a_reject_and_every_token_is_counted(tmp_path: Path) -> None:
    files, counts = pair(tmp_path, chunk(*PROMPTS[:3]), chunk(*PROMPTS[3:]))
    assert [row["id"] for row in files["pairs"]] == [f"two/{ids}" for ids in ordered(files, "two")] + ["one/1/2"]
    assert len(files["pairs"]) == 4
    assert {row["id"]: row["reason"] for row in files["rejects"]} == {
        "none": "none correct",
        "all": "all correct",
        "cut": "every sample cut off",
        "half": "none correct",
        "long": "prompt too long",
    }
    assert counts == {
        "prompts": 7,
        "pairs": 4,
        "pairs.evaluation": 0,
        "samples.duplicate": 0,
        "dropped.all_correct": 1,
        "dropped.every_sample_cut_off": 1,
        "dropped.none_correct": 2,
        "dropped.prompt_too_long": 1,
        "pass_rate": pytest.approx((2 / 5 + 0 + 1 + 1 + 1 / 2 + 1 / 2) / 6),
    }
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert (ledger["rows_in"], ledger["rows_out"], sum(ledger["dropped"].values())) == (7, 2, 5)
    used = len({i for row in files["pairs"][:3] for i in row["id"].split("/")[1:]})
    assert (ledger["tokens_in"], ledger["tokens_trained"]) == (2 * 17, 2 * (used + 2))
    assert ledger["tokens_dropped"] == ledger["tokens_in"] - ledger["tokens_trained"]


def ordered(files: Files, name: str) -> list[str]:
    return [row["id"].removeprefix(f"{name}/") for row in files["pairs"] if row["id"].startswith(name)]


def test_scores_choose_the_pair(tmp_path: Path) -> None:
    scores = (0, 1, 5, 4)
    samples = [replace(s, score=scores[s.index]) for s in graded("a", RIGHT, RIGHT, WRONG, WRONG)]
    [row] = pair(tmp_path, chunk(("a", samples)), count=1)[0]["pairs"]
    assert row["id"] == "a/1/2"
    assert row["scores"] == [1, 5] and row["ranks"] == [3, 1]


def test_equal_texts_are_counted(tmp_path: Path) -> None:
    samples = [replace(s, completion="same") for s in graded("a", RIGHT, WRONG, WRONG)]
    files, counts = pair(tmp_path, chunk(("a", samples)))
    assert counts["samples.duplicate"] == 2
    assert [row["reason"] for row in files["rejects"]] == ["all correct"]


def test_prompts_set_aside_for_evaluation_are_not_trained_on(tmp_path: Path) -> None:
    many = chunk(*((f"p{i}", graded(f"p{i}", RIGHT, RIGHT, WRONG, WRONG)) for i in range(400)))
    files, counts = pair(tmp_path / "a", many, share=0.25, seed=3, count=2)
    of_train, of_evaluation = ({r["id"].split("/")[0] for r in files[name]} for name in ("pairs", "evaluation"))
    assert not of_train & of_evaluation
    assert len(of_train | of_evaluation) == 400
    assert len(of_evaluation) == pytest.approx(100, abs=30)
    assert (counts["pairs"], counts["pairs.evaluation"]) == (len(files["pairs"]), len(files["evaluation"]))
    assert counts["pairs"] + counts["pairs.evaluation"] == 800, "both pairs of each prompt"
    others = {row["id"].split("/")[0] for row in pair(tmp_path / "b", many, share=0.25, seed=4)[0]["evaluation"]}
    assert others != of_evaluation, "drawn by the seed"


def test_nothing_is_left_of_a_run_that_failed(tmp_path: Path) -> None:
    writer = PairWriter(tmp_path, PairingConfig(), 0.5, 0, Ledger(), ORIGIN)
    with pytest.raises(AttributeError), writer.files():
        writer.add(chunk(*PROMPTS, ("broken", [None])))  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


def test_a_shard_is_an_override() -> None:
    assert with_shard(["--config", "a", "--shard", "2/8", "seed=1"]) == [
        "--config",
        "a",
        "shard=2/8",
        "seed=1",
    ]
    with pytest.raises(ValidationError, match=r"pairs by reward alone, and 'reward_models' names none"):
        PreferencesConfig(output_dir=Path("x"), model="m", prompts="p", pairing=PairingConfig(math_rule=False))
    with pytest.raises(ValidationError, match="the first number is 1 to the second"):
        PreferencesConfig(output_dir=Path("x"), model="m", prompts="p", shard="9/8")


def source(path: Path, names: list[str], quota: int | None = None, kind: Any = None) -> SourceConfig:
    write_rows(path, [prompt(name) for name in names])
    return SourceConfig(rows=str(path), quota=quota, kind=kind)


def test_sources_are_drawn_by_quota_and_what_is_not_drawn_is_counted(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(50)]
    sources = {
        "math": source(tmp_path / "a.jsonl", names, quota=20, kind="math"),
        "shop": source(tmp_path / "b.jsonl", names[:7]),
    }
    ledger = Ledger()
    rows = list(draw_prompts(sources, 0, ledger))
    assert len(rows) == 27 == expected_prompts(sources)
    assert len({row["id"] for row in rows}) == 27 and {row["source"] for row in rows} == {"math", "shop"}
    assert {row.get("kind") for row in rows} == {"math", None}
    assert (ledger.rows_in, ledger.dropped["not drawn"]) == (30, 30)
    drawn = [row["id"] for row in rows if row["source"] == "math"]
    assert drawn == sorted(drawn, key=lambda name: int(name.removeprefix("math/p"))), "in the order of the rows"
    again = source(tmp_path / "c.jsonl", names[::-1], quota=20)
    assert {row["id"] for row in draw_prompts({"math": again}, 0, Ledger())} == set(drawn), "whatever their order"
    assert {row["id"] for row in draw_prompts({"math": again}, 1, Ledger())} != set(drawn)
    with pytest.raises(UserError, match=r"sources\.shop\.quota: 8 prompts wanted, .*b\.jsonl holds 7"):
        list(draw_prompts({"shop": source(tmp_path / "b.jsonl", names[:7], quota=8)}, 0, Ledger()))
