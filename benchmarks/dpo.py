"""A step of preference training: OT against plain DPO, packed against padded pairs, and the memory of the head.

    python -m benchmarks.dpo

A step is the trainer's `compute_loss` and the backward, with the reference's log-probabilities made beforehand, TRL's
too. All train one model on the same pairs of mixed length in one process. The head is measured in processes of its own:
peak resident bytes beyond its inputs and weight, from hidden states to their gradient and the weight's.

Suffixes: n tokens, D model dim, V vocabulary.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler

from benchmarks import in_turns, report, speedup

PAIRS, BATCH, LONGEST, VOCABULARY = 8, 4, 512, 8192
OT_ROUNDS, PADDING_ROUNDS = 11, 5
HEAD = {"tokens": 4096, "vocabulary": 150_000, "hidden": 256}
THREADS = 1

Pairs = list[dict[str, Any]]
Step = Callable[[], float]


def draw_pairs() -> Pairs:
    """Log-normal lengths, so that about half of a padded batch is padding."""
    generator = np.random.default_rng(0)

    def ids(mean: float, most: int) -> list[int]:
        length = int(np.clip(generator.lognormal(np.log(mean), 0.7), 8, most))
        return [int(token) for token in generator.integers(3, VOCABULARY, length)]

    return [
        {"prompt_ids": ids(40, 96), "chosen_ids": ids(130, LONGEST - 96), "rejected_ids": ids(130, LONGEST - 96)}
        | {"row": row, "pair_weight": 1.0}
        for row in range(PAIRS)
    ]


def tokenizer() -> Any:
    """Trainers ask for one; nothing here is text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")


def settings(folder: Path, **specific: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "per_device_train_batch_size": BATCH, "dataloader_pin_memory": False,
        "router_aux_loss_coef": 0.0,
    } | specific  # fmt: skip


def our_step(folder: Path, pairs: Pairs, loss: str, padded: bool = False) -> Step:
    from datasets import Dataset

    from alignment.kernels.model import use_kernels
    from benchmarks.sft import tiny_model
    from dpo.arguments import PreferenceArguments
    from dpo.forward import Way
    from dpo.trainer import PreferenceTrainer

    class Padded(PreferenceTrainer):
        def _prepare_forward(self) -> None:
            self._way = Way(padded="the packed one's peer")

    words = tokenizer()
    trainer = (Padded if padded else PreferenceTrainer)(
        use_kernels(tiny_model(words), "auto"),
        PreferenceArguments(**settings(folder / f"{loss}-{padded}", loss_type=[loss])),
        train_dataset=Dataset.from_list(pairs),
        processing_class=words,
    )
    trainer.prepare_references()
    cuts = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    batches: Any = [trainer.data_collator(cut) for cut in cuts]
    return lambda: run_step(trainer, batches, num_items_in_batch=torch.tensor(PAIRS))


