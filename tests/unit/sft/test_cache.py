"""Tokenized rows: what is kept and rejected, what a cache's key is made of, caches that are damaged or contended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from alignment import chat, fingerprint, processes
from alignment.errors import UserError
from alignment.rows import Row, write_rows
from sft import cache, rendering
from sft.cache import TokenizedRows, prepare_source
from sft.config import PrepareConfig


def row(question: str, answer: str, **others: str) -> Row:
    return {**others, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def numbered(path: Path, count: int) -> Path:
    write_rows(
        path,
        (row(f"{number} shirts?", f"{number * 12.5} baht" * (number % 5), id=f"r{number}") for number in range(count)),
    )
    return path


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(cache=tmp_path / "cache", workers=2)


def folders(config: PrepareConfig) -> list[Path]:
    return sorted(config.cache.glob("[!.]*"))


def make(path: Path, tokenizer: PreTrainedTokenizerFast, config: PrepareConfig) -> TokenizedRows:
    return TokenizedRows([prepare_source(str(path), tokenizer, config)])


# what is kept


def test_only_what_the_assistant_wrote_is_trained(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, config: PrepareConfig
) -> None:
    messages = [*row("3 x 15?", "45")["messages"], *row("12.5?", "so 12.5")["messages"]]
    write_rows(tmp_path / "rows.jsonl", [{"messages": messages}, row("ส้ม?", "45 บาท")])
    rows = make(tmp_path / "rows.jsonl", tiny_tokenizer, config)
    ids, trained = rows.take([0])
    assert tiny_tokenizer.decode(ids[trained]) == "45<|im_end|>so 12.5<|im_end|>"
    assert tiny_tokenizer.decode(ids) == tiny_tokenizer.apply_chat_template(messages, tokenize=False)
    assert (rows.lengths[0], rows.trained_tokens[0]) == (len(ids), trained.sum())
    assert ids.dtype == np.int32 and trained.dtype == bool


def test_a_first_token_is_never_trained(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that marks everything: the first token's predictor would be another sample's last."""
    template = "{% generation %}{{ messages[0]['content'] + '<|im_end|>' }}{% endgeneration %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    rows = make(numbered(tmp_path / "rows.jsonl", 3), tiny_tokenizer, config)
    for index in range(3):
        assert rows.take([index])[1].tolist() == [False] + [True] * (rows.lengths[index] - 1)


STOP, SPACE = chat.TURN_END, "\n"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([f"a{STOP}"], None),
        ([f"a{STOP}{SPACE}{SPACE}"], None),
        ([f"a{STOP}", f"b{STOP}{SPACE}"], None),
        ([], "nothing to train"),
        (["a"], "no stop token after a trained turn"),
        ([f"a{STOP}", "b"], "no stop token after a trained turn"),
        ([f"a{STOP}b"], "a stop token inside a trained turn"),
        ([f"a{STOP}b{STOP}"], "a stop token inside a trained turn"),
        ([f"a{STOP}{STOP}"], "a stop token inside a trained turn"),
    ],
)
def test_each_trained_turn_ends_with_its_one_stop_token(
    tiny_tokenizer: PreTrainedTokenizerFast, turns: list[str], reason: str | None
) -> None:
    ids, trained = tiny_tokenizer("ask")["input_ids"], []
    trained = [False] * len(ids)
    for turn in turns:
        of_turn = tiny_tokenizer(turn)["input_ids"]
        ids, trained = [*ids, *of_turn, 5], [*trained, *[True] * len(of_turn), False]
    assert rendering.reject(np.array(ids), np.array(trained), tiny_tokenizer) == reason


