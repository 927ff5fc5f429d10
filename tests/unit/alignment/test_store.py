"""The sample store: what a kill leaves, and what another address does not find."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignment.config import SamplingConfig
from alignment.errors import UserError
from alignment.rollout.samples import Sample, chunk_seed
from alignment.rollout.sampling import sample
from alignment.rollout.store import SampleReader

SAMPLING = SamplingConfig(n=3, max_tokens=8)
PROMPTS = [{"id": f"p{i}", "prompt": [{"role": "user", "content": "ab" * (i + 1)}]} for i in range(10)]


class Killed(BaseException):
    """Stands in for SIGKILL: no handler of ours catches it."""


class ScriptedEngine:
    """Draws tokens from the seed; counts its calls, and dies before call number `dies_at`."""

    max_model_len = 40

    def __init__(self, weights: str = "w", dies_at: int | None = None) -> None:
        self.weights, self.dies_at, self.calls = weights, dies_at, 0
        self.settings = {"engine": "scripted"}

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, stop: Sequence[int], seed: int
    ) -> list[list[Sample]]:
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1
        draw = random.Random(f"{seed} {self.weights} {prompts}")
        return [
            [Sample([*draw.choices(range(2, 8), k=4), *stop], "stop", -draw.random()) for _ in range(sampling.n)]
            for _ in prompts
        ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: i for i, letter in enumerate("abcdefgh", start=2)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="h"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return wrapped


def contents(folder: Path) -> dict[str, list[dict]]:
    return {p.name: pq.read_table(p).to_pylist() for p in sorted(folder.glob("*.parquet"))}


def run(engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast, root: Path, prompts: list = PROMPTS, **changes):
    options = {"sampling": SAMPLING, "seed": 0, "chunk_prompts": 4, **changes}
    return sample(engine, tokenizer, prompts, root, **options)


def test_reader_gives_each_prompt_its_samples_in_order(tokenizer, tmp_path):
    reader = run(ScriptedEngine(), tokenizer, tmp_path)
    samples = list(reader)
    assert [s.prompt_id for of_prompt in samples for s in of_prompt] == [p["id"] for p in PROMPTS for _ in range(3)]
    assert all([s.index for s in of_prompt] == [0, 1, 2] for of_prompt in samples)
    first = samples[0][0]
    assert first.text == "".join("abcdefgh"[token - 2] for token in first.token_ids[:-1])
    assert first.token_ids[-1] == 1 and first.seed == chunk_seed(0, 0)
    assert len(reader) == 10 and reader.n == 3 and reader.too_long == []


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_killed_run_ends_with_the_same_samples(tokenizer, tmp_path, dies_at):
    whole = run(ScriptedEngine(), tokenizer, tmp_path / "whole")
    with pytest.raises(Killed):
        run(ScriptedEngine(dies_at=dies_at), tokenizer, tmp_path / "killed")
    second = ScriptedEngine()
    resumed = run(second, tokenizer, tmp_path / "killed")
    assert second.calls == 3 - dies_at
    assert contents(resumed.folder) == contents(whole.folder)
    third = ScriptedEngine()
    assert list(run(third, tokenizer, tmp_path / "killed")) == list(whole)
    assert third.calls == 0


def test_torn_and_unreadable_files_are_sampled_again(tokenizer, tmp_path):
    reader = run(ScriptedEngine(), tokenizer, tmp_path)
    before = contents(reader.folder)
    torn = reader.folder / ".shard-00000.parquet.123.tmp"
    torn.write_bytes(b"PAR1half")
    shard = reader.folder / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    engine = ScriptedEngine()
    run(engine, tokenizer, tmp_path)
    assert engine.calls == 1 and not torn.exists()
    assert contents(reader.folder) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"sampling": SAMPLING.model_copy(update={"temperature": 0.5})},
        {"chunk_prompts": 5},
        {"prompts": PROMPTS[:9]},
        {"prompts": PROMPTS[::-1]},
        {"prompts": [{**PROMPTS[0], "id": "other"}, *PROMPTS[1:]]},
        {"engine": ScriptedEngine(weights="v")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_anything_else_has_another_address(tokenizer, tmp_path, changes):
    before = run(ScriptedEngine(), tokenizer, tmp_path)
    kept = contents(before.folder)
    engine = changes.pop("engine", None) or ScriptedEngine()
    after = run(engine, tokenizer, tmp_path, **changes)
    assert after.folder != before.folder and engine.calls > 0
    assert contents(before.folder) == kept


def test_another_chat_template_has_another_address(tokenizer, tmp_path):
    before = run(ScriptedEngine(), tokenizer, tmp_path).folder
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + "{# changed #}"
        assert run(ScriptedEngine(), tokenizer, tmp_path).folder != before
    finally:
        tokenizer.chat_template = template


def test_long_prompts_are_counted_not_cut(tokenizer, tmp_path):
    long = {"id": "long", "prompt": [{"role": "user", "content": "a" * 33}]}
    exact = {"id": "exact", "prompt": [{"role": "user", "content": "a" * 32}]}
    reader = run(ScriptedEngine(), tokenizer, tmp_path, [long, exact])
    assert reader.too_long == ["long"]
    assert [of_prompt[0].prompt_id for of_prompt in reader] == ["exact"]
    with pytest.raises(UserError, match="shortest has 33 tokens"):
        run(ScriptedEngine(), tokenizer, tmp_path, [long])


def test_faults_of_the_prompts_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="'p0' is given 2 times"):
        run(ScriptedEngine(), tokenizer, tmp_path, [PROMPTS[0], PROMPTS[0]])
    with pytest.raises(UserError, match="prompt 1: expected an 'id'"):
        run(ScriptedEngine(), tokenizer, tmp_path, [{"prompt": PROMPTS[0]["prompt"]}])
    with pytest.raises(UserError, match="no prompts"):
        run(ScriptedEngine(), tokenizer, tmp_path, [])


def test_unfinished_or_foreign_folders_are_not_read(tokenizer, tmp_path):
    with pytest.raises(UserError, match="not a sample store"):
        SampleReader(tmp_path)
    folder = run(ScriptedEngine(), tokenizer, tmp_path).folder
    (folder / "shard-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        SampleReader(folder)


def test_shards_of_other_prompts_are_refused(tokenizer, tmp_path):
    folder = run(ScriptedEngine(), tokenizer, tmp_path).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["chunks"][0].reverse()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RuntimeError, match="does not hold the samples of 'p3'"):
        list(SampleReader(folder))
