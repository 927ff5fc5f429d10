"""Configuration of the data builders. Imports no torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignment.config import Config, EngineConfig, JobConfig, RequestsConfig, SamplingConfig, server_addresses
from alignment.questions import QuestionSet
from alignment.rows import is_hub_id

SPAN = r"[1-9]\d*[hdw]"  # of time


class SynthesizeConfig(JobConfig):
    """Multilingual shopping arithmetic; the four training sets share no problem with each other or the held-out one."""

    languages: list[str] = Field(default=["en", "zh", "id", "ms", "th", "vi", "tl", "pt"], min_length=1)
    templates: list[str] | None = Field(None, description="default: all")
    short_rows: int = Field(ge=1, description="SFT rows with short worked answers")
    direct_rows: int = Field(ge=1, description="SFT rows with the result alone, without its working")
    long_rows: int = Field(ge=1, description="SFT rows with thinking before the answer")
    reward_prompts: int = Field(ge=1, description="prompts whose graded samples train the reward models")
    prompts: int = Field(ge=1, description="prompts of online preference training")
    held_out: int = Field(ge=1, description="prompts of evaluation")


class PairingConfig(Config):
    """Which samples of a prompt become pairs; see data_builders.pairs. Math prompts go by their verdicts."""

    math_rule: bool = Field(
        True, description="false: prompts with answers are paired by reward alone too, their verdicts only noted"
    )
    policy: Literal["best_worst", "best_quantile", "best_sigma"] = Field(
        "best_worst", description="what is rejected where no answer is known: the lowest score, or nearest to a target"
    )
    quantile: float = Field(0.25, ge=0, le=1, description="best_quantile: the target among the prompt's scores")
    sigmas: float = Field(2.0, ge=0, description="best_sigma: the target is mean - sigmas x standard deviation")
    minimum_margin: float = Field(0.0, ge=0, description="chosen - rejected, at least, in units of the reward")
    minimum_margin_sigmas: float = Field(0.0, ge=0, description="the same in standard deviations of the prompt")
    longest_ratio: float | None = Field(
        None, ge=1, description="length control: tokens of the longer over the shorter of a pair, at most"
    )
    per_prompt: int = Field(1, ge=1, description="pairs a prompt, at most")


class BuildConfig(Config):
    """How prompts become pairs: sampled, judged, paired."""

    reward_models: list[str] = Field(default_factory=list, description="folders; their mean score ranks the samples")
    score_batch_tokens: int = Field(16384, ge=64)
    pairing: PairingConfig = PairingConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _reward_to_pair_by(self) -> Self:
        if not self.pairing.math_rule and not self.reward_models:
            raise ValueError("pairing.math_rule: false pairs by reward alone, and 'reward_models' names none")
        return self


class SourceConfig(Config):
    """Prompts of one origin."""

    rows: str = Field(description="a file, a folder or a hub id of rows with `prompt` and, for the math rule, `answer`")
    quota: int | None = Field(None, ge=1, description="prompts to draw; default: all")
    kind: Literal["general", "bad_case", "math", "ecommerce"] | None = Field(
        None, description="what the rows become; default: what they say"
    )


class PreferencesConfig(BuildConfig, JobConfig):
    """Preference pairs from a policy's own samples."""

    model: str = Field(description="the folder of the policy that answers")
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompts: str | None = Field(None, description="rows with `prompt` and, for the math rule, `answer`")
    sources: dict[str, SourceConfig] = Field(
        default_factory=dict, description="in place of `prompts`: several sources, name -> rows, quota, kind"
    )
    evaluation_share: float = Field(
        0.0, ge=0, lt=1, description="share of the prompts whose pairs go to evaluation.jsonl"
    )
    shard: str | None = Field(
        None, pattern=r"^[1-9]\d*/[1-9]\d*$", description="I/N: sample and judge every N-th chunk, as `--shard I/N`"
    )

    @model_validator(mode="after")
    def _prompts_or_sources(self) -> Self:
        if (self.prompts is None) == (not self.sources):
            raise ValueError("give one of 'prompts' and 'sources'")
        if self.shard is not None and int(self.shard.split("/")[0]) > int(self.shard.split("/")[1]):
            raise ValueError(f"shard: {self.shard}: the first number is 1 to the second")
        return self

    @property
    def all_sources(self) -> dict[str, SourceConfig]:
        return self.sources or {"": SourceConfig(rows=str(self.prompts))}

    @property
    def run_dir(self) -> Path:
        """Where the job keeps its book: a shard's beside the samples that all share."""
        if self.shard is None:
            return self.output_dir
        return self.output_dir / "shards" / self.shard.replace("/", "-of-")