def test_rejected_rows_keep_their_length_and_place_and_hold_no_tokens(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, config: PrepareConfig
) -> None:
    folder = tmp_path / "rows"
    write_rows(folder / "a.jsonl", [row("a", "b"), {"id": "ask", "messages": [{"role": "user", "content": "12.5?"}]}])
    write_rows(folder / "b.jsonl", [row("a", "b<|im_end|>c"), row("a", "d")])
    rows = make(folder, tiny_tokenizer, config)
    assert [cache.REJECTED[code - 1] if code else None for code in rows.reasons] == [
        None,
        "nothing to train",
        "a stop token inside a trained turn",
        None,
    ]
    assert (rows.lengths > 3).all() and rows.trained_tokens[[1, 2]].tolist() == [0, 0]
    assert len(rows.take([1, 2])[0]) == 0
    assert rows.place(1) == cache.Place(str(folder), f"{folder}/a.jsonl:2", "ask")
    assert rows.place(2) == cache.Place(str(folder), f"{folder}/b.jsonl:1", None)
    (made,) = folders(config)
    facts = cache.read_facts(made)
    assert facts["rejected"] == {"nothing to train": 1, "a stop token inside a trained turn": 1}
    assert facts["rejects"][0] == {"place": "/a.jsonl:2", "id": "ask", "length": 7, "reason": "nothing to train"} | {
        "length": int(rows.lengths[1])
    }
    assert (facts["rows"], facts["tokens"]) == (4, rows.lengths.sum())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=4),
    limit=st.one_of(st.none(), st.integers(1, 30)),
    data=st.data(),
)
def test_rows_are_taken_as_they_were_written(lengths: list[list[int]], limit: int | None, data: st.DataObject) -> None:
    """Rows of any length, in any batches: tokens, and the bits beside them, which begin within bytes."""
    rng = np.random.default_rng(0)
    written = [(rng.integers(0, 9, n), rng.integers(0, 2, n).astype(bool)) for part in lengths for n in part]
    remaining = iter(written)
    batches = []
    for part in lengths:
        rows = [next(remaining) for _ in part]
        columns = {"input_ids": [ids.tolist() for ids, _ in rows], "trained": [t.tolist() for _, t in rows]}
        facts = {"length": part, "trained_tokens": part, "reason": [None] * len(part), "place": [""] * len(part)}
        batches.append(pa.RecordBatch.from_pydict({**columns, **facts, "id": ["x"] * len(part)}, rendering.SCHEMA))
    rows_ = TokenizedRows([cache.SourceRows("a", batches[:1]), cache.SourceRows("b", batches[1:])])
    indices = data.draw(st.lists(st.integers(0, len(written) - 1), max_size=8))
    ids, trained = rows_.take(indices, limit)
    assert ids.tolist() == [t for i in indices for t in written[i][0][:limit].tolist()]
    assert trained.tolist() == [t for i in indices for t in written[i][1][:limit].tolist()]
    with pytest.raises(IndexError):
        rows_.take([len(written)])


# one cache, many processes


def test_processes_give_what_one_gives(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a row far behind that the template refuses: its file and line reach the caller, and no cache stays."""
    source = numbered(tmp_path / "rows.jsonl", 90)
    here = make(source, tiny_tokenizer, config)
    monkeypatch.setattr(rendering, "ROWS_FOR_PROCESSES", 20)
    monkeypatch.setattr(rendering, "CHUNK_ROWS", 7)
    other = config.model_copy(update={"cache": tmp_path / "other"})
    there = make(source, tiny_tokenizer, other)
    assert len(here) == len(there) == 90
    for field in ("lengths", "trained_tokens", "reasons"):
        assert getattr(here, field).tolist() == getattr(there, field).tolist()
    every = np.arange(90)
    assert all(np.array_equal(a, b) for a, b in zip(here.take(every), there.take(every), strict=True))
    assert [there.place(i).where for i in (0, 50)] == [f"{source}:1", f"{source}:51"]

    template = "{% if '77 ' in messages[0]['content'] %}{{ raise_exception('seventy-seven') }}{% endif %}" + chat.CHATML
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=rf"{source}:78: .*refuses a conversation: seventy-seven"):
        make(source, tiny_tokenizer, other)
    assert len(folders(other)) == 1 and [p.suffix for p in other.cache.glob(".*")] == [".lock", ".lock"]


def test_a_process_that_dies_is_an_error(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "ROWS_FOR_PROCESSES", 20)
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"a process of sft\.rendering\.render_chunk ended with exit code 1"):
        make(numbered(tmp_path / "rows.jsonl", 40), tiny_tokenizer, config)
    assert folders(config) == []


RANK = """
import sys
import time
from pathlib import Path
from transformers import AutoTokenizer
from alignment import job
from sft import cache
from sft.cache import TokenizedRows, prepare_source
from sft.config import PrepareConfig

def write(*arguments, write=cache._write):
    print("makes it", flush=True)
    time.sleep(1)
    write(*arguments)

def command():
    cache._write = write
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.readline()
    rows = TokenizedRows([prepare_source("rows.jsonl", tokenizer, PrepareConfig(cache=Path("cache"), workers=2))])
    print(len(rows), int(rows.lengths.sum()), flush=True)

sys.exit(job.guarded(command))
"""


@pytest.fixture
def start(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[int], subprocess.Popen[str]]:
    """Starts a rank that prepares rows.jsonl once a line is written to it."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def start_rank(rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=tmp_path,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start_rank


def go(process: subprocess.Popen[str]) -> None:
    """Once the process is ready."""
    assert process.stdin is not None and process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def test_one_rank_fills_the_cache_and_the_others_wait(
    tmp_path: Path, start: Callable[[int], subprocess.Popen[str]]
) -> None:
    """Rank 1 begins first; two processes with the first rank's part come at once; all have the same rows."""
    numbered(tmp_path / "rows.jsonl", 300)
    ranks = [start(1), start(0), start(0)]
    for process in ranks:
        go(process)
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0]
    assert outputs[0] == [outputs[1][-1]] == [outputs[2][-1]], "rank 1 makes nothing and says nothing"
    assert [*outputs[1], *outputs[2]].count("makes it") == 1
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_preparation_leaves_no_half_cache_and_no_process(
    tmp_path: Path, start: Callable[[int], subprocess.Popen[str]], signum: signal.Signals
) -> None:
    numbered(tmp_path / "rows.jsonl", 60_000)
    process = start(0)
    go(process)
    workers: list[int] = []
    while len(workers) < 2:
        assert process.poll() is None
        workers = children_of(process.pid)
        time.sleep(0.05)
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == (128 + signum if signum == signal.SIGTERM else -signum)
    assert list((tmp_path / "cache").glob("[!.]*")) == []
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a process that renders outlived its parent"
        time.sleep(0.1)
    left = [path.suffix for path in (tmp_path / "cache").glob(".*")]
    assert left == [".lock"] if signum == signal.SIGTERM else sorted(left) == [".lock", ".tmp"]


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"alignment.processes" in Path(f"/proc/{child}/cmdline").read_bytes()]


