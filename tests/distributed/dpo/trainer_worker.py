"""One rank of a test: preference training case after case, plain, under ZeRO, or with experts split between ranks.

    trainer_worker.py OUT CASES      CASES: JSON, a list of {"name": ..., and what differs from DEFAULTS}

On one process a step is one micro-batch, on two ranks two of each. Every rank writes OUT/NAME/rank{n}.pt.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from worker import EOS, PAD, VOCAB, random_pairs, settings, tiny_model, tiny_tokenizer

from alignment import adapters
from alignment.config import LoRAConfig, RouterConfig
from alignment.errors import UserError
from alignment.moe.trainer import ddp_backend
from alignment.training import leave
from dpo.arguments import PreferenceArguments
from dpo.train import ExpertParallelPreferenceTrainer

ROWS_A_STEP = 8
DEFAULTS: dict[str, Any] = {
    "loss": "ot_dpo", "scope": "micro", "reference": "stored", "other": False, "copy": False, "lora": False,
    "dense": False,
    "stage": None, "ep": 0, "pairs": 11, "nll_weight": 0.2, "router": "global",
}  # fmt: skip


def launched_with(folder: Path, stage: int | None, ep: int) -> None:
    """As if this process had been launched with another DeepSpeed config, or without DeepSpeed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()  # under ZeRO 3 the next model would be loaded in parts
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(stage is not None).lower()
    os.environ["ACCELERATE_USE_CPU"] = str(stage is None).lower()
    if stage is None:
        os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
        return
    config = json.loads(Path("configs/deepspeed/zero1-ep2.json").read_text())
    config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config["expert_parallel"] = {"enabled": ep > 0, "autoep_size": max(1, ep)}
    path = folder / f"deepspeed-{os.environ['RANK']}.json"
    path.write_text(json.dumps(config))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)


def dense_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
            bos_token_id=None, pad_token_id=PAD, eos_token_id=EOS,
        )
    )  # fmt: skip


def save_bases(out: Path) -> None:
    """Both policies, and other weights to be held to."""
    for name, model in (("moe", tiny_model()), ("dense", dense_model())):
        with torch.no_grad():
            for gate in (p for key, p in model.named_parameters() if key.endswith("mlp.gate.weight")):
                gate.normal_(std=0.5)  # they start at zero, which is an even choice
        model.save_pretrained(out / "bases" / name)
        tiny_tokenizer().save_pretrained(out / "bases" / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        model.save_pretrained(out / "bases" / f"{name}-other")


def load(out: Path, case: dict[str, Any], other: bool) -> PreTrainedModel:
    name = ("dense" if case["dense"] else "moe") + ("-other" if other else "")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(out / "bases" / name)
    return model


def trainer(out: Path, case: dict[str, Any], model: PreTrainedModel, **options: Any) -> Any:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    loss = case["loss"]
    ours = loss in ("ot_dpo", "dpo") or case["scope"] == "global"
    args = PreferenceArguments(
        **settings(
            out / case["name"], use_cpu=case["stage"] is None, loss_type=[loss], loss_scope=case["scope"],
            reference=case["reference"], nll_weight=case["nll_weight"] if ours else 0.0, learning_rate=1e-2,
            optim="adamw_torch", adam_epsilon=1e-4, num_train_epochs=1, max_grad_norm=1.0, ddp_backend=ddp_backend(),
            router_aux_loss_coef=0.0, ot_reg=0.1,
        ),
        per_device_train_batch_size=ROWS_A_STEP if ranks == 1 else 2,
        gradient_accumulation_steps=1 if ranks == 1 else ROWS_A_STEP // 2 // ranks,
    )  # fmt: skip
    data = random_pairs(case["pairs"])
    return ExpertParallelPreferenceTrainer(
        model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer(),
        router=RouterConfig(balance=0.05, z=0.01, scope=case["router"]), **options,
    )  # fmt: skip


def train(out: Path, case: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"weights_hash": "initial"}
    if case["other"] and case["reference"] == "stored":
        scoring = trainer(out, case, load(out, case, other=True), weights_hash="other")
        scoring.store_references()
        if scoring.is_deepspeed_enabled:
            scoring.model_wrapped.destroy()
        options["reference_hash"] = "other"
        del scoring
        gc.collect()
    if case["reference"] == "live" and (case["other"] or case["copy"] or not case["lora"]):
        options["ref_model"] = load(out, case, other=case["other"])
    model = load(out, case, other=False)
    if case["lora"]:
        options["peft_config"] = adapters.peft_config(LoRAConfig(rank=4, alpha=8), model)
    made = trainer(out, case, model, **options)
    first: dict[str, torch.Tensor] = {}
    if case["stage"] is None:
        made.create_optimizer()
        made.optimizer.register_step_pre_hook(lambda *_: note_gradients(first, made.model))
    made.train()
    made.save_model(str(out / case["name"] / "saved"))
    if case["stage"] is not None:
        made.deepspeed.destroy()
    return {"log": made.state.log_history, "gradients": first}


def note_gradients(first: dict[str, torch.Tensor], model: Any) -> None:
    """Those of the first step."""
    if not first:
        first |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(out: Path, case: dict[str, Any]) -> Any:
    folder = out / case["name"]
    folder.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        launched_with(folder, case["stage"], case["ep"])
    try:
        return train(out, case)
    except (UserError, ValueError) as error:
        return {"refused": str(error)}


def main() -> None:
    out, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    if not (out / "bases").exists():
        save_bases(out)
    for given in json.loads(sys.argv[2]):
        case = DEFAULTS | given
        torch.save(run(out, case), out / case["name"] / f"rank{rank}.pt")
        gc.collect()


if __name__ == "__main__":
    main()
    leave()
