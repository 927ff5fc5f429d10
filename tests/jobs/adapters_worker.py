"""Runs an engine with adapters in a fresh process for test_adapter_engine.py: `python adapters_worker.py FOLDER`.

FOLDER holds `model` and, of each language that has one, `adapter_LANGUAGE`. Writes found.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.chat import render_prompt, stop_token_id
from alignment.config import EngineConfig, SamplingConfig
from alignment.errors import UserError
from alignment.rollout import open_engine
from alignment.rollout.adapters import AdapterEngine
from alignment.rollout.samples import engine_metrics
from alignment.rollout.sampling import sample

SAMPLING = SamplingConfig(n=4, max_tokens=12)
TEXTS = {
    "th": ("th", "ส้มสามผลราคาเท่าไหร่ครับ"),
    "id": ("id", "Berapa harga tiga baju?"),
    "ms": ("ms", "Berapa harga tiga helai baju itu?"),
    "en": ("en", "How much are three shirts?"),
    "th_unlabelled": (None, "ส้มสามผลราคา 45 บาท เท่าไหร่ครับ"),
    "en_unlabelled": (None, "How much are the three shirts that I ordered yesterday in this shop?"),
    "doubtful": (None, "45 x 3 = ?"),
}
PROMPTS = [
    {"id": name, "prompt": [{"role": "user", "content": text}]} | ({"language": language} if language else {})
    for name, (language, text) in TEXTS.items()
]
EXPECTED = {"th": "th", "id": "id", "ms": "id", "th_unlabelled": "th"}


def main(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    adapters = {"th": folder / "adapter_th", "id": folder / "adapter_id", "ms": folder / "adapter_id"}
    config = EngineConfig(max_model_len=128, max_num_seqs=24, kv_cache_gib=0.25, adapters=adapters)
    found: dict[str, Any] = {}
    with open_engine(folder / "model", config, "float32") as engine:
        assert isinstance(engine, AdapterEngine)
        chunks = list(sample(engine, tokenizer, PROMPTS, folder / "store", SAMPLING, seed=1, chunk_prompts=4))
        found["routed"] = engine_metrics(engine)
        samples = {
            prompt["id"]: of_prompt or []
            for chunk in chunks
            for prompt, of_prompt in zip(chunk.prompts, chunk.samples, strict=True)
        }
        found["gaps"] = {name: gaps(folder, tokenizer, name, of_prompt) for name, of_prompt in samples.items()}
        prompts = [render_prompt(tokenizer, prompt["prompt"]) for prompt in PROMPTS]
        budget = SAMPLING.model_copy(update={"thinking_budget": 4})
        [chunk] = sample(engine, tokenizer, PROMPTS, folder / "budget", budget, seed=1)
        found["budget"] = [len(of_prompt or []) for of_prompt in chunk.samples]
        stop = [stop_token_id(tokenizer)]
        alone = engine.generate_with(["th"], prompts[:1], [[s.seed for s in samples["th"]]], SAMPLING, stop)[0]
        found["alone_as_together"] = [s.token_ids for s in alone] == [s.token_ids for s in samples["th"]]
        relabelled = [row | {"language": "en"} for row in PROMPTS]
        other = list(sample(engine, tokenizer, relabelled, folder / "store", SAMPLING, seed=1, chunk_prompts=4))
        found["relabelled_differ"] = other[0].samples[0] != chunks[0].samples[0]
        again = list(sample(engine, tokenizer, PROMPTS, folder / "store", SAMPLING, seed=1, chunk_prompts=4))
        found["stored_as_drawn"] = [c.samples for c in again] == [c.samples for c in chunks]
        found["weights"] = engine.weights
        try:
            engine.load_weights(folder / "model")
        except UserError as error:
            found["reload"] = str(error)
    (folder / "found.json").write_text(json.dumps(found))


@torch.no_grad()
def gaps(folder: Path, tokenizer: Any, name: str, samples: Any) -> dict[str, float]:
    """The greatest gap between stored log-probabilities and those of peft with each adapter, and with none."""
    prompt = render_prompt(tokenizer, [{"role": "user", "content": TEXTS[name][1]}])
    found = {}
    for adapter in (None, "th", "id"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, folder / f"adapter_{adapter}")
        model.eval()
        each = []
        for s in samples:
            ids = torch.tensor([prompt + s.token_ids])
            chosen = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            each.append(abs(float(chosen[len(prompt) - 1 :].sum()) - s.logprob))
        found[str(adapter)] = max(each)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
