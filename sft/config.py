"""Configuration of supervised fine-tuning. Imports no torch."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from alignment.config import (
    Config,
    EngineConfig,
    JobConfig,
    LoRAConfig,
    ModelConfig,
    SamplingConfig,
    TasksConfig,
    TrainingConfig,
)


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
        "with a weight or a mixture_share, the most passes",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="its share of the mixture's rows, beside the other sources' weights: all have one, or none",
    )
    mixture_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="its share of an epoch's rows, down-sampled to it or repeated within `epochs`; sources without one "
        "stay as they are. 0.2: one row in five",
    )

    @model_validator(mode="after")
    def _one_way_to_draw(self) -> Self:
        given = [name for name in ("count", "cap", "share", "mixture_share") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give at most one of 'count', 'cap', 'share' and 'mixture_share', not {' and '.join(given)}"
            )
        if self.mixture_share is not None and self.weight is not None:
            raise ValueError("give one of 'weight' and 'mixture_share'")
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


class SFTSettings(Config):
    """What a model is fine-tuned from and on, and how."""

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
        beside = [index for index, source in enumerate(self.sources) if source.mixture_share is None]
        without = [index for index in beside if self.sources[index].weight is None]
        if 0 < len(without) < len(beside):
            raise ValueError(f"sources: some have a weight and sources[{without[0]}] has none; give all one, or none")
        return self

    @model_validator(mode="after")
    def _shares_leave_room(self) -> Self:
        shares = [source.mixture_share for source in self.sources if source.mixture_share is not None]
        if len(shares) == len(self.sources) or sum(shares) >= 1:
            raise ValueError("sources: mixture_share is a share beside sources that have none; they need the rest of 1")
        return self


class SFTConfig(SFTSettings, JobConfig):
    """Supervised fine-tuning on packed rows."""


class PromptsConfig(Config):
    """Prompts with answers, and how a model's answers to them are drawn."""

    prompts: str = Field(description="rows with `prompt` and `answer`")
    sampling: SamplingConfig = SamplingConfig(n=4)


class EvaluationConfig(Config):
    """What each model of a sweep is measured on: reasoning in both modes, general ability in the fast one."""

    reasoning: PromptsConfig
    general: PromptsConfig | None = None
    tasks: TasksConfig | None = Field(None, description="general ability by lm-eval; beside `general`, or in its place")
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _something_general(self) -> Self:
        if self.general is None and self.tasks is None:
            raise ValueError("give 'general', 'tasks' or both: the limit is held against them")
        return self


class MixtureSweepConfig(JobConfig):
    """Train one model for each share of long answers in the mixture, and choose the share."""

    base: SFTSettings = Field(description="a config of sft.train without the long answers; it stays whole")
    long: SourceConfig = Field(description="the long answers; `epochs`: the most passes over them")
    shares: list[float] = Field(
        [0, 0.05, 0.1, 0.2, 0.4], min_length=2, description="of an epoch's rows; 0 is what the others are compared with"
    )
    seeds: int = Field(1, ge=1, description="models of each share; the interval then holds for other seeds too")
    limit: float = Field(
        0.01, gt=0, lt=1, description="each general measure falls by less than this: 0.01 is one percentage point"
    )
    launch: Path | None = Field(None, description="a launcher config of configs/accelerate; default: one process")
    evaluation: EvaluationConfig

    @field_validator("shares")
    @classmethod
    def _from_none_upwards(cls, given: list[float]) -> list[float]:
        if given[0] != 0 or given != sorted(set(given)) or given[-1] >= 1:
            raise ValueError("expected rising shares from 0, which the others are compared with, to below 1")
        return given

    @field_validator("long")
    @classmethod
    def _drawn_by_the_sweep(cls, given: SourceConfig) -> SourceConfig:
        if given.model_fields_set - {"rows", "epochs"}:
            raise ValueError("the sweep decides how many rows are drawn: give 'rows' and 'epochs' alone")
        return given

    @model_validator(mode="after")
    def _a_whole_model(self) -> Self:
        if self.base.lora is not None and not self.base.lora.merge:
            raise ValueError("base.lora.merge: the models are evaluated, so their adapters have to be merged")
        return self

    def variant(self, share: float, seed: int) -> SFTConfig:
        """The config of one run, the `seed`-th of its share."""
        drawn = [self.long.model_copy(update={"mixture_share": share})] if share else []
        settings = {name: getattr(self.base, name) for name in SFTSettings.model_fields}
        own = {"sources": [*self.base.sources, *drawn], "seed": self.seed + seed}
        return SFTConfig(**settings | own, output_dir=self.folder(share, seed) / "sft")

    def folder(self, share: float, seed: int) -> Path:
        """Where a run and what is measured of it lie."""
        return self.output_dir / (f"share_{share:g}" + (f"_seed_{seed}" if self.seeds > 1 else ""))


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


GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
BASE, JOINT = "base", "joint"  # beside the groups: no adapter, and one for all of their rows


class AdaptersConfig(JobConfig):
    """One adapter for each language, or group of languages, from one recipe; see sft.adapters."""

    base: SFTSettings = Field(description="a config of sft.train with `lora`; its sources hold all languages")
    groups: dict[str, list[str]] | None = Field(
        None, min_length=1, description="name -> languages; default: a group for each language of the rows"
    )
    identify: list[str] = Field(
        [],
        description="languages that rows without a `language` may be in, which are then identified, as ISO 639-1 "
        "codes; default: such a row is refused",
    )
    minimum_rows: int = Field(50, ge=1, description="a group with fewer rows is refused")
    joint: bool = Field(True, description="train one adapter on the rows of all groups, to compare with")
    launch: Path | None = Field(None, description="a launcher config of configs/accelerate; default: one process")
    evaluation: str | None = Field(
        None, description="held-out rows with `messages` and `language`: every adapter is measured on each language"
    )

    @model_validator(mode="after")
    def _an_adapter(self) -> Self:
        if self.base.lora is None:
            raise ValueError("base.lora is missing: it says what an adapter is")
        return self

    @field_validator("groups")
    @classmethod
    def _groups(cls, given: dict[str, list[str]] | None) -> dict[str, list[str]] | None:
        languages = [language for group in (given or {}).values() for language in group]
        for name, group in (given or {}).items():
            if not GROUP_NAME.fullmatch(name) or name in (BASE, JOINT):
                raise ValueError(f"{name!r} is no name for a group: letters, digits, _ and -, and not base or joint")
            if not group:
                raise ValueError(f"{name!r} has no language")
            if twice := [language for language in group if languages.count(language) > 1]:
                raise ValueError(f"{twice[0]!r} is in two groups, or twice in one")
        return given

    def variant(self, name: str, sources: list[SourceConfig]) -> SFTConfig:
        """The config of one group's run on these rows."""
        settings = {field: getattr(self.base, field) for field in SFTSettings.model_fields}
        return SFTConfig(**settings | {"sources": sources}, seed=self.seed, output_dir=self.output_dir / name)
