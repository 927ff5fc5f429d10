"""Runs the real engine in a fresh process for test_rollout.py: `python rollout_worker.py FOLDER killed|whole`.

`killed` makes the models and ends in SIGKILL before the second chunk; `whole` goes on from there and writes whole.json.
"""

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedTokenizerFast

from alignment import tokenizer as byte_tokenizer
from alignment.config import EngineConfig, SamplingConfig
from alignment.errors import UserError
from alignment.rollout import engine as engine_module
from alignment.rollout.engine import VLLMEngine
from alignment.rollout.samples import Sample
from alignment.rollout.sampling import sample
from alignment.rollout.seeds import sample_seed
from alignment.rollout.store import Completion

VOCABULARY = 96
CONFIG = EngineConfig(max_model_len=128, max_num_seqs=24, kv_cache_gib=0.25)
SAMPLING = SamplingConfig(n=8, max_tokens=24)
PROMPTS = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"t{i} " * (12 + 7 * i)}]} for i in range(10)]

CALL = {"name": "price", "arguments": '{"item":"ส้ม 😀","count":3}'}
WITH_TOOLS = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
        {"role": "tool", "tool_call_id": "1", "content": "12 baht"},
    ],
    "tools": [
        {"type": "function", "function": {"name": "price", "description": "ราคา", "parameters": {"type": "object"}}}
    ],
}
TURNS = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\nTwo."},
        {"role": "user", "content": "Và 2 + 2?"},
    ]
}
REQUESTS = [
    request | {"chat_template_kwargs": {"enable_thinking": deep}}
    for request in (WITH_TOOLS, TURNS)
    for deep in (False, True)
]


class MortalEngine(VLLMEngine):
    """Dies by SIGKILL at its second call."""

    calls = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        if self.calls == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        return super().generate(prompts, seeds, sampling, stop)


def save_model(folder: Path, seed: int, **changes: int) -> None:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64, "moe_layer_start_index": 0,
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**shape, **changes}, eos_token_id=1, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)  # else the distribution is all but flat
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):
                parameter.zero_()
    model.save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"t{i}": i + 2 for i in range(VOCABULARY - 2)}}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def killed(folder: Path) -> None:
    for number in (1, 2):
        save_model(folder / f"model-{number}", seed=number)
        make_tokenizer().save_pretrained(folder / f"model-{number}")
    save_model(folder / "model-wide", seed=3, moe_intermediate_size=96)
    engine = MortalEngine(folder / "model-1", CONFIG)
    draw(engine, folder / "killed", seed=7)


def draw(engine: VLLMEngine, root: Path, seed: int) -> list[list[Completion]]:
    chunks = sample(engine, make_tokenizer(), PROMPTS, root, SAMPLING, seed=seed, chunk_prompts=4)
    return [of_prompt for chunk in chunks for of_prompt in chunk.samples if of_prompt]