class QuestionsConfig(QuestionSet, JobConfig):
    """SFT rows and prompts from rows of questions with worked answers."""

    prompts: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0, description="rows set aside as prompts, drawn by the seed, or all; the rest become SFT rows"
    )


class EmbeddingConfig(Config):
    """A model that makes vectors of texts, and where they are kept; see data_builders.embeddings."""

    model: str = Field(description="a sentence-transformers folder or hub id; of endpoints: the name that they serve")
    backend: Literal["sentence_transformers", "vllm", "endpoint"] = Field(
        "sentence_transformers", description="both of the first run the model in this process"
    )
    revision: str | None = Field(None, description="of a hub id; default: its main branch")
    endpoints: list[str] = Field([], description="addresses of servers of /v1/embeddings, as http://host:8000")
    requests: RequestsConfig = RequestsConfig()
    prefix: str = Field("", description="stands before each text, as the model was trained: 'query: ' for E5")
    batch_size: int = Field(32, ge=1, description="texts that the model, or one request, takes at once")
    max_tokens: int | None = Field(
        None, ge=2, description="longer texts are cut, and counted; default: the model's own maximum"
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="of the vectors on disk and, on a GPU, of the model"
    )
    cache: Path = Field(Path("runs/cache/embeddings"), description="a folder that jobs share")

    @model_validator(mode="after")
    def _endpoints_and_backend(self) -> Self:
        if (self.backend == "endpoint") != bool(self.endpoints):
            raise ValueError("'endpoints' and backend: endpoint go together")
        if self.revision is not None and (self.backend == "endpoint" or not is_hub_id(self.model)):
            raise ValueError(f"revision: {self.model!r} is no hub id, org/name")
        return self

    @field_validator("endpoints")
    @classmethod
    def _addresses(cls, given: list[str]) -> list[str]:
        return server_addresses(given, "embedding.endpoints")


class EmbeddingNeighboursConfig(EmbeddingConfig):
    """Rows alike by the cosine of their embeddings."""

    similarity: float = Field(
        0.9, gt=0, le=1, description="cosine of two rows, at least; models differ in it: measure it for yours"
    )


class EmbedConfig(JobConfig):
    """Embeddings of rows, made ahead of the jobs that use them."""

    rows: str = Field(description="a file, a folder or a hub id of rows of any kind")
    column: str | None = Field(None, description="default: the first of messages, prompt, question, problem, text")
    turns: Literal["user", "all"] = Field("user", description="which messages count")
    embedding: EmbeddingConfig


class EvaluationFileConfig(Config):
    """Rows that must not be trained on."""

    rows: str = Field(description="a file, a folder or a hub id")
    column: str | None = Field(None, description="default: the first of messages, prompt, question, problem, text")


class DecontaminateConfig(JobConfig):
    """Rows without those that repeat an evaluation row; see data_builders.overlap."""

    rows: str = Field(description="a file, a folder or a hub id of rows of any kind")
    column: str | None = Field(None, description="default: the first of messages, prompt, question, problem, text")
    turns: Literal["user", "all"] = Field("user", description="which messages are searched")
    evaluation: dict[str, EvaluationFileConfig] = Field(min_length=1, description="name -> rows")
    words: float = Field(0.6, gt=0, le=1, description="share of an evaluation row, at least, in its own words")
    renumbered: float = Field(0.75, gt=0, le=1, description="the same where numbers do not count")
    embedding: EmbeddingNeighboursConfig | None = Field(None, description="also paraphrases and translations")
    workers: int | None = Field(None, ge=1, description="processes that search; default: one for each core")


class NearDuplicatesConfig(Config):
    """Near-duplicates by MinHash (Broder 1997, On the resemblance and containment of documents)."""

    similarity: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of two rows' runs of words, at least")
    run: int = Field(3, ge=1, description="words of a run")
    permutations: int = Field(128, ge=16, description="hash functions; more estimate the similarity better")


