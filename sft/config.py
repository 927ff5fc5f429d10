"""Configuration of supervised fine-tuning. Imports no torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from alignment.config import Config, JobConfig, LoRAConfig, ModelConfig, TrainingConfig


class SourceConfig(Config):
    """One source of rows in the mixture. Its usable rows are those that are not rejected, nor dropped as overlong."""

    rows: str = Field(description="a file, a folder or a hub id of rows with `messages`")
    count: int | None = Field(
        None,
        ge=1,
        description="draw exactly this many of its usable rows for the whole run, without replacement, by the seed",
    )
    cap: int | None = Field(None, ge=1, description="as count, but at most this many")
    share: float | None = Field(None, gt=0, le=1, description="draw this share of its usable rows (down-sampling)")
    epochs: float = Field(
        1.0,
        gt=0,
        description="passes over the drawn rows within one epoch of the run: 2 repeats them, 0.5 takes half of them; "
        "with a weight, the most passes",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="its share of the mixture's rows, beside the other sources' weights: all have one, or none",
    )

    @model_validator(mode="after")
    def _one_way_to_draw(self) -> Self:
        given = [name for name in ("count", "cap", "share") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give at most one of 'count', 'cap' and 'share', not {' and '.join(given)}")
        return self


class PackingConfig(Config):
    """How samples become packs."""

    capacity: int = Field(2048, ge=16, description="tokens a pack holds, and a rank trains on in one micro-batch")
    bucket: int = Field(
        64, ge=1, description="a step's packs are padded to its longest, rounded up to a multiple of this"
    )
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop", description="samples longer than the capacity; truncate keeps their first tokens"
    )

    @property
    def limit(self) -> int | None:
        """Tokens that a sample may give at most, where longer ones are truncated."""
        return self.capacity if self.overlong == "truncate" else None


class PrepareConfig(Config):
    """Rows are rendered and tokenized once, on the CPU, into a cache that all ranks map into memory."""

    cache: Path = Field(Path("runs/cache/sft"), description="a folder for the tokenized rows of all runs")
    workers: int | None = Field(None, ge=1, description="processes that render; default: one for each core")


class SFTConfig(JobConfig):
    """Supervised fine-tuning on packed rows."""

    model: ModelConfig
    sources: list[SourceConfig] = Field(min_length=1)
    prepare: PrepareConfig = PrepareConfig()
    packing: PackingConfig = PackingConfig()
    training: TrainingConfig
    lora: LoRAConfig | None = Field(None, description="train an adapter instead of the weights")

    @model_validator(mode="after")
    def _base_of_the_adapter(self) -> Self:
        if self.lora is not None and self.model.path is None:
            raise ValueError("lora: an adapter needs a trained base, 'model.path'; a preset's weights are random")
        return self

    @model_validator(mode="after")
    def _weights_of_all_or_none(self) -> Self:
        without = [index for index, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(f"sources: some have a weight and sources[{without[0]}] has none; give all one, or none")
        return self


class PastConfig(Config):
    """What the adapter was trained on."""

    rows: str = Field(description="a file, a folder or a hub id of rows with `messages`")
    by: str | None = Field(
        None, description="a column, as cluster or language, whose values keep their shares in what is drawn"
    )


class ReplayConfig(Config):
    """Past rows that are trained on again."""

    share: float = Field(0.05, ge=0, le=1, description="of the past rows; 0 for none")
    weight: float = Field(0.1, ge=0, description="beta, of their mean loss")


class EWCConfig(Config):
    """Elastic weight consolidation; see sft.ewc."""

    weight: float = Field(2.0, ge=0, description="lambda; 0 turns it off")
    rows: int = Field(256, ge=1, description="past rows that the Fisher information is taken from, at most")


class GateConfig(Config):
    """Held-out rows that decide whether an update is accepted; see sft.gate."""

    old: str = Field(description="a file, a folder or a hub id of held-out rows with `messages`, like the past ones")
    by: str | None = Field(None, description="a column, as cluster or language: no value of it may lose too much")
    new: str = Field(description="held-out rows like the new ones")
    limit: float = Field(
        0.02, ge=0, description="largest rise of the mean loss in any group of old rows, in nats a token (0.02: 2%)"
    )


class UpdateConfig(JobConfig):
    """An adapter trained on for new rows, without losing what it knows."""

    model: ModelConfig
    shelf: Path = Field(description="a folder of the adapter's versions; see alignment.versions")
    adapter: Path | None = Field(
        None, description="the adapter to start from; needed where the shelf is empty; default: the version in use"
    )
    rows: str = Field(description="new rows with `messages`: a file, a folder or a hub id")
    past: PastConfig
    replay: ReplayConfig = ReplayConfig()
    ewc: EWCConfig = EWCConfig()
    gate: GateConfig
    prepare: PrepareConfig = PrepareConfig()
    packing: PackingConfig = PackingConfig()
    training: TrainingConfig

    @model_validator(mode="after")
    def _base_of_the_adapter(self) -> Self:
        if self.model.path is None:
            raise ValueError("model: an adapter needs its base, 'model.path'; a preset's weights are random")
        return self

    def training_on(self, rows: str) -> SFTConfig:
        """The config of packed training on these rows alone."""
        return SFTConfig(
            output_dir=self.output_dir,
            seed=self.seed,
            model=self.model,
            sources=[SourceConfig(rows=rows)],
            prepare=self.prepare,
            packing=self.packing,
            training=self.training,
        )