def whole(folder: Path) -> dict[str, Any]:
    tokenizer, found = make_tokenizer(), {}
    environment, threads, set_num_threads = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    begun = time.monotonic()
    with VLLMEngine(folder / "model-1", CONFIG) as engine:
        found["start_seconds"] = time.monotonic() - begun
        found["environment_kept"] = all(
            os.environ.get(name) == environment.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")
        )
        found["threads_kept"] = torch.get_num_threads() == threads and torch.set_num_threads is set_num_threads

        torch.manual_seed(11)
        state = torch.get_rng_state()
        stores = [(folder / name, seed) for name, seed in (("killed", 7), ("whole", 7), ("other", 8))]
        fresh = [draw(engine, *store) for store in stores][1]
        found["random_state_kept"] = torch.equal(state, torch.get_rng_state())
        found["stores"] = [str(root) for root, _ in stores]

        prompts = [tokenizer(row["prompt"][0]["content"])["input_ids"] for row in PROMPTS]
        found["logprob_gap.1"] = logprob_gap(folder / "model-1", prompts, [[vars(s) for s in of] for of in fresh])
        seeds = [[sample_seed(3, str(i), j) for j in range(SAMPLING.n)] for i in range(len(prompts))]
        first = engine.generate(prompts, seeds, SAMPLING, [1])
        found["same_again"] = engine.generate(prompts, seeds, SAMPLING, [1]) == first
        alone = [engine.generate([prompts[i]], [seeds[i][:2]], SAMPLING, [1])[0] for i in (9, 4, 0)]
        found["alone_as_together"] = [[s.token_ids for s in of] for of in alone] == [
            [s.token_ids for s in first[i][:2]] for i in (9, 4, 0)
        ]

        found["reload"] = vars(engine.load_weights(folder / "model-2"))
        second = engine.generate(prompts, seeds, SAMPLING, [1])
        found["changed_by_reload"] = second != first
        found["logprob_gap.2"] = logprob_gap(folder / "model-2", prompts, [[vars(s) for s in of] for of in second])
        engine.load_weights(folder / "model-1")
        found["back_again"] = engine.generate(prompts, seeds, SAMPLING, [1]) == first

        found["idle_cpu_share"] = idle_cpu_share()
        found["other_shape"] = error_of(UserError, lambda: engine.load_weights(folder / "model-wide"))
        repack, engine_module.repack = engine_module.repack, lambda model: None
        found["half_loaded"] = error_of(RuntimeError, lambda: engine.load_weights(folder / "model-2"))
        engine_module.repack = repack
        engine.load_weights(folder / "model-1")
        engine._llm.collective_rpc = engine._llm.apply_model = lambda *args, **kwargs: None
        found["not_loaded"] = error_of(RuntimeError, lambda: engine.load_weights(folder / "model-2"))
        before = psutil.Process().memory_info().rss
    gc.collect()
    found["freed_mib"] = (before - psutil.Process().memory_info().rss) / 2**20
    found["dist_closed"] = not torch.distributed.is_initialized()
    found["chats"] = [{"request": request, "prompt": prompt} for request, prompt in chats(folder / "chat")]
    return found


def chats(folder: Path) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The token ids that vLLM's server makes of requests to /v1/chat/completions, before any engine sees them."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import renderer_from_config
    from vllm.renderers.online_renderer import OnlineRenderer

    save_model(folder, seed=4, max_position_embeddings=4096)
    byte_tokenizer.train(iter(["a"]), vocab_size=300, max_length=4096).save_pretrained(folder)
    config = EngineArgs(model=str(folder), dtype="float32").create_engine_config()
    server = OnlineRenderer(
        config.model_config,
        renderer_from_config(config),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=True,
        tool_parser="hermes",
    )
    for request in REQUESTS:
        _, [engine_input] = asyncio.run(server.render_chat(ChatCompletionRequest(**request, max_tokens=1)))
        yield request, engine_input["prompt_token_ids"]


def idle_cpu_share(seconds: float = 2.0) -> float:
    time.sleep(0.5)  # OpenMP threads spin for a moment after their last work
    begun = time.process_time()
    threading.Event().wait(seconds)
    return (time.process_time() - begun) / seconds


def error_of(kind: type[Exception], action: Any) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return "no error"


@torch.no_grad()
def logprob_gap(folder: Path, prompts: list[list[int]], samples: list[list[dict[str, Any]]]) -> float:
    """Greatest gap between a sample's stored log-probability and transformers', in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gaps = []
    for prompt, of_prompt in zip(prompts, samples, strict=True):
        for s in of_prompt[:3]:
            ids = torch.tensor([prompt + s["token_ids"]])
            chosen = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :]
            gaps.append(abs(float(chosen.sum()) - s["logprob"]))
    return max(gaps)


if __name__ == "__main__":
    root, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "killed":
        killed(root)
    else:
        (root / "whole.json").write_text(json.dumps(whole(root)))
