"""Packed SFT against TRL's SFTTrainer on two CPU ranks: valid tokens a second, and a step's loss however it is cut.

    python -m benchmarks.sft

TRL runs in its three modes: padded batches, batches of like length, and packs by best fit decreasing. All train the
same model on the same rows with about as many tokens a step, the assistant's tokens alone bear loss, and every run has
processes of its own, in turns: ours changes TRL where it is imported. The rows are those of ../shared/data where that
is there, else made of words, of log-normal length.
"""

import dataclasses
import gzip
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import spawn

from benchmarks import report

RANKS, ROUNDS, STEPS, WARM_UP = 2, 3, 10, 2
ROWS, CAPACITY, BATCH, VOCABULARY = 3000, 1024, 8, 8192
LOSS_STEPS = 20
PEERS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": BATCH},
    "grouped": {"per_device_train_batch_size": BATCH, "train_sampling_strategy": "group_by_length"},
    "bfd": {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1},
}
NAMES = {"padded": "padded, batch 8", "grouped": "group_by_length, batch 8", "bfd": "packed bfd, 1,024 tokens"}
GPTEACHER = Path(__file__).parents[2] / "shared" / "data" / "gpteacher"
Rows = list[dict[str, Any]]


def rows() -> tuple[Rows, str]:
    """Conversations of mixed length, and what they are."""
    if not GPTEACHER.is_dir():
        return _made_rows(), "words, log-normal"
    files = sorted(GPTEACHER.glob("*.json.gz"))
    given = [row for path in files for row in json.loads(gzip.decompress(path.read_bytes()))]
    found = [_conversation(f"{row['instruction']}\n{row['input']}".strip(), row["response"]) for row in given]
    random.Random(0).shuffle(found)
    return found[:ROWS], "gpteacher"


def _made_rows() -> Rows:
    generator = np.random.default_rng(0)
    words = ["".join(letters) for letters in generator.choice(list("abcdefgh"), (500, 5))]
    counts = generator.lognormal(3.2, 0.6, (ROWS, 2)).clip(1, 150).astype(int)
    return [_conversation(*(" ".join(generator.choice(words, n)) for n in pair)) for pair in counts]


def _conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def tiny_model(tokenizer: Any, **options: Any) -> Any:
    """Ernie4_5_Moe of 10M parameters, the same every time.

    Its routers start at zero, where every choice is a tie that rounding decides; they are drawn, so that a step's loss
    follows from its tokens.
    """
    import transformers

    torch.manual_seed(0)
    config: Any = transformers.Ernie4_5_MoeConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        moe_num_experts=16, moe_k=4, moe_intermediate_size=128, moe_num_shared_experts=2,
        moe_layer_start_index=0, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.05)
    return model


def arguments(folder: Path, steps: int, **specific: Any) -> Any:
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig(
        output_dir=str(folder / "out"), max_steps=steps, learning_rate=1e-4, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
        dataloader_pin_memory=False, router_aux_loss_coef=0.0, **specific,
    )  # fmt: skip


def peer(mode: str, folder: Path, tokenizer: Any) -> Any:
    import datasets
    from trl.trainer.sft_trainer import SFTTrainer

    return SFTTrainer(
        model=tiny_model(tokenizer),
        args=arguments(folder, STEPS, max_length=CAPACITY, assistant_only_loss=True, **PEERS[mode]),
        train_dataset=datasets.Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache")),
        processing_class=tokenizer,
    )