class DeduplicateConfig(JobConfig):
    """Rows of which each says something new; of those alike the first stays."""

    rows: str = Field(description="a file, a folder or a hub id of rows of any kind")
    column: str | None = Field(None, description="default: the first of messages, prompt, question, problem, text")
    turns: Literal["user", "all"] = Field("user", description="which messages are compared")
    near: NearDuplicatesConfig | None = Field(NearDuplicatesConfig(), description="null: no near-duplicates")
    embedding: EmbeddingNeighboursConfig | None = Field(None, description="also those alike by their embeddings")
    workers: int | None = Field(None, ge=1, description="processes that hash; default: one for each core")


class LanguagesConfig(JobConfig):
    """Rows whose sentences keep to one language; see alignment.languages."""

    rows: str = Field(description="a file, a folder or a hub id of rows of any kind")
    column: str | None = Field(None, description="default: the first of messages, prompt, question, problem, text")
    turns: Literal["user", "assistant", "all"] = Field("assistant", description="which messages are checked")
    languages: list[str] = Field(
        default=["en", "zh", "id", "ms", "th", "vi", "tl", "pt"], description="what may occur, ISO 639-1 codes"
    )
    language: str | None = Field(
        None, description="what all rows should be in; default: a row's `language`, or what most of its text is in"
    )
    stray: float = Field(0.2, ge=0, lt=1, description="share of a row's letters in other languages, at most")
    confidence: float = Field(
        0.8, gt=0, le=1, description="how likely a sentence is in another language, at least, to count as one that is"
    )
    label: bool = Field(True, description="write `language` and `language_confidence` where a row has no `language`")
    workers: int | None = Field(None, ge=1, description="processes that identify; default: one for each core")

    @model_validator(mode="after")
    def _language_in_question(self) -> Self:
        if self.language is not None and self.language not in self.languages:
            raise ValueError(f"language: {self.language!r} is not among 'languages'")
        return self


class RolloutsConfig(Config):
    """Answers of the model that is to learn: the share that is right says how hard a query is for it."""

    model: str = Field(description="a model folder")
    dtype: Literal["float32", "bfloat16"] = "float32"
    mode: Literal["fast", "deep"] | None = Field(
        None, description="the chat template's thinking switch, off or on; default: not given"
    )
    sampling: SamplingConfig = SamplingConfig(n=8)
    engine: EngineConfig = EngineConfig()


class TeacherConfig(Config):
    """The model whose answers are trained on: a folder for `engine`, or a name at servers of chat completions."""

    model: str = Field(description="a model folder, or with `endpoints` the model's name there")
    dtype: Literal["float32", "bfloat16"] = "float32"
    endpoints: list[str] = Field([], description="any OpenAI-compatible servers, as http://host:8000")
    request: dict[str, Any] = Field(
        default_factory=dict, description="with `endpoints`: more keys of each request; null leaves one out"
    )
    enable_thinking: bool | None = Field(
        True, description="the teacher's chat template is given it; null: it is not, for servers that know none"
    )
    system_prompt: str | None = Field(None, description="for the teacher alone; what is trained on has another")
    sampling: SamplingConfig = SamplingConfig(n=4, max_tokens=8192)
    engine: EngineConfig = EngineConfig(max_model_len=10240)

    @field_validator("endpoints")
    @classmethod
    def _addresses(cls, given: list[str]) -> list[str]:
        return server_addresses(given, "teacher.endpoints")

    @model_validator(mode="after")
    def _one_way_to_ask(self) -> Self:
        if self.endpoints and self.engine.endpoints:
            raise ValueError("'endpoints' are servers of any kind, 'engine.endpoints' those of a folder: give one")
        if self.endpoints and self.sampling.thinking_budget is not None:
            raise ValueError("sampling.thinking_budget: servers of chat completions keep none")
        if self.request and not self.endpoints:
            raise ValueError("request: only what is sent to 'endpoints' has further keys")
        return self


