"""Configuration of selection. Imports no torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from alignment.config import Config, JobConfig
from data_builders.config import EmbeddingConfig


class VectorsConfig(Config):
    """Vectors that are there already: .npy files of [rows, dimensions], float16 or float32, in the rows' order."""

    pool: Path
    target: Path | None = None
    training: Path | None = None
    answers: Path | None = Field(None, description="of the pool's answers, for method dbscan")


class BoundsConfig(Config):
    """Rows to draw of one group."""

    minimum: int = Field(0, ge=0)
    maximum: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum: {self.maximum} is below the minimum, {self.minimum}")
        return self


class ConstraintsConfig(Config):
    """Bounds that every method keeps."""

    languages: dict[str, BoundsConfig] = Field(default_factory=dict, description="by the rows' `language`")
    domains: dict[str, BoundsConfig] = Field(default_factory=dict, description="by the rows' `domain_column`")
    domain_column: str = "domain"


class DBSCANConfig(Config):
    """Compass-v2's clusters of questions; see data_builders.selection.density."""

    components: int = Field(32, ge=2, description="of the PCA before it")
    min_samples: int = Field(10, ge=2, description="rows, itself among them, that make a row a core point")
    eps: float | None = Field(None, gt=0, description="their distance at most; default: what `core_share` says")
    core_share: float = Field(0.5, gt=0, le=1, description="share of the rows that are to be core points")
    sample: int = Field(
        50_000, ge=100, description="rows among which core points are found; all are compared with them"
    )
    answers: bool = Field(True, description="a row weighs less, the more its answer is like its question")
    answer_column: str | None = Field(None, description="default: the assistant's turns of `messages`")


class SelectConfig(JobConfig):
    """Rows of an auxiliary pool, drawn so that training on them is like what the model is used for."""

    rows: str = Field(description="the pool: a file, a folder or a hub id of rows of any kind")
    target: str | None = Field(None, description="a sample of the usage; default: the pool stands for itself")
    training: str | None = Field(None, description="rows that are trained on with those drawn; none for an adapter")
    column: str | None = Field(None, description="default: the first of messages, prompt, question, problem, text")
    turns: Literal["user", "all"] = Field("user", description="which messages make a row's text")
    method: Literal["semantic_gap", "dbscan", "linguistic", "random"] = "semantic_gap"
    budget: int = Field(ge=1, description="rows to draw")
    clusters: int | list[int] = Field(
        100, description="of the target: a number, or several of which the highest silhouette decides"
    )
    inside: float = Field(0.99, gt=0, le=1, description="share of the target that is to count as inside its clusters")
    weighting: Literal["gap", "inverse"] = Field(
        "gap", description="what a cluster with a deficit weighs: the deficit, or 1 / (its training rows + 1)"
    )
    dbscan: DBSCANConfig = DBSCANConfig()
    constraints: ConstraintsConfig = ConstraintsConfig()
    embedding: EmbeddingConfig | None = Field(None, description="the model that makes the vectors")
    vectors: VectorsConfig | None = Field(None, description="in place of `embedding`: vectors that are there already")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.embedding is None) == (self.vectors is None):
            raise ValueError("give one of 'embedding' and 'vectors'")
        if self.method in ("semantic_gap", "linguistic") and self.target is None:
            raise ValueError(f"method {self.method} needs 'target', a sample of the usage")
        if min(self.cluster_candidates, default=0) < 2:
            raise ValueError("clusters: give a number of 2 or more, or several")
        for name in ("target", "training"):
            if self.vectors is not None and (getattr(self, name) is None) != (getattr(self.vectors, name) is None):
                raise ValueError(f"'{name}' and 'vectors.{name}' go together")
        answers = self.vectors is not None and self.vectors.answers is not None
        if self.vectors is not None and self.method == "dbscan" and self.dbscan.answers != answers:
            raise ValueError("'dbscan.answers: true' and 'vectors.answers' go together")
        return self

    @property
    def cluster_candidates(self) -> list[int]:
        return [self.clusters] if isinstance(self.clusters, int) else self.clusters
