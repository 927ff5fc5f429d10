"""data_builders.long_cot by its real command: killed and whole to the same bytes, and once with vLLM itself."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alignment import chat
from alignment.rollout.store import stored_samples
from alignment.rows import Row, read_rows, write_rows

WORKER = Path(__file__).with_name("long_cot_worker.py")
QUERIES = 20
CAREFUL = f"You are careful. {chat.THINKING_PROMPT}"


def numbered(number: int) -> Row:
    """The student is right in about `number` of 10 rollouts, and from 12 on in half of them."""
    shirts = number if number < 12 else 5
    row = {
        "id": f"q{number}",
        "kind": "math",
        "language": "en",
        "prompt": [{"role": "user", "content": f"{shirts} shirts?"}],
        "answer": "1",
    }
    if number == 4:
        row["prompt"] = [{"role": "user", "content": "4 shirts? " + "And " * 400}]
    if number == 5:
        row["answer"] = ""
    if number == 11:
        del row["answer"]
    return row


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long_cot")
    write_rows(folder / "queries.jsonl", map(numbered, range(QUERIES)))
    engine = {"max_model_len": 512, "chunk_prompts": 3}
    config = {
        "output_dir": "whole",
        "sources": {"shop": {"rows": "queries.jsonl"}},
        "alpha": 0.1,
        "beta": 0.9,
        "rollouts": {"model": str(tiny_model_folder), "sampling": {"n": 10, "max_tokens": 16}, "engine": engine},
        "teacher": {"model": str(tiny_model_folder), "sampling": {"n": 6, "max_tokens": 64}, "engine": engine},
        "system_prompts": [chat.THINKING_PROMPT, CAREFUL],
    }
    (folder / "long_cot.yaml").write_text(yaml.safe_dump(config))
    ended = subprocess.run(
        [sys.executable, str(WORKER), "long_cot.yaml"], cwd=folder, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def read(path: Path) -> list[Row]:
    return list(read_rows(path))


def test_every_query_is_a_row_or_a_reject(folder: Path) -> None:
    rows, rejects = read(folder / "whole" / "rows.jsonl"), read(folder / "whole" / "rejects.jsonl")
    ledger = json.loads((folder / "whole" / "ledger.json").read_text())
    metrics = json.loads((folder / "whole" / "metrics.json").read_text())
    assert {row["id"] for row in rows}.isdisjoint(row["id"] for row in rejects)
    assert {row["id"] for row in [*rows, *rejects]} == {f"shop/q{i}" for i in range(QUERIES)}
    reasons = {row["id"].removeprefix("shop/"): row["reason"] for row in rejects}
    expected = {
        "q0": "too hard",
        "q3": "no good answer by the teacher",
        "q4": "prompt too long",
        "q5": "bad gold",
        "q10": "too easy",
        "q11": "no gold answer",
    }
    assert expected.items() <= reasons.items()
    assert (ledger["rows_in"], ledger["rows_out"], ledger["dropped"]) == (QUERIES, len(rows), Counter(reasons.values()))
    assert metrics["rows"] == len(rows) > 2 and metrics["queries.kept"] == len(rows)
    assert sum(count for key, count in metrics.items() if key.startswith("queries.correct_")) == QUERIES - 2
    taught = [*rows, *(row for row in rejects if "samples" in row)]
    samples = {key: count for key, count in metrics.items() if key.startswith("teacher.samples.")}
    assert sum(samples.values()) == 6 * len(taught) and min(samples.values()) > 0
    assert set(samples) == {
        f"teacher.samples.{reason}" for reason in ("good", "wrong_answer", "no_thinking", "cut_off")
    }
    assert all(0.1 <= row["pass_rate"] <= 0.9 for row in taught)
    [nobody] = [row for row in rejects if row["id"] == "shop/q3"]
    assert nobody["samples"] == ["wrong answer"] * 6


def test_rows_are_what_the_teacher_said_and_tokens_are_accounted_for(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = read(folder / "whole" / "rows.jsonl")
    ledger = json.loads((folder / "whole" / "ledger.json").read_text())
    stored = {(s.prompt_id, s.index): s.text for s in stored_samples(folder / "whole" / "teacher")}
    for row in rows:
        answer = row["messages"][-1]["content"]
        good = {
            text
            for (name, _), text in stored.items()
            if name == row["id"] and text.endswith("boxed{1}") and "<t" in text
        }
        assert stored[row["id"], row["sample"]] == answer == min(good, key=len), "the shortest that is good"
        assert row["thinking_tokens"] == len(tiny_tokenizer(answer.split("\n")[1])["input_ids"])
    trained = [len(chat.render_completion(tiny_tokenizer, row["messages"][-1]["content"])) for row in rows]
    written = [len(chat.render_completion(tiny_tokenizer, text)) for text in stored.values()]
    assert (ledger["tokens_trained"], ledger["tokens_in"]) == (sum(trained), sum(written))
    assert ledger["tokens_dropped"] == sum(written) - sum(trained)


def test_system_prompts_are_drawn_and_the_first_is_the_switch(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """What a row trains on is what the template makes of its bare prompt and `enable_thinking`."""
    rows = read(folder / "whole" / "rows.jsonl")
    drawn = {row["messages"][0]["content"] for row in rows}
    assert drawn == {chat.THINKING_PROMPT, CAREFUL}
    for row in rows:
        system, *question, answer = row["messages"]
        asked = question if system["content"] == chat.THINKING_PROMPT else [system, *question]
        prompt = chat.render_prompt(tiny_tokenizer, asked, enable_thinking=True)
        completion = chat.render_completion(tiny_tokenizer, answer["content"])
        trained = chat.render(tiny_tokenizer, row["messages"])
        assert trained.input_ids[: len(prompt) + len(completion)] == prompt + completion
        assert trained.assistant_mask == [
            len(prompt) <= place < len(prompt) + len(completion) for place in range(len(trained.input_ids))
        ]


def test_killed_four_times_and_whole_are_byte_equal(folder: Path) -> None:
    def contents(name: str) -> dict[str, bytes]:
        ended = folder / name
        left = ("run.json", "resolved_config.yaml", "DONE", ".lock")
        files = [
            path
            for path in ended.rglob("*")
            if path.is_file() and path.name not in left and not path.name.endswith(".tmp")
        ]
        return {str(path.relative_to(ended)): path.read_bytes() for path in files}

    assert contents("killed") == contents("whole")
    assert {"rows.jsonl", "rejects.jsonl", "ledger.json", "metrics.json"} < set(contents("whole"))


@pytest.fixture(scope="module")
def thinker(policy: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy, taught to think first where the template asks for it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        prompt = chat.render_prompt(
            tiny_tokenizer, [{"role": "user", "content": f"{step} shirts?"}], enable_thinking=True
        )
        completions = [
            chat.render_completion(tiny_tokenizer, f"<think>\n{answer}\n</think>\n\\boxed{{{answer}}}")
            for answer in "12"
        ]
        ids = torch.tensor([prompt + completion for completion in completions])
        labels = torch.tensor([[-100] * len(prompt) + completion for completion in completions])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("thinker")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_student_and_teacher_by_vllm_one_after_the_other(
    policy: Path, thinker: Path, question: Callable[[int], Row], tmp_path: Path
) -> None:
    write_rows(tmp_path / "queries.jsonl", map(question, range(12)))
    engine = {"max_model_len": 256, "max_num_seqs": 64, "kv_cache_gib": 0.25}
    config = {
        "output_dir": "out",
        "sources": {"shop": {"rows": "queries.jsonl"}},
        "rollouts": {"model": str(policy), "sampling": {"n": 6, "max_tokens": 16}, "engine": engine},
        "teacher": {
            "model": str(thinker),
            "sampling": {"n": 8, "temperature": 0.5, "max_tokens": 64},
            "engine": engine,
        },
        "keep": "all",
    }
    (tmp_path / "long_cot.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "data_builders.long_cot", "--config", "long_cot.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = read(tmp_path / "out" / "rows.jsonl")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["rows_in"] == 12 == ledger["rows_out"] + sum(ledger["dropped"].values())
    assert metrics["rollouts.samples"] == 72 and len(rows) > 0
    samples = {(s.prompt_id, s.index): s.text for s in stored_samples(tmp_path / "out" / "teacher")}
    assert len(samples) == 8 * metrics["queries.in_window"]
    for row in rows:
        query, _, index = row["id"].rpartition("/")
        text = row["messages"][-1]["content"]
        assert "".join(text.split()) == "".join(samples[query, int(index)].split()) and text.endswith("\\boxed{1}")
    assert len({(row["id"].rpartition("/")[0], row["messages"][-1]["content"]) for row in rows}) == len(rows)
