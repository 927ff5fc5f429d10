"""vLLM in this process: deterministic samples, and weights that change while the engine lives.

Each sample is drawn from its own seed (alignment.rollout.draw). The scheduler runs in this process, one step after the
other, so that the same call batches, and rounds, in the same way, in this process or in another.
"""

import gc
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before vLLM is imported. With the scheduler in a process of its own, batches would depend on when requests arrive.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed

from alignment.closing import Closing
from alignment.config import EngineConfig, SamplingConfig
from alignment.fingerprint import weights_hash
from alignment.models import check_model_folder
from alignment.rollout.proof import (
    GATE,
    Proof,
    check_shape,
    mean_gap,
    mismatch,
    probe,
    reference_logprobs,
    shape_of,
)
from alignment.rollout.reload import repack
from alignment.rollout.samples import Sample
from alignment.rollout.seeds import PROCESSOR, arguments

GIB = 1 << 30
# The smallest that vLLM's CPU attention takes. A prompt's full blocks are prefilled once for all its samples, so with
# vLLM's default of 128 a prompt of 100 tokens is computed n times over.
CPU_BLOCK = 32
# Tokens of one scheduler step, so that a chunk's prompts are prefilled in few of them.
STEP_TOKENS = 8192
# What vLLM sets for itself and a training process started from here must not inherit.
NOT_INHERITED = ("LD_PRELOAD", "LOCAL_WORLD_SIZE")


