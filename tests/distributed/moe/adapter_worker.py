"""One rank of a test: trains LoRA adapters, case after case, with a real Trainer, and records OUT/CASE/rank*.pt."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from worker import TinyTrainer, collate, rows

from alignment import adapters
from alignment.config import LoRAConfig
from alignment.errors import UserError
from alignment.moe.trainer import ddp_backend
from alignment.training import leave

STEPS = 5
SAVED_AT = 3


def deepspeed_config(folder: Path, stage: int, bf16: bool) -> str:
    """The repository's config of two ranks with another ZeRO stage or dtype."""
    config = json.loads(Path("configs/deepspeed/zero1-ep2.json").read_text())
    config["zero_optimization"]["stage"] = stage
    config["bf16"]["enabled"] = bf16
    path = folder / f"deepspeed-{os.environ['RANK']}.json"
    path.write_text(json.dumps(config))
    return str(path)


def trainer(folder: Path, base: Path, dtype: str, lora: LoraConfig | None = None, *, dora: bool = False) -> TinyTrainer:
    """A trainer of 8 rows a step: in one batch on one process, on two ranks in two of two rows each."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = 8 if ranks == 1 else 2
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=STEPS, learning_rate=1e-2, adam_epsilon=1e-5,
        per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch // ranks, max_grad_norm=0.1,
        lr_scheduler_type="linear", logging_steps=1, save_strategy="steps", save_steps=SAVED_AT, seed=3,
        ddp_backend=ddp_backend(), average_tokens_across_devices=True, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    arguments.bf16 = dtype == "bfloat16"  # its own check wants a GPU for it
    targets = ["q_proj", "v_proj"] if dora else None  # peft has no DoRA for routed experts' weights
    config = lora or adapters.peft_config(LoRAConfig(rank=4, alpha=8, dora=dora, targets=targets), model)
    return TinyTrainer(
        model=get_peft_model(model, config), args=arguments, train_dataset=rows(64), data_collator=collate
    )


def train(folder: Path, base: Path, dtype: str, resume: Path | None, *, dora: bool) -> dict[str, Any]:
    """What a case did: losses, and the logits of the trained engine."""
    made = trainer(folder, base, dtype, dora=dora)
    made.train(resume_from_checkpoint=str(resume) if resume else None)
    made.save_model(str(folder / "adapter"))
    probe = collate(rows(5))
    made.model_wrapped.eval()
    with torch.no_grad():
        outputs = made.model_wrapped(
            input_ids=probe["input_ids"], attention_mask=probe["attention_mask"], output_router_logits=True
        )
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logged],
        "grad_norms": [float(entry["grad_norm"]) for entry in logged if "grad_norm" in entry],
        "probe": probe,
        "logits": outputs.logits,
        "router_logits": outputs.router_logits,
    }


def refusal(folder: Path, base: Path, lora: LoraConfig | None = None) -> str:
    try:
        trainer(folder, base, "float32", lora)
    except UserError as error:
        return str(error)
    return "not refused"


def run(case: dict[str, Any], out: Path) -> Any:
    folder = out / case["name"]
    folder.mkdir(parents=True, exist_ok=True)
    base = out / case.get("base", "ernie")
    if "WORLD_SIZE" in os.environ:
        AcceleratorState._reset_state()
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = deepspeed_config(
            folder, case.get("stage", 1), case.get("dtype") == "bfloat16"
        )
    if "refused" in case:
        lora = LoraConfig(target_parameters=case["refused"], target_modules=[]) if case["refused"] else None
        return refusal(folder, base, lora)
    resume = out / case["resume"] if "resume" in case else None
    return train(folder, base, case.get("dtype", "float32"), resume, dora="dora" in case)


def main() -> None:
    out = Path(sys.argv[1])
    rank = os.environ.get("RANK", "0")
    for case in json.loads(sys.argv[2]):
        torch.save(run(case, out), out / case["name"] / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
    leave()
