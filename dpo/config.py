"""Configuration of preference training. Imports no torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from alignment.config import Config, JobConfig, LoRAConfig, ModelConfig, TrainingConfig
from data_builders.config import BuildConfig


class TransportConfig(Config):
    """OT-DPO's token weights (arXiv 2505.18720): entropic unbalanced transport between hidden states."""

    reg: float = Field(1.0, gt=0, description="entropic regularisation")
    reg_m: float = Field(0.2, gt=0, description="penalty on mass that is not transported")
    metric: Literal["euclidean", "sqeuclidean", "cosine"] = Field("euclidean", description="cost between two states")
    cost_norm: Literal["max", "none", "reference"] = Field(
        "max", description="what a pair's costs are divided by; reference: as the published code does"
    )
    total: Literal["min", "own", "none"] = Field(
        "min", description="sum of a side's weights: the shorter length, its own length (DPO's), or the plan's own mass"
    )
    mix: float = Field(1.0, ge=0, le=1, description="0: weights of one (plain DPO), 1: transport's weights")

    @model_validator(mode="after")
    def _reference_is_euclidean(self) -> Self:
        if self.cost_norm == "reference" and self.metric != "euclidean":
            raise ValueError(f"cost_norm: reference is defined for metric euclidean, not {self.metric}")
        return self


class LossConfig(Config):
    """The preference loss."""

    type: str = Field("ot_dpo", description="ot_dpo, dpo, dpo_uniform, dpo_norm, or a loss of TRL's DPOTrainer")
    beta: float = Field(0.1, gt=0)
    nll_weight: float = Field(0.0, ge=0, description="weight of the chosen answers' negative log-likelihood")
    transport: TransportConfig = TransportConfig()
    scope: Literal["micro", "global"] = Field(
        "micro", description="aot and aot_unpaired sort the pairs of a rank's micro-batch, or all pairs of the step"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs taken for swapped; exo_pair (which needs it), robust, aot"
    )


class ReferenceConfig(Config):
    """What the policy is held to: the log-probabilities that its own are compared with."""

    model: str | None = Field(None, description="a model folder; default: the weights that training starts from")
    kind: Literal["stored", "live"] = Field(
        "stored",
        description="stored: one log-probability a token, in a file made before the first step; live: a forward at "
        "every step, of a frozen copy or with the adapter switched off",
    )


class DPOConfig(JobConfig):
    """Offline preference training on pairs."""

    model: ModelConfig
    rows: str = Field(description="a file, a folder or a hub id of rows with `prompt`, `chosen` and `rejected`")
    evaluation: str | None = Field(None, description="rows as these, measured before and after, never trained on")
    loss: LossConfig = LossConfig()
    reference: ReferenceConfig = ReferenceConfig()
    lora: LoRAConfig | None = Field(None, description="train an adapter instead of the weights")
    batch_size: int = Field(8, ge=1, description="pairs a rank holds in one micro-batch")
    max_length: int = Field(1024, ge=16, description="longer pairs are dropped and counted")
    training: TrainingConfig

    @model_validator(mode="after")
    def _base_of_the_adapter(self) -> Self:
        if self.lora is not None and self.model.path is None:
            raise ValueError("lora: an adapter needs a trained base, 'model.path'; a preset's weights are random")
        return self


class RoundConfig(Config):
    """What one round of online training samples and pairs."""

    prompts: int = Field(ge=1, description="different prompts drawn for a round")
    redraw: Literal["uniform", "pass_rate"] = Field(
        "pass_rate", description="from round 2 on: each prompt once before any comes again, or by what its samples were"
    )
    logprob_gate: float | None = Field(
        None,
        gt=0,
        description="mean gap a token, in nats, between engine and transformers that stops the run; "
        "default: 1e-4 in float32, 0.02 in bfloat16",
    )


class StopConfig(Config):
    """What ends online training before its last round; by default nothing does."""

    patience: int | None = Field(
        None, ge=1, description="rounds in a row without a gain in held-out pass@1; the best round's model is kept"
    )
    kl: float | None = Field(
        None, gt=0, description="KL divergence from the starting policy, nats an answer; a round beyond it is not kept"
    )


class EvaluationConfig(Config):
    """Evaluation after each round."""

    prompts: str = Field(description="rows with `prompt` and `answer`, none of which is trained on")
    n: int = Field(8, ge=1, description="samples a prompt")
    baseline: str | None = Field(
        None, description="an alignment.evaluate run of the starting policy on these prompts; default: made first"
    )


class OnlineConfig(BuildConfig, JobConfig):
    """Online preference training: rounds of sample, score, pair, train and load."""

    model: str = Field(description="the folder of the policy that the first round starts from")
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompts: str = Field(description="rows with `prompt` and, for the math rule, `answer`")
    evaluation: EvaluationConfig
    rounds: int = Field(2, ge=1)
    round: RoundConfig
    stop: StopConfig = StopConfig()
    reference: Literal["initial", "last_round"] = Field(
        "last_round",
        description="what a round's log-probabilities are held against: the run's first policy, or its own",
    )
    loss: LossConfig = LossConfig()
    batch_size: int = Field(8, ge=1)
    training: TrainingConfig
    lora: LoRAConfig | None = Field(None, description="train an adapter each round and go on from the merged model")
    accelerate: Path | None = Field(
        None, description="launcher config of the training ranks; default: this process's kind"
    )

    @model_validator(mode="after")
    def _a_model_to_sample_from(self) -> Self:
        if self.lora is not None and not self.lora.merge:
            raise ValueError("lora.merge: the engine samples from the merged model, so it has to be true")
        if self.engine.adapters:
            raise ValueError("engine.adapters: a policy whose weights change has none; merge the adapter first")
        return self
