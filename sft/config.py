"""Configuration of supervised fine-tuning. Imports no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from alignment.config import Config, JobConfig, LoRAConfig, ModelConfig, TrainingConfig


class SourceConfig(Config):
    """One source of rows in the mixture."""

    rows: str = Field(description="a file, a folder or a hub id of rows with `messages`")
    count: int | None = Field(None, ge=1, description="draw this many rows, by the seed; default: all")


class PackingConfig(Config):
    """How samples become packs."""

    capacity: int = Field(2048, ge=16, description="tokens a pack holds, and a rank trains on in one micro-batch")
    overlong: Literal["drop", "error"] = Field("drop", description="samples longer than the capacity")


class SFTConfig(JobConfig):
    """Supervised fine-tuning on packed rows."""

    model: ModelConfig
    sources: list[SourceConfig] = Field(min_length=1)
    packing: PackingConfig = PackingConfig()
    training: TrainingConfig
    lora: LoRAConfig | None = Field(None, description="train an adapter instead of the weights")

    @model_validator(mode="after")
    def _base_of_the_adapter(self) -> Self:
        if self.lora is not None and self.model.path is None:
            raise ValueError("lora: an adapter needs a trained base, 'model.path'; a preset's weights are random")
        return self