def ours(folder: Path, tokenizer: Any, steps: int = STEPS, singly: bool = False) -> Any:
    """Our trainer; `singly` cuts each step of the plan into samples on their own."""
    from alignment import attention
    from alignment.kernels.model import use_kernels
    from alignment.packing import plan_epoch
    from sft.cache import TokenizedRows, prepare_source
    from sft.config import PrepareConfig
    from sft.data import PackedRows
    from sft.trainer import PackedSFTTrainer

    there = TokenizedRows(
        [prepare_source(str(folder / "rows.jsonl"), tokenizer, PrepareConfig(cache=folder / "tokens"))]
    )
    usable = np.flatnonzero((there.reasons == 0) & (there.lengths <= CAPACITY))
    plan = plan_epoch(there.lengths[usable], CAPACITY, RANKS, 64, np.random.default_rng(0))
    plan = dataclasses.replace(plan, order=usable[plan.order])
    if singly:
        plan = one_sample_a_pack(plan.of_steps(0, steps), there.lengths)
    attention.register()
    model = use_kernels(tiny_model(tokenizer, attn_implementation=attention.SEGMENTS), "auto")
    return PackedSFTTrainer(
        model=model,
        args=arguments(
            folder, steps, max_length=None, per_device_train_batch_size=1, remove_unused_columns=False,
            gradient_accumulation_steps=plan.packs_per_step // RANKS,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        packs=PackedRows(there, plan, None, tokenizer.pad_token_id),
        processing_class=tokenizer,
    )  # fmt: skip


def one_sample_a_pack(plan: Any, lengths: np.ndarray) -> Any:
    """The same steps; packs without a sample fill those of fewer samples."""
    size = plan.packs_per_step
    steps = [plan.order[plan.starts[i] : plan.starts[i + size]] for i in range(0, plan.packs, size)]
    most = -(-max(map(len, steps)) // RANKS) * RANKS
    held = np.concatenate([np.arange(most) < len(samples) for samples in steps])
    order = np.concatenate(steps)
    tokens = np.zeros(len(held), dtype=np.int64)
    tokens[held] = lengths[order]
    return dataclasses.replace(
        plan, order=order, starts=np.concatenate([[0], held.cumsum()]), widths=tokens.clip(1), tokens=tokens,
        attention=tokens**2, packs_per_step=most,
    )  # fmt: skip


def train(trainer: Any) -> dict[str, Any]:
    """Run it; valid tokens of all ranks a second, after the first steps, and the loss of each step."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    seen: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append((time.perf_counter(), valid_tokens(trainer)))

    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    (began, before), (ended, after) = seen[WARM_UP - 1], seen[-1]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "speed": (after - before) / (ended - began),
        "tokens_a_step": (after - before) / (len(seen) - WARM_UP),
        "losses": losses,
    }


def valid_tokens(trainer: Any) -> int:
    """Trained on so far, by the plan, or as TRL counts them over its ranks."""
    if not hasattr(trainer, "plan"):
        return int(trainer._total_train_tokens)
    return int(trainer.plan.of_steps(0, trainer.state.global_step).tokens.sum())


def rank_main(rank: int, what: str, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    match what:
        case "peers":
            found = {mode: train(peer(mode, folder, tokenizer)) for mode in PEERS}
        case "ours":
            found = {"ours": train(ours(folder, tokenizer))}
        case "loss":
            found = {
                "packed": train(ours(folder, tokenizer, LOSS_STEPS)),
                "singly": train(ours(folder, tokenizer, LOSS_STEPS, singly=True)),
            }
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(what: str, folder: Path) -> dict[str, Any]:
    from accelerate.utils.other import get_free_port

    spawn(rank_main, args=(what, folder, get_free_port()), nprocs=RANKS)
    return dict(json.loads((folder / "found.json").read_text()))


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate gives each rank the threads of all
    import trl

    from alignment import tokenizer
    from alignment.rows import write_rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversations, source = rows()
        write_rows(folder / "rows.jsonl", conversations)
        texts = (message["content"] for row in conversations for message in row["messages"])
        tokenizer.train(texts, VOCABULARY, 4096).save_pretrained(folder / "tokenizer")
        runs = [launch("ours", folder) | launch("peers", folder) for _ in range(ROUNDS)]
        gap = launch("loss", folder)
    speeds = {mode: statistics.median(run[mode]["speed"] for run in runs) for mode in ("ours", *PEERS)}
    settings: dict[str, Any] = {
        "rows": f"{len(conversations):,} of {source}", "ranks": RANKS, "threads_a_rank": 1, "dtype": "float32",
        "rounds": ROUNDS, "steps": STEPS - WARM_UP, "model": "Ernie4_5_Moe, 10M parameters",
        "tokens_a_step": {mode: round(run["tokens_a_step"]) for mode, run in runs[0].items()},
        "last_loss": {mode: round(run["losses"][-1], 3) for mode, run in runs[0].items()},
    }  # fmt: skip
    for mode in PEERS:
        found = {"own_value": round(speeds["ours"]), "peer_value": round(speeds[mode])}
        named = f"trl {trl.__version__} SFTTrainer, {NAMES[mode]}"
        report(f"sft.valid_tokens_over_trl_{mode}", speeds["ours"] / speeds[mode], "x", named, **found, **settings)
    worst = max(abs(a - b) for a, b in zip(gap["packed"]["losses"], gap["singly"]["losses"], strict=True))
    settings = {"steps": LOSS_STEPS, "losses": gap["packed"]["losses"][:3], "peer_value": 0.0}
    report("sft.loss_gap_max", worst, "nats", "one sample at a time", better="lower", **settings)


if __name__ == "__main__":
    main()
