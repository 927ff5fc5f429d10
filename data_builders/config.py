"""Configuration of the data builders. Imports no torch."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignment.config import Config, EngineConfig, JobConfig, SamplingConfig, addresses
from alignment.questions import QuestionSet


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

    prompts: int = Field(0, ge=0, description="rows set aside as prompts, drawn by the seed; the rest become SFT rows")


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
    near: NearDuplicatesConfig | None = Field(NearDuplicatesConfig(), description="null: exact duplicates alone")
    workers: int | None = Field(None, ge=1, description="processes that hash; default: one for each core")


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
        return addresses(given)

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
        description="near-duplicate questions go; those of one template share its words; null: exact duplicates alone",
    )

    @field_validator("families", "languages")
    @classmethod
    def _shares(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        if given is not None and (min(given.values(), default=0) < 0 or sum(given.values()) <= 0):
            raise ValueError("shares are 0 or more, and not all 0; they need not add up to 1")
        return given
