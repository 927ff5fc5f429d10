"""The sample store: what a kill leaves, and what another address does not find."""

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignment.config import SamplingConfig
from alignment.errors import UserError
from alignment.rollout.samples import Sample
from alignment.rollout.sampling import Chunk, Shard, sample
from alignment.rollout.seeds import sample_seed
from alignment.rollout.store import stored_samples

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
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1
        return [[self._sample(prompt, seed, stop) for seed in own] for prompt, own in zip(prompts, seeds, strict=True)]

    def _sample(self, prompt: Sequence[int], seed: int, stop: Sequence[int]) -> Sample:
        draw = random.Random(f"{seed} {self.weights} {prompt}")
        return Sample([*draw.choices(range(2, 8), k=4), *stop], "stop", -draw.random())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: i for i, letter in enumerate("abcdefgh", start=2)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="h"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return wrapped


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}


def run(
    engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast, root: Path, prompts: list = PROMPTS, **changes
) -> list[Chunk]:
    options = {"sampling": SAMPLING, "seed": 0, "chunk_prompts": 4, **changes}
    return list(sample(engine, tokenizer, prompts, root, **options))


def test_chunks_give_each_prompt_its_samples_in_order(tokenizer, tmp_path):
    chunks = run(ScriptedEngine(), tokenizer, tmp_path)
    assert [len(chunk.prompts) for chunk in chunks] == [4, 4, 2]
    samples = [of_prompt for chunk in chunks for of_prompt in chunk.samples]
    assert [s.prompt_id for of_prompt in samples for s in of_prompt] == [p["id"] for p in PROMPTS for _ in range(3)]
    assert all([s.index for s in of_prompt] == [0, 1, 2] for of_prompt in samples)
    first = samples[0][0]
    assert first.text == "".join("abcdefgh"[token - 2] for token in first.token_ids[:-1])
    assert first.token_ids[-1] == 1 and first.seed == sample_seed(0, "p0", 0)
    assert len({s.seed for of_prompt in samples for s in of_prompt}) == 30
    assert list(stored_samples(tmp_path)) == sorted(
        (s for of_prompt in samples for s in of_prompt), key=lambda s: order_of(tmp_path, s.prompt_id)
    )


def order_of(root: Path, prompt_id: str) -> str:
    """The name of the shard that holds a prompt: what orders `stored_samples`."""
    return next(str(p) for p in root.rglob("*.parquet") if prompt_id in pq.read_table(p)["prompt_id"].to_pylist())


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_killed_run_ends_with_the_same_bytes(tokenizer, tmp_path, dies_at):
    whole = run(ScriptedEngine(), tokenizer, tmp_path / "whole")
    with pytest.raises(Killed):
        run(ScriptedEngine(dies_at=dies_at), tokenizer, tmp_path / "killed")
    second = ScriptedEngine()
    assert run(second, tokenizer, tmp_path / "killed") == whole
    assert second.calls == 3 - dies_at
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    third = ScriptedEngine()
    assert run(third, tokenizer, tmp_path / "killed") == whole
    assert third.calls == 0


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_shards_together_are_the_whole(tokenizer, tmp_path, of):
    run(ScriptedEngine(), tokenizer, tmp_path / "whole")
    parts = [
        run(ScriptedEngine(), tokenizer, tmp_path / "parts", shard=Shard.parse(f"{i + 1}/{of}")) for i in range(of)
    ]
    assert sum(len(chunk.prompts) for part in parts for chunk in part) == len(PROMPTS)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    joined = ScriptedEngine()
    run(joined, tokenizer, tmp_path / "parts")
    assert joined.calls == 0