# keys


def test_nothing_is_made_twice(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    config: PrepareConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A call changes nothing in the key; a copy of the file is the same rows, under its own name."""
    source = numbered(tmp_path / "rows.jsonl", 5)
    make(source, tiny_tokenizer, config)
    assert capsys.readouterr().out.startswith(f"sft.prepare: {source}: 5 rows, ")
    tiny_tokenizer(["a", "long one"], padding=True, truncation=True, max_length=3)
    monkeypatch.setattr(rendering, "render_chunk", None)
    make(source, tiny_tokenizer, config)
    assert capsys.readouterr().out.endswith(" tokens (cached)\n")
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(source.read_bytes())
    assert make(copied, tiny_tokenizer, config).place(1).where == f"{copied}:2"
    assert len(folders(config)) == 1


def test_other_rows_template_or_tokenizer_are_another_key(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = numbered(tmp_path / "rows.jsonl", 5)
    make(source, tiny_tokenizer, config)
    changed = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    swapped = {value: key for key, value in changed["model"]["vocab"].items()}
    changed["model"]["vocab"] |= {swapped[20]: 21, swapped[21]: 20}
    with monkeypatch.context() as patch:
        patch.setattr(tiny_tokenizer, "_tokenizer", tokenizers.Tokenizer.from_str(json.dumps(changed)))
        make(source, tiny_tokenizer, config)
    assert len(folders(config)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tiny_tokenizer, "chat_template", chat.CHATML + " ")
        make(source, tiny_tokenizer, config)
    assert len(folders(config)) == 3
    numbered(source, 6)
    assert len(make(source, tiny_tokenizer, config)) == 6
    assert len(folders(config)) == 4
    assert {fingerprint.value_hash(cache.read_facts(f)["made_of"]) for f in folders(config)} == {
        f.name for f in folders(config)
    }


# mistakes and damage


def cut(folder: Path) -> None:
    whole = (folder / cache.ROWS).read_bytes()
    (folder / cache.ROWS).write_bytes(whole[: len(whole) // 2])


def cut_and_say_so(folder: Path) -> None:
    cut(folder)
    facts = cache.read_facts(folder) | {"bytes": (folder / cache.ROWS).stat().st_size}
    (folder / cache.FACTS).write_text(json.dumps(facts))


def other_rows(folder: Path) -> None:
    facts = cache.read_facts(folder) | {"rows": 4}
    (folder / cache.FACTS).write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "bytes, expected"),
        (cut_and_say_so, "rows.arrow: "),
        (other_rows, "5 rows and"),
        (lambda folder: (folder / cache.FACTS).write_text("{"), "source.json"),
        (lambda folder: (folder / cache.ROWS).unlink(), None),
    ],
    ids=["cut", "cut, of the size it says", "other rows", "torn facts", "no rows"],
)
def test_a_damaged_cache_is_made_again(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    config: PrepareConfig,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str | None,
) -> None:
    source = numbered(tmp_path / "rows.jsonl", 5)
    before = make(source, tiny_tokenizer, config).take(range(5))
    (folder,) = folders(config)
    damage(folder)
    capsys.readouterr()
    after = make(source, tiny_tokenizer, config).take(range(5))
    assert after[0].tolist() == before[0].tolist() and after[1].tolist() == before[1].tolist()
    assert folders(config) == [folder]
    printed = capsys.readouterr().out
    assert "(cached)" not in printed
    if message:
        assert "sft.prepare: a damaged cache is made again" in printed and message in printed


def test_mistakes_name_their_place(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = numbered(tmp_path / "rows.jsonl", 3)
    with source.open("a") as file:
        file.write('{"messages": [{"role": "robot", "content": ""}]}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:4: messages\[0\] has role 'robot'"):
        make(source, tiny_tokenizer, config)
    with pytest.raises(UserError, match="row.jsonl: no such file; did you mean 'rows.jsonl'?"):
        make(tmp_path / "row.jsonl", tiny_tokenizer, config)
    with pytest.raises(UserError, match="some/set:train: the hub does not say which revision this is"):
        prepare_source("some/set:train", tiny_tokenizer, config)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="prepare.cache: .*file cannot be written: "):
        make(numbered(source, 3), tiny_tokenizer, PrepareConfig(cache=tmp_path / "file"))
    assert folders(config) == []