class LongCoTConfig(JobConfig):
    """Rows with thinking before the answer, for the questions that the model sometimes answers."""

    sources: dict[str, SourceConfig] = Field(min_length=1, description="name -> rows with `prompt` and `answer`")
    rollouts: RolloutsConfig
    alpha: float = Field(0.1, ge=0, le=1, description="lowest pass rate of a query that is kept")
    beta: float = Field(0.9, ge=0, le=1, description="highest pass rate of a query that is kept")
    teacher: TeacherConfig
    keep: Literal["shortest", "first", "all"] = Field(
        "shortest", description="of the teacher's good answers to a query"
    )
    system_prompts: list[str] | None = Field(
        None, min_length=1, description='one is drawn for each row; "": none; default: the chat template\'s switch'
    )
    languages: list[str] = Field(
        default=["en", "zh", "id", "ms", "th", "vi", "tl", "pt"],
        min_length=2,
        description="languages that queries and summaries may be in",
    )

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.alpha > self.beta:
            raise ValueError(f"alpha: {self.alpha} is above beta, {self.beta}")
        return self


class UsageConfig(Config):
    """Rows of usage, and where their texts lie."""

    rows: str = Field(description="a file, a folder or a hub id of rows of any kind")
    vectors: Path | None = Field(
        None, description="an .npy file [rows, dimensions], a line for each row; default: embedded by `embedding`"
    )


class PerformanceConfig(Config):
    """How well the model did on each row: whether it was right, a score, a loss."""

    column: str = Field(description="a number or true or false in every row of reference and stream")
    better: Literal["higher", "lower"] = "higher"
    pair: str | None = Field(
        None, description="a column, as id, that names the same question in both: then differences are tested"
    )


class TriggerConfig(Config):
    """What raises an alarm."""

    by: Literal["drift", "performance", "both", "either"] = "drift"
    minimum_shift: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a window's rows, beyond chance, that went to other clusters, at least; 0: need be none",
    )
    minimum_fall: float = Field(0.0, ge=0, description="fall of the mean performance, at least, in its own units")


class DriftConfig(JobConfig):
    """Windows of usage against a reference; see data_builders.drift."""

    reference: UsageConfig
    stream: UsageConfig
    column: str | None = Field(None, description="default: the first of messages, prompt, question, problem, text")
    turns: Literal["user", "all"] = Field("user", description="which messages are embedded")
    embedding: EmbeddingConfig | None = Field(None, description="how texts are embedded that come without vectors")
    time: str | None = Field(
        None, description="a column with ISO 8601 times or seconds since 1970; default: the order of the rows"
    )
    window: int | str = Field(1000, description="rows of a window, or its span in hours, days or weeks: 12h, 1d, 2w")
    minimum_rows: int = Field(100, ge=20, description="windows of fewer rows are not tested")
    clusters: int = Field(32, ge=2, description="K-means clusters, found on one half of the reference")
    tests: list[Literal["mmd", "classifier", "jensen_shannon"]] = Field(
        ["mmd", "classifier", "jensen_shannon"], min_length=1
    )
    level: float = Field(0.05, gt=0, lt=1, description="chance that a stream like the reference raises any alarm")
    permutations: int = Field(4999, ge=99, description="of each test")
    block: int = Field(500, ge=20, description="rows of each side in a block of the mmd")
    performance: PerformanceConfig | None = None
    trigger: TriggerConfig = TriggerConfig()
    rows_to_add: int = Field(1000, ge=1, description="rows drawn from the clusters that grew, at most")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.trigger.by != "drift" and self.performance is None:
            raise ValueError(f"trigger.by: {self.trigger.by} needs 'performance'")
        if self.embedding is None and None in (self.reference.vectors, self.stream.vectors):
            raise ValueError("give 'embedding', or 'vectors' of both reference and stream")
        if len(set(self.tests)) < len(self.tests):
            raise ValueError("tests: one is given twice")
        return self

    @field_validator("window")
    @classmethod
    def _rows_or_span(cls, window: int | str) -> int | str:
        if re.fullmatch(SPAN if isinstance(window, str) else r"[1-9]\d*", str(window)) is None:
            raise ValueError("expected a number of rows or a span such as 12h, 1d or 2w")
        return window

    @model_validator(mode="after")
    def _time_of_a_span(self) -> Self:
        if isinstance(self.window, str) and self.time is None:
            raise ValueError(f"window: {self.window} needs 'time', the column with the rows' times")
        return self
