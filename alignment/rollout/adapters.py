"""vLLM with several LoRA adapters side by side (Punica, arXiv 2310.18547): each prompt by the adapter of its language.

The adapters lie beside one copy of the model, and prompts of several share a batch. vLLM takes LoRA, not DoRA, whose
adapters have to be merged; and on what it serves: linear layers, not the routed experts' stacked weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from alignment.adapters import check_adapter_folder, put_on
from alignment.config import EngineConfig, ModelConfig, SamplingConfig
from alignment.errors import UserError
from alignment.fingerprint import value_hash, weights_hash
from alignment.models import load_pretrained
from alignment.rollout.engine import VLLMEngine
from alignment.rollout.proof import GATE, Proof, logprobs_of, mean_gap, mismatch
from alignment.rollout.routes import Routes
from alignment.rollout.samples import Sample

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM 0.31 makes room for


class AdapterEngine(VLLMEngine):
    """As VLLMEngine, with an adapter for each language in `config.adapters`; `weights` is the hash of them all.

    Every adapter's log-probabilities are compared with those of peft.
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
        super().__init__(model, config, dtype=dtype, verify=verify)
        self.weights = value_hash({"model": self.weights, "adapters": hashes})
        if verify:
            for language, folder in config.adapters.items():
                self._prove_adapter(model, language, folder)

    def generate_with(
        self,
        adapters: Sequence[str | None],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        """As `generate`, each prompt by the adapter of a language; None: by the model alone."""
        requests = [None if language is None else self._adapters[language] for language in adapters]
        return self._generate(prompts, seeds, sampling, stop, requests)

    def load_weights(self, folder: Path) -> Proof | None:
        """
        Raises:
            UserError: always: the adapters are of the weights that are there.
        """
        raise UserError(f"engine.adapters: they belong to the model in the engine; {folder} cannot take its place")

    def _options(self, config: EngineConfig) -> dict[str, Any]:
        places = len({request.lora_int_id for request in self._adapters.values()})
        return super()._options(config) | {"enable_lora": True, "max_loras": places, "max_lora_rank": self._rank}

    def _prove_adapter(self, model: Path, language: str, folder: Path) -> None:
        """
        Raises:
            RuntimeError: vLLM does not serve what peft makes of the adapter.
        """
        source = ModelConfig.model_validate({"path": str(model), "dtype": self._dtype})
        base = load_pretrained(AutoModelForCausalLM, source, dtype=getattr(torch, self._dtype))
        expected = logprobs_of(put_on(base, folder, str(model)).eval(), self._probe)
        [now] = self.logprobs([self._probe], self._adapters[language])
        gap = mean_gap(now, expected)
        if not gap <= GATE[self._dtype]:
            raise RuntimeError(mismatch(f"engine.adapters.{language}: {folder}", gap, self._dtype))


def rank_of(folder: Path) -> int:
    """The rank of an adapter that vLLM can serve.

    Raises:
        UserError: not an adapter's folder, or an adapter of another kind.
    """
    check_adapter_folder(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora"):
        raise UserError(f"{folder}: vLLM serves no DoRA adapter beside a model; merge it: `alignment merge`")
    if experts := [name for name in config.get("target_parameters") or () if ".experts." in f".{name}"]:
        raise UserError(f"{folder}: adapts routed experts ({experts[0]}), which is not served; merge it")
    if config["r"] > RANKS[-1]:
        raise UserError(f"{folder}: rank {config['r']}, expected at most {RANKS[-1]}, which vLLM takes")
    return int(config["r"])
