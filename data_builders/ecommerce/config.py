"""Configuration of e-commerce instructions. Imports no torch."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from alignment.config import Config, EngineConfig, JobConfig, SamplingConfig
from data_builders.config import EmbeddingNeighboursConfig, NearDuplicatesConfig, TeacherConfig


class WriterConfig(TeacherConfig):
    """A model that writes one text for each question."""

    enable_thinking: bool | None = Field(None, description="the chat template is given it; null: it is not")
    system_prompt: str | None = Field(None, description="stands before what the job itself says in the system turn")
    sampling: SamplingConfig = SamplingConfig(n=1, temperature=0.7, max_tokens=512)
    engine: EngineConfig = EngineConfig(max_model_len=4096)

    @model_validator(mode="after")
    def _one_text_each(self) -> Self:
        if self.sampling.n != 1:
            raise ValueError(f"sampling.n: a writer is asked for 1 text, not for {self.sampling.n}")
        return self


class TableConfig(Config):
    """A table: CSV, JSONL, Parquet, a hub id, or product pairs in Ditto's format (.txt)."""

    rows: str = Field(description="a file (.csv, .tsv, .txt, also .gz, .jsonl, .parquet), a folder or a hub id")
    columns: dict[str, str] = Field({}, description="our name -> the table's; default: the same name")
    values: dict[str, str] = Field({}, description="our name -> what holds of every row, such as currency: IDR")


class TablesConfig(Config):
    """What instructions are made of."""

    products: list[TableConfig] = Field(
        [], description="title, and any of id, brand, price, currency, category, description, attributes, language"
    )
    reviews: list[TableConfig] = Field([], description="text, and any of rating, sentiment, language")
    pairs: list[TableConfig] = Field([], description="left, right, label (1: the same product); language")
    queries: list[TableConfig] = Field([], description="query, title, label (1: relevant); language")

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not (self.products or self.reviews or self.pairs or self.queries):
            raise ValueError("give a table: products, reviews, pairs or queries")
        return self


class RewriteConfig(Config):
    """Instructions in other words, by a model."""

    writer: WriterConfig
    share: float = Field(0.5, gt=0, le=1, description="share of the instructions that are rewritten")
    styles: dict[str, str] = Field(
        {
            "formal": "formally and politely",
            "casual": "casually, as a shopper types on a phone",
            "terse": "as tersely as possible",
            "seller": "as a seller asks an assistant in a shop's back office",
        },
        min_length=1,
        description="name -> how, put behind `Rewrite the instruction`",
    )


class ChainOfThoughtConfig(Config):
    """Answers that think first: arithmetic by template, other verifiable answers by a teacher."""

    share: float = Field(gt=0, le=1, description="share of the rows with a verifiable answer")
    teacher: WriterConfig | None = Field(None, description="default: arithmetic alone")


class MixtureOfAgentsConfig(Config):
    """Answers by several models that one sums up (Wang et al. 2024, arXiv 2406.04692), in one layer."""

    proposers: list[WriterConfig] = Field(min_length=1)
    aggregator: WriterConfig


class InstructionsConfig(JobConfig):
    """E-commerce instructions of twelve families in several languages; see data_builders.ecommerce."""

    tables: TablesConfig
    rows: int = Field(ge=1, description="rows wanted")
    families: dict[str, float] | None = Field(
        None, description="family -> share; default: the recipe's shares of the families that the tables allow"
    )
    languages: dict[str, float] = Field(
        {"en": 1, "zh": 1, "id": 1, "ms": 1, "th": 1, "vi": 1, "tl": 1, "pt": 1},
        min_length=1,
        description="language of the instruction -> share",
    )
    cross_lingual: bool = Field(
        True, description="false: a table row whose language is known serves instructions in that language alone"
    )
    spare: float = Field(0.25, ge=0, description="drafts beyond each quota, as a share of it, for what is rejected")
    longest: int = Field(600, ge=1, description="words and signs of a question or an answer, at most")
    rewrite: RewriteConfig | None = None
    chain_of_thought: ChainOfThoughtConfig | None = None
    mixture_of_agents: MixtureOfAgentsConfig | None = Field(
        None, description="default: no task whose answer does not follow from the tables"
    )
    near: NearDuplicatesConfig | None = Field(
        NearDuplicatesConfig(similarity=0.9),
        description="near-duplicate questions go; those of one template share its words; null: none",
    )
    embedding: EmbeddingNeighboursConfig | None = Field(
        None, description="also questions alike by their embeddings; null: none"
    )

    @field_validator("families", "languages")
    @classmethod
    def _shares(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        if given is not None and (min(given.values(), default=0) < 0 or sum(given.values()) <= 0):
            raise ValueError("shares are 0 or more, and not all 0; they need not add up to 1")
        return given
