"""One rank of a test: the packed forward inside engines, case after case; a case is the ZeRO stage, 0 for no engine.

    forward_worker.py OUT BATCH STAGE...

With experts split between the ranks where the launcher asks for it. Rank 0 writes OUT/result.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from worker import random_pairs, settings, tiny_model, tiny_tokenizer

from alignment.config import RouterConfig
from alignment.moe.trainer import ddp_backend
from alignment.training import leave
from dpo.arguments import PreferenceArguments
from dpo.train import ExpertParallelPreferenceTrainer

PAIRS, EPOCHS = 11, 2  # in global batches of 8: the second has three pairs, and fillers
NAMES = ("loss", "grad_norm", "rewards/margins", "nll", "ot/mass", "router/balance_loss", "router/z_loss")


def use_stage(folder: Path, stage: int) -> None:
    """The repository's config of two ranks with another ZeRO stage."""
    AcceleratorState._reset_state()
    config = json.loads(Path("configs/deepspeed/zero1-ep2.json").read_text())
    config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    path = folder / f"deepspeed-{os.environ['RANK']}.json"
    path.write_text(json.dumps(config))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)


def train(folder: Path, batch: int, stage: int) -> dict[str, Any]:
    if stage:
        use_stage(folder, stage)
    options = {"optim": "adamw_torch", "learning_rate": 2e-3, "adam_epsilon": 1e-6, "max_grad_norm": 1.0}
    arguments = PreferenceArguments(
        **settings(folder / f"stage{stage}", num_train_epochs=EPOCHS, ddp_backend=ddp_backend(), **options),
        loss_type=["ot_dpo"], nll_weight=0.2, per_device_train_batch_size=batch, gradient_accumulation_steps=2,
    )  # fmt: skip
    arguments.remove_unused_columns = False
    trainer = ExpertParallelPreferenceTrainer(
        model=tiny_model(),
        args=arguments,
        train_dataset=random_pairs(PAIRS),
        processing_class=tiny_tokenizer(),
        weights_hash="tiny",
        router=RouterConfig(balance=0.05, z=0.01, scope="global"),
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "figures": {name: [float(line[name]) for line in lines] for name in NAMES},
        "packed": trainer.data_collator.packed,
        "engine": type(trainer.model_wrapped).__name__,
    }


def main() -> None:
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    results = {stage: train(folder, batch, int(stage)) for stage in sys.argv[3:]}
    if os.environ.get("RANK", "0") == "0":
        (folder / "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave()
