"""One rank of a test: preference training of a tiny model; rank 0 writes its log and final weights to OUT/result.pt."""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedTokenizerFast

from alignment.moe.trainer import ddp_backend
from alignment.training import leave
from dpo.arguments import PreferenceArguments
from dpo.trainer import PreferenceTrainer

VOCAB, PAD, EOS = 64, 0, 2


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t1")), pad_token="t0", eos_token="t2"
    )


def tiny_model() -> Ernie4_5_MoeForCausalLM:
    torch.manual_seed(0)
    return Ernie4_5_MoeForCausalLM(
        Ernie4_5_MoeConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, moe_intermediate_size=16, moe_num_experts=4,
            moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=0, initializer_range=0.2,
            router_aux_loss_coef=0.0, bos_token_id=None, pad_token_id=PAD, eos_token_id=EOS,
        )
    )  # fmt: skip


def random_pairs(count: int) -> Dataset:
    """Pairs of many lengths, so that padding and token counts differ between ranks."""
    generator = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return Dataset.from_list(
        [
            {"prompt_ids": ids(2, 9), "chosen_ids": [*ids(1, 9), EOS], "rejected_ids": [*ids(1, 15), EOS]}
            | {"row": row, "pair_weight": 1.0}
            for row in range(count)
        ]
    )


def settings(out: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "num_train_epochs": 2, "seed": 1,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "beta": 0.5,
        "dataloader_pin_memory": False,
    } | options  # fmt: skip


def train(out: Path, loss: str, pairs: int, batch: int, accumulation: int) -> dict[str, Any]:
    args = PreferenceArguments(
        **settings(out, loss_type=[loss], nll_weight=0.2, ddp_backend=ddp_backend()),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    data = random_pairs(pairs)
    trainer = PreferenceTrainer(
        tiny_model(), args, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer()
    )
    trainer.train()
    trainer.evaluate()
    return {
        "ranks": trainer.accelerator.num_processes,
        "log": trainer.state.log_history,
        "weights": {name: value.detach().clone() for name, value in trainer.model.state_dict().items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--loss", default="ot_dpo")
    for name in ("pairs", "batch", "accumulation"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    result = train(**vars(given))
    if int(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0) == 0:
        torch.save(result, given.out / "result.pt")


if __name__ == "__main__":
    main()
    leave()
