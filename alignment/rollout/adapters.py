"""vLLM with several LoRA adapters side by side (Punica, arXiv 2310.18547): each prompt by the adapter of its language.

The adapters lie beside one copy of the model, and prompts of several share a batch. vLLM takes LoRA, not DoRA, whose
adapters have to be merged; and on what it serves: linear layers, not the routed experts' stacked weights.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.platforms import current_platform

from alignment.adapters import put_on
from alignment.config import EngineConfig, ModelConfig, SamplingConfig
from alignment.errors import UserError
from alignment.fingerprint import value_hash, weights_hash
from alignment.models import load_pretrained
from alignment.rollout.engine import VLLMEngine
from alignment.rollout.proof import GATE, Proof, logprobs_of, mean_gap, mismatch
from alignment.rollout.routes import Routes
from alignment.rollout.samples import Sample
from alignment.rollout.served import RANKS, rank_of, targets_of


class AdapterEngine(VLLMEngine):
    """As VLLMEngine, with an adapter for each language in `config.adapters`; `weights` is the hash of them all.

    The log-probabilities of each, and of the model alone, are compared with those of transformers and peft.
    """

    def __init__(self, model: Path, config: EngineConfig, *, dtype: str = "float32", verify: bool = True) -> None:
        """
        Raises:
            UserError: an adapter that is none, that vLLM cannot serve, or that is not one of this model.
        """
        ranks = {language: rank_of(folder) for language, folder in config.adapters.items()}
        hashes = {language: weights_hash(folder) for language, folder in config.adapters.items()}
        self.routes = Routes(config)
        self._rank = next(rank for rank in RANKS if rank >= max(ranks.values()))
        # Languages of one group share an adapter, which vLLM then holds once.
        numbers = {found: number for number, found in enumerate(dict.fromkeys(hashes.values()), start=1)}
        self._adapters = {
            language: LoRARequest(hashes[language], numbers[hashes[language]], str(folder.resolve()))
            for language, folder in config.adapters.items()
        }
        with _experts_as_without_adapters():
            super().__init__(model, config, dtype=dtype, verify=verify)
        self.weights = value_hash({"model": self.weights, "adapters": hashes})
        if verify:
            self._prove_adapters(model, config.adapters)

    def generate_with(
        self,
        adapters: Sequence[str | None],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        """As `generate`, each prompt by the adapter of a language; None: by the model alone."""
        return self._generate(prompts, seeds, sampling, stop, [self._request(language) for language in adapters])

    def load_weights(self, folder: Path) -> Proof | None:
        """
        Raises:
            UserError: always: the adapters are of the weights that are there.
        """
        raise UserError(f"engine.adapters: they belong to the model in the engine; {folder} cannot take its place")

    def _options(self, config: EngineConfig) -> dict[str, Any]:
        places = len({request.lora_int_id for request in self._adapters.values()})
        # vLLM's kernels for CPUs take the last place for a prompt without an adapter (torch_ops.lora_ops indexes it by
        # -1): one more than there are adapters stays empty, and adds nothing.
        places += self._on_cpu
        # Without names vLLM wraps routed experts too, and the head, with which on a CPU it cannot score prompts.
        targets = sorted({name for folder in config.adapters.values() for name in targets_of(folder)})
        lora = {"enable_lora": True, "max_loras": places, "max_lora_rank": self._rank, "lora_target_modules": targets}
        return super()._options(config) | lora

    def _prove_adapters(self, model: Path, folders: Mapping[str, Path]) -> None:
        """Compare the model alone and every adapter, as they answer beside each other in one batch.

        Raises:
            UserError: an adapter of another model.
            RuntimeError: vLLM does not serve what transformers and peft make of them.
        """
        source = ModelConfig.model_validate({"path": str(model), "dtype": self._dtype})
        asked = [None, *folders]
        found = self.logprobs([self._probe] * len(asked), [self._request(language) for language in asked])
        for language, now in zip(asked, found, strict=True):
            answering = load_pretrained(AutoModelForCausalLM, source, dtype=getattr(torch, self._dtype))
            what = str(model) if language is None else f"engine.adapters.{language}: {folders[language]}"
            whole = answering if language is None else put_on(answering, folders[language], str(model))
            gap = mean_gap(now, logprobs_of(whole.eval(), self._probe))
            if not gap <= GATE[self._dtype]:
                raise RuntimeError(mismatch(what, gap, self._dtype))

    def _request(self, language: str | None) -> LoRARequest | None:
        return None if language is None else self._adapters[language]


@contextmanager
def _experts_as_without_adapters() -> Iterator[None]:
    """Let a mixture's routed experts, which no adapter is on, run by the kernel that they have without adapters.

    vLLM 0.31 asks for one that could adapt them, which is in Triton, and there is none on a CPU.
    """
    if not current_platform.is_cpu():
        yield
        return
    chooser: Any = unquantized_fused_moe_method
    select = chooser.select_unquantized_moe_backend
    chooser.select_unquantized_moe_backend = lambda moe_config: select(
        moe_config=dataclasses.replace(moe_config, is_lora_enabled=False)
    )
    try:
        yield
    finally:
        chooser.select_unquantized_moe_backend = select
