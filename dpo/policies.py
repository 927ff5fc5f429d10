"""The engine of online training: one for all rounds, with the weights asked for, and believed only once it shows them.

Sampling and training take turns. On CPU, on servers and on Ray the engine stays. In this process on a GPU it is closed
before a training begins, which takes the same devices, and started with the new weights after it. To sample and train
on devices of their own, serve the policy elsewhere and name it in `engine.endpoints`.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from alignment import chat, models
from alignment.closing import Closing
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.fingerprint import weights_hash
from alignment.rollout import open_engine
from alignment.rollout.seeds import sample_seed
from alignment.rows import Row
from dpo.config import OnlineConfig
from dpo.likelihood import Answer, gap_per_token

PROBES = 8  # prompts that a policy answers before it is believed
# Mean |difference| a token that is taken for rounding. On the demo's models engine and transformers differ by 7e-8 and
# 1e-3, and weights of another round by 0.06; larger models in bfloat16 round more.
LIMITS = {"float32": 1e-4, "bfloat16": 0.02}
# How many times better the former weights have to fit for the new ones to be disbelieved within that limit, which lets
# a small change of weights through. Weights that hardly changed fit equally well.
CLEARLY = 2


class Policies(Closing):
    """The engine, started when it is first needed, with the weights that were last asked for.

    `gap` is what the last load showed: mean |difference| of log-probabilities a token to transformers, in nats.
    """

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config
        self.engine: Any = None
        self.gap = 0.0
        self._model: Path | None = None

    def engine_with(self, model: Path, prompts: Sequence[Row]) -> Any:
        """The engine with the weights of `model`. Where it held others it first answers some of `prompts`.

        Raises:
            RuntimeError: its log-probabilities of these answers are not the model's, or fit the former model's better:
                it serves other weights.
        """
        former = self._model
        if self.engine is None:
            former, self.engine = None, self._open(model)
        elif self.engine.weights != weights_hash(model):
            self.engine.load_weights(model)
        else:
            return self.engine
        self._model = model
        self._check(model, former, self._answers(model, prompts))
        return self.engine

    def _check(self, model: Path, former: Path | None, answers: Sequence[Answer]) -> None:
        dtype = self.config.dtype
        self.gap = gap_per_token(answers, model, dtype)
        limit = self.config.round.logprob_gate or LIMITS[dtype]
        if not self.gap <= limit:
            raise RuntimeError(
                f"{model}: the engine's answers differ from transformers' log-probabilities by {self.gap:.2g} a token, "
                f"expected at most {limit:.2g} (round.logprob_gate): the engine does not serve these weights"
            )
        if former is not None and CLEARLY * (before := gap_per_token(answers, former, dtype)) < self.gap:
            raise RuntimeError(
                f"{model}: the engine's answers differ from transformers' log-probabilities by {self.gap:.2g} a token, "
                f"from those of {former} by {before:.2g}: the engine does not serve these weights, but the former ones"
            )

    def release(self) -> None:
        """Give the devices to the training that follows, where it takes the same."""
        elsewhere = self.config.engine.endpoints or self.config.engine.ray_replicas
        if torch.cuda.is_available() and not elsewhere:
            self.close()

    def close(self) -> None:
        """Closing twice does nothing."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def _open(self, model: Path) -> Any:
        if not self.config.engine.endpoints:
            return open_engine(model, self.config.engine, self.config.dtype)
        from alignment.rollout.endpoints import EndpointEngine

        # Servers outlive a run that was killed: they may still have the weights of another round.
        return EndpointEngine(model, self.config.engine, dtype=self.config.dtype, reload=True)

    def _answers(self, model: Path, prompts: Sequence[Row]) -> list[Answer]:
        tokenizer = models.load_tokenizer(ModelConfig(path=str(model)))
        room = self.config.engine.max_model_len - self.config.sampling.max_tokens
        rendered = (
            (row["id"], chat.render_prompt(tokenizer, row["prompt"], **chat.template_options(row))) for row in prompts
        )
        probes = dict(islice(((name, ids) for name, ids in rendered if len(ids) <= room), PROBES))
        if not probes:
            raise UserError(
                f"no prompt fits: all have more than {room} tokens (engine.max_model_len - sampling.max_tokens)"
            )
        seeds = [[sample_seed(self.config.seed, f"gate/{name}", 0)] for name in probes]
        stop = [chat.stop_token_id(tokenizer)]
        samples = self.engine.generate(list(probes.values()), seeds, self.config.sampling, stop)
        return [Answer(ids, s.token_ids, s.logprob) for ids, [s] in zip(probes.values(), samples, strict=True)]
