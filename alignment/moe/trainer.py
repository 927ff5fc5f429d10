"""Expert parallelism for any transformers Trainer: checks before and after the engine is made, and the right save.

    class Trainer(ExpertParallelTrainerMixin, SFTTrainer): ...

The mixin comes first among the bases. Expert parallelism is asked for by `expert_parallel` in the DeepSpeed config that
`accelerate launch` names; without it every method is the plain trainer's.
"""

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from alignment.errors import UserError
from alignment.moe import adapters
from alignment.moe.autoep import (
    autoep_layers,
    check_model,
    check_replaced,
    freeze_correction_bias,
    install_ernie_preset,
)
from alignment.moe.export import export_model


def expert_parallel_size() -> int:
    """The expert-parallel size that the launcher's DeepSpeed config asks for; 1 where it asks for none."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 1
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None:
        return 1
    section = json.loads(Path(path).read_text()).get("expert_parallel", {})
    return int(section.get("autoep_size", 1)) if section.get("enabled") else 1


def ddp_backend() -> str | None:
    """What `TrainingArguments.ddp_backend` must be on this rank; call it before they are created.

    Left out on CPU ranks, each rank would take itself for the only one. It also keeps DeepSpeed from compiling its
    shared-memory all-reduce (a minute and a half on the first launch, for inference only).
    """
    if torch.cuda.is_available():
        return None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    if "LOCAL_RANK" not in os.environ:
        return None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return "gloo"


class ExpertParallelTrainerMixin(Trainer):
    """Put before a Trainer class; see the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.expert_parallel_size = expert_parallel_size()
        if self.expert_parallel_size > 1:
            install_ernie_preset()  # before TRL makes an engine of the reference model
        super().__init__(*args, **kwargs)
        if self.expert_parallel_size > 1:
            self._check_launch()
            if isinstance(self.model, PeftModel):
                adapters.prepare(self.model, self.accelerator.state.deepspeed_plugin.zero_stage)
            check_model(self._module, self.expert_parallel_size, self.args.world_size)
            freeze_correction_bias(self._module)

    @property
    def _module(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model)

    def _check_launch(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if not self.is_deepspeed_enabled:
            raise UserError(
                "expert parallelism was asked for, but accelerate has dropped DeepSpeed\n"
                "unset ACCELERATE_USE_CPU, and use_cpu in the accelerate config and the training arguments"
            )
        if self.args.world_size != launched:
            raise UserError(
                f"{launched} processes were launched, but the trainer sees {self.args.world_size}\n"
                "set ddp_backend=alignment.moe.trainer.ddp_backend() in the training arguments when there is no GPU"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = cast(Any, super())._prepare_for_training(*args, **kwargs)
        if self.expert_parallel_size > 1:
            check_replaced(self._module)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Resume every weight: transformers saves experts under the hub's names, and resumes without them."""
        if self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            cast(Any, super())._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model to a Hugging Face folder, or its adapter; collective under expert parallelism."""
        if not any(autoep_layers(self._module)):
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or cast(str, self.args.output_dir)
        if isinstance(self.model, PeftModel):
            adapters.save_adapter(self.model, Path(folder))
        else:
            export_model(self._module, Path(folder))
        if self.args.should_save and self.processing_class is not None:
            cast(Any, self.processing_class).save_pretrained(folder)