def trl_step(folder: Path, pairs: Pairs) -> Step:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from benchmarks.sft import tiny_model

    class Tokenized(DPOTrainer):
        """TRL's trainer on ids, in their order."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(range(PAIRS))

    words = tokenizer()
    trainer = Tokenized(
        tiny_model(words),
        args=DPOConfig(**settings(folder / "trl", precompute_ref_log_probs=True, max_length=None)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=words,
    )
    batches = list(trainer.get_train_dataloader())
    return lambda: run_step(trainer, batches, share=1 / len(batches))


def run_step(trainer: Any, batches: Sequence[dict[str, Any]], share: float = 1.0, **options: Any) -> float:
    """The norm of the gradient of the step's mean loss; a batch's loss has this share in it."""
    trainer.model.train()
    trainer.model.zero_grad()
    for batch in batches:
        (trainer.compute_loss(trainer.model, dict(batch), **options) * share).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None]))


def steps(folder: Path) -> None:
    """What OT costs a step and what packing saves; first, every way to plain DPO must make the same gradient."""
    import transformers
    import trl

    pairs = draw_pairs()
    lengths = [len(pair["prompt_ids"]) + len(pair[key]) for pair in pairs for key in ("chosen_ids", "rejected_ids")]
    dpo, transport = our_step(folder, pairs, "dpo"), our_step(folder, pairs, "ot_dpo")
    padded, peer = our_step(folder, pairs, "dpo", padded=True), trl_step(folder, pairs)
    norm = dpo()
    assert norm > 0.1 and all(abs(step() / norm - 1) < 1e-3 for step in (padded, peer))
    found: dict[str, Any] = {
        "pairs": PAIRS, "pairs_a_batch": BATCH, "tokens": sum(lengths), "longest": max(lengths),
        "padding": round(1 - sum(lengths) / padded_tokens(lengths), 3), "model": "Ernie4_5_Moe, 10M parameters",
        "hidden": 256, "vocabulary": VOCABULARY, "threads": THREADS, "dtype": "float32",
    }  # fmt: skip
    ours, plain = in_turns(transport, dpo, OT_ROUNDS, clock=time.process_time)
    measured = {"cpu_seconds": round(ours, 4), "plain_cpu_seconds": round(plain, 4), "rounds": OT_ROUNDS}
    measured["peer_value"] = 1.0
    report("dpo.ot_step_over_dpo", ours / plain, "of its time", "loss dpo, same trainer", "lower", **measured, **found)
    rounds = PADDING_ROUNDS
    speedup("dpo.padding_free_over_padded", "padded, same trainer", in_turns(dpo, padded, rounds), rounds, **found)
    named = f"trl {trl.__version__} DPOTrainer, transformers {transformers.__version__}, padded"
    speedup("dpo.padding_free_over_trl", named, in_turns(dpo, peer, rounds), rounds, **found)


def padded_tokens(lengths: Sequence[int]) -> int:
    """Of the batches' rows, 2 a pair, when each is as long as the longest of its batch."""
    size = 2 * BATCH
    return sum(size * max(lengths[start : start + size]) for start in range(0, len(lengths), size))


def head_pass(way: str) -> dict[str, float]:
    """One forward and backward of the head in this process: peak bytes beyond its inputs, and seconds."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from benchmarks.moe import resident
    from dpo.logps import token_logps

    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    hidden_nD = torch.randn(HEAD["tokens"], HEAD["hidden"], generator=generator).requires_grad_()
    weight_VD = torch.randn(HEAD["vocabulary"], HEAD["hidden"], generator=generator).mul_(0.05).requires_grad_()
    target_n = torch.randint(HEAD["vocabulary"], (HEAD["tokens"],), generator=generator)
    gradient_n = torch.randn(HEAD["tokens"], generator=generator)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, began = resident("VmRSS"), time.perf_counter()
    match way:
        case "ours":
            logps_n = token_logps(hidden_nD, weight_VD, target_n)
        case "trl":
            options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
            logps_n = ChunkedLogProbFunction.apply(hidden_nD, weight_VD, None, target_n, *options)[0]
        case "full":
            logps_n = (hidden_nD @ weight_VD.t()).log_softmax(-1).gather(-1, target_n[:, None])[:, 0]
    logps_n.backward(gradient_n)
    seconds, peak = time.perf_counter() - began, resident("VmHWM") - before
    assert hidden_nD.grad is not None
    return {"bytes": peak, "seconds": round(seconds, 2), "gradient": hidden_nD.grad.norm().item()}


def head() -> None:
    found = {}
    for way in ("ours", "full", "trl"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[way] = pool.submit(head_pass, way).result()
    for way in ("full", "trl"):
        assert abs(found[way]["gradient"] / found["ours"]["gradient"] - 1) < 1e-5
    measured = {
        "measure": "peak resident bytes beyond inputs and weight", "found": found, "threads": THREADS,
        "dtype": "float32", "peer_value": 1.0,
    }  # fmt: skip
    for claim, way, peer in (
        ("dpo.logprob_memory_ratio", "full", f"torch {torch.__version__} log_softmax of all logits"),
        ("dpo.logprob_memory_over_trl", "trl", "trl ChunkedLogProbFunction, as its DPOTrainer calls it"),
    ):
        ratio = found["ours"]["bytes"] / found[way]["bytes"]
        report(claim, ratio, "of its memory", peer, "lower", **measured, **HEAD)


def main() -> None:
    import datasets
    import transformers

    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    head()
    with tempfile.TemporaryDirectory() as folder:
        steps(Path(folder))


if __name__ == "__main__":
    main()