class VLLMEngine(Closing):
    """`vllm.LLM` around a model folder. Use as a context manager, or `close()` it.

    Only one lives at a time in a process. The constructor and `load_weights` compare its log-probabilities with those
    of transformers and raise where they differ (`verify=False` leaves that out, for models that do not fit twice).
    """

    def __init__(
        self,
        model: Path,
        config: EngineConfig,
        *,
        dtype: str = "float32",
        eager: bool | None = None,
        verify: bool = True,
    ) -> None:
        """`eager` runs the model uncompiled; the default is True on CPU, where compiling costs more than it gives."""
        check_model_folder(model)
        self.max_model_len = config.max_model_len
        self.weights = weights_hash(model)
        self._dtype, self._verify = dtype, verify
        self._on_cpu = current_platform.is_cpu()
        self._eager = self._on_cpu if eager is None else eager
        self._shape = shape_of(model)
        self._probe = probe(model, config.max_model_len)
        self.settings: dict[str, str | int | float] = {
            "engine": "vllm",
            "sampler": "inverse transform",
            "dtype": dtype,
            "eager": self._eager,
            "device": current_platform.device_name,
            **config.model_dump(
                exclude={
                    "chunk_prompts",
                    "endpoints",
                    "requests",
                    "ray_replicas",
                    "data_parallel_size",
                    "adapters",
                    "detect",
                }
            ),
        }
        with own_random_state(0), self._stance(), kept_process_state():
            self._llm: LLM | None = LLM(str(model), **self._options(config))
        if verify:
            self._prove(model, before=None)

    def _options(self, config: EngineConfig) -> dict[str, Any]:
        options: dict[str, Any] = {
            "skip_tokenizer_init": True,  # prompts are token ids, and samples are decoded by the caller
            "generation_config": "vllm",  # else the model folder's own defaults add stop tokens
            "dtype": self._dtype,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": max(STEP_TOKENS, config.max_model_len, config.max_num_seqs),
            "tensor_parallel_size": config.tensor_parallel_size,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enforce_eager": self._eager,
            "use_tqdm_on_load": sys.stderr.isatty(),
            "enable_prefix_caching": True,
            "logits_processors": [PROCESSOR],
        }
        if self._on_cpu:
            options |= {"kv_cache_memory_bytes": int(config.kv_cache_gib * GIB), "block_size": CPU_BLOCK}
        return options

    @property
    def faults(self) -> Mapping[str, int]:
        """None: what fails here fails the job."""
        return {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        """For each prompt (token ids) a sample of each of its seeds, in the order of the prompts.

        The same weights, settings and arguments give the same samples bit by bit. `stop` holds the token ids that end
        an answer; the model's own eos token counts only where it is among them.
        """
        return self._generate(prompts, seeds, sampling, stop, [None] * len(prompts))

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
        adapters: Sequence[LoRARequest | None],
    ) -> list[list[Sample]]:
        """`generate`, each prompt by an adapter of its own."""
        self._reset_prefix_cache()  # what was cached decides how prompts are batched, and so the last bits
        requests = [prompt for prompt, own in zip(prompts, seeds, strict=True) for _ in own]
        params = [_params(sampling, stop, seed) for own in seeds for seed in own]
        of_request = [adapter for adapter, own in zip(adapters, seeds, strict=True) for _ in own]
        outputs = iter(self._run(requests, params, of_request))
        return [[_sample(next(outputs).outputs[0]) for _ in own] for own in seeds]

    def logprobs(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[LoRARequest | None] | None = None
    ) -> list[list[float]]:
        """Log-probability of each token but the first, for each sequence."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run(token_ids, [params] * len(token_ids), adapters or [None] * len(token_ids))
        return [
            [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, token_ids, strict=True)
        ]

    def load_weights(self, folder: Path) -> Proof | None:
        """Replace the weights by those of `folder`, a model of the same shape, and prove that they are in use.

        Raises:
            UserError: no such model, or one of another shape.
            RuntimeError: the engine's log-probabilities are not those of the folder. The engine is then of no use.
        """
        check_model_folder(folder)
        check_shape(self._shape, shape_of(folder), folder)
        before = self.logprobs([self._probe])[0] if self._verify else None
        with own_random_state(0), self._stance():
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            if self._on_cpu:
                self._engine.apply_model(repack)
        self._reset_prefix_cache()
        former, self.weights = self.weights, weights_hash(folder)
        if before is None:
            return None
        return self._prove(folder, before if former != self.weights else None)

    def close(self) -> None:
        """Free the weights and the cache. Closing twice does nothing."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()
        gc.collect()

    @property
    def _engine(self) -> LLM:
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        return self._llm

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        adapters: Sequence[LoRARequest | None],
    ) -> list[Any]:
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        with self._stance(), _no_garbage_collection():
            return self._engine.generate(requests, params, lora_request=_or_none(adapters), use_tqdm=False)

    def _reset_prefix_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def _stance(self) -> Any:
        # vLLM's CPU sampler is torch.compiled even under enforce_eager: 15 s at the first sample, to no gain.
        return torch.compiler.set_stance("force_eager" if self._on_cpu and self._eager else "default")

    def _prove(self, folder: Path, before: Sequence[float] | None) -> Proof:
        [reference] = reference_logprobs(folder, [self._probe], self._dtype)
        now = self.logprobs([self._probe])[0]
        proof = Proof(mean_gap(now, reference), None if before is None else mean_gap(before, reference))
        if before is not None and list(now) == list(before):
            raise RuntimeError(f"{folder}: vLLM's log-probabilities did not change with the weights: they are stale")
        if not proof.gap <= GATE[self._dtype]:
            raise RuntimeError(mismatch(str(folder), proof.gap, self._dtype))
        return proof


def _or_none(adapters: Sequence[LoRARequest | None]) -> Any:
    """What vLLM takes: for each prompt an adapter or None; of an engine without adapters no list."""
    return list(adapters) if any(adapters) else None


def _params(sampling: SamplingConfig, stop: Sequence[int], seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,  # the draw leaves one token to choose
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(stop),
        logprobs=0,  # the chosen token's only
        flat_logprobs=True,
        detokenize=False,
        extra_args=arguments(sampling, seed),
    )


def _sample(completion: Any) -> Sample:
    return Sample(list(completion.token_ids), completion.finish_reason, float(completion.cumulative_logprob))


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Seed every generator that vLLM draws from, and give the caller's states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            set_random_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector walks vLLM's thousands of live requests over and over: 6% of a small model's sampling."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def kept_process_state() -> Iterator[None]:
    """Undo what vLLM's start does to this process beyond the engine: environment, and `torch.set_num_threads`."""
    environment = {name: os.environ.get(name) for name in NOT_INHERITED}
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
