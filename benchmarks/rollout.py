"""Sampling: the whole job against bare vLLM, vLLM against transformers, and the job's memory as prompts grow.

    python -m benchmarks.rollout

Engine starts are not timed: one engine lives through a job. Every side runs max_num_seqs 1,024 and both cores.
"""

import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
import vllm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from alignment import chat, tokenizer
from alignment.config import EngineConfig, SamplingConfig
from alignment.ledger import Ledger
from alignment.models import preset_config
from alignment.rollout.engine import VLLMEngine
from alignment.rows import Row
from benchmarks import in_turns, report, speedup
from data_builders.config import BuildConfig
from data_builders.preferences import PairWriter, build, origin_of

PROMPTS, SAMPLES, TOKENS, ROUNDS = 32, 32, 64, 3
GENERATE_PROMPTS = 16  # what transformers is given: a batch of 512 sequences
MANY, FEW = 10_000, 1_000
LINES = [f"{a} shirts cost {a * b}, one costs {b}, the answer is \\boxed{{{b}}}" for a in range(40) for b in range(40)]


def save_model(folder: Path) -> PreTrainedTokenizerBase:
    """Fresh weights of compass-tiny without a stop token, so that every sample has the same length."""
    words = tokenizer.train(iter(LINES), vocab_size=2048, max_length=512)
    torch.manual_seed(0)
    shape = {"vocab_size": len(words), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(preset_config("compass-tiny", **shape)).save_pretrained(folder)
    words.save_pretrained(folder)
    return words


def prompts(count: int) -> Iterator[Row]:
    draw = random.Random(0)
    for number in range(count):
        text = " ".join(f"{draw.randrange(10, 99)} shirts" for _ in range(24))
        yield {"id": f"p{number}", "prompt": [{"role": "user", "content": text}], "answer": "7"}


def run_job(engine: VLLMEngine, words: PreTrainedTokenizerBase, count: int, config: BuildConfig) -> dict[str, Any]:
    """Sample, store, verify, pair, in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        writer = PairWriter(Path(folder), config.pairing, 0.0, 0, Ledger(), origin_of(engine, words))
        return build(engine, words, prompts(count), config, Path(folder), writer, seed=0, total=count)


def against_bare_vllm(engine: VLLMEngine, words: PreTrainedTokenizerBase, config: BuildConfig) -> None:
    """Tokens a second; samples end where they draw the stop token, so that the two make different numbers of them."""
    requests = [TokensPrompt(prompt_token_ids=chat.render_prompt(words, row["prompt"])) for row in prompts(PROMPTS)]
    stop = [chat.stop_token_id(words)]
    params = SamplingParams(n=SAMPLES, max_tokens=TOKENS, stop_token_ids=stop, logprobs=0, detokenize=False)
    made: tuple[list[int], list[int]] = ([], [])

    def ours() -> None:
        made[0].append(run_job(engine, words, PROMPTS, config)["samples.tokens"])

    def theirs() -> None:
        engine._engine.reset_prefix_cache()
        with engine._stance():
            outputs = engine._engine.generate(requests, params, use_tqdm=False)
        made[1].append(sum(len(one.token_ids) for output in outputs for one in output.outputs))

    seconds = in_turns(ours, theirs, ROUNDS)
    rates = [round(median(tokens) / taken) for tokens, taken in zip(made, seconds, strict=True)]
    settings: dict[str, Any] = {"prompts": PROMPTS, "samples": SAMPLES, "tokens": TOKENS, "model": "compass-tiny"}
    settings |= {"own_value": rates[0], "peer_value": rates[1], "rounds": ROUNDS, "threads": torch.get_num_threads()}
    peer = f"vllm {vllm.__version__} LLM.generate, tokens/s"
    report("rollout.job_over_bare_vllm", rates[0] / rates[1], "x", peer, **settings)


def against_transformers(engine: VLLMEngine, words: PreTrainedTokenizerBase, folder: Path) -> None:
    sampling, total = SamplingConfig(n=SAMPLES, max_tokens=TOKENS), GENERATE_PROMPTS * SAMPLES * TOKENS
    tokens = [chat.render_prompt(words, row["prompt"]) for row in prompts(GENERATE_PROMPTS)]
    length = min(map(len, tokens))
    tokens = [ids[-length:] for ids in tokens]
    seeds = [[SAMPLES * i + j for j in range(SAMPLES)] for i in range(GENERATE_PROMPTS)]
    # The plain loop over experts, as our scorer runs it on a CPU.
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").train(False)

    def ours() -> None:
        samples = engine.generate(tokens, seeds, sampling, stop=[])
        assert sum(len(sample.token_ids) for of_prompt in samples for sample in of_prompt) == total

    @torch.inference_mode()
    def theirs() -> None:
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": TOKENS, "num_return_sequences": SAMPLES}
        assert model.generate(torch.tensor(tokens), **options)[:, length:].numel() == total

    seconds = in_turns(ours, theirs, ROUNDS)
    settings = {"prompts": GENERATE_PROMPTS, "samples": SAMPLES, "prompt_tokens": length, **_rates(total, seconds)}
    peer = f"transformers {transformers.__version__} generate"
    speedup("rollout.vllm_over_transformers", peer, seconds, ROUNDS, **settings)


def _rates(tokens: int, seconds: tuple[float, float]) -> dict[str, float | str | int]:
    ours, theirs = seconds
    return {
        "model": "compass-tiny",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "tokens_per_second": round(tokens / ours),
        "peer_tokens_per_second": round(tokens / theirs),
    }


def memory() -> None:
    """Peak memory of a job of its own process, its worker processes not counted."""
    peaks = [int(_alone(count)) for count in (MANY, FEW)]
    settings = {"own_value": peaks[0], "peer_value": peaks[1], "prompts": [MANY, FEW], "samples": 4, "tokens": 8}
    report("rollout.memory_10k_over_1k", peaks[0] / peaks[1], "x", f"{FEW:,} prompts, kB", "lower", **settings)


def _alone(count: int) -> str:
    command = [sys.executable, "-m", "benchmarks.rollout", str(count)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def with_engine(action: Callable[[VLLMEngine, PreTrainedTokenizerBase, Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = save_model(Path(folder))
        with VLLMEngine(Path(folder), EngineConfig()) as engine:
            action(engine, words, Path(folder))


def main(argv: list[str]) -> None:
    if argv:
        config = BuildConfig(sampling=SamplingConfig(n=4, max_tokens=8))
        with_engine(lambda engine, words, _: run_job(engine, words, int(argv[0]), config))
        status = Path("/proc/self/status").read_text()  # getrusage would hand on the peak of the process that forked
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return
    config = BuildConfig(sampling=SamplingConfig(n=SAMPLES, max_tokens=TOKENS))

    def compare(engine: VLLMEngine, words: PreTrainedTokenizerBase, folder: Path) -> None:
        against_bare_vllm(engine, words, config)
        against_transformers(engine, words, folder)

    with_engine(compare)
    memory()


if __name__ == "__main__":
    main(sys.argv[1:])
