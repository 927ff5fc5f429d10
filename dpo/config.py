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
    mix: float = Field(1.0, ge=0, le=1, description="0: weights of one (plain DPO), 1: transport's weights")
    cost_norm: Literal["max", "none"] = Field("max", description="what a pair's distances are divided by")


class LossConfig(Config):
    """The preference loss."""

    type: str = Field("ot_dpo", description="ot_dpo, dpo, or a loss of TRL's DPOTrainer")
    beta: float = Field(0.1, gt=0)
    nll_weight: float = Field(0.0, ge=0, description="weight of the chosen answers' negative log-likelihood")
    transport: TransportConfig = TransportConfig()


class DPOConfig(JobConfig):
    """Offline preference training on pairs."""

    model: ModelConfig
    rows: str = Field(description="a file, a folder or a hub id of rows with `prompt`, `chosen` and `rejected`")
    loss: LossConfig = LossConfig()
    batch_size: int = Field(8, ge=1, description="pairs a rank holds in one micro-batch")
    max_length: int = Field(1024, ge=16, description="longer pairs are dropped and counted")
    training: TrainingConfig


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
        return self