def test_torn_and_unreadable_files_are_sampled_again(tokenizer, tmp_path, caplog):
    run(ScriptedEngine(), tokenizer, tmp_path)
    before = contents(tmp_path)
    shard = tmp_path / min(before)
    shard.write_bytes(shard.read_bytes()[:100])
    shard.with_name(f".{shard.name}.123.tmp").write_bytes(b"PAR1half")
    engine = ScriptedEngine()
    chunks = run(engine, tokenizer, tmp_path)
    assert engine.calls == 1 and "sampled again" in caplog.text
    assert sorted(chunk.resampled for chunk in chunks) == [False, False, True]
    assert not any(chunk.resampled for chunk in run(engine, tokenizer, tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({"seed": 1}, 3),
        ({"sampling": SAMPLING.model_copy(update={"temperature": 0.5})}, 3),
        ({"sampling": SAMPLING.model_copy(update={"n": 4})}, 3),
        ({"chunk_prompts": 5}, 2),
        ({"prompts": PROMPTS[::-1]}, 3),
        ({"prompts": [{**PROMPTS[0], "id": "other"}, *PROMPTS[1:]]}, 1),
        ({"prompts": [{**PROMPTS[0], "prompt": PROMPTS[9]["prompt"]}, *PROMPTS[1:]]}, 1),
        ({"engine": ScriptedEngine(weights="v")}, 3),
    ],
    ids=["seed", "temperature", "n", "chunks", "order", "id", "text", "weights"],
)
def test_anything_else_is_sampled_anew(tokenizer, tmp_path, changes, calls):
    run(ScriptedEngine(), tokenizer, tmp_path)
    kept = contents(tmp_path)
    engine = changes.pop("engine", None) or ScriptedEngine()
    run(engine, tokenizer, tmp_path, **changes)
    assert engine.calls == calls
    assert contents(tmp_path).items() >= kept.items()


def test_prompts_that_are_added_find_the_earlier_ones(tokenizer, tmp_path):
    run(ScriptedEngine(), tokenizer, tmp_path, PROMPTS[:8])
    engine = ScriptedEngine()
    run(engine, tokenizer, tmp_path)
    assert engine.calls == 1


def test_another_chat_template_is_another_store(tokenizer, tmp_path):
    run(ScriptedEngine(), tokenizer, tmp_path)
    template = tokenizer.chat_template
    engine = ScriptedEngine()
    try:
        tokenizer.chat_template = template + "{# changed #}"
        run(engine, tokenizer, tmp_path)
    finally:
        tokenizer.chat_template = template
    assert engine.calls == 3


def test_long_prompts_are_counted_not_cut(tokenizer, tmp_path):
    long = {"id": "long", "prompt": [{"role": "user", "content": "a" * 33}]}
    exact = {"id": "exact", "prompt": [{"role": "user", "content": "a" * 32}]}
    [chunk] = run(ScriptedEngine(), tokenizer, tmp_path, [long, exact])
    assert chunk.prompts == [long, exact]
    assert chunk.samples[0] is None and {s.prompt_id for s in chunk.samples[1]} == {"exact"}
    with pytest.raises(UserError, match="no prompt fits: all have more than 32 tokens"):
        run(ScriptedEngine(), tokenizer, tmp_path, [long])


def test_faults_of_the_prompts_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="prompt 2: the id 'p0' is given a second time"):
        run(ScriptedEngine(), tokenizer, tmp_path, [PROMPTS[0], PROMPTS[0]])
    with pytest.raises(UserError, match="prompt 1: expected an 'id'"):
        run(ScriptedEngine(), tokenizer, tmp_path, [{"prompt": PROMPTS[0]["prompt"]}])
    with pytest.raises(UserError, match="no prompts"):
        run(ScriptedEngine(), tokenizer, tmp_path, [])


def test_folders_that_are_no_store_are_not_read(tmp_path):
    with pytest.raises(UserError, match="not a sample store"):
        list(stored_samples(tmp_path))


def test_shards_of_other_prompts_are_refused(tokenizer, tmp_path):
    run(ScriptedEngine(), tokenizer, tmp_path)
    first, second = sorted(tmp_path.rglob("*.parquet"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(RuntimeError, match="does not hold the 3 samples of each of its prompts"):
        run(ScriptedEngine(), tokenizer, tmp_path)
