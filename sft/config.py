"""Configuration of supervised fine-tuning. Imports no torch."""

from typing import Literal

from pydantic import Field

from alignment.config import Config, JobConfig, ModelConfig, TrainingConfig


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
